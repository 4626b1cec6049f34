"""Trainings that are killed, stopped, starved and fed with rubbish, in real processes: what is left, and what is said.

The functions before the tests are done to each rank before it begins: they break what the tests are about.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import psutil
import pytest
import torch
from PIL import Image
from processes import GUARD, Launched, metrics, same_bits, tensors, wait_for, words

from asymflow.averages import Profile
from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.run import checkpoint, signals
from asymflow.training.run.signals import CAUGHT, Signals


# ---- Done to the ranks -----------------------------------------------------------------------------------------------
def this_rank():
    return int(os.environ["RANK"])


def before_step(action, step):
    """Do `action(training)` when `step` (1, 2, ...) begins."""
    from asymflow.training.loop import Training

    one_step = Training.one_step

    def replaced(self, stream):
        if self.step + 1 == step:
            action(self)
        return one_step(self, stream)

    Training.one_step = replaced


def on_rank(rank, action):
    return lambda training: action() if training.rank == rank else None


def saving_hangs(at):
    """As soon as a checkpoint or a snapshot comes to `checkpoint.AT`."""
    setattr(checkpoint, at, lambda *args: time.sleep(1000))


def hangs_at(step):
    before_step(lambda training: time.sleep(1000), step)


def waits_at(step, file):
    """Until the test has made this file."""
    before_step(lambda training: wait_for(file.exists), step)


def signals_while_saving(echo, told=None):
    """`echo` is within how many seconds a second signal is no more than an echo. Saving waits for the file `told`."""
    save, signals.ECHO = checkpoint.save, echo
    checkpoint.save = lambda *args: (wait_for(told.exists) if told else time.sleep(1000)) or save(*args)


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


def fault_on(rank, function, fault):
    """`start.function` finds a fault on one rank."""
    from asymflow.training import start

    def replaced(*args):
        raise fault

    if this_rank() == rank:
        setattr(start, function, replaced)


def dies(rank, step, how):
    def action():
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("such is life")

    before_step(on_rank(rank, action), step)


def loses_a_worker(rank, step):
    before_step(on_rank(rank, lambda: psutil.Process().children()[0].kill()), step)


def vanishes(folder, step):
    before_step(on_rank(0, lambda: shutil.rmtree(folder)), step)


def dies_while_others_wait(rank, step):
    """The others wait for something else than gloo, which would notice by itself."""

    def action(training):
        if training.rank == rank:
            time.sleep(0.5)  # until the others wait, which makes no difference
            os._exit(7)
        time.sleep(1000)

    before_step(action, step)


# ---- Looking ---------------------------------------------------------------------------------------------------------
def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(run, count, launched):
    wait_for(lambda: lines(run / "metrics.jsonl") >= count, launched.said)


def everything(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != ".lock")


def whole_steps(run):
    """The checkpoints there are, all of which have to be whole."""
    steps = checkpoint.steps(run / "checkpoints")
    for step in steps:
        assert checkpoint.fault(checkpoint.folder_of(run / "checkpoints", step)) is None
    return steps


def one_line(launched, *parts, code=2):
    """All ranks end with `code`, and one line is written in all, which has these parts."""
    assert launched.wait() == [code] * len(launched.ranks), launched.said()
    said = launched.said()
    assert len(said) == 1, said
    for part in parts:
        assert part in said[0]
    return said[0]


# ---- Killed ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_twenty_times_and_none_the_worse(tmp_path):
    every, steps = 4, 100
    settings = [
        f"train.steps={steps}",
        f"checkpoint={{every: {every}, keep_last: 2}}",
        "ema.snapshot_every=10",
        "sample={every: 20, num: 2, steps: 1, method: euler}",
        "data.workers=1",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert Launched(2, straight, *settings).wait() == [0, 0]
    moments, furthest = random.Random(4), 0
    for i in range(20):
        if i % 4 == 0:  # perhaps while it starts
            launched = Launched(2, killed, *settings, patch=partial(hangs_at, furthest + 2))
            time.sleep(moments.uniform(0, 1.5))
        elif i % 4 == 1:  # while it saves
            launched = Launched(2, killed, *settings, patch=partial(saving_hangs, ("write_rank", "finish")[i // 4 % 2]))
            wait_for(lambda: any(killed.glob("*/.*.writing")), launched.said)
            time.sleep(moments.uniform(0, 0.25))
        else:  # while it trains and saves; it gets no further than 6 steps until it is killed
            launched = Launched(2, killed, *settings, patch=partial(hangs_at, furthest + 7))
            wait_for_steps(killed, furthest + 1, launched)
            time.sleep(moments.uniform(0, 0.25))
        launched.kill()
        done = lines(killed / "metrics.jsonl")
        if done:
            newest = max(whole_steps(killed), default=0)
            assert done - newest <= every, launched.said()
        furthest = max(furthest, done)
    assert furthest < steps, "there was nothing left to kill"
    assert Launched(2, killed, *settings).wait() == [0, 0]
    assert metrics(killed) == metrics(straight)
    assert [m["step"] for m in metrics(killed)] == list(range(1, steps + 1))
    assert same_bits(tensors(killed, steps), tensors(straight, steps))
    assert everything(killed) == everything(straight)
    for picture in (straight / "samples").iterdir():
        assert (killed / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.slow
def test_other_numbers_of_ranks_and_stages_continue_and_say_so(tmp_path):
    stage = "deepspeed.zero_optimization.stage={}".format
    assert Launched(1, tmp_path / "alone", "train.steps=8", "checkpoint.every=4", stage(1)).wait() == [0]
    cases = (((2, 1), (1, 1)), ((1, 0), (2, 2)), ((2, 3), (2, 1)))
    for n, ((ranks, zero), (later_ranks, later_zero)) in enumerate(cases):
        out = tmp_path / str(n)
        assert Launched(ranks, out, "train.steps=4", "checkpoint.every=4", stage(zero)).wait() == [0] * ranks
        rest = Launched(later_ranks, out, "train.steps=8", "checkpoint.every=4", stage(later_zero))
        assert rest.wait() == [0] * later_ranks
        assert rest.said() == [
            f"continuing from {out}/checkpoints/00000004, written by {ranks} ranks at ZeRO stage {zero}, "
            f"on {later_ranks} at stage {later_zero}"
        ]
        for m, expected in zip(metrics(out), metrics(tmp_path / "alone"), strict=True):
            assert m["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# ---- Stopped ---------------------------------------------------------------------------------------------------------
ENDLESS = ("train.steps=100000", "checkpoint.every=100000")


def test_a_signal_to_any_rank_saves_and_the_same_command_continues(tmp_path):
    for n, (number, ranks) in enumerate([(signal.SIGTERM, [1]), (signal.SIGUSR1, [0, 1]), (signal.SIGTERM, [0, 0])]):
        before = lines(tmp_path / "run" / "metrics.jsonl")
        told = tmp_path / f"told{n}"
        settings = *ENDLESS, "ema.snapshot_every=null"
        launched = Launched(2, tmp_path / "run", *settings, patch=partial(signals_while_saving, 1000, told))
        wait_for_steps(tmp_path / "run", before + 3, launched)
        for rank in ranks:  # the last of these twice, as by a scheduler and a launcher
            launched.signal(number, rank)
            time.sleep(0.2)  # else two might be one, which makes no difference
        told.touch()
        assert launched.wait() == [0, 0]
        step = lines(tmp_path / "run" / "metrics.jsonl")
        assert whole_steps(tmp_path / "run")[-1] == step
        ending = f"{number.name}: stopped and saved at step {step} of 100000: {tmp_path / 'run'}"
        assert [line for line in launched.said("out") if "stopped and saved" in line] == [ending]
        assert launched.said("out").count("the same command continues") == 1
        assert launched.said() == ([f"continuing from {tmp_path}/run/checkpoints/{before:08d}"] if n else [])


def test_an_echo_of_a_signal_after_saving_is_harmless():
    before = {number: signal.getsignal(number) for number in CAUGHT}
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    launched = Launched(1, tmp_path / "run", *ENDLESS, patch=partial(signals_while_saving, 0.5))
    wait_for_steps(tmp_path / "run", 2, launched)

    def ended():
        with suppress(ProcessLookupError):
            launched.signal(signal.SIGTERM)  # again and again: the first ones may be echoes
        return not launched.ranks[0].is_alive()

    wait_for(ended, launched.said)
    assert launched.wait() == [128 + signal.SIGTERM]
    assert whole_steps(tmp_path / "run") == []


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
    assert len(launched.said()) == 3
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
        later = Launched(2, tmp_path / "x0", *without, f"data.workers={workers}", patch=partial(stale_after, 9))
        one_line(later, "[Errno 116] Stale file handle: '/data'", code=1)


@pytest.mark.slow
def test_a_folder_that_vanishes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(150):
            Image.new("RGB", (16, 16), (i, i, 0)).save(tmp_path / "data" / name / f"{i}.png")
    images = ("data.kind=image_folder", f"data.path={tmp_path / 'data'}", "data.workers=1", *ENDLESS)
    vanishing = partial(vanishes, tmp_path / "data", 3)
    one_line(Launched(2, tmp_path / "run", *images, patch=vanishing), "could not be read", "No such file or directory")


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


# ---- Started wrongly -------------------------------------------------------------------------------------------------
def test_what_cannot_begin_is_said_once(tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    assert Launched(1, out, "train.steps=2", "checkpoint.every=2").wait() == [0]
    there = everything(out)
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    (tmp_path / "broken.yaml").write_text("train: [")
    one_line(Launched(2, arguments=["--bla"]), "train_ddp.py: error: unrecognized arguments: --bla")
    one_line(Launched(2, arguments=["--config", "shapes_tine"]), "did you mean shapes_tiny?")
    one_line(Launched(2, arguments=["--config", str(tmp_path / "broken.yaml")]), "broken.yaml")
    one_line(Launched(2, tmp_path / "new", "train.stepz=2"), "train.steps")
    one_line(Launched(2, tmp_path / "new", "train.global_batch_size=7"), "7 is not divisible by 2 ranks")
    one_line(Launched(2, out, "train.steps=4", "train.seed=1"), "train.seed: 0 there, 1 here")
    one_line(Launched(2, other), "not the folder of a run")
    for folder in (out, other / "nothing"):
        launched = Launched(2, arguments=[*words(tmp_path / "branch", "train.steps=4"), "--resume", str(folder)])
        one_line(launched, f"--resume {folder} is not a whole checkpoint: manifest.json is missing")
    one_line(Launched(2, arguments=[*words(out), "--resume", "never"]), "checkpoints up to step 2", "--out")
    config = partial(fault_on, 1, "load_config", InputError("run.yaml cannot be read"))
    one_line(Launched(2, tmp_path / "new", patch=config), "error: rank 1: run.yaml cannot be read")
    data = partial(fault_on, 0, "make_dataset", PermissionError(errno.EACCES, "Permission denied", "/data"))
    one_line(Launched(2, tmp_path / "new", patch=data), "error: [Errno 13] Permission denied: '/data'")
    assert everything(out) == there
    assert everything(other) == ["thesis.txt"]
    assert not (tmp_path / "new").exists()


def test_a_branch_of_another_run_begins_there_and_then_goes_on_by_itself(tmp_path):
    """The weights and the subspace are those of the other run, the settings need not be."""
    first, branch = tmp_path / "first", tmp_path / "branch"
    assert Launched(1, first, "train.steps=4", "checkpoint.every=2").wait() == [0]
    resume = ["--resume", str(first / "checkpoints" / "00000002")]
    settings = ("checkpoint.every=2", "subspace.images=32", "data.size=128", "optimizer.lr=0")
    assert Launched(1, arguments=[*words(branch, *settings, "train.steps=4"), *resume]).wait() == [0]
    again = Launched(1, arguments=[*words(branch, *settings, "train.steps=6"), *resume])
    assert again.wait() == [0]
    assert again.said() == [
        f"{branch} has checkpoints of its own, so it does not begin with {' '.join(resume)} again",
        f"continuing from {branch}/checkpoints/00000004",
    ]
    assert [m["step"] for m in metrics(branch)] == [3, 4, 5, 6]
    assert (branch / "subspace.safetensors").read_bytes() == (first / "subspace.safetensors").read_bytes()
    old, new = tensors(first, 2), tensors(branch, 4)
    assert all(torch.equal(old[key], new[key]) for key in old if key[0] == "weights")


def other_subspace(out):
    trained = Subspace.load(out / "subspace.safetensors")
    Subspace(-trained.basis, trained.scale, patch_size=8).save(out / "subspace.safetensors")


def more_images():
    from asymflow.data.shapes import Shapes

    count = Shapes.__len__
    Shapes.__len__ = lambda self: count(self) + 1


def elsewhere(folder):
    """A working folder of its own for each rank, as if on machines without a common disk."""
    (folder / os.environ["RANK"]).mkdir()
    os.chdir(folder / os.environ["RANK"])


def test_what_a_checkpoint_was_trained_with_has_to_be_there(tmp_path):
    out, settings = tmp_path / "run", ("checkpoint.every=2", "data.workers=0")
    assert Launched(2, out, *settings, "train.steps=2").wait() == [0, 0]
    there = everything(out)
    more = Launched(2, out, *settings, "train.steps=4", patch=more_images)
    one_line(more, "checkpoints/00000002 was trained on 256 images, and now there are 257, in another order")
    other_subspace(out)
    one_line(Launched(2, out, *settings), f"was trained with another subspace than {out}/subspace.safetensors")
    assert everything(out) == there


def test_machines_without_a_common_disk(tmp_path):
    launched = Launched(2, "run", "train.steps=2", patch=partial(elsewhere, tmp_path))
    one_line(launched, "rank 1 sees another run than rank 0: choose an --out on a file system that all share")
    assert everything(tmp_path) == ["0", "0/run", "0/run/config.yaml", "1"]


def test_snapshots_of_weights_that_were_lost_are_not_used(tmp_path):
    """The checkpoints after step 4 are gone; what training comes to then, with other masks of dropout, say, is new."""
    out, settings = tmp_path / "run", ("checkpoint={every: 4, keep_last: 9}", "ema.snapshot_every=3")
    assert Launched(1, out, *settings, "train.steps=12").wait() == [0]
    assert checkpoint.steps(out / "snapshots") == [3, 6, 9, 12]
    for step in (8, 12):
        shutil.rmtree(checkpoint.folder_of(out / "checkpoints", step))
    back = Launched(1, out, *settings, "train.steps=8")
    assert back.wait() == [0]
    assert back.said() == [
        f"continuing from {out}/checkpoints/00000004; later snapshots are put aside, as 00000006.abandoned and so on"
    ]
    left = ["00000003", "00000006", "00000008", "00000009.abandoned", "00000012.abandoned"]
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == left
    assert Launched(1, out, *settings, "train.steps=12").wait() == [0]
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == [*left[:3], "00000009", "00000012"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path):
    every = ("checkpoint={every: 2, keep_last: 1, keep_every: 2}", "ema.snapshot_every=2")
    out, settings = tmp_path / "run", ("train.steps=6", *every)
    assert Launched(2, out, *settings).wait() == [0, 0]
    expected, path = tensors(out, 6), out / "checkpoints" / "00000006" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = Launched(2, out, *settings)
    assert again.wait() == [0, 0]
    assert again.said() == [
        f"{path.parent} is damaged, not used, and now called 00000006.damaged: {path.name} is not as it was written",
        f"continuing from {out}/checkpoints/00000004; later snapshots are put aside, as 00000006.abandoned",
    ]
    assert same_bits(tensors(out, 6), expected)
    assert [m["step"] for m in metrics(out)] == list(range(1, 7))


@pytest.mark.slow
def test_two_trainings_in_one_folder(tmp_path):
    out = tmp_path / "run"
    first = Launched(2, out, *ENDLESS, "data.workers=1")
    wait_for_steps(out, 2, first)
    one_line(Launched(2, out, *ENDLESS), f"{out} is being trained in by process {first.ranks[0].pid} on ")
    steps = lines(out / "metrics.jsonl")
    wait_for_steps(out, steps + 2, first)
    first.kill()
    last = Launched(2, out, "train.steps=2", "checkpoint.every=100000")
    assert last.wait() == [0, 0]
    assert len(metrics(out)) == 2


# ---- Bereft ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [pytest.param("exit", marks=pytest.mark.slow), "kill"])
def test_a_rank_that_dies_ends_the_others(tmp_path, rank, how):
    launched = Launched(2, tmp_path / "run", *ENDLESS, patch=partial(dies, rank, 3, how))
    codes = launched.wait()
    assert codes[rank] == {"exit": 7, "kill": -signal.SIGKILL}[how]
    assert codes[1 - rank] == 1
    assert len(launched.said()) == 1, launched.said()
    assert f"rank {rank} died without a word" in launched.said()[0]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_in_one_rank_is_shown_once(tmp_path, rank):
    launched = Launched(
        3, tmp_path / "run", "train.global_batch_size=9", *ENDLESS, patch=partial(dies, rank, 3, "raise")
    )
    assert launched.wait() == [1, 1, 1]
    said = launched.said()
    assert said[-1] == f"train_ddp.py: error: rank {rank}: ValueError: such is life"
    assert sum(line.startswith("Traceback") for line in said) == 1


def waits_and_perhaps_fails(file, fails):
    waits_at(6, file)
    if fails:
        dies(1, 8, "raise")


def in_session(number):
    """The processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == number and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "failed", "stopped", "done"])
