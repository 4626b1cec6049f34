"""Trainings that are killed, stopped and started wrongly, in real processes: what is left, and what is said."""

import errno
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from functools import partial

import psutil
import pytest
import torch
from processes import GUARD, Launched, metrics, same_bits, tensors, wait_for, words
from ways_to_end import (
    ENDLESS,
    dies,
    dies_while_others_wait,
    everything,
    fault_on,
    hangs_at,
    lines,
    loses_a_worker,
    one_line,
    saving_hangs,
    signals_while_saving,
    waits_at,
    whole_steps,
)

from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.run import checkpoint
from asymflow.training.run.signals import CAUGHT, Signals


# ---- Looking ---------------------------------------------------------------------------------------------------------
def wait_for_steps(run, count, launched):
    wait_for(lambda: lines(run / "metrics.jsonl") >= count, launched.said)


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


# ---- Started wrongly -------------------------------------------------------------------------------------------------
@pytest.mark.slow
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
    for folder, said in ((out, "a run: give one of its checkpoints, such as"), (other / "nothing", "no checkpoint")):
        launched = Launched(2, arguments=[*words(tmp_path / "branch", "train.steps=4"), "--resume", str(folder)])
        one_line(launched, f"--resume {folder} is {said}")
        assert not (tmp_path / "branch").exists()
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


def other_images():
    """As many of them."""
    from asymflow.data.shapes import Shapes

    Shapes.digest = "others"


def elsewhere(folder):
    """A working folder of its own for each rank, as if on machines without a common disk."""
    (folder / os.environ["RANK"]).mkdir()
    os.chdir(folder / os.environ["RANK"])


@pytest.mark.slow
def test_what_a_checkpoint_was_trained_with_has_to_be_there(tmp_path):
    out, settings = tmp_path / "run", ("checkpoint.every=2", "data.workers=0")
    assert Launched(2, out, *settings, "train.steps=2").wait() == [0, 0]
    there, about = everything(out), (out / "config.yaml").read_text()
    assert (out / "classes.json").exists()
    more = Launched(2, out, *settings, "train.steps=4", patch=more_images)
    one_line(more, "checkpoints/00000002 was trained on 256 images, and now there are 257, in another order")
    others = Launched(2, out, *settings, "train.steps=4", patch=other_images)
    one_line(others, "was trained on 256 images, and now they are others, by name or class: restore the data")
    other_subspace(out)
    one_line(Launched(2, out, *settings), f"was trained with another subspace than {out}/subspace.safetensors")
    assert everything(out) == there
    assert (out / "config.yaml").read_text() == about  # a start that is refused changes nothing


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
        f"continuing from {out}/checkpoints/00000004; later snapshots are put aside, as 00000006.abandoned and so on",
        f"{out}/metrics.jsonl: put aside, in metrics.jsonl.abandoned: 8 lines after step 4",
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
        f"{out}/metrics.jsonl: put aside, in metrics.jsonl.abandoned: 2 lines after step 4",
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
