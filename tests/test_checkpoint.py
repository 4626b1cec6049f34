"""Checkpoints that are whole or not there, whatever happens to the process, the disk or the files in between."""

import errno
import json
import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

from asymflow.errors import InputError
from asymflow.training import checkpoint, run
from asymflow.training.checkpoint import Piece
from asymflow.training.ranks import AgreedError, on_first

SHAPES = {"a": (2, 3), "b": (5,)}
TOUCHES = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.scandir",
    "shutil.rmtree",
    "os.truncate",
)
DIED = 9


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pieces(seed):
    g = torch.Generator().manual_seed(seed)
    for kind in ("weights", "exp_avg"):
        for name, shape in SHAPES.items():
            yield Piece(kind, name, 0, torch.randn(torch.Size(shape).numel(), generator=g))


def save(folder, step):
    checkpoint.save(checkpoint.folder_of(folder, step), pieces(step), SHAPES, {"step": step})
    on_first(lambda: checkpoint.prune(folder, 1, None))


def check(folder):
    """All checkpoints there are have the right content. Returns their steps."""
    steps = checkpoint.steps(folder)
    for step in steps:
        path = checkpoint.folder_of(folder, step)
        assert checkpoint.fault(path) is None
        reader = checkpoint.Reader(path)
        assert reader.state["step"] == step
        for piece in pieces(step):
            assert torch.equal(reader.full(piece.kind)[piece.name].flatten(), piece.values)
    return steps


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


def refuse():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 4)
    return folder


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


# ---- Damaged ---------------------------------------------------------------------------------------------------------
def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["rank_00000.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_seen_and_the_checkpoint_before_is_used(tmp_path, damage, file):
    out = tmp_path / "run"
    checkpoints = out / run.CHECKPOINTS
    checkpoint.save(checkpoint.folder_of(checkpoints, 4), pieces(4), SHAPES, {"step": 4})
    checkpoint.save(checkpoint.folder_of(checkpoints, 8), pieces(8), SHAPES, {"step": 8})
    DAMAGE[damage](checkpoint.folder_of(checkpoints, 8) / file)
    if (file, damage) == ("manifest.json", "longer"):  # a blank more: what it says is the same
        assert run.to_resume(out, "auto") == (checkpoint.folder_of(checkpoints, 8), [])
        return
    chosen, remarks = run.to_resume(out, "auto")
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