def test_nothing_is_left_running(tmp_path, how):
    """Each rank is the leader of a session, to which its workers belong."""
    settings = ("train.steps=8", "data.workers=2") if how == "done" else (*ENDLESS, "data.workers=2")
    looked = tmp_path / "looked"
    launched = Launched(2, tmp_path / "run", *settings, patch=partial(waits_and_perhaps_fails, looked, how == "failed"))
    wait_for_steps(tmp_path / "run", 5, launched)
    sessions = [rank.pid for rank in launched.ranks]
    assert [len(in_session(session)) for session in sessions] == [3, 3]
    looked.touch()
    if how == "killed":
        launched.signal(signal.SIGKILL, 1)
    elif how == "stopped":
        for session in sessions:
            os.killpg(session, signal.SIGTERM)  # the workers as well, as a scheduler does
    try:
        for rank in launched.ranks:
            rank.join(GUARD)
        codes = [rank.exitcode for rank in launched.ranks]
        assert codes == {"killed": [1, -signal.SIGKILL], "failed": [1, 1]}.get(how, [0, 0]), launched.said()
        wait_for(
            lambda: not any(in_session(session) for session in sessions),
            lambda: [in_session(session) for session in sessions],
        )
    finally:
        launched.kill()


def test_a_worker_that_dies_is_no_riddle(tmp_path):
    launched = Launched(2, tmp_path / "run", *ENDLESS, "data.workers=1", patch=partial(loses_a_worker, 1, 3))
    one_line(launched, "rank 1: DataLoader worker (pid", "(is there enough memory", code=1)


@pytest.mark.slow
def test_a_rank_that_dies_ends_those_that_would_wait_forever(tmp_path):
    launched = Launched(
        3, tmp_path / "run", "train.global_batch_size=9", *ENDLESS, patch=partial(dies_while_others_wait, 2, 3)
    )
    assert launched.wait() == [1, 1, 7]
    assert launched.said() == ["train_ddp.py: error: rank 2 died without a word: was it killed, or out of memory?"]
