"""Trainings that are starved and fed with rubbish, in real processes."""

import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image
from processes import Launched, metrics, tensors
from ways_to_end import ENDLESS, before_step, everything, on_rank, one_line, this_rank, whole_steps

from asymflow.averages import Profile
from asymflow.errors import InputError


# ---- Done to the ranks -----------------------------------------------------------------------------------------------
def bad_noise(value, samples):
    """The noise of these samples of the training is not a number, or infinite."""
    from asymflow.training.loader import Batches

    get = Batches.__getitem__

    def replaced(self, k):
        batch = get(self, k)
        for i, sample in enumerate(batch.samples):
            if sample in samples:
                batch.eps[i, 0, 0, 0] = value
        return batch

    Batches.__getitem__ = replaced


def without_steps(first, count):
    """A training that never sees the data of these steps."""
    from asymflow.training.loader import Batches

    get = Batches.__getitem__
    Batches.__getitem__ = lambda self, k: get(
        self, k + (count * self.accumulation if k >= first * self.accumulation else 0)
    )


def bad_gradient(samples):
    """The loss of these samples of the training is right, but not its derivative."""
    from asymflow.training.objectives.class_conditional import ClassConditional

    losses = ClassConditional.losses

    def replaced(self, model, batch):
        value = losses(self, model, batch)
        bad = not samples.isdisjoint(batch.samples)
        return value + (0 * value).sqrt() if bad else value  # whose derivative is 0 times infinity

    ClassConditional.losses = replaced


def corrupt_images(indices):
    from asymflow.data.shapes import Shapes

    get = Shapes.__getitem__

    def replaced(self, index):
        if index in indices:
            raise InputError(f"shapes/{index}: it is cut off")
        return get(self, index)

    Shapes.__getitem__ = replaced


def no_space(rank, name):
    """On one rank, a file whose name contains `name` cannot be written."""

    def hook(event, args):
        if event == "open" and name in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    if this_rank() == rank:
        sys.addaudithook(hook)


def little_space_for_metrics(step):
    """From a step on, files cannot grow longer than half a line more than metrics.jsonl: a limit of the kernel's."""

    def limit(training):
        if training.rank == 0:
            size = (training.out / "metrics.jsonl").stat().st_size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            os.ftruncate(2, 0)  # for stderr is a file as well, and has to take what is said of it
            os.lseek(2, 0, os.SEEK_SET)

    before_step(limit, step)


def small_shared_memory(rank, size):
    """One rank and its workers have a /dev/shm of their own."""
    if this_rank() == rank:
        assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
        command = "mount --make-rprivate / && mount -t tmpfs -o size=$0 tmpfs /dev/shm"
        subprocess.run(["sh", "-c", command, size], check=True)


def vanishes(folder, step):
    before_step(on_rank(0, lambda: shutil.rmtree(folder)), step)


