"""Running checks one after the other. If one fails, its error is written down, and the next begins."""

import argparse
import importlib.util
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from asymflow import files
from asymflow.bench.trainings import FailedError, Trainings

PASSED, MEASURED, FAILED, ERROR, NOT_RUN = "passed", "measured", "FAILED", "error", "not run"
PACKAGES = ("deepspeed", "pydantic", "yaml")  # every training needs them


class WrongError(Exception):
    """A check found something wrong. figures: the numbers that show it."""

    def __init__(self, what: str, figures: dict | None = None):
        super().__init__(what)
        self.figures = figures or {}


class NotRunError(Exception):
    """A check cannot be run here. The message says why."""


@dataclass
class Kit:
    """What the checks share. args: of the command line. work: a temporary folder. deadline: on `time.monotonic`."""

    device: torch.device
    args: argparse.Namespace
    work: Path
    trainings: Trainings
    deadline: float
    limits: dict = field(default_factory=dict)
    """Measured in this run: `matmul` in FLOPs a second, `copy` in bytes a second, read and written."""

    @property
    def tiny(self) -> bool:
        return self.args.tiny

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def on_a_gpu(self) -> None:
        if not self.cuda:
            raise NotRunError("not on a CPU")

    def need(self, *packages: str) -> None:
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            raise NotRunError(f"not installed: {', '.join(missing)}")

    def train(self, name: str, settings: dict, config: str = "shapes_tiny", **watch) -> dict:
        """A run of train_ddp.py in the folder `name`: see `Trainings.run`."""
        self.need(*PACKAGES)
        return self.trainings.run(self.work / name, config, settings, timeout=max(self.left, 5), **watch)


@dataclass
class Check:
    """A check. function: gets a Kit, and returns (summary, figures). seconds: about how long it takes on an H100.

    measures: whether it measures a speed, instead of checking that something is right. anywhere: whether a CPU does it
    in minutes, even if not `--tiny`.
    """

    name: str
    function: Callable[[Kit], tuple[str, dict]]
    seconds: float
    measures: bool = False
    anywhere: bool = False


@dataclass
class Result:
    name: str
    status: str
    summary: str
    figures: dict
    seconds: float


def run(check: Check, kit: Kit) -> Result:
    started, figures = time.monotonic(), {}
    bad = ERROR if check.measures else FAILED
    if not (kit.cuda or kit.tiny or check.anywhere):
        return Result(check.name, NOT_RUN, "on a CPU it would take hours: give --tiny", {}, 0.0)
    if kit.left < check.seconds:
        why = f"{kit.left:.0f} s were left, and it takes about {check.seconds:.0f}"
        return Result(check.name, NOT_RUN, why, {}, 0.0)
    try:
        summary, figures = check.function(kit)
        status = MEASURED if check.measures else PASSED
    except NotRunError as e:
        status, summary = NOT_RUN, str(e)
    except WrongError as e:
        status, summary, figures = bad, str(e), e.figures
    except FailedError as e:
        cut = kit.left <= 0
        status, summary = (NOT_RUN, f"cut off, the time was up: {e}") if cut else (bad, str(e))
    except Exception as e:
        status, summary = bad, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        figures = {"traceback": traceback.format_exc()}
    if status == bad and kit.trainings:
        kit.trainings.end()  # its process may still hold the memory of the failed training
    release(kit)
    return Result(check.name, status, summary, figures, time.monotonic() - started)


def release(kit: Kit) -> None:
    """Free what a check left behind: GPU memory of this process, and folders."""
    if kit.cuda:
        with suppress(RuntimeError):  # if the GPU has become unusable, the next check will fail and say so
            torch.cuda.empty_cache()
    for path in kit.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- The report ------------------------------------------------------------------------------------------------------
def write(folder: Path, about: dict, limits: dict, results: list[Result]) -> None:
    """Write bench.json and bench.md. Called after every check."""
    found = {**about, "limits": limits, "checks": [asdict(result) for result in results]}
    texts = {"bench.json": json.dumps(found, indent=2, default=str) + "\n", "bench.md": as_markdown(about, results)}
    for name, text in texts.items():
        with files.replacing(folder / name) as beside:
            beside.write_text(text)


def as_markdown(about: dict, results: list[Result]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']}, driver {about['driver']}, {versions}, commit {about['commit']}, {about['date']}.",
        "",
        "| check | status | what came out | seconds |",
        "|---|---|---|---|",
    ]
    for r in results:
        summary = r.summary.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {r.name} | {r.status} | {summary} | {r.seconds:.1f} |")
    return "\n".join(lines) + "\n"
