"""The folder of a run: its files, whether it belongs to the configuration, and the checkpoint to resume from.

RUN/config.yaml             the resolved configuration
RUN/subspace.safetensors    the subspace that the model uses
RUN/classes.json            the names of the classes, by number, if the data has names
RUN/metrics.jsonl           one object a step
RUN/evaluations.jsonl       one object an evaluation
RUN/checkpoints/00001000/   see checkpoint.py; a damaged one is renamed to 00001000.damaged
RUN/snapshots/00001000/     power-function averages for `asymflow ema`. If training goes back to an earlier step, it is
                            renamed to 00001000.abandoned, and removed when training reaches step 1000 again
RUN/samples/00001000.png    images from fixed noise
RUN/problems.log            images that could not be read, one object each
RUN/metrics.jsonl.abandoned what was written of later steps, if training went back; so for the two others, and samples
RUN/tensorboard, csv_monitor  what DeepSpeed's monitors write, if they are enabled
RUN/.lock                   held by the process that trains here
"""

import json
import os
import re
import secrets
from functools import partial
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from pydantic import ValidationError

from asymflow import files, opening
from asymflow.averages import Profile
from asymflow.errors import InputError
from asymflow.progress import progress_bar
from asymflow.text import count
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, dump, load_config
from asymflow.training.run import checkpoint
from asymflow.training.run.ranks import AgreedError, gather, rank0_broadcast

CONFIG, SUBSPACE, CLASSES = "config.yaml", "subspace.safetensors", "classes.json"
JOURNALS = METRICS, PROBLEMS, EVALUATIONS = "metrics.jsonl", "problems.log", "evaluations.jsonl"
CHECKPOINTS, SNAPSHOTS, SAMPLES = "checkpoints", "snapshots", "samples"
MOST_JOURNAL = 2**33  # bytes
LOCK, ABANDONED = ".lock", "abandoned"


def differences_of_state(state: dict, config: Config) -> list[str]:
    """What makes `config` another training than the one whose checkpoint has this state.json.

    Empty if the state does not say: checkpoints of earlier versions have no configuration.
    """
    try:
        return differences(Config.model_validate(state["config"]), config)
    except (KeyError, ValidationError):
        return []


# ---- Opening ---------------------------------------------------------------------------------------------------------
def open_run(out: Path, config: Config) -> TextIO:
    """Make a new run folder with the configuration, or check that an existing run has the same.

    Returns the lock, to be kept open as long as the run goes on. For rank 0 alone. Raises InputError if the folder is
    not a run's, has another configuration, or is in use.
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
    if not path.exists():
        write_about(out, config, [])
    return lock


def write_about(out: Path, config: Config, class_names: list[str]) -> None:
    """Write the configuration, of which some keys may change, and the names of the classes, if the data has names."""
    with files.replacing(out / CONFIG) as beside:
        beside.write_text(dump(config))
    if class_names:
        with files.replacing(out / CLASSES) as beside:
            beside.write_text(json.dumps(class_names, indent=1) + "\n")


def clear_leftovers(out: Path) -> None:
    """Remove what earlier processes were writing when they were killed. Nobody else uses these names with a dot."""
    for folder in (out / CHECKPOINTS, out / SNAPSHOTS):
        checkpoint.clear_leftovers(folder)
    for folder in (out, out / SAMPLES):
        for path in folder.glob(".*"):
            ours = files.TEMPORARY.fullmatch(path.name)
            of_check_shared = re.fullmatch(r"\.\w+\.[0-9a-f]{8}\.\w+", path.name)  # and of earlier versions
            if (ours or of_check_shared) and not path.is_dir():  # a folder may be what `asymflow export` is writing
                path.unlink()


# ---- Continuing ------------------------------------------------------------------------------------------------------
def checkpoint_to_resume(out: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None, and remarks for the user. resume: the option --resume.

    Called by all ranks; they share the work of reading. Raises AgreedError if `resume` is impossible or no checkpoint
    is whole; then no file has been changed.
    """
    check_shared(out)
    folder = out / CHECKPOINTS
    steps = rank0_broadcast(lambda: checkpoint.steps(folder), "looking for checkpoints")
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
    abandoned = rank0_broadcast(lambda: abandon_snapshots(out, 0), "old snapshots stay")
    begun = rank0_broadcast(lambda: any((out / name).exists() and (out / name).stat().st_size for name in JOURNALS))
    anew = abandoned or begun
    return None, [f"{out} has no checkpoint: training begins anew{abandoned}"] if anew else []


