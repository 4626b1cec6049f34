"""Checkpoints that are whole or not there, whatever happens to the process, the disk or the files in between."""

import errno
import multiprocessing
import os
import resource
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_pieces import DAMAGE, SHAPES, check, flip, pieces, refuse, save

from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run
from asymflow.training.run.checkpoint import Piece
from asymflow.training.run.ranks import AgreedError

TOUCHES = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
    "os.truncate",
)
DIED = 9


# ---- A process that dies before each thing it does to the disk, and a disk that refuses each -------------------------
def at_call(n, folder, action):
    """Do `action` at the n-th time that something in `folder` is opened, made, renamed or removed (0: never)."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in TOUCHES and any(str(folder) in str(arg) for arg in args):
            count += 1
            if count == n:
                action()

    sys.addaudithook(hook)
    return lambda: count


def in_child(folder, n, action, step):
    """Save and prune in a forked process, with `action` at its n-th touch; its exit code, and how many there were."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dist.all_gather_object = lambda everyone, mine: everyone.__setitem__(
                0, mine
            )  # gloo does not survive a fork
            dist.broadcast_object_list = lambda objects: None
            counted = at_call(n, folder, action)
            try:
                save(folder, step)
                code = 0
            except AgreedError:
                code = 2
            sender.send(counted())
        finally:
            os._exit(code)
    sender.close()
    _, status = os.waitpid(pid, 0)
    try:
        return os.waitstatus_to_exitcode(status), receiver.recv()
    except EOFError:
        return os.waitstatus_to_exitcode(status), 0


def die():
    os._exit(DIED)


def test_a_process_that_dies_anywhere_leaves_the_old_or_the_new(tmp_path, folder):
    code, touches = in_child(folder, 0, die, 8)
    assert code == 0
    assert touches > 10
    newest = []
    for n in range(1, touches + 1):
        at = tmp_path / str(n)
        save(at, 4)
        assert in_child(at, n, die, 8) == (DIED, 0)
        steps = check(at)
        assert steps in ([4], [4, 8], [8])
        newest.append(steps[-1])
        save(at, 8)  # as a resumed training does
        save(at, 12)
        assert check(at) == [12]
        assert [path.name for path in at.iterdir()] == ["00000012"]
    assert newest == sorted(newest)  # there is one moment at which the new one is there
    assert set(newest) == {4, 8}


def test_a_disk_that_refuses_anything_is_reported_and_leaves_the_old_or_the_new(tmp_path, folder):
    _, touches = in_child(folder, 0, refuse, 8)
    outcomes = set()
    for n in range(1, touches + 1):
        at = tmp_path / str(n)
        save(at, 4)
        code, _ = in_child(at, n, refuse, 8)
        assert code in (0, 2), n
        outcomes.add((code, tuple(check(at))))
        if code == 2:
            assert {path.suffix for path in at.iterdir()} <= {"", ".removed"}, n
            assert not list(at.glob(".*.writing")), n
    assert (2, (4,)) in outcomes


class Elsewhere(torch.Tensor):
    """Like a tensor on a GPU: on the host it is only in copies, of which `copies` still use memory."""

    copies = 0

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="meta")
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Elsewhere(args[0].values)
        assert function is torch.ops.aten._to_copy.default, function
        assert cls.copies == 0, "what was written before is still on the host"
        memory = args[0].values.numpy().copy()
        cls.copies += 1
        weakref.finalize(memory, cls.freed)
        return torch.from_numpy(memory)

    @classmethod
    def freed(cls):
        cls.copies -= 1


def test_no_more_than_one_piece_is_copied_to_the_host_at_a_time(tmp_path):
    there = (Piece(p.kind, p.name, p.start, Elsewhere(p.values)) for p in pieces(4))
    checkpoint.save(checkpoint.folder_of(tmp_path, 4), there, SHAPES, {"step": 4})
    assert check(tmp_path) == [4]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="where it is counted what a process reads")
def test_what_is_written_is_not_read_again(tmp_path):
    def has_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    size = 10**6  # what else is read, the state and the manifest, is a thousandth of this
    before = has_read()
    checkpoint.save(checkpoint.folder_of(tmp_path, 4), [Piece("weights", "a", 0, torch.ones(size))], {"a": (size,)}, {})
    assert has_read() - before < size
    assert checkpoint.fault(checkpoint.folder_of(tmp_path, 4)) is None


def altering(monkeypatch, change):
    """A disk that has `change` done to the file of a rank while it flushes it, and says nothing."""

    def flush(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.suffix == ".safetensors":
            change(path)
        fsync(handle)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", flush)


def size_of_a_rank(folder):
    return (checkpoint.folder_of(folder, 4) / checkpoint.rank_file(0)).stat().st_size


def test_a_disk_that_ends_within_the_tensors_leaves_the_old(folder):
    """Whatever part of the file still fits."""
    size = size_of_a_rank(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for fits in (0, 7, 8, size // 3, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (fits, limits[1]))
        try:
            with pytest.raises(AgreedError, match=f"could not be written.*{os.strerror(errno.EFBIG)}"):
                save(folder, 8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert check(folder) == [4]
        assert [path.name for path in folder.iterdir()] == ["00000004"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="where files can be told by their numbers")
def test_a_file_that_comes_out_too_short_leaves_the_old(folder, monkeypatch):
    size = size_of_a_rank(folder)
    altering(monkeypatch, DAMAGE["truncated"])
    with pytest.raises(AgreedError, match=f"has {size - 1} of the {size} bytes that were written"):
        save(folder, 8)
    assert check(folder) == [4]
    assert [path.name for path in folder.iterdir()] == ["00000004"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="where files can be told by their numbers")
def test_what_the_disk_altered_while_it_was_written_is_seen_before_it_is_used(out, monkeypatch):
    """The checksum is of what was to be written."""
    altering(monkeypatch, flip)
    checkpoints = out / run.CHECKPOINTS
    checkpoint.save(checkpoint.folder_of(checkpoints, 12), pieces(12), SHAPES, {"step": 12})
    chosen, (remark,) = run.checkpoint_to_resume(out, "auto")
    assert chosen == checkpoint.folder_of(checkpoints, 8)
    assert "00000012" in remark
