"""`asymflow data pack`: the shards hold what the folder holds, always the same bytes, and nothing is done twice."""

import json
import multiprocessing
import os
import re
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from asymflow import files
from asymflow.cli import main
from asymflow.data import writing
from asymflow.data.folder import ImageFolder
from asymflow.data.shards import TarShards, index_path
from asymflow.errors import InputError

CLASSES = "110 images of 3 classes: x, y, z"


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns (exit code, stdout, stderr without progress bars and the classes)."""

    def run(*argv):
        try:
            options = dict(zip(argv[::2], argv[1::2], strict=True))  # a test may replace some of `arguments`
            code = main(["data", "pack", *map(str, chain.from_iterable(options.items()))])
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        err = [line.rpartition("\r")[2] for line in text.err.split("\n")]  # a terminal shows no more
        return code, text.out, "\n".join(line for line in err if line.strip() and line != CLASSES)

    return run


@pytest.fixture
def folder(tmp_path):
    """110 images of 20 x 14 pixels in three classes, one of them with a caption."""
    root = tmp_path / "images"
    g = np.random.default_rng(0)
    for i in range(110):
        path = root / "xyz"[i % 3] / f"{i}.v1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (14, 20, 3), dtype=np.uint8)).save(path)
    (root / "y/1.v1.txt").write_text("a würfel\n", encoding="utf-8")
    return root


@pytest.fixture
def arguments(folder, tmp_path):
    return ["--data", folder, "--out", tmp_path / "packed", "--size", 8, "--per-shard", 40, "--workers", 2]


def content(out):
    """Every file, hidden ones too, but the lock, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock0"}


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_shards_hold_the_pixels_classes_and_captions_of_the_folder(run, arguments, folder, tmp_path, kind):
    code, out, err = run(*arguments, "--format", kind)
    assert (code, err) == (0, "")
    assert "110 images of 3 classes" in out
    packed, originals = TarShards(tmp_path / "packed", 8), ImageFolder(folder, 8)
    assert len(packed) == 110
    numbers = []
    for i in range(110):
        sample = packed[i]
        number = int(re.fullmatch(rf".*: (\d{{8}})\.{kind}", sample.name)[1])
        original = originals[number]
        assert torch.equal(sample.image, original.image)
        assert (sample.label, sample.caption) == (original.label, original.caption)
        numbers.append(number)
    assert sorted(numbers) == list(range(110))
    assert sum(packed[i].caption == "a würfel" for i in range(110)) == 1
    assert all(set(packed.labels[k : k + 40]) == {0, 1, 2} for k in (0, 40, 80))  # a fair sample in each shard
    meta = json.loads((tmp_path / "packed/meta.json").read_text())
    expected = {"files": 110, "images": 110, "unreadable": 0, "shards": 3, "size": 8, "classes": ["x", "y", "z"]}
    assert expected.items() <= meta.items()