def check_resume(out: Path, resume: str, config: Config) -> None:
    """InputError if a new run cannot begin with the option --resume, as far as its place and its state tell."""
    if resume in ("auto", "never") or checkpoint.steps(out / CHECKPOINTS):
        return
    if steps := checkpoint.steps(Path(resume) / CHECKPOINTS):
        newest = checkpoint.folder_of(Path(resume) / CHECKPOINTS, steps[-1])
        raise InputError(f"--resume {resume} is a run: give one of its checkpoints, such as {newest}")
    if not (Path(resume) / checkpoint.MANIFEST).is_file():
        raise InputError(f"--resume {resume} is no checkpoint: give a folder such as RUN/checkpoints/00001000")
    state = checkpoint.read_state(Path(resume))
    if "images" not in state:
        raise InputError(f"--resume {resume} is a snapshot of averages: give a checkpoint, RUN/checkpoints/00001000")
    asked = [Profile(decay=decay).name for decay in config.ema.decays]
    asked += [Profile(sigma_rel=width).name for width in config.ema.sigma_rel]
    if missing := [name for name in asked if name not in state["averages"]]:
        has = ", ".join(state["averages"]) or "none"
        raise InputError(f"--resume {resume} has no average {missing[0]}, which ema asks for: it has {has}")


def check_shared(out: Path) -> None:
    """AgreedError unless all ranks see the same folder. Otherwise each machine would keep only a part of a checkpoint.

    Rank 0 makes a file, and all look for it. Its name is random: a network file system may remember for a while that a
    file of a known name did not exist.
    """
    token = out / rank0_broadcast(lambda: f".shared.{secrets.token_hex(4)}.token")
    rank0_broadcast(token.touch)
    seen = gather(token.exists)
    rank0_broadcast(token.unlink)
    if not all(seen):
        raise AgreedError(
            f"rank {seen.index(False)} sees another {out} than rank 0: choose an --out on a file system that all share"
        )


def newest_whole(folder: Path, steps: list[int]) -> tuple[Path, list[str]]:
    """The newest undamaged checkpoint in `folder`. Newer, damaged ones are renamed, with a remark for each.

    Raises AgreedError if all are damaged; then nothing is renamed.
    """
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
        failure = f"{path} is damaged ({reason}), but stays"
        aside = rank0_broadcast(lambda path=path: put_aside(path, "damaged"), failure)
        remarks.append(f"{path} is damaged, not used, and now called {aside.name}: {reason}")
    return candidate, remarks


def shared_fault(folder: Path) -> str | None:
    """As `checkpoint.fault`, with the files shared out among the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shown = partial(progress_bar, desc="checking the checkpoint", unit="file", silent=rank > 0)
    found = gather(lambda: checkpoint.fault(folder, rank, world, shown), f"{folder} cannot be read, and stays as it is")
    return next(filter(None, found), None)


def put_aside(folder: Path, why: str) -> Path:
    """Rename to FOLDER.why, so that the same step can be written again. Returns the new path."""
    aside = folder.with_name(f"{folder.name}.{why}")
    if aside.exists():
        checkpoint.remove(aside)
    return folder.rename(aside)


def abandon_snapshots(out: Path, step: int) -> str:
    """Rename the snapshots and samples after `step`, from which training resumes: the weights will change.

    Snapshots are removed only when training reaches their step again, in case somebody went back by mistake. Returns a
    remark for the user, empty if there are none.
    """
    folder, remark = out / SNAPSHOTS, ""
    snapshots = [checkpoint.folder_of(folder, taken) for taken in checkpoint.steps(folder) if taken > step]
    pictures = sorted(p for p in (out / SAMPLES).glob("*.png") if p.stem.isdecimal() and int(p.stem) > step)
    aside = {"snapshots": [put_aside(path, ABANDONED) for path in snapshots]}
    aside["samples"] = [picture.rename(f"{picture}.{ABANDONED}") for picture in pictures]
    for kind, paths in aside.items():
        if names := [path.name for path in paths]:
            remark += f"; later {kind} are put aside, as {names[0]}" + " and so on" * (len(names) > 1)
    return remark


def forget_abandoned(snapshot: Path) -> None:
    """Remove the abandoned snapshot of this step, now that there is a new one."""
    if (abandoned := snapshot.with_name(f"{snapshot.name}.{ABANDONED}")).exists():
        checkpoint.remove(abandoned)


# ---- Journals --------------------------------------------------------------------------------------------------------
class Journal:
    """A file of JSON objects, one on each line, with the key "step". Lines are only ever added. For rank 0.

    When it is opened to continue after `step`, lines of later steps go to the end of a file beside it, NAME.abandoned,
    because these steps will be taken again, and `remark` says so; a last line that was cut off is removed. Any other
    line that cannot be read stays.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        content = opening.read_bytes(path, most=MOST_JOURNAL) if path.exists() else b""
        *whole, _ = content.split(b"\n")
        kept, later = [], []
        for line in whole:
            (kept if (entry_of(line) or {"step": 0})["step"] <= step else later).append(line + b"\n")
        aside = path.with_name(f"{path.name}.{ABANDONED}")
        lines = f"{count(len(later), 'line')} after step {step}"
        self.remark = f"{path}: put aside, in {aside.name}: {lines}" if later else ""
        if content != (wanted := b"".join(kept)):
            if later:
                with aside.open("ab") as file:
                    file.write(b"".join(later))
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
        """Flush to the disk. Called before a checkpoint is written: what comes before it must survive a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def entry_of(line: bytes) -> dict | None:
    """The JSON object in a line; None if there is none, or it has no step."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
