"""`asymflow data encode` begun again, interrupted, and by two processes: the same shards."""

import itertools
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from encoding_runs import LENGTH, SETTINGS, content, copy_of, two_processes

from asymflow import files
from asymflow.cli import main
from asymflow.data import encode as encoding
from asymflow.data import writing
from asymflow.data.captioned import find_captioned
from asymflow.data.encode import encode
from asymflow.data.encoded import EncodedShards
from asymflow.errors import InputError


# ---- Again, interrupted, together ------------------------------------------------------------------------------------
def test_where_it_was_interrupted_it_goes_on(shards, base, photos, tmp_path, monkeypatch):
    out, calls, really = tmp_path / "s", itertools.count(), encoding.encode_image

    def interrupted(*arguments):
        if next(calls) == 3:  # in the second batch of the second shard
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(encoding, "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode([photos], base, out, **SETTINGS)
    assert content(out).keys() == {"00000.tar", "00000.index.npz", "meta.json", "empty_prompt.safetensors"}
    with pytest.raises(InputError, match="not finished"):
        EncodedShards(out)
    encode([photos], base, out, **SETTINGS)
    assert next(calls) == 4 + 4  # the first shard was not made again
    assert content(out) == content(shards)
    monkeypatch.setattr(encoding, "load_encoders", None)  # what is done needs no models
    encode([photos], base, out, **SETTINGS)
    assert content(out) == content(shards)


@pytest.mark.usefixtures("without_models")
def test_killed_as_its_first_shard_comes_or_as_it_is_cleared_away_it_goes_on(base, photos, tmp_path, monkeypatch):
    out, save, unlink = tmp_path / "s", writing.save_index, Path.unlink
    other = {**SETTINGS, "max_length": 32}  # as nothing was made, it may be begun again with other settings
    encode([photos], base, tmp_path / "whole", **other)

    def killed(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_index", killed)
        with pytest.raises(KeyboardInterrupt):
            encode([photos], base, out, **SETTINGS)
    assert content(out).keys() == {"00000.index.npz", "meta.json", "empty_prompt.safetensors"}
    for number in range(3):
        calls = itertools.count()

        def killed_later(path, calls=calls, number=number, **options):
            if next(calls) == number:
                raise KeyboardInterrupt
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed_later)
            with pytest.raises(KeyboardInterrupt):
                encode([photos], base, out, **other)
    assert content(out).keys() == {"meta.json", "empty_prompt.safetensors"}
    encode([photos], base, out, **other)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.usefixtures("without_models")
def test_the_same_folder_by_another_name_is_the_same(base, photos, tmp_path, monkeypatch):
    encode([photos], base, tmp_path / "s", **SETTINGS)
    before = content(tmp_path / "s")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for name in (".", f"../{photos.name}/", f"{photos}/set0/..", tmp_path / "link"):
        encode([name], base, tmp_path / "s", **SETTINGS)
    assert content(tmp_path / "s") == before


@pytest.mark.usefixtures("without_models")
def test_what_was_left_out_stays_so_and_what_has_changed_is_refused(base, photos, tmp_path, capsys):
    data, settings = copy_of(photos, tmp_path / "data"), {**SETTINGS, "allow_bad": 40}
    caption, other = (data / "set0" / f"p{i}.v1.txt" for i in (6, 8))
    text = caption.read_text(encoding="utf-8")
    caption.unlink()
    encode([data], base, tmp_path / "s", **settings)
    before = content(tmp_path / "s")
    caption.write_text(text, encoding="utf-8")  # as if the file system had only stumbled
    capsys.readouterr()
    assert encode([data], base, tmp_path / "s", **settings)["left_out"] == 1
    assert "1 of the images that could not be used" in capsys.readouterr().err
    assert content(tmp_path / "s") == before
    other.write_text("another")
    with pytest.raises(InputError, match="sizes or captions of images in --data have changed"):
        encode([data], base, tmp_path / "s", **settings)
    other.unlink()
    with pytest.raises(InputError, match=r"p8.* has no caption, but it could be used when"):
        encode([data], base, tmp_path / "s", **settings)
    (data / "set0" / "p8.v1.jpg").unlink()
    with pytest.raises(InputError, match="--data had 12 images, and now has 11"):
        encode([data], base, tmp_path / "s", **settings)
    assert content(tmp_path / "s") == before


def test_other_settings_are_refused_by_name(shards, base, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "load_encoders", None)
    before = content(shards)
    for change, word in (
        ({"size": 128}, "--size was 64"),
        ({"max_length": 32}, "--max-length was 48"),
        ({"image_format": "webp"}, "--format was png"),
        ({"dtype": torch.bfloat16}, "--dtype was float32"),
        ({"data": [photos / "set0"]}, "--data was"),
    ):
        given = {"data": [photos], **SETTINGS, **change}
        with pytest.raises(InputError, match=word):
            encode(given.pop("data"), base, shards, **given, allow_bad=99)
    other = copy_of(base, tmp_path / "base")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="sha256 of vae"):
        encode([photos], other, shards, **SETTINGS)
    assert content(shards) == before


