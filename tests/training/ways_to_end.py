"""What is done to each rank before it begins, and what is looked at afterwards."""

import os
import signal
import time

import psutil
from processes import wait_for

from asymflow.training.run import checkpoint, signals


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


def dies_while_others_wait(rank, step):
    """The others wait for something else than gloo, which would notice by itself."""

    def action(training):
        if training.rank == rank:
            time.sleep(0.5)  # until the others wait, which makes no difference
            os._exit(7)
        time.sleep(1000)

    before_step(action, step)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def everything(run):
    """The names of all files of a run, but for what it put aside when it was resumed."""
    paths = [path for path in run.rglob("*") if path.name != ".lock" and not path.name.endswith("l.abandoned")]
    return sorted(str(path.relative_to(run)) for path in paths)


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


ENDLESS = ("train.steps=100000", "checkpoint.every=100000")
