"""Folders of images that are scored, or that samples are held against."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from test_cli_sample import save_model
from test_evaluate import pictures

from asymflow.cli import main
from asymflow.cli.card import table as card_table
from asymflow.cli.evaluate_report import comparable, table
from asymflow.errors import InputError
from asymflow.evaluation import result
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.images import Folder
from asymflow.evaluation.reference import Opened


@pytest.mark.parametrize("name", ["data", "shapes", "adm-imagenet"])
def test_a_folder_called_as_a_reference_is_another_one(tmp_path, monkeypatch, name):
    pictures(tmp_path / name, 5)
    monkeypatch.chdir(tmp_path)
    assert len(Opened(f"./{name}", (16, 16), None, 32).source) == 5
    with pytest.raises(InputError) if name == "adm-imagenet" else nullcontext():
        assert len(Opened(name, (16, 16), None, 32, data=Folder(pictures(tmp_path / "one", 7))).source) != 5


def test_what_lies_beside_samples_is_none_of_them(tmp_path):
    """`asymflow sample` writes OUT/images, OUT/grid.png and OUT/samples.json."""
    names = [f"images/{path.name}" for path in sorted(pictures(tmp_path / "images", 4).iterdir())]
    images = [{"file": name, "class": 0} for name in names]
    (tmp_path / "samples.json").write_text(json.dumps({"settings": {"seed": 0}, "images": images}))
    assert Folder(tmp_path / "images").settings == Folder(tmp_path).settings == {"seed": 0}
    pictures(tmp_path / "real", 3)
    assert Folder(tmp_path / "real").settings is None
    shutil.rmtree(tmp_path / "real")
    Image.new("RGB", (16, 16)).save(tmp_path / "grid.png")
    with pytest.raises(InputError, match=rf"did not draw, such as grid\.png: .* alone, {tmp_path}/images"):
        Folder(tmp_path)
    (tmp_path / names[2]).unlink()
    with pytest.raises(InputError, match="lists 4 images, of which 3 are there"):
        Folder(tmp_path / "images")


def test_a_folder_that_is_still_being_written_is_noticed(tmp_path):
    folder = Folder(pictures(tmp_path / "images", 10))
    folder.read(0, 5)
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "new.png")
    with pytest.raises(ValueError, match="still being written: it had 10 images, and has 11 now"):
        folder.read(5, 10)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("evaluate --images one", ("result.json", "grid.png")),
        ("evaluate --images one --save-npz out/mine.npz", ("mine.npz",)),
        ("evaluate search --model model --ema 0.9 --guidance 1,2", ("search.json", "search.csv", "search.png")),
    ],
)
def test_what_another_has_put_there_is_not_overwritten(tmp_path, monkeypatch, capsys, command, names):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "one", 3)
    for name in names:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        words = [*command.split(), "--reference", "one", "--extractor", "classifier", "--weights", "x", "--out", "out"]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert name in error
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
        assert (tmp_path / "out" / name).read_text() == "mine"
        shutil.rmtree(tmp_path / "out")


SETTINGS = {"seed": 0, "steps": 50, "method": "heun", "shift": 1.0, "precision": "float32", "classes": "all"}
SETTINGS |= {"step": 7, "average": "0.99", "guidance": 1.5, "interval": [0.0, 0.9], "orthogonal": 0.0, "clamp": False}


def recorded(folder, settings):
    """Images and a record, as `asymflow sample` leaves them."""
    images = sorted(pictures(folder / "images", 12).iterdir())
    entries = [{"file": f"images/{path.name}", "class": 0} for path in images]
    (folder / "samples.json").write_text(json.dumps({"settings": settings, "images": entries}))
    return folder / "images"


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Options: what images are held against, in which features."""
    folder = tmp_path_factory.mktemp("held")
    torch.manual_seed(0)
    Classifier(10, width=8).save(folder / "classifier.safetensors")
    pictures(folder / "other", 40, seed=1, shift=0.3)
    options = {"--reference": folder / "other", "--extractor": "classifier", "--device": "cpu"}
    return options | {"--weights": folder / "classifier.safetensors"}


