"""Runs train_ddp.py in real processes, as a launcher would start them, but without a launcher's start-up time."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from asymflow.training.loader import end_with_parent
from asymflow.training.run import checkpoint

ROOT = Path(__file__).parent.parent
GUARD = 600  # seconds after which a test that waits for something gives up: far more than it ever takes
TINY = [  # a model that takes milliseconds a step
    "model.size=tiny/8",
    "model.image_size=16",
    "model.options={width: 32, depth: 2, heads: 2, bottleneck: 16, in_context_start: 1, in_context_tokens: 2}",
    "subspace.images=64",
    "data.size=256",
    "train.global_batch_size=8",
    "ema.decays=[0.5, 0.9]",
    "sample.every=null",
    "optimizer.warmup_steps=2",
]

SPEED = ("images_per_second", "waiting", "mfu")  # of the metrics


def words(out, *settings):
    """The arguments of train_ddp.py for a run in `out`, with the settings `a.b=c` on top of TINY."""
    return ["--out", str(out), *(word for setting in [*TINY, *settings] for word in ("--set", setting))]


def environment_of(world):
    """What a launcher tells all ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return {**place, "CUDA_VISIBLE_DEVICES": ""}


def train(world, *trainings, patch=None, timeout=GUARD):
    """Run these trainings, each the arguments of train_ddp.py, one after the other. Fails unless all exit with 0.

    Returns what the processes wrote to stderr, as `Launched.said`.
    """
    launched = Launched(world, trainings=trainings, patch=patch)
    assert launched.wait(timeout) == [0] * world, launched.said()
    return launched.said()


def slow_unless(quick, names):
    """The names as parameters of a test, which is slow for those that are not in `quick`."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def wait_for(event, said=lambda: ""):
    """Until `event()` is true. said: what to show if it never is."""
    until = time.monotonic() + GUARD
    while not event():
        assert time.monotonic() < until, said()
        time.sleep(0.02)


# ---- What is left of a run -------------------------------------------------------------------------------------------
def metrics(run):
    """All of each step but how fast it was."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in SPEED} for entry in entries]


def tensors(run, step):
    """Everything in the checkpoint of a step, by (kind, parameter)."""
    reader = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", step))
    return {(kind, name): value for kind in reader.kinds() for name, value in reader.full(kind).items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# ---- Processes, forked from one that has imported torch and DeepSpeed, which takes longer than a training ------------
class Launched:
    """`world` ranks of train_ddp.py, with the arguments of `words`, or these, or with those of several trainings.

    Several are run one after the other; the first that does not exit with 0 is the last. patch: called in each rank
    before it begins.
    """

    server = None

    def __init__(self, world, out=None, *settings, patch=None, arguments=None, trainings=None):
        if Launched.server is None:
            Launched.server = server()
        self.folder = Path(tempfile.mkdtemp())
        common = environment_of(world)
        if trainings is None:
            trainings = [words(out, *settings) if arguments is None else arguments]
        self.ranks = []
        for rank in range(world):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = Launched.server.Process(
                target=one_rank, args=(trainings, environment, self.folder / str(rank), patch)
            )
            process.start()
            self.ranks.append(process)

    def signal(self, number, *ranks):
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid, number)

    def kill(self):
        """All at once, and the workers that they started."""
        for process in self.ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # it has no group of its own yet
        for process in self.ranks:
            process.join()

    def wait(self, timeout=GUARD):
        """Their exit codes."""
        until = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.kill()
        assert not hanging, f"ranks {hanging} did not end; {self.said()}"
        return [process.exitcode for process in self.ranks]

    def said(self, stream="err"):
        """What all ranks wrote to stderr, or stdout ("out"), without progress, how much data there is, and warnings of
        libraries."""
        text = "\n".join((self.folder / f"{rank}.{stream}").read_text() for rank in range(len(self.ranks)))
        lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
        progress = (
            r"step \d+ of \d+: |.*: +\d+%\||.*: [\d,]+ of [\d,]+ \w+, |looking through the data$|making the model"
        )
        lines = [line for line in lines if not re.match(rf"{progress}|[\d,]+ images of \d+ classes", line)]
        return [line for line in lines if line.strip() and not line.startswith(("[W", "[rank"))]


def server():
    """A multiprocessing context whose processes are forked from one that has imported `preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
        forkserver.ensure_running()  # before Python 3.13 it knows no other places, and passes over what it cannot find
    return context


def one_rank(trainings, environment, log, patch):
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()  # a pytest that is killed leaves no training behind
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    from asymflow.training.start import main

    if patch:
        patch()
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the next training uses it, too
    for argv in trainings[:-1]:
        if code := main(list(map(str, argv))):
            sys.exit(code)
    dist.destroy_process_group = destroy
    sys.exit(main(list(map(str, trainings[-1]))))
