"""Data and configurations with any damage are read or refused in one line."""

import pytest
import yaml
from fuzzing import COUNTS, fuzz
from image_data import pixels, png, write_tar

from asymflow.data.folder import ImageFolder
from asymflow.data.pack import pack_folder
from asymflow.data.shards import TarShards
from asymflow.entries import UnreadableError
from asymflow.errors import InputError
from asymflow.training.config.reading import load_config


def make_folder(folder):
    for i, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(png(pixels(i)))
        (folder / name / "a.txt").write_text(f"a {name}\n")


def make_packed(folder):
    (images := folder.parent / "images").mkdir()
    make_folder(images)
    pack_folder(ImageFolder(images, 8), folder, 1, "png", 1)


def make_tar(folder):
    contents = [
        (f"{i}.{kind}", c) for i in range(3) for kind, c in (("png", png(pixels(i))), ("cls", b"1"), ("txt", b"a"))
    ]
    write_tar(folder / "a.tar", contents)


def read_all(images):
    problems = 0
    for index in range(len(images)):
        try:
            images[index]
        except UnreadableError:
            problems += 1
    if problems:
        raise InputError(f"{images.path}: {problems} cannot be read")


def make_configuration(folder):
    (folder / "a.yaml").write_text(yaml.safe_dump(load_config("shapes_tiny").model_dump(mode="json")))
    (folder / "b.yaml").write_text("base: a.yaml\ntrain: {steps: 3}\n")


READERS = {
    "folder": (make_folder, lambda d: read_all(ImageFolder(d, 8))),
    "packed": (make_packed, lambda d: read_all(TarShards(d, 8))),
    "tar": (make_tar, lambda d: read_all(TarShards(d / "a.tar", 8))),
    "configuration": (make_configuration, lambda d: load_config(str(d / "b.yaml"))),
}


@COUNTS
@pytest.mark.parametrize("reader", READERS)
def test_damaged_data_is_read_or_refused_in_one_line(reader, count, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make, read = READERS[reader]
    (folder := tmp_path / reader).mkdir()
    make(folder)
    fuzz(folder, read, count)
