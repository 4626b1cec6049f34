"""The emoji: their shard is made from the package as its docstring says, and the study goes from it to its figure."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from asymflow.data.shards import TarShards
from toy import emoji64, make_emoji64


def png(color, alpha=255, size=64):
    image = Image.new("RGBA", (size, size), (*color, alpha))
    image.paste((0, 0, 0, 0), (0, 0, 8, 8))  # transparent
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def entry(code, category, name, **more):
    return {"unified": code, "image": f"{code.lower()}.png", "category": category, "name": name, **more} | {
        "has_img_google": True
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A small package of the same layout: two categories, skin tones, an emoji without an image, a component."""
    tones = {
        "1F3FB-1F3FF": {"image": "a-1f3fb-1f3ff.png", "has_img_google": True},
        "1F3FB": {"image": "a-1f3fb.png", "has_img_google": True},
        "1F3FC": {"image": "a-1f3fc.png", "has_img_google": False},
    }
    emoji = [entry(f"B{i:03}", "Symbols", f"SIGN {i}") for i in reversed(range(99))]
    emoji += [
        entry("A", "Animals & Nature", "WAVING CAT", skin_variations=tones),
        entry("C", "Component", "TONE"),
        {**entry("D", "Symbols", "NONE"), "has_img_google": False},
    ]
    path = tmp_path_factory.mktemp("package") / "package.tgz"
    with tarfile.open(path, "w:gz") as tar:
        images = {e["image"]: png((i, 2 * i % 256, 90)) for i, e in enumerate(emoji)}
        images |= {"a-1f3fb.png": png((200, 0, 0)), "a-1f3fb-1f3ff.png": png((0, 200, 0), alpha=128)}
        contents = {f"img/google/64/{name}": content for name, content in images.items()}
        for name, content in {"emoji.json": json.dumps(emoji).encode(), **contents}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def shard(package):
    assert make_emoji64.main([str(package), str(package.parent / "emoji64.tar")]) == 0
    return package.parent / "emoji64.tar"


def test_the_shard_has_the_images_on_white_with_class_and_caption(shard):
    dataset = TarShards(shard, 64)
    assert len(dataset) == 102
    first = [dataset[i] for i in range(4)]
    captions = ["waving cat", "waving cat, light skin tone", "waving cat, light skin tone, dark skin tone", "sign 0"]
    assert [s.caption for s in first] == captions
    assert [s.label for s in first] == [0, 0, 0, 1]
    assert all((s.image[:, :8, :8] == 255).all() for s in first)
    assert first[1].image[:, 20, 20].tolist() == [200, 0, 0]
    assert np.allclose(first[2].image[:, 20, 20], [127, 227, 127], atol=1)  # half transparent


def test_equal_packages_make_equal_bytes_and_nothing_is_overwritten(package, shard, tmp_path, capsys):
    assert make_emoji64.main([str(package), str(tmp_path / "again.tar")]) == 0
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()
    (tmp_path / "mine.tar").write_text("mine")
    (tmp_path / "text").write_text("text")
    capsys.readouterr()
    for arguments in ([package, tmp_path / "mine.tar"], [tmp_path / "text", tmp_path / "x"], [shard, tmp_path / "x"]):
        assert make_emoji64.main([str(a) for a in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("toy.make_emoji64: error: ")
    assert (tmp_path / "mine.tar").read_text() == "mine"
    assert not (tmp_path / "x").exists()


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(0.99999)
def test_a_package_that_is_cut_off_is_one_line_or_no_loss(package, shard, tmp_path, capsys, share):
    content = package.read_bytes()
    (tmp_path / "cut.tgz").write_bytes(content[: int(share * len(content))])
    made = tmp_path / "x"
    made.unlink(missing_ok=True)
    capsys.readouterr()
    if make_emoji64.main([str(tmp_path / "cut.tgz"), str(made)]) == 0:  # only a checksum behind all files is missing
        assert made.read_bytes() == shard.read_bytes()
        return
    (line,) = [part for part in capsys.readouterr().err.splitlines() if not part.startswith("\r")]
    assert line.startswith(f"toy.make_emoji64: error: {tmp_path / 'cut.tgz'} is not the package")
    assert not made.exists()


@pytest.mark.slow
def test_the_study_goes_from_the_shard_to_its_figure(shard, tmp_path, monkeypatch, capsys):
    options = "{width: 32, depth: 2, heads: 2, bottleneck: 16, in_context_start: 1, in_context_tokens: 2}"
    small = [
        f"model.options={options}",
        "train.global_batch_size=4",
        "data.workers=0",
        "sample.num=2",
        "ema.decays=[0]",
        "data.fewer_classes=true",
    ]
    argv = ["--data", str(shard), "--out", str(tmp_path / "out"), "--ranks", "8", "--seeds", "0", "--steps", "2"]
    argv += ["--samples", "6", "--epochs", "2", *(f"--set={setting}" for setting in small)]
    monkeypatch.setattr(emoji64, "generate", lambda *a, **k: emoji64.torch.zeros(36, 3, 64, 64))  # minutes otherwise
    assert emoji64.main(argv) == 0
    results = json.loads((tmp_path / "out" / "emoji64.json").read_text())
    assert [row["rank"] for row in results["table"]] == ["8"]
    assert all(len(run["loss"]) == 2 and run["frechet_distance"] > results["floor"] for run in results["runs"])
    assert np.asarray(Image.open(tmp_path / "out" / "emoji64.png").convert("L")).std() > 10
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert emoji64.main(argv) == 0  # it takes up what is there
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((tmp_path / "out" / "emoji64.json").read_text()) == results
    assert json.loads((tmp_path / "out" / "emoji64.1.json").read_text()) == results  # of the first time
    assert emoji64.main(["--data", str(tmp_path / "missing.tar")]) == 2
    capsys.readouterr()
    (line,) = (tmp_path / "out/rank-8-seed-0/evaluations.jsonl").read_text().splitlines()
    entry = json.loads(line)
    other = entry | {"frechet_distance": 0.0, "evaluate": entry["evaluate"] | {"num": 5}}
    with (tmp_path / "out/rank-8-seed-0/evaluations.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    assert emoji64.main(argv) == 0  # that of other settings is not taken
    assert json.loads((tmp_path / "out" / "emoji64.json").read_text()) == results
    for other, said in ((["--epochs", "3"], "of other epochs"), (["--steps", "1"], "another --out")):
        assert emoji64.main([*argv, *other]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_too_few_images_for_a_classifier_are_one_line(package, tmp_path, capsys):
    shard = tmp_path / "few.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(78):
            for name, content in ((f"{i:02}.png", png((i, 0, 0))), (f"{i:02}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert emoji64.main(["--data", str(shard), "--out", str(tmp_path / "out")]) == 2
    assert "78 images are too few to train a classifier with" in capsys.readouterr().err.splitlines()[-1]
