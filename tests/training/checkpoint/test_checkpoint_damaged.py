"""A checkpoint with any damage is put aside, also if its manifest describes the damage."""

import os

import pytest
from checkpoint_pieces import save
from fuzzing import COUNTS, fuzz

from asymflow import InputError
from asymflow.training.run import checkpoint


def read_checked(folder):
    if found := checkpoint.fault(folder):
        raise InputError(f"{folder}: {found}")
    checkpoint.read_state(folder)


def read_unchecked(folder):
    """As if every file were as its manifest says."""
    reader = checkpoint.Reader(folder)
    for kind in reader.kinds():
        reader.full(kind)


@COUNTS
@pytest.mark.parametrize("read", [read_checked, read_unchecked])
def test_a_damaged_checkpoint_is_read_or_refused_in_one_line(read, count, tmp_path):
    save(tmp_path, 4)
    fuzz(checkpoint.folder_of(tmp_path, 4), read, count)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("to", ["/dev/zero", "pipe", "nowhere"])
def test_a_link_to_something_endless_is_a_fault(folder, name, to):
    path = checkpoint.folder_of(folder, 4)
    (path / name).unlink()
    if to == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(to)
    assert name in checkpoint.fault(path)


@pytest.mark.parametrize("name", ["../00000004/state.json", "/etc/passwd", "..", ""])
def test_a_manifest_that_lists_files_elsewhere_is_a_fault(folder, name):
    path = checkpoint.folder_of(folder, 4)
    (path / "manifest.json").write_text(f'{{"{name}": {{"size": 1, "sha256": ""}}}}')
    assert "is not as it was written" in checkpoint.fault(path)