def test_shards_are_plain_tar_files_of_webdataset(run, arguments, tmp_path):
    run(*arguments)
    assert sorted(path.name for path in (tmp_path / "packed").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    for shard in (tmp_path / "packed").glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        keys = [member.name.split(".")[0] for member in members]
        assert sorted(set(keys), key=keys.index) == list(dict.fromkeys(keys))
        together = [a for a, b in zip(keys, [None, *keys], strict=False) if a != b]
        assert len(together) == len(set(keys))  # the files of a sample follow each other
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        index_path(shard).unlink()
    assert len(TarShards(tmp_path / "packed", 8)) == 110  # by the headers alone


def test_jpeg_is_close(run, arguments, folder, tmp_path):
    smooth = np.add.outer(np.arange(14) * 9, np.arange(20) * 5)[..., None].repeat(3, -1).astype(np.uint8)
    for path in folder.rglob("*.png"):
        Image.fromarray(smooth).save(path)
    run(*arguments, "--format", "jpg")
    packed, original = TarShards(tmp_path / "packed", 8)[0], ImageFolder(folder, 8)[0]
    assert packed.name.endswith(".jpg")
    assert (packed.image.int() - original.image.int()).abs().max() < 8


def test_the_same_images_make_the_same_bytes(run, arguments, tmp_path):
    run(*arguments)
    run(*arguments, "--out", tmp_path / "again", "--workers", 5)
    assert content(tmp_path / "packed") == content(tmp_path / "again")


@pytest.mark.parametrize("stop", [0, 39, 40, 85])
def test_an_interrupted_command_goes_on(run, arguments, tmp_path, monkeypatch, stop):
    run(*arguments, "--out", tmp_path / "straight")
    out = tmp_path / "packed"
    encoded = []

    def interrupted(tar, name, data):
        encoded.extend([name] if name.endswith(".png") else [])
        if len(encoded) > stop:
            raise KeyboardInterrupt
        return add(tar, name, data)

    add = writing.add
    with monkeypatch.context() as m:
        m.setattr(writing, "add", interrupted)
        assert run(*arguments)[0] == 130
    assert [path.name for path in out.glob(".*")] == [".lock0"]
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(finished) == stop // 40
    with pytest.raises(InputError, match="is not finished: run its `asymflow data pack` again"):
        TarShards(out, 8)
    (out / ".00001.deadbeef.tar").write_bytes(b"of a process that was killed")
    assert run(*arguments)[0] == 0
    assert content(out) == content(tmp_path / "straight")
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    monkeypatch.setattr(writing.Writer, "write", None)  # nothing is left to do
    assert run(*arguments)[0] == 0
    assert content(out) == content(tmp_path / "straight")


def test_while_no_shard_is_made_the_settings_may_change(run, arguments, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(writing, "add", interrupted)
        assert run(*arguments, "--format", "webp")[0] == 130
    assert run(*arguments)[0] == run(*arguments, "--out", tmp_path / "straight")[0] == 0
    assert content(tmp_path / "packed") == content(tmp_path / "straight")


def test_a_folder_in_which_another_is_at_work_is_refused(run, arguments, tmp_path):
    (tmp_path / "packed").mkdir()
    work = lambda: os._exit(main(["data", "pack", *map(str, arguments)]))
    with files.hold(tmp_path / "packed/.lock0", "is held"):
        job = multiprocessing.get_context("fork").Process(target=work)
        job.start()
        job.join(60)
    assert job.exitcode == 2
    assert content(tmp_path / "packed") == {}
    assert run(*arguments)[0] == 0


def test_another_command_into_the_same_folder_is_refused(run, arguments, folder, tmp_path):
    run(*arguments)
    before = content(tmp_path / "packed")

    def refused(*more):
        code, out, err = run(*arguments, *more)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert content(tmp_path / "packed") == before
        return err

    assert "(--size was 8)" in refused("--size", 9)
    assert "(--per-shard was 40; --format was png)" in refused("--per-shard", 50, "--format", "webp")
    assert f"(--data was {folder})" in refused("--data", folder.rename(folder.with_name("moved")))
    folder.with_name("moved").rename(folder)
    (folder / "x/0.v1.txt").write_text("new")
    assert "--data had 110 images" in refused()
    (folder / "x/0.v1.txt").unlink()
    (folder / "x/0.v1.png").rename(folder / "x/00.v1.png")
    assert "--data had 110 images" in refused()


def test_what_cannot_be_packed_is_refused(run, arguments, folder, tmp_path):
    def refused(words, *more):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*arguments, *more)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert words in err
        assert sorted(tmp_path.rglob("*")) == before

    refused("is inside of --data", "--out", folder / "packed")
    refused("is inside of --data", "--out", folder)
    refused("none does not exist", "--data", tmp_path / "none")
    refused("--size", "--size", 0)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/mine.txt").touch()
    refused("exists already")
    refused("exists already", "--out", tmp_path / "packed/mine.txt")


def test_a_corrupt_image_is_left_out_and_listed(run, arguments, folder, tmp_path):
    (folder / "y/1.v1.png").write_bytes(b"garbage")
    for _ in range(2):  # the second call finds all shards made
        code, out, err = run(*arguments)
        assert code == 0
        assert "109 images" in out
        assert err == f"left out, because unreadable: 1 image, see {tmp_path}/packed/problems.log"
        problems = (tmp_path / "packed/problems.log").read_text()
        assert problems.startswith(f"{folder / 'y/1.v1.png'} is not a whole image")
        assert problems.count("\n") == 1
    meta = json.loads((tmp_path / "packed/meta.json").read_text())
    assert (meta["files"], meta["images"], meta["unreadable"]) == (110, 109, 1)
    packed = TarShards(tmp_path / "packed", 8)
    assert len(packed) == 109
    assert all(packed[i].image.shape == (3, 8, 8) for i in range(109))


def test_too_many_corrupt_images_are_refused(run, arguments, folder, tmp_path):
    """It may be the disk that fails: half a data set must not pass for a whole one."""
    for name in ("x/0", "y/1"):
        (folder / f"{name}.v1.png").write_bytes(b"garbage")
    for _ in range(2):
        code, out, err = run(*arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "2 of 110 images would be left out, and --allow-bad is 1 %" in err
        assert len((tmp_path / "packed/problems.log").read_text().splitlines()) == 2
        with pytest.raises(InputError, match="is not finished"):
            TarShards(tmp_path / "packed", 8)
    for name in ("x/0", "y/1"):
        Image.fromarray(np.zeros((14, 20, 3), np.uint8)).save(folder / f"{name}.v1.png")
    assert run(*arguments)[0] == 0
    # One of them was in a shard that is finished, and is never made again.
    left = json.loads((tmp_path / "packed/meta.json").read_text())["unreadable"]
    assert left == len((tmp_path / "packed/problems.log").read_text().splitlines()) == 1
    assert len(TarShards(tmp_path / "packed", 8)) == 109


@pytest.mark.parametrize("at_once", [False, True])
def test_when_too_many_are_corrupt_all_are_listed_at_once_and_can_be_mended(run, arguments, folder, tmp_path, at_once):
    """Shards that were whole before it became too much stay; none is written after that."""
    out, listing = tmp_path / "packed", ImageFolder(folder, 8)
    plan = writing.plan_shards([0] * 110, 40)
    paths = [folder / os.fsdecode(listing.names[n]) for n in (plan[1 - at_once][5], *plan[1][3:4], *plan[2][:29:28])]
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(b"garbage")
    code, _, err = run(*arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "4 of 110 images would be left out" in err
    named = [line.split(" is not")[0] for line in (out / "problems.log").read_text().splitlines()]
    assert named == sorted(map(str, paths))
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    for path, content in whole.items():
        path.write_bytes(content)
    assert run(*arguments)[0] == 0
    assert len(TarShards(out, 8)) == 110 - at_once  # what was left out of a shard that is whole stays left out


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_allow_bad_is_the_percentage_that_may_be_left_out(run, folder, tmp_path_factory, allowed, bad):
    out, images = tmp_path_factory.mktemp("out") / "packed", sorted(folder.rglob("*.png"))
    whole = [path.read_bytes() for path in images[:bad]]
    for path in images[:bad]:
        path.write_bytes(b"garbage")
    code, *_ = run("--data", folder, "--out", out, "--size", 2, "--workers", 1, "--allow-bad", allowed)
    for path, content in zip(images, whole, strict=False):
        path.write_bytes(content)
    assert code == (0 if 100 * bad <= allowed * 110 else 2)
    assert bad == (len((out / "problems.log").read_text().splitlines()) if (out / "problems.log").exists() else 0)


def test_what_is_passed_over_and_the_classes_are_said(arguments, folder, capsys):
    (folder / "x/phone.heic").touch()
    (folder / "x/notes.csv").touch()
    assert main(["data", "pack", *map(str, arguments)]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"passed over, of a kind that is not read: 1 image ({folder}/x/phone.heic). Convert")
    assert second == CLASSES
