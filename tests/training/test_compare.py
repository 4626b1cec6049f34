"""`asymflow compare`: three trainings that differ in the rank alone, from a folder of images to a figure."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_data import pixels, png
from PIL import Image
from processes import ROOT, TINY, wait_for

from asymflow.cli import main, make_parser
from asymflow.cli.compare import BASE, RECORD, begin, hold_out, open_folder, prepare, settings
from asymflow.cli.compare_report import FEATURES, frechet, real_images, remarks, smooth
from asymflow.data.shards import TarShards
from asymflow.errors import InputError
from asymflow.training.config.reading import load_config
from asymflow.training.evaluate import protocol_of, settings_of
from asymflow.training.run.folder import EVALUATIONS


def write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(pixels(i)))
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", [f"{name}/{i}.png" for name in ("cat", "dog", "owl") for i in range(7)])


def parsed(data, out, *more):
    return make_parser("compare").parse_args(["compare", "--data", str(data), "--out", str(out), *more])


# ---- What is compared ------------------------------------------------------------------------------------------------
@given(
    size=st.sampled_from([16, 32, 64]),
    model=st.sampled_from(["tiny/4", "S/8", "B/16"]),
    steps=st.integers(1, 10**6),
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 50),
    more=st.sampled_from([[], ["train.precision=bf16"], ["optimizer.lr=3e-5", "data.flip=true"]]),
)
def test_the_trainings_differ_in_the_rank_alone(size, model, steps, seed, classes, more):
    args = Namespace(out=Path("a: {b}, #é"), size=size, model=model, steps=steps, seed=seed, set=more)
    folder = type("folder", (), {"num_classes": classes, "__len__": lambda self: 100})()
    configs = [load_config(BASE, settings(args, rank, folder)).model_dump() for rank in (7, 0, "full")]
    assert [config["subspace"].pop("rank") for config in configs] == [7, 0, "full"]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["data"]["path"] == str(args.out / "images/train")
    assert (configs[0]["train"]["steps"], configs[0]["model"]["num_classes"]) == (steps, classes)


@given(st.lists(st.integers(0, 5), max_size=300), st.integers(0, 9))
def test_one_in_ten_is_held_out_but_never_the_last_of_a_class(labels, seed):
    held_out = hold_out(labels, seed)
    assert held_out == hold_out(labels, seed)
    assert len({*held_out}) == len(held_out) <= len(labels) / 10
    rest = Counter(labels) - Counter(labels[i] for i in held_out)
    assert rest.keys() == {*labels}
    if labels and min(Counter(labels).values()) > len(labels) / 10:
        assert len(held_out) == len(labels) // 10


@pytest.mark.parametrize("classes", [["cat", "dog"], [""]])
def test_all_images_are_used_once(tmp_path, classes):
    """In folders of classes, and without; what is damaged is left out and named."""
    names = [f"{name}/{i}.png".strip("/") for name in classes for i in range(15)]
    data = write_images(tmp_path / "photos", names)
    (data / names[0]).write_bytes(b"no image")
    args = parsed(data, tmp_path / "out", "--size", "8")
    left_out = prepare(args, open_folder(data, 8))
    assert [names[0] in problem for problem in left_out] == [True]
    parts = [TarShards(tmp_path / "out/images" / name, 8) for name in ("train", "held_out")]
    assert [part.classes for part in parts] == [[name or "photos" for name in classes]] * 2
    found = sorted((part.label(i), part[i].image.numpy().tobytes()) for part in parts for i in range(len(part)))
    image = lambda i: pixels(i).transpose(2, 0, 1).tobytes()
    assert found == sorted((classes.index(Path(names[i]).parent.name), image(i)) for i in range(1, len(names)))


# ---- Mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", "60"], "--size 60"),
        (["--rank", "192"], "below 192"),
        (["--model", "tiny"], "--model"),
        (["--set", "subspace.rank=4"], "--rank"),
        (["--set", "model.backbone=a:B"], "model.backbone"),
        (["--set", "finetune.base=a"], "finetune.base"),
        (["--set", "subspace={rank: 4}"], "subspace.rank: use --rank"),
        (["--set", "train={seed: 9}"], "train.seed: use --seed"),
        (["--set", "data={options: {crop: 8}}"], "data.options: compare decides"),
        (["--set", "data.options.crop=8"], "data.options.crop: compare decides"),
        (["--set", "train.stepz=4"], "train.steps"),
        (["--set", "sample.every=null"], "sample.every"),
        (["--set", "loss.objective=mine:Loss"], "loss.objective: compare decides"),
        (["--set", "evaluate={every: 1000, measures: [kid]}"], "the figure shows frechet_distance"),
        (["--data", "photos/cat/missing"], "photos/cat/missing"),
        (["--data", "empty"], "empty"),
        (["--data", "one"], "one image"),
        (["--data", "split"], "train"),
        (["--out", "photos/out"], "inside of --data"),
        (["--out", "photos"], "photos"),
        (["--out", "taken"], "taken"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(photos, tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_images(Path("one"), ["a.png"])
    write_images(Path("split"), ["train/cat/a.png", "val/cat/a.png"])
    write_images(Path("taken"), ["a.txt"])
    before = sorted(tmp_path.rglob("*"))
    options = {"--data": "photos", "--out": "out"} | dict([words])
    assert main(["compare", *chain.from_iterable(options.items())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asymflow compare: error: ")
    assert named in line
    assert sorted(tmp_path.rglob("*")) == before


def test_other_settings_or_images_are_refused_where_it_was_begun(photos, tmp_path):
    out = tmp_path / "out"
    now = lambda *words: begin(parsed(photos, out, *words), open_folder(photos, 64))
    now()
    kept = (out / RECORD).read_bytes()
    now()
    for words, named in ((["--steps", "7"], "--steps was 1000, and is 7"), (["--set", "data.flip=true"], "--set was")):
        with pytest.raises(InputError, match=named):
            now(*words)
    (photos / "cat/0.png").rename(photos / "dog/9.png")
    with pytest.raises(InputError, match="other images"):
        now()
    assert (out / RECORD).read_bytes() == kept


# ---- The report ------------------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=300))
def test_a_smooth_curve_ends_at_the_last_step_and_stays_within_the_losses(losses):
    steps, curve = smooth([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    assert len(steps) == len(curve)
    assert steps[-1] == len(losses)
    assert min(losses) <= curve.min() * (1 + 1e-12)
    assert curve.max() <= max(losses) * (1 + 1e-12)


@given(st.integers(1, 10**5), st.integers(2, 10**5), st.sampled_from([*FEATURES]), st.sampled_from([None, 3.5]))
def test_a_distance_of_fewer_images_or_samples_than_features_says_nothing(images, num, extractor, distance):
    words = [f"evaluate.num={num}", f"evaluate.extractor={extractor}", "evaluate.weights=file"]
    told = remarks(load_config(BASE, words), images, 0, [], [{"frechet_distance": distance}])[-1]
    fewest = images if distance is None else min(images, num)
    assert ("nothing" in told) == (fewest < FEATURES[extractor])
    assert ("not measured" in told) == (distance is None)


def test_the_distance_is_that_of_the_settings_asked_for(tmp_path, capsys):
    """Somebody may have evaluated the finished run again, with train_ddp.py and other settings."""
    config = load_config(BASE, ["evaluate.num=100"])
    others = ["sample.guidance=3"], ["sample.steps=9"], ["evaluate.num=50"]
    asked, *others = (settings_of(c, protocol_of(c)) for c in (config, *(load_config(BASE, more) for more in others)))
    measured = [{"step": config.train.steps, "frechet_distance": i, **each} for i, each in enumerate([asked, *others])]
    measured += [{"step": 1, "frechet_distance": 9, **asked}, {"step": config.train.steps, "frechet_distance": 9}]
    path = tmp_path / EVALUATIONS
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in measured) + '{"step": tr\n')
    assert frechet(tmp_path, config) == 0
    assert capsys.readouterr().err == f"{path}: 1 of 7 lines cannot be read, and are left out\n"
    assert frechet(tmp_path, load_config(BASE, ["evaluate.num=101"])) is None


def test_the_images_beside_the_samples_are_of_the_same_classes(photos, tmp_path):
    for i, name in enumerate(("cat", "dog", "owl")):  # of one grey for each class
        for file in (photos / name).iterdir():
            file.write_bytes(png(np.full((8, 8, 3), 50 * i, np.uint8)))
    prepare(parsed(photos, tmp_path / "out", "--size", "8"), open_folder(photos, 8))
    grid = real_images(TarShards(tmp_path / "out/images/train", 8), 6, 4)  # class 3 has no image: white
    assert [int(grid[y, x, 0]) for y in (4, 14) for x in (4, 14, 24)] == [0, 50, 100, 255, 0, 50]


# ---- From first to last ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_goes_from_a_folder_to_a_figure_and_goes_on_where_it_was_stopped(photos, tmp_path, in_the_foreground):
    out = tmp_path / "out"
    small = [word for word in TINY if word.startswith(("model.options", "ema."))]
    options = ["--size", "16", "--model", "tiny/8", "--rank", "3", "--steps", "30", "--data", str(photos)]
    options += [
        "--out",
        str(out),
        *(f"--set={word}" for word in [*small, "train.global_batch_size=4", "sample.steps=2"]),
    ]
    start = lambda: subprocess.Popen(
        [sys.executable, "-m", "asymflow", "compare", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = lambda name: [
        json.loads(line)["step"]
        for line in ((out / name / "metrics.jsonl").read_bytes().splitlines() if (out / name).exists() else ())
    ]
    stopped = start()
    wait_for(lambda: (out / "x0/metrics.jsonl").exists() and len(steps("x0")) > 3)
    stopped.send_signal(signal.SIGINT)
    assert "interrupted" in stopped.communicate()[1]
    assert stopped.returncode == 130
    saved = steps("x0")
    assert saved == list(range(1, len(saved) + 1))
    assert (out / f"x0/checkpoints/{len(saved):08d}").exists()  # it was asked to save, and lost no step
    done = (out / "asymmetric/metrics.jsonl").read_bytes()
    again = start()
    said = again.communicate()[1]
    assert again.returncode == 0, said
    assert f"continuing from {out}/x0/checkpoints/{len(saved):08d}" in said
    assert [steps(name) for name in ("asymmetric", "x0", "u")] == [list(range(1, 31))] * 3
    assert (out / "asymmetric/metrics.jsonl").read_bytes() == done
    record = json.loads((out / RECORD).read_text())
    assert [row["rank"] for row in record["results"]] == [3, 0, "full"]
    assert all(0 < row["held_out_loss"] < 100 and row["seconds"] > 0 for row in record["results"])
    assert record["images_trained_on"] + record["images_held_out"] == 21
    assert np.asarray(Image.open(out / "compare.png").convert("L")).std() > 10
    assert main(["compare", *options, "--seed", "1"]) == 2
    drawn = ["--classes", "owl", "--num", "2", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "samples")]
    assert main(["sample", "--model", str(out / "asymmetric"), *drawn]) == 0
    assert len(list((tmp_path / "samples/images").iterdir())) == 2
