"""Folders of images that are scored, or that samples are held against."""

import json
import shutil
from contextlib import nullcontext

import pytest
from PIL import Image
from test_evaluate import pictures

from asymflow.cli import main
from asymflow.errors import InputError
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
