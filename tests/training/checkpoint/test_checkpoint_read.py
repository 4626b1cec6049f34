"""Checkpoints that are damaged, where to continue from, and journals."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoint_pieces import DAMAGE, SHAPES, check, flip, pieces, refuse, save

from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run
from asymflow.training.run.ranks import AgreedError


# ---- Damaged ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["rank_00000.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_seen_and_the_checkpoint_before_is_used(tmp_path, damage, file):
    out = tmp_path / "run"
    checkpoints = out / run.CHECKPOINTS
    checkpoint.save(checkpoint.folder_of(checkpoints, 4), pieces(4), SHAPES, {"step": 4})
    checkpoint.save(checkpoint.folder_of(checkpoints, 8), pieces(8), SHAPES, {"step": 8})
    DAMAGE[damage](checkpoint.folder_of(checkpoints, 8) / file)
    if (file, damage) == ("manifest.json", "longer"):  # a blank more: what it says is the same
        assert run.checkpoint_to_resume(out, "auto") == (checkpoint.folder_of(checkpoints, 8), [])
        return
    chosen, remarks = run.checkpoint_to_resume(out, "auto")
    assert chosen == checkpoint.folder_of(checkpoints, 4)
    if (file, damage) != ("manifest.json", "gone"):  # then it is none
        (remark,) = remarks
        assert str(checkpoint.folder_of(checkpoints, 8)) in remark
        assert (checkpoints / "00000008.damaged").is_dir()
    assert checkpoint.steps(checkpoints) == [4]


def test_every_byte_of_a_manifest_matters_or_changes_nothing(folder):
    path = checkpoint.folder_of(folder, 4) / checkpoint.MANIFEST
    content = path.read_bytes()
    for i in range(len(content)):
        for bit in (0x01, 0x20):
            changed = bytearray(content)
            changed[i] ^= bit
            path.write_bytes(changed)
            if checkpoint.fault(path.parent) is None:
                assert json.loads(bytes(changed)) == json.loads(content), (i, bit)


def test_reading_what_is_not_there(folder):
    reader = checkpoint.Reader(checkpoint.folder_of(folder, 4))
    with pytest.raises(InputError, match="0 of 6 elements of exp_avg_sq/a"):
        reader.full("exp_avg_sq")
    with pytest.raises(InputError, match="5 of 6 elements of weights/b"):
        reader.read("weights", "b", 0, 6)


def test_pruning_keeps_the_last_and_every_so_manyth(tmp_path):
    for step in range(2, 22, 2):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), pieces(step), SHAPES, {"step": step})
        checkpoint.prune(tmp_path, 2, 6)
    assert check(tmp_path) == [6, 12, 18, 20]


def test_a_folder_that_somebody_reads_in_is_removed_later(tmp_path, monkeypatch):
    """As NFS does it, where what is deleted while it is open stays under another name."""
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        for n in range(2):  # the second time as after a resumption
            save(folder, 4)
            save(folder, 8)
            assert check(folder) == [8]
            checkpoint.folder_of(folder, 8).rename(tmp_path / str(n))
    save(folder, 12)
    assert [path.name for path in folder.iterdir()] == ["00000012"]


def test_a_checkpoint_that_cannot_even_be_renamed_stays(tmp_path, monkeypatch):
    for step in (4, 8, 12):
        checkpoint.save(checkpoint.folder_of(tmp_path, step), pieces(step), SHAPES, {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        checkpoint.prune(tmp_path, 1, None)
    assert check(tmp_path) == [4, 8, 12]
    checkpoint.prune(tmp_path, 1, None)
    assert check(tmp_path) == [12]


def test_files_of_a_rank_that_rank_0_does_not_see(tmp_path, monkeypatch):
    save(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "write_rank", lambda path, pieces: (checkpoint.rank_file(1), {}))
    with pytest.raises(AgreedError, match=r"rank_00001.safetensors was written, but is not there.*that all share"):
        save(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["00000004"]


def test_a_fingerprint_tells_subspaces_apart():
    one = Subspace.random(12, 2, seed=1)
    others = [Subspace.random(12, 2, seed=2), Subspace(one.basis, 2.0), Subspace(-one.basis), Subspace.empty(12)]
    prints = [checkpoint.fingerprint(subspace) for subspace in (one, *others)]
    assert len(set(prints)) == len(prints)
    assert checkpoint.fingerprint(Subspace(one.basis, fitted_on="elsewhere", patch_size=2)) == prints[0]


# ---- Where to continue -----------------------------------------------------------------------------------------------
def everything(folder):
    return sorted((str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def test_where_no_checkpoint_is_whole_training_does_not_begin_anew(out):
    flip(out / "checkpoints/00000004/rank_00000.safetensors")
    (out / "checkpoints/00000008/state.json").unlink()
    before = everything(out)
    with pytest.raises(AgreedError) as caught:
        run.checkpoint_to_resume(out, "auto")
    for part in (
        "00000008: state.json is missing; 00000004: rank_00000.safetensors is not as it was written",
        "Nothing was changed",
        f"move {out}/checkpoints away",
    ):
        assert part in str(caught.value)
    assert everything(out) == before


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["reading", "listing", "looking"])
def test_a_disk_that_does_not_answer_is_no_damage(out, monkeypatch, error, what):
    checkpoints, before = out / run.CHECKPOINTS, everything(out)

    def failing(call, suffix):
        def replaced(path, *args, **options):
            if str(path).endswith(suffix):
                raise OSError(error, os.strerror(error), str(path))
            return call(path, *args, **options)

        return replaced

    owner, name, suffix = {
        "reading": (checkpoint.files, "sha256", "08/rank_00000.safetensors"),
        "listing": (Path, "iterdir", checkpoints.name),
        "looking": (Path, "stat", "08/manifest.json"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), suffix))
        with pytest.raises(AgreedError, match=os.strerror(error)):
            run.checkpoint_to_resume(out, "auto")
    assert everything(out) == before
    assert run.checkpoint_to_resume(out, "auto") == (checkpoint.folder_of(checkpoints, 8), [])


def test_a_run_begins_where_it_is_told_and_then_goes_on_by_itself(out, tmp_path):
    """So the same command continues, whatever has become of what it began with."""
    begin, branch = str(out / "checkpoints/00000004"), tmp_path / "branch"
    branch.mkdir()
    assert run.checkpoint_to_resume(branch, begin) == (out / "checkpoints/00000004", [])
    with pytest.raises(AgreedError, match=f"--resume {out} is not a whole checkpoint: manifest.json is missing"):
        run.checkpoint_to_resume(branch, str(out))
    save(branch / run.CHECKPOINTS, 6)
    for told in (begin, str(out)):
        chosen, (remark,) = run.checkpoint_to_resume(branch, told)
        assert chosen == branch / "checkpoints/00000006"
        assert remark == f"{branch} has checkpoints of its own, so it does not begin with --resume {told} again"
    flip(branch / "checkpoints/00000006/state.json")
    with pytest.raises(AgreedError, match=r"no checkpoint in .* is whole"):
        run.checkpoint_to_resume(branch, begin)


def test_snapshots_that_training_goes_back_behind_are_put_aside_until_it_is_there_again(out):
    snapshots = out / run.SNAPSHOTS
    (out / run.SAMPLES).mkdir()
    for _ in range(2):
        for step in (4, 6):
            (out / run.SAMPLES / f"{step:08d}.png").touch()
        said = run.abandon_snapshots(out, 4)
        assert said == (
            "; later snapshots are put aside, as 00000006.abandoned and so on"
            "; later samples are put aside, as 00000006.png.abandoned"
        )
        assert sorted(path.name for path in (out / run.SAMPLES).iterdir()) == ["00000004.png", "00000006.png.abandoned"]
        assert check(snapshots) == [2]
        assert run.abandon_snapshots(out, 4) == ""
        again = checkpoint.folder_of(snapshots, 6)
        checkpoint.save(again, pieces(6), SHAPES, {"step": 6})
        run.forget_abandoned(again)
        assert check(snapshots) == [2, 6]
        (snapshots / "00000010.abandoned").rename(snapshots / "00000010")
    assert sorted(path.name for path in snapshots.iterdir()) == ["00000002", "00000006", "00000010"]
    shutil.rmtree(out / run.CHECKPOINTS)
    _, (remark,) = run.checkpoint_to_resume(out, "auto")
    assert "no checkpoint: training begins anew; later snapshots are put aside, as 00000002.abandoned" in remark
    assert check(snapshots) == []


# ---- Journals --------------------------------------------------------------------------------------------------------
def test_a_journal_continues_after_any_cut(tmp_path):
    path, entries = tmp_path / "metrics.jsonl", [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    journal = run.Journal(path, 0)
    for entry in entries:
        journal.add(entry)
    journal.close()
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        run.Journal(path, 9).close()
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])
        journal = run.Journal(path, min(whole, 3))
        for entry in entries[min(whole, 3) :]:
            journal.add(entry)
        journal.close()
        assert path.read_bytes() == content


def test_a_journal_loses_no_more_than_what_was_cut_off_or_comes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b"\0\0\0",
        b'{"step": 2}',
        b"null",
        b"\xff\r{",
        b'{"loss": 1}',
        b'{"step": 3}',
        b'{"step": 4}',
    ]
    path.write_bytes(b"\n".join([*lines, b'{"step": 5}']))
    journal = run.Journal(path, 9)
    assert [entry["step"] for entry in journal.entries()] == [1, 2, 3, 4]
    journal.add({"step": 5})
    journal.close()
    assert path.read_bytes() == b"\n".join([*lines, b'{"step": 5}', b""])
    run.Journal(path, 2).close()
    assert path.read_bytes() == b"\n".join([*lines[:6], b""])
    aside = tmp_path / "metrics.jsonl.abandoned"
    assert aside.read_bytes() == b"\n".join([*lines[6:], b'{"step": 5}', b""])
    run.Journal(path, 1).close()  # and what comes later is added
    assert aside.read_bytes() == b"\n".join([*lines[6:], b'{"step": 5}', lines[2], b""])
    assert path.read_bytes() == b"\n".join([*lines[:2], *lines[3:6], b""])
