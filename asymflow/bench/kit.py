"""Checks that run one after the other, each by itself: what one of them raises is written down, and the next begins."""

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

from asymflow.bench.trainings import FailedError, Trainings

PASSED, MEASURED, FAILED, ERROR, NOT_RUN = "passed", "measured", "FAILED", "error", "not run"
PACKAGES = ("deepspeed", "pydantic", "yaml")  # without which nothing can be trained


class WrongError(Exception):
    """A check found that something is not right: what, and the figures that show it."""

    def __init__(self, what: str, figures: dict | None = None):
        super().__init__(what)
        self.figures = figures or {}


class NotRunError(Exception):
    """A check cannot be done here: why."""


@dataclass
class Kit:
    """What the checks share. work: a folder that is removed in the end. deadline: of `time.monotonic`."""

    device: torch.device
    tiny: bool
    work: Path
    trainings: Trainings
    deadline: float
    limits: dict = field(default_factory=dict)
    """Measured in this run: `matmul` in FLOPs a second, `copy` in bytes a second, both ways counted."""

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
    """function: given a Kit, returns (summary, figures). seconds: that it takes on an H100, at least, about.

    measures: it says how fast something is, and not whether it is right.
    """

    name: str
    function: Callable[[Kit], tuple[str, dict]]
    seconds: float
    measures: bool = False


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
        kit.trainings.end()  # its process may hold what the training had
    release(kit)
    return Result(check.name, status, summary, figures, time.monotonic() - started)


def release(kit: Kit) -> None:
    """What a check left behind: memory of the GPU in this process, and folders."""
    if kit.cuda:
        with suppress(RuntimeError):  # the GPU is no longer usable from here: the next check will say so
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
    """gpu.json and gpu.md, anew after every check."""
    found = {**about, "limits": limits, "checks": [asdict(result) for result in results]}
    (folder / "gpu.json").write_text(json.dumps(found, indent=2, default=str) + "\n")
    (folder / "gpu.md").write_text(as_markdown(about, results))


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
