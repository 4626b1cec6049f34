"""What is no regular file is refused at once, and what asks for too much memory before it gets it."""

import errno
import io
import json
import os
import re
import socket
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise
from random_jits import TINY, random_jit

from asymflow import AsymFlow, InputError, Subspace, files, opening
from asymflow.backbones.jit.published import load_published
from asymflow.cli import drawing
from asymflow.data.captioned import json_lines
from asymflow.data.shards import PACKED, read_meta
from asymflow.entries import Entry, find_images, tar_entries
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.frechet import load_statistics
from asymflow.pixels import read_square

DOORS = {
    "existing_file": opening.existing_file,
    "read_bytes": opening.read_bytes,
    "read_text": opening.read_text,
    "read_json": opening.read_json,
    "read_tensors": opening.read_tensors,
    "read_pickle": opening.read_pickle,
    "read_arrays": lambda path: opening.read_arrays(path, ("mu",)),
    "subspace": Subspace.load,
    "published": load_published,
    "statistics": load_statistics,
    "classifier": Classifier.load,
    "image": lambda path: read_square(Entry(str(path)), 8),
    "tar": lambda path: list(tar_entries(str(path))),
    "jsonl": lambda path: list(json_lines(path)),
}


def bound(path):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket must be short
        server.bind(path.name)


OTHERS = {
    "pipe": os.mkfifo,
    "socket": bound,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_file_is_refused_at_once_in_one_line(door, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a\nb.tar"
    OTHERS[kind](path)
    with pytest.raises(InputError) as error:
        DOORS[door](path)
    assert len(str(error.value).splitlines()) == 1
    assert r"a\nb.tar" in str(error.value)


def test_a_name_of_zero_bytes_is_no_file():
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError, match="cannot be opened"):
            opening.existing_file(name)


def test_a_file_that_becomes_a_pipe_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(path := tmp_path / "a")
    monkeypatch.setattr(opening, "existing_file", Path)
    with pytest.raises(InputError, match="a pipe or a device"):
        opening.read_bytes(path)


# ---- Memory ----------------------------------------------------------------------------------------------------------
def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path):
    (path := tmp_path / "a").write_bytes(b"12345")
    assert opening.read_bytes(path, most=5) == b"12345"
    with pytest.raises(InputError, match="has more than 4 bytes"):
        opening.read_bytes(path, most=4)


def test_tensors_that_are_larger_than_their_file_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "expanded.pth")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    for name, said in (("expanded", "more numbers than are in the file"), ("packed", "is compressed")):
        with pytest.raises(InputError, match=said):
            opening.read_pickle(tmp_path / f"{name}.pth")


def test_tensors_that_share_numbers_or_hold_themselves_are_read(tmp_path):
    shared = torch.arange(5000.0)
    content = {"a": shared, "b": [shared, shared.view(50, 100)]}
    content["b"].append(content["b"])
    torch.save(content, tmp_path / "a.pth")
    found = opening.read_pickle(tmp_path / "a.pth")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"][1], shared.view(50, 100))


@pytest.mark.parametrize("shape", [(10**9,), (2**40, 2**40), (3,)])
def test_arrays_that_claim_more_than_there_is_are_refused(shape, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(16))
    with pytest.raises(InputError, match="more than is in it"):
        opening.read_arrays(tmp_path / "a.npz", ("mu",))


def test_a_compressed_array_of_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MOST_NUMBERS", 10**6)
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(10**6))
    with pytest.raises(InputError, match=r"an array mu\.npy of 8,000,000 bytes"):
        opening.read_arrays(tmp_path / "a.npz", ("mu",))
    assert opening.read_arrays(tmp_path / "a.npz", ("sigma",)) == {}  # what is not asked for does not matter