# ---- Fed with rubbish ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "micro"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 2), (2, 2), (3, 2))] + [(1, "null")],
)
def test_skipped_steps_leave_no_trace(tmp_path, stage, micro):
    """Weights and moments are those of a training that never saw the data of the skipped steps."""
    common = [
        f"deepspeed.zero_optimization.stage={stage}",
        f"train.micro_batch_size={micro}",
        "checkpoint={every: 1, keep_last: 99}",
        "train.skip_nonfinite=2",
        "deepspeed.gradient_clipping=0.1",
    ]
    bad = partial(bad_noise, float("nan"), {8 * 3 + 1, 8 * 4 + 7})  # of rank 0 in step 4, and rank 1 in step 5
    said = []
    for steps in (4, 8):  # interrupted between the two
        skipping = Launched(2, tmp_path / "skipping", f"train.steps={steps}", *common, patch=bad)
        assert skipping.wait() == [0, 0]
        said += [line for line in skipping.said() if not line.startswith("continuing from")]
    assert said == [
        "the loss of step 4 is not finite (rank 0: samples 25): skipped, 1 of 2",
        "the loss of step 5 is not finite (rank 1: samples 39): skipped, 2 of 2",
    ]
    assert Launched(2, tmp_path / "without", "train.steps=6", *common, patch=partial(without_steps, 3, 2)).wait() == [
        0,
        0,
    ]
    states = {step: tensors(tmp_path / "skipping", step) for step in (3, 4, 5, 8)}
    expected = tensors(tmp_path / "without", 6)
    kept = [key for key in expected if not key[0].startswith("ema")]
    for key in kept:
        assert torch.equal(states[3][key], states[4][key])
        assert torch.equal(states[3][key], states[5][key])
        assert torch.equal(states[8][key], expected[key]), key
    for (kind, name), value in states[4].items():  # the averages go on, with the weights as they are
        if kind == "ema-0.5":
            share = Profile(decay=0.5).share_at(4)
            towards = torch.lerp(states[3][kind, name], states[3]["weights", name], share)
            assert torch.allclose(value, towards, rtol=1e-6, atol=1e-7)
    taken = [m["loss"] for m in metrics(tmp_path / "skipping")]
    assert taken[3:5] == [None, None]
    assert taken[:3] + taken[5:] == [m["loss"] for m in metrics(tmp_path / "without")]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    out = tmp_path / "run"
    bad = partial(bad_noise, float("inf"), {8 * 3 + 4, 8 * 3 + 6})
    settings = ("train.steps=9", "checkpoint.every=2", "data.workers=1")
    parts = ("step 4", "rank 1: samples 28, 30", f"last good checkpoint: {out}/checkpoints/00000002")
    one_line(Launched(2, out, *settings, patch=bad), *parts)
    assert whole_steps(out) == [2]
    assert len(metrics(out)) == 3
    more = ("train.skip_nonfinite=1", *settings)  # what was skipped is counted over both
    two = partial(bad_noise, float("nan"), {8 * 3 + 4, 8 * 6})
    launched = Launched(2, out, *more, patch=two)
    assert launched.wait() == [2, 2]
    assert len(launched.said()) == 4
    assert "metrics.jsonl: put aside, in metrics.jsonl.abandoned: 1 line after step 2" in launched.said()[1]
    assert "step 7" in launched.said()[-1]
    assert "rank 0: samples 48" in launched.said()[-1]
    assert "Steps skipped before: 1" in launched.said()[-1]
    assert whole_steps(out)[-1] == 6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved_unless_it_may_be_skipped(tmp_path, stage):
    run = tmp_path / "run"
    settings = ("train.steps=5", "checkpoint={every: 1, keep_last: 9}", f"deepspeed.zero_optimization.stage={stage}")
    bad = partial(bad_gradient, {8 * 3 + 5})  # on rank 1
    one_line(Launched(2, run, *settings, patch=bad), "the gradient of step 4 is not finite", "checkpoints/00000003")
    assert whole_steps(run)[-1] == 3
    skipping = Launched(2, run, *settings, "train.skip_nonfinite=1", patch=bad)
    assert skipping.wait() == [0, 0]
    assert skipping.said()[1:] == ["the gradient of step 4 is not finite: skipped, 1 of 1"]
    assert [m["grad_norm"] is None for m in metrics(run)] == [False, False, False, True, False]
    assert all(m["loss"] for m in metrics(run))
    before, after = tensors(run, 3), tensors(run, 4)
    assert all(torch.equal(value, after[key]) for key, value in before.items() if not key[0].startswith("ema"))


def problems(run):
    return [json.loads(line) for line in (run / "problems.log").read_text().splitlines()]


