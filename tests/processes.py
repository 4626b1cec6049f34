"""Runs train_ddp.py in real processes, as a launcher would start them, but without a launcher's start-up time."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from asymflow.data.batches import end_with_parent
from asymflow.training import checkpoint

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

# Several trainings in one start of two processes: importing torch and DeepSpeed takes longer than the steps.
MANY = """
import json, sys
from asymflow.training.start import main
import torch.distributed as dist
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    if code:
        sys.exit(code)
destroy()
"""


def words(out, *settings):
    """The arguments of train_ddp.py for a run in `out`, with the settings `a.b=c` on top of TINY."""
    return ["--out", str(out), *(word for setting in [*TINY, *settings] for word in ("--set", setting))]


def environment_of(world):
    """What a launcher tells all ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return {**common, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(world, *arguments, code=None, **environment):
    """Start `world` processes of train_ddp.py with these arguments, or of Python with `code`; return them."""
    command = [sys.executable, *(["-c", code] if code else [str(ROOT / "train_ddp.py")]), *map(str, arguments)]
    common = environment_of(world)
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(world)
    ]


def finish(workers, timeout=GUARD):
    """Wait for all, and return their exit codes and what rank 0, rank 1, ... wrote to stdout and stderr."""
    try:
        written = [worker.communicate(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
    return [worker.returncode for worker in workers], written


def train(world, out, *settings, config="shapes_tiny", timeout=GUARD, **environment):
    """Train, with the settings `a.b=c` on top of TINY, and return what rank 0 wrote. Fails unless all exit with 0."""
    words = [word for setting in [*TINY, *settings] for word in ("--set", setting)]
    codes, written = finish(start(world, "--config", config, "--out", out, *words, **environment), timeout)
    assert codes == [0] * world, written
    return written[0]


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
    return [
        {name: value for name, value in entry.items() if name not in ("images_per_second", "mfu")} for entry in entries
    ]


def tensors(run, step):
    """Everything in the checkpoint of a step, by (kind, parameter)."""
    reader = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", step))
    return {(kind, name): value for kind in reader.kinds() for name, value in reader.full(kind).items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# ---- The same without importing torch and DeepSpeed each time: forked from a process that has ------------------------
class Launched:
    """`world` ranks of train_ddp.py. patch: called in each before it begins; arguments: instead of those of `words`."""

    server = None

    def __init__(self, world, out=None, *settings, patch=None, arguments=None):
        if Launched.server is None:
            Launched.server = multiprocessing.get_context("forkserver")
            Launched.server.set_forkserver_preload(["deepspeed", "asymflow.training.start"])
        self.folder = Path(tempfile.mkdtemp())
        common, argv = environment_of(world), words(out, *settings) if arguments is None else list(arguments)
        self.ranks = []
        for rank in range(world):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = Launched.server.Process(target=one_rank, args=(argv, environment, self.folder / str(rank), patch))
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
        """What all ranks wrote to stderr, or stdout ("out"), without progress bars and warnings of libraries."""
        text = "\n".join((self.folder / f"{rank}.{stream}").read_text() for rank in range(len(self.ranks)))
        lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
        lines = [line for line in lines if not re.match(r"training:|.*: +\d+%\|", line)]  # bars
        return [line for line in lines if line.strip() and not line.startswith(("[W", "[rank"))]


def one_rank(argv, environment, log, patch):
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()  # a pytest that is killed leaves no training behind
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    from asymflow.training.start import main

    if patch:
        patch()
    sys.exit(main(argv))