def evaluate(held, out, images, *more, of="--images"):
    words = {of: images, "--protocol": "adm", "--out": out, **held, **dict(zip(more[::2], more[1::2], strict=True))}
    return main(["evaluate", *(str(word) for pair in words.items() for word in pair)])


def result_of(held, out, *words, **options):
    assert evaluate(held, out, *words, **options) == 0
    return result.read(out)


def test_samples_are_in_one_table_with_those_that_are_drawn_alike(held, tmp_path):
    model = save_model(tmp_path / "model")
    words = ["--model", model, "--steps", 2, "--num", 12, "--guidance", 1.5, "--interval", "0,0.9"]
    assert main(["sample", *map(str, words), "--device", "cpu", "--out", str(tmp_path / "samples")]) == 0
    drawn = result_of(held, tmp_path / "drawn", *words[1:], of="--model")
    read = result_of(held, tmp_path / "read", tmp_path / "samples" / "images")
    assert read["protocol"]["name"] == "adm, extractor classifier, num 12, steps 2"
    assert comparable(read) == comparable(drawn)
    for name in ("guidance", "interval", "orthogonal"):
        assert read["scored"][name] == drawn["scored"][name]


@pytest.mark.parametrize(("section", "key"), [("flow", "noise_scale"), ("network", "in_context_start")])
def test_another_configuration_of_the_same_weights_is_another_model(held, tmp_path, capsys, section, key):
    model, out = save_model(tmp_path / "model"), str(tmp_path / "samples")
    sample = ["sample", "--model", str(model), "--steps", "1", "--num", "3", "--device", "cpu", "--out", out]
    assert main(sample) == 0
    words = [model, "--steps", 1, "--num", 6]
    about = result_of(held, tmp_path / "out", *words, of="--model")["scored"]
    assert (about["sigma_min"], about["noise_scale"]) == (0.04, 1.0)
    config = json.loads((model / "config.json").read_text())
    of_key = config[section].get("config", config[section])
    of_key[key] += 1
    (model / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(sample) == 2
    assert "config_sha256 " in capsys.readouterr().err
    assert evaluate(held, tmp_path / "out", *words, of="--model") == 2
    assert "holds features of something else (scored " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"steps": 10}, ", steps 10"),
        ({"method": "euler", "shift": 2.0}, ", method euler, shift 2.0"),
        ({"seed": 3}, ", seed 3"),
        ({"precision": "bf16"}, ", precision bf16"),
        ({"guidance": 3.0}, ""),
        ({"classes": [1, 5]}, ""),
        ({"clamp": True}, ""),
    ],
)
def test_how_samples_were_drawn_is_in_the_name_of_the_protocol_or_beside_it(held, tmp_path, changed, said):
    usual = result_of(held, tmp_path / "usual", recorded(tmp_path / "a", SETTINGS))
    other = result_of(held, tmp_path / "out", recorded(tmp_path / "b", SETTINGS | changed))
    assert other["protocol"]["name"] == f"adm, extractor classifier, num 12{said}"
    for name in ("step", "average", "guidance", "interval", "orthogonal"):
        assert other["scored"][name] == (SETTINGS | changed)[name]
    assert (f"guidance {other['scored']['guidance']}") in card_table(other)
    is_other = changed.keys() & {"steps", "method", "seed", "precision", "classes", "clamp"}
    assert (comparable(other) != comparable(usual)) == bool(is_other)
    assert bool(other["remarks"]) == bool(changed.keys() & {"classes", "clamp"})


@pytest.mark.parametrize("settings", [{}, [], SETTINGS | {"steps": "many"}, SETTINGS | {"interval": 0.9}])
def test_images_of_unknown_origin_are_in_no_table_with_drawn_ones(held, tmp_path, settings):
    known = result_of(held, tmp_path / "known", recorded(tmp_path / "a", SETTINGS))
    unknown = result_of(held, tmp_path / "unknown", recorded(tmp_path / "b", settings))
    assert unknown["remarks"] == ["how these images were drawn is not known"]
    assert comparable(known) != comparable(unknown)
    for said in (table([unknown]).splitlines()[0], card_table(unknown)):
        assert "how these images were drawn is not known" in said
