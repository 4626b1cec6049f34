"""Checkpoints that are whole or not there, whatever happens to the process, the disk or the files in between."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run
from asymflow.training.run.checkpoint import Piece
from asymflow.training.run.ranks import AgreedError, rank0_broadcast

SHAPES = {"a": (2, 3), "b": (5,)}
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
    rank0_broadcast(lambda: checkpoint.prune(folder, 1, None))


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


def refuse(*args, **options):
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
@pytest.fixture
def out(tmp_path):
    """A run with checkpoints at steps 4 and 8, and snapshots at 2, 6 and 10."""
    for name, steps in ((run.CHECKPOINTS, (4, 8)), (run.SNAPSHOTS, (2, 6, 10))):
        for step in steps:
            path = checkpoint.folder_of(tmp_path / "run" / name, step)
            checkpoint.save(path, pieces(step), SHAPES, {"step": step})
    return tmp_path / "run"


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
    for _ in range(2):
        assert run.abandon_snapshots(out, 4) == "; later snapshots are put aside, as 00000006.abandoned and so on"
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
