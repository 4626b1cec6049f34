"""The folder of a run: what is in it, whether it belongs to the configuration, and what to continue from.

RUN/config.yaml             the resolved configuration
RUN/subspace.safetensors    the subspace that the model uses
RUN/metrics.jsonl           one object a step
RUN/evaluations.jsonl       one object an evaluation
RUN/checkpoints/00001000/   see checkpoint.py; one that was found damaged is renamed to 00001000.damaged
RUN/snapshots/00001000/     power-function averages for `asymflow ema`
RUN/samples/00001000.png    images from fixed noise
RUN/problems.log            images that could not be read, one object each
RUN/tensorboard, csv_monitor  what DeepSpeed's monitors write, if they are enabled
RUN/.lock                   held by the process that trains here
"""

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from asymflow import files
from asymflow.errors import InputError
from asymflow.training import checkpoint
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, dump, load_config
from asymflow.training.ranks import AgreedError, on_first, together

CONFIG, SUBSPACE = "config.yaml", "subspace.safetensors"
METRICS, PROBLEMS, EVALUATIONS = "metrics.jsonl", "problems.log", "evaluations.jsonl"
CHECKPOINTS, SNAPSHOTS, SAMPLES = "checkpoints", "snapshots", "samples"
LOCK = ".lock"


# ---- Opening ---------------------------------------------------------------------------------------------------------
def open_run(out: Path, config: Config) -> TextIO:
    """Write the configuration to a new run folder, or check that it is that of the run that is there already.

    Returns the lock, to be kept open as long as the run goes on. For rank 0 alone. Raises InputError.
    """
    path = out / CONFIG
    if not path.exists() and out.exists() and (not out.is_dir() or any(p for p in out.iterdir() if p.name[0] != ".")):
        raise InputError(f"{out} is not empty, and not the folder of a run (it has no {CONFIG}): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out / LOCK)
    if path.exists() and (differing := differences(load_config(path), config)):
        raise InputError(
            f"{out} belongs to another configuration ({'; '.join(differing)}): choose another --out, or the same "
            "settings"
        )
    clear_leftovers(out)
    with files.replacing(path) as beside:
        beside.write_text(dump(config))
    return lock


def hold(path: Path) -> TextIO:
    """Lock a file until the process ends, however it ends. Raises InputError if another process holds it.

    A POSIX lock: also over NFS, if the server keeps locks (version 4 does). Where no locks are to be had, it is not
    held, and nothing is said.
    """
    import fcntl  # not on Windows, where the other functions here are of use

    lock = path.open("a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise InputError(f"{path.parent} is being trained in by {lock.read().strip() or 'another process'}") from None
    except OSError:
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def clear_leftovers(out: Path) -> None:
    """Remove what processes that were killed were writing. Names of this form, with a dot, are ours alone."""
    for folder in (out / CHECKPOINTS, out / SNAPSHOTS):
        checkpoint.clear_leftovers(folder)
    for folder in (out, out / SAMPLES):
        for path in folder.glob(".*"):
            if re.fullmatch(r"\.\w+\.[0-9a-f]{8}\.\w+", path.name):  # of `files.replacing`
                path.unlink()


# ---- Continuing ------------------------------------------------------------------------------------------------------
def to_resume(out: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and remarks on those that are damaged. `resume`: auto, never, or a folder.

    Called by all ranks, which share the reading. Raises AgreedError.
    """
    folder = out / CHECKPOINTS
    steps = on_first(lambda: checkpoint.steps(folder), "looking for checkpoints")
    if resume == "never":
        if steps:
            raise AgreedError(
                f"{out} has checkpoints up to step {steps[-1]}, and --resume never would begin anew: choose another "
                "--out"
            )
        return None, []
    if resume != "auto":
        chosen = Path(resume)
        if reason := shared_fault(chosen):
            raise AgreedError(f"--resume {resume} is not a whole checkpoint: {reason}")
        step = checkpoint.Reader(chosen).state["step"]
        if steps and steps[-1] > step:
            raise AgreedError(
                f"{out} has checkpoints up to step {steps[-1]}, and --resume {resume} is of step {step}: choose "
                "another --out, or remove the later ones"
            )
        return chosen, []
    remarks = []
    for step in reversed(steps):
        candidate = checkpoint.folder_of(folder, step)
        reason = shared_fault(candidate)
        if not reason:
            return candidate, remarks
        aside = on_first(lambda damaged=candidate: put_aside(damaged), f"{candidate} is damaged ({reason}), but stays")
        remarks.append(f"{candidate} is damaged, not used, and now called {aside.name}: {reason}")
    return None, remarks


def shared_fault(folder: Path) -> str | None:
    rank, world = dist.get_rank(), dist.get_world_size()
    return next(filter(None, together(lambda: checkpoint.fault(folder, rank, world), f"checking {folder}")), None)


def put_aside(folder: Path) -> Path:
    """Out of the way of the checkpoint of that step that will be written again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)


# ---- Journals --------------------------------------------------------------------------------------------------------
class Journal:
    """A file of JSON objects, one a line, each of a step, that only grows. For rank 0.

    Opened to continue after `step`, it loses the lines of later steps, which are about to be taken again, and a last
    line that was cut off.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        whole = [line for line, entry in self.lines() if entry["step"] <= step]
        if path.exists() and path.read_bytes() != (content := b"".join(whole)):
            with files.replacing(path) as beside:
                beside.write_bytes(content)
        self.file = path.open("ab", buffering=0)

    def lines(self):
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                entry = json.loads(line)
                entry["step"] + 0
            except (ValueError, KeyError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            yield line, entry

    def entries(self) -> list[dict]:
        return [entry for _, entry in self.lines()]

    def add(self, entry: dict) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Before a checkpoint is written: what it continues from is on the disk, also after a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
