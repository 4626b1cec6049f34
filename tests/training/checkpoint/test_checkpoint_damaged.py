"""A checkpoint with any damage is put aside, also if its manifest describes the damage."""

import errno
import os

import pytest
from checkpoint_pieces import save
from fuzzing import COUNTS, fuzz

from asymflow import InputError, opening
from asymflow.training.run import checkpoint
from asymflow.training.run.folder import clear_leftovers


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
@pytest.mark.parametrize("to", ["/dev/zero", "pipe", "nowhere", "itself"])
def test_a_link_to_something_endless_is_a_fault(folder, name, to):
    path = checkpoint.folder_of(folder, 4)
    (path / name).unlink()
    if to == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(name if to == "itself" else to)
    assert name in checkpoint.fault(path)


@pytest.mark.parametrize("name", ["../00000004/state.json", "/etc/passwd", "..", ""])
def test_a_manifest_that_lists_files_elsewhere_is_a_fault(folder, name):
    path = checkpoint.folder_of(folder, 4)
    (path / "manifest.json").write_text(f'{{"{name}": {{"size": 1, "sha256": ""}}}}')
    assert "is not as it was written" in checkpoint.fault(path)


def test_a_failing_disk_is_no_damage(folder, monkeypatch):
    """Of the manifest either: else a whole checkpoint would be put aside."""
    path = checkpoint.folder_of(folder, 4)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(opening, "without_waiting", fail)
    for read in (checkpoint.fault, checkpoint.read_state, checkpoint.Reader):
        with pytest.raises(OSError, match="Input/output error") as error:
            read(path)
        assert not isinstance(error.value, InputError)


def test_what_an_export_is_writing_into_a_run_stays(folder):
    (exporting := folder.parent / ".export.0123abcd.asymflow").mkdir()
    (killed := folder.parent / ".config.0123abcd.asymflow.yaml").touch()
    clear_leftovers(folder.parent)
    assert exporting.is_dir()
    assert not killed.exists()