@pytest.mark.slow
def test_corrupt_images_are_logged_once_and_replaced(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    few = partial(corrupt_images, {5, 77})
    settings = ("checkpoint.every=11", "data.workers=1", "ema.decays=[]", "ema.sigma_rel=[]", "ema.snapshot_every=null")
    assert Launched(2, straight, "train.steps=40", *settings, patch=few).wait() == [0, 0]
    first = Launched(2, resumed, "train.steps=33", *settings, patch=few)
    assert first.wait() == [0, 0]
    shutil.rmtree(resumed / "checkpoints" / "00000033")
    assert Launched(2, resumed, "train.steps=40", *settings, patch=few).wait() == [0, 0]
    assert problems(straight) == problems(resumed)
    assert {entry["problem"] for entry in problems(straight)} == {"shapes/5: it is cut off", "shapes/77: it is cut off"}
    assert len(problems(straight)) == 2
    assert metrics(straight) == metrics(resumed)


@pytest.mark.slow
def test_more_than_one_percent_of_corrupt_images_stop_the_run(tmp_path):
    out = tmp_path / "run"
    few, many = partial(corrupt_images, {5, 77}), partial(corrupt_images, {5, 77, *range(100, 130)})
    # All that is known counts, from before a resumption as well.
    assert Launched(2, out, "train.steps=32", "checkpoint.every=32", patch=few).wait() == [0, 0]
    launched = Launched(2, out, "train.steps=64", "checkpoint.every=32", patch=many)
    assert launched.wait() == [2, 2]
    assert len(launched.said()) == 2
    count = len(problems(out))
    assert count > 2
    assert f"{count} of the 256 images could not be read, more than 1%: shapes/" in launched.said()[1]
    assert "shapes/5: it is cut off" in launched.said()[1]
    assert "shapes/77: it is cut off" in launched.said()[1]


def stale_after(count):
    """From then on, in each process, the images are on a disk that is gone."""
    from asymflow.data.shapes import Shapes

    get, reads = Shapes.__getitem__, iter(range(count))

    def replaced(self, index):
        if next(reads, None) is None:
            raise OSError(errno.ESTALE, "Stale file handle", "/data")
        return get(self, index)

    Shapes.__getitem__ = replaced


@pytest.mark.slow
def test_images_of_which_none_can_be_read(tmp_path):
    none, stale = partial(corrupt_images, range(256)), partial(stale_after, 0)
    parts = "the subspace cannot be fitted", "none of 32 images could be read", "the last: "
    one_line(Launched(2, tmp_path / "run", patch=none), *parts, "it is cut off")
    one_line(Launched(2, tmp_path / "run", patch=stale), *parts, "Stale file handle: '/data'")
    without = ("subspace.rank=0", "train.steps=9")
    one_line(Launched(2, tmp_path / "x0", *without, patch=none), "100 images in a row could not be read")
    for workers in (0, 1):
        out = tmp_path / f"later-{workers}"
        later = Launched(2, out, *without, f"data.workers={workers}", patch=partial(stale_after, 9))
        one_line(later, "[Errno 116] Stale file handle: '/data'", code=1)


@pytest.mark.slow
def test_a_folder_that_vanishes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(150):
            Image.new("RGB", (16, 16), (i, i, 0)).save(tmp_path / "data" / name / f"{i}.png")
    images = ("data.kind=image_folder", f"data.path={tmp_path / 'data'}", "data.size=null", "data.workers=1")
    images += ("model.num_classes=2", *ENDLESS)
    vanishing = partial(vanishes, tmp_path / "data", 3)
    one_line(Launched(2, tmp_path / "run", *images, patch=vanishing), "could not be read", "does not exist")


# ---- Starved ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rank", "name"), [(1, "rank_00001"), pytest.param(0, "manifest", marks=pytest.mark.slow)])
def test_a_checkpoint_that_one_rank_cannot_write(tmp_path, rank, name):
    out, settings = tmp_path / "run", ("checkpoint.every=2", "ema.snapshot_every=null")
    assert Launched(2, out, "train.steps=2", *settings).wait() == [0, 0]
    there = everything(out)
    launched = Launched(2, out, "train.steps=4", *settings, patch=partial(no_space, rank, name))
    assert launched.wait() == [2, 2]
    assert len(launched.said()) == 2
    assert "checkpoints/00000004 could not be" in launched.said()[1]
    assert "No space left on device" in launched.said()[1]
    assert everything(out) == there
    assert whole_steps(out) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "40k"])  # too little for the locks of the workers; and for a batch
def test_too_little_shared_memory(tmp_path, size):
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    launched = Launched(2, tmp_path / "run", "data.workers=1", patch=partial(small_shared_memory, 1, size))
    parts = "rank 1: ", "through shared memory", "No space left on device", "make /dev/shm larger", "data.workers=0"
    one_line(launched, *parts, code=1)


@pytest.mark.slow
def test_metrics_that_cannot_be_written(tmp_path):
    out = tmp_path / "run"
    settings = ("train.steps=8", "checkpoint.every=2")
    launched = Launched(2, out, *settings, patch=partial(little_space_for_metrics, 4))
    one_line(launched, "rank 0", "metrics.jsonl", os.strerror(errno.EFBIG), code=1)
    assert not (out / "metrics.jsonl").read_bytes().endswith(b"\n")  # as long as there was space
    assert whole_steps(out) == [2]
    assert Launched(2, out, *settings).wait() == [0, 0]
    assert [m["step"] for m in metrics(out)] == list(range(1, 9))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_read_only(small_disk):
    out, settings = small_disk / "run", ("checkpoint.every=2", "ema.snapshot_every=null")
    assert Launched(2, out, "train.steps=2", *settings).wait() == [0, 0]
    size = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*"))
    there = everything(out)
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 2))
    launched = Launched(2, out, "train.steps=4", *settings)
    assert launched.wait() == [2, 2]
    assert "No space left on device" in launched.said()[-1]
    assert len(launched.said()) == 2
    assert everything(out) == there
    assert whole_steps(out) == [2]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    one_line(Launched(2, out, "train.steps=4"), "Read-only file system")
    one_line(Launched(2, small_disk / "new"), "Read-only file system")