@pytest.mark.parametrize(("key", "value"), [("depth", 10**9), ("width", 10**12), ("num_classes", 2**62)])
def test_a_network_larger_than_its_weights_is_not_made(key, value, tmp_path):
    AsymFlow(random_jit(), Subspace.random(TINY["patch_size"] ** 2 * 3, 2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert key in config["network"]["config"]
    config["network"]["config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"more tensors than its weights|does not (fit|describe)|not a multiple"):
        AsymFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_numbers_that_are_no_weights_are_refused(dtype, tmp_path):
    AsymFlow(random_jit(), Subspace.random(TINY["patch_size"] ** 2 * 3, 2)).save_pretrained(tmp_path)
    tensors, metadata = opening.read_tensors(tmp_path / "model.safetensors")
    name = "backbone.blocks.0.mlp.w3.weight"
    tensors = {**{n: t.clone() for n, t in tensors.items()}, name: tensors[name].to(dtype)}
    files.write_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(InputError, match=rf"{name} is of {dtype}"):
        AsymFlow.from_pretrained(tmp_path)


def test_links_that_make_a_folder_endless_are_followed_once(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        noise(8, 8).save(tmp_path / f"{i}" / "a.png")
        for j in range(25):
            (tmp_path / f"{i}" / f"link{j}").symlink_to(tmp_path / f"{(i + 1) % 3}")
    found = [entry.path for entry in find_images([tmp_path])]
    assert "not read twice: 75 paths (the first: " in capsys.readouterr().err
    assert len(found) == 3
    assert len({os.path.realpath(path) for path in found}) == 3


def test_a_record_without_images_is_gone_on_with(tmp_path):
    for images in ([], [{"file": "images/000000.png", "index": 0, "class": 3}]):
        record = {"settings": {"seed": 0}, "images": images}
        (tmp_path / "samples.json").write_text(json.dumps(record))
        drawing.open_record(Namespace(out=tmp_path), {"seed": 0}, [(1, 2)], {"model": "a"})
        found = json.loads((tmp_path / "samples.json").read_text())["images"]
        assert [entry["index"] for entry in found] == [entry["index"] for entry in images] + [1]


# ---- What a killed process leaves ------------------------------------------------------------------------------------
def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    with files.replacing(tmp_path / "a.npz") as beside:
        beside.write_bytes(b"")
    kept = [
        tmp_path / name for name in (".cache.0123abcd", ".b.0123abcd.npz", ".x.asymflow", "a.0123abcd.asymflow.npz")
    ]
    old, fresh = tmp_path / beside.name.replace(".a.", ".old."), tmp_path / beside.name.replace(".a.", ".fresh.")
    folder = tmp_path / ".model.0123abcd.asymflow"
    folder.mkdir()
    for path in (*kept, old, fresh, folder / "weights"):
        path.write_bytes(b"")
    for path in (*kept, old, folder, folder / "weights"):
        os.utime(path, (time.time() - 2 * files.ABANDONED,) * 2)
    files.remove_abandoned.cache_clear()
    with files.replacing(tmp_path / "b.npz") as beside:
        beside.write_bytes(b"")
    assert not any(path.exists() for path in (old, folder))
    assert all(path.exists() for path in (*kept, fresh, tmp_path / "a.npz", tmp_path / "b.npz"))


# ---- What is not the file's fault ------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_an_error_of_the_disk_is_not_taken_for_a_damaged_file(code, tmp_path, monkeypatch):
    """Else a checkpoint would be put aside, or a record of shards written over, that is whole."""
    (path := tmp_path / "meta.json").write_text("{}")

    def fail(*args):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(opening, "without_waiting", fail)
    for read in (opening.read_bytes, opening.read_json, lambda path: read_meta(path.parent, PACKED)):
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as error:
            read(path)
        assert not isinstance(error.value, InputError)


def test_too_little_memory_is_not_taken_for_a_damaged_file():
    with pytest.raises(MemoryError), opening.reading("a", "b"):
        raise MemoryError


def test_a_file_is_read_into_no_more_memory_than_it_has(tmp_path):
    (path := tmp_path / "a").write_bytes(b"12345")
    assert opening.read_bytes(path, most=2**60) == b"12345"


@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (True, False), (False, True)])
def test_models_of_torch_compile_are_saved_and_loaded(saved, loaded, tmp_path):
    compiled = lambda yes, net: torch.compile(net, backend="eager") if yes else net
    jit = random_jit(dtype=torch.float32)
    flow = AsymFlow(compiled(saved, jit), Subspace.random(jit.dim, 2), jit.patch_size)
    flow.save_pretrained(tmp_path)
    other = compiled(loaded, random_jit(seed=1, dtype=torch.float32))
    AsymFlow.from_pretrained(tmp_path, backbone=other)
    for name, weight in jit.named_parameters():
        assert torch.equal(dict(getattr(other, "_orig_mod", other).named_parameters())[name], weight)
