"""The folder of a run: what is in it, whether it belongs to the configuration, and what to continue from.

RUN/config.yaml             the resolved configuration
RUN/subspace.safetensors    the subspace that the model uses
RUN/metrics.jsonl           one object a step
RUN/evaluations.jsonl       one object an evaluation
RUN/checkpoints/00001000/   see checkpoint.py; one that was found damaged is renamed to 00001000.damaged
RUN/snapshots/00001000/     power-function averages for `asymflow ema`; 00001000.abandoned: from before the training
                            went on from an earlier step, and until it comes to this one again
RUN/samples/00001000.png    images from fixed noise
RUN/problems.log            images that could not be read, one object each
RUN/tensorboard, csv_monitor  what DeepSpeed's monitors write, if they are enabled
RUN/.lock                   held by the process that trains here
"""

import json
import os
import re
import secrets
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from asymflow import files
from asymflow.errors import InputError
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, dump, load_config
from asymflow.training.run import checkpoint
from asymflow.training.run.ranks import AgreedError, on_first, together

CONFIG, SUBSPACE = "config.yaml", "subspace.safetensors"
METRICS, PROBLEMS, EVALUATIONS = "metrics.jsonl", "problems.log", "evaluations.jsonl"
CHECKPOINTS, SNAPSHOTS, SAMPLES = "checkpoints", "snapshots", "samples"
LOCK, ABANDONED = ".lock", "abandoned"


# ---- Opening ---------------------------------------------------------------------------------------------------------
def open_run(out: Path, config: Config) -> TextIO:
    """Write the configuration to a new run folder, or check that it is that of the run that is there already.

    Returns the lock, to be kept open as long as the run goes on. For rank 0 alone. Raises InputError.
    """
    path = out / CONFIG
    if not path.exists() and out.exists() and (not out.is_dir() or any(p for p in out.iterdir() if p.name[0] != ".")):
        raise InputError(f"{out} is not empty, and not the folder of a run (it has no {CONFIG}): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    lock = files.hold(out / LOCK, "is being trained in")
    if path.exists() and (differing := differences(load_config(path), config)):
        raise InputError(
            f"{out} belongs to another configuration ({'; '.join(differing)}): choose another --out, or the same "
            "settings"
        )
    clear_leftovers(out)
    with files.replacing(path) as beside:
        beside.write_text(dump(config))
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
    """The checkpoint to continue from, and remarks. `resume`: auto, never, or the checkpoint that the run begins with.

    Called by all ranks, which share the reading. Raises AgreedError, and then has changed nothing.
    """
    check_shared(out)
    folder = out / CHECKPOINTS
    steps = on_first(lambda: checkpoint.steps(folder), "looking for checkpoints")
    if steps and resume == "never":
        raise AgreedError(
            f"{out} has checkpoints up to step {steps[-1]}, and --resume never would begin anew: choose another --out"
        )
    if steps:
        chosen, remarks = newest_whole(folder, steps)
        if resume != "auto":
            remarks.append(f"{out} has checkpoints of its own, so it does not begin with --resume {resume} again")
        return chosen, remarks
    if resume not in ("auto", "never"):
        if reason := shared_fault(Path(resume)):
            raise AgreedError(f"--resume {resume} is not a whole checkpoint: {reason}")
        return Path(resume), []
    abandoned = on_first(lambda: abandon_snapshots(out, 0), "old snapshots stay")
    return None, [f"{out} has no checkpoint: training begins anew{abandoned}"] if abandoned else []


def check_shared(out: Path) -> None:
    """AgreedError unless all ranks see the same folder: else each machine would write checkpoints that are not whole.

    By a file of a name that no machine can remember not to have seen, and that `clear_leftovers` removes.
    """
    token = out / on_first(lambda: f".shared.{secrets.token_hex(4)}.token")
    on_first(token.touch)
    seen = together(token.exists)
    on_first(token.unlink)
    if not all(seen):
        raise AgreedError(
            f"rank {seen.index(False)} sees another {out} than rank 0: choose an --out on a file system that all share"
        )


def newest_whole(folder: Path, steps: list[int]) -> tuple[Path, list[str]]:
    """Of the checkpoints in `folder`; later ones are put aside, and remarked upon. AgreedError if none is whole."""
    faults = {}
    for step in reversed(steps):
        candidate = checkpoint.folder_of(folder, step)
        faults[candidate] = shared_fault(candidate)
        if not faults[candidate]:
            break
    else:
        said = "; ".join(f"{path.name}: {reason}" for path, reason in list(faults.items())[:5])
        raise AgreedError(
            f"no checkpoint in {folder} is whole ({said}). Nothing was changed. To begin anew, choose another --out or "
            f"move {folder} away"
        )
    remarks = []
    for path, reason in list(faults.items())[:-1]:
        aside = on_first(lambda path=path: put_aside(path, "damaged"), f"{path} is damaged ({reason}), but stays")
        remarks.append(f"{path} is damaged, not used, and now called {aside.name}: {reason}")
    return candidate, remarks


def shared_fault(folder: Path) -> str | None:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = together(lambda: checkpoint.fault(folder, rank, world), f"{folder} cannot be read, and stays as it is")
    return next(filter(None, found), None)


def put_aside(folder: Path, why: str) -> Path:
    """Out of the way of the one of that step that will be written again: its new name."""
    aside = folder.with_name(f"{folder.name}.{why}")
    if aside.exists():
        checkpoint.remove(aside)
    return folder.rename(aside)


def abandon_snapshots(out: Path, step: int) -> str:
    """Put aside the snapshots after `step`, from which training goes on: they are of weights that will not come again.

    Not removed, until they are taken again: somebody may have gone back by mistake. Returns what to say of it.
    """
    folder = out / SNAPSHOTS
    later = [checkpoint.folder_of(folder, taken) for taken in checkpoint.steps(folder) if taken > step]
    names = [put_aside(path, ABANDONED).name for path in later]
    return f"; later snapshots are put aside, as {names[0]}" + " and so on" * (len(names) > 1) if names else ""


def forget_abandoned(snapshot: Path) -> None:
    """Of a step that has been reached again."""
    if (abandoned := snapshot.with_name(f"{snapshot.name}.{ABANDONED}")).exists():
        checkpoint.remove(abandoned)


# ---- Journals --------------------------------------------------------------------------------------------------------
class Journal:
    """A file of JSON objects, one a line, each of a step, that only grows. For rank 0.

    Opened to continue after `step`, it loses the lines of later steps, which are about to be taken again, and a last
    line that was cut off. Other lines that make no sense, of a disk or a user, are left alone.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        *whole, _ = content.split(b"\n")
        kept = (line for line in whole if (entry_of(line) or {"step": 0})["step"] <= step)
        if content != (wanted := b"".join(line + b"\n" for line in kept)):
            with files.replacing(path) as beside:
                beside.write_bytes(wanted)
        self.file = path.open("ab", buffering=0)

    def entries(self) -> list[dict]:
        return [entry for line in self.path.read_bytes().split(b"\n") if (entry := entry_of(line))]

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


def entry_of(line: bytes) -> dict | None:
    """None if the line is none of ours, or damaged."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