@pytest.mark.usefixtures("without_models")
def test_a_folder_that_is_someone_elses_is_left_alone(base, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(InputError, match="no `data encode` began it"):
        encode(["shapes:3"], base, tmp_path, **SETTINGS)
    assert content(tmp_path) == {"precious": b""}


def test_two_processes_make_the_same_shards(shards, base, photos, tmp_path):
    options = ["--size=64", "--per-shard=4", "--batch=3", f"--max-length={LENGTH}", "--dtype=float32", "--device=cpu"]
    out = tmp_path / "s"
    said = two_processes(tmp_path, "data", "encode", "--base", base, "--data", photos, "--out", out, *options)
    assert content(out) == content(shards)
    assert "12 images of 3 sizes" in said


@pytest.mark.usefixtures("without_models")
def test_processes_that_find_other_images_are_refused(base, photos, tmp_path, monkeypatch):
    def another_first(data, side, passed):  # where one image has another name
        found = find_captioned(data, side, passed)
        return found[1:] + found[:1] if os.environ["RANK"] == "1" else found

    monkeypatch.setattr(encoding, "find_captioned", another_first)
    argv = ["data", "encode", "--base", base, "--data", photos, "--out", tmp_path / "s", "--device=cpu"]
    assert two_processes(tmp_path, *argv, code=2).count("do not find the same images in --data") == 2
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("without_models")
def test_a_folder_that_cannot_be_made_ends_all_processes(base, photos, tmp_path):
    """Only the first would make it; the other must not wait for that until its time is up."""
    (tmp_path / "file").touch()
    argv = ["data", "encode", "--base", base, "--data", photos, "--out", tmp_path / "file" / "s", "--size=64"]
    assert two_processes(tmp_path, *argv, "--device=cpu", code=2).count("Not a directory") == 2


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_in_which_another_is_at_work_is_refused(base, photos, tmp_path, monkeypatch, rank):
    out, answers = tmp_path / "s", multiprocessing.get_context("fork").SimpleQueue()
    encode([photos], base, out, **SETTINGS)
    (out / "meta.json").write_text((out / "meta.json").read_text().replace('"shards"', '"begun"'))
    (out / "00002.tar").unlink()
    (out / ".00002.tar").write_text("half")

    def another():
        try:
            answers.put(encode([photos], base, out, **SETTINGS))
        except InputError as e:
            answers.put(str(e))

    with files.hold(out / f".lock{rank}", "is held"):
        before = content(out)
        job = multiprocessing.get_context("fork").Process(target=another)
        job.start()
        job.join(300)
        said = answers.get()
    assert f"{out} is being written to by process {os.getpid()} on " in said
    assert content(out) == before
    assert encode([photos], base, out, **SETTINGS)["images"] == 12


def test_processes_that_do_not_know_which_they_are_are_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = ["data", "encode", "--base", str(base), "--data", "shapes:3", "--out", str(tmp_path / "s"), "--device=cpu"]
    assert main(argv) == 2
    assert "SLURM_STEP_NUM_TASKS 8" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_who_is_done_before_the_others_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asymflow.cli.data.encode", lambda *_, **__: None)
    argv = ["data", "encode", "--base", "b", "--data", "shapes:3", "--out", str(tmp_path / "s"), "--device=cpu"]
    assert main(argv) == 0
    assert "run the same command again" in capsys.readouterr().out


@pytest.mark.usefixtures("without_models")
def test_who_is_done_first_leaves_the_end_to_the_others(base, photos, tmp_path, monkeypatch):
    look, out = encoding.inspect_all, tmp_path / "s"
    monkeypatch.setattr(encoding, "inspect_all", lambda items, sizes, threads, *_: look(items, sizes, threads, 0, 1))
    begin = lambda shards, *given, beside: setattr(shards, "meta", shards.take(*given, beside))
    monkeypatch.setattr(writing.Writer, "begin", begin)
    monkeypatch.setattr(writing, "gathered", lambda work, world: [work()] * world)
    assert encode([photos], base, out, rank=1, world=2, **SETTINGS) is None
    assert sorted(path.name for path in out.glob("*.tar")) == ["00001.tar"]
    with pytest.raises(InputError, match="not finished"):
        EncodedShards(out)
    assert encode([photos], base, out, rank=0, world=2, **SETTINGS)["images"] == len(EncodedShards(out)) == 12


def test_captions_that_are_cut_are_counted_and_listed(base, photos, tmp_path, capsys):
    """Also those of a shard that was there already. Two that differ only behind the cut have one embedding."""
    data, long = shutil.copytree(photos, tmp_path / "data"), "very " * LENGTH
    first, second, *_ = sorted(data.glob("set0/*.txt"))
    first.write_text(f"{long} good")
    second.write_text(f"{long} bad")
    assert encode([data], base, tmp_path / "s", **SETTINGS)["cut_captions"] == 2
    listed = (tmp_path / "s/cut_captions.log").read_text().splitlines()
    assert [Path(line.rpartition(": ")[0]).stem for line in listed] == [first.stem, second.stem]
    assert all(re.fullmatch(rf"\d+ tokens, of which {LENGTH} are used", line.rpartition(": ")[2]) for line in listed)
    embedded = [sample.prompt for sample in EncodedShards(tmp_path / "s") if sample.caption.startswith("very")]
    assert torch.equal(*embedded)
    sorted((tmp_path / "s").glob("*.tar"))[-1].unlink()
    words = ["data", "encode", "--base", base, "--data", data, "--out", tmp_path / "s", "--dtype", "float32"]
    words += ["--size", 64, "--per-shard", 4, "--batch", 3, "--max-length", LENGTH, "--workers", 2]
    assert main(list(map(str, words))) == 0
    assert "cut, because longer than --max-length: 2 captions, see" in capsys.readouterr().err
    assert (tmp_path / "s/cut_captions.log").read_text().splitlines() == listed
