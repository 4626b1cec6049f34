"""Does everything work on this GPU, and how fast? `python -m asymflow.bench gpu --out DIR`, in a few minutes.

Trainings are run by the real train_ddp.py, on generated images. DIR/gpu.json has all figures, DIR/gpu.md a table of
them; both are rewritten after every check. The most important checks come first; those for which there is no time left
are listed as not run. The exit code is 1 if a check failed.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from asymflow.bench import fast, kit, right
from asymflow.bench.trainings import Trainings
from asymflow.cli.common import at_least, default_device, usable_device
from asymflow.errors import InputError
from asymflow.parser import Parser

VERSIONS = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "lpips", "numpy")
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # torch.use_deterministic_algorithms requires it


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m asymflow.bench gpu", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and gpu.log")
    p.add_argument("--minutes", type=at_least(1), default=8, metavar="N", help="no check goes on after these")
    p.add_argument("--tiny", action="store_true", help="the same in small, which takes two minutes on a CPU")
    p.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    p.add_argument("--only", metavar="WORDS", help="the checks whose names have one of these, such as ZeRO,memory")
    args = p.parse_args(argv)
    try:
        device = usable_device(args.device)
        if device.type == "cpu" and not args.tiny:
            raise InputError("on a CPU it takes --tiny: the real sizes would take days")
        checks = chosen(args.only)
        args.out.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as e:
        p.error(str(e))
    return run(args, device, checks)


def run(args: argparse.Namespace, device: torch.device, checks: list[kit.Check]) -> int:
    deadline = time.monotonic() + 60 * args.minutes
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    about, results = description(device), []
    with (
        tempfile.TemporaryDirectory(prefix="asymflow-bench-") as work,
        Trainings(args.out / "gpu.log", **DETERMINISTIC, **hidden) as trainings,
    ):
        tools = kit.Kit(device, args.tiny, Path(work), trainings, deadline)
        for check in checks:
            print(f"{tools.left:5.0f} s left: {check.name} ...", flush=True)
            results.append(kit.run(check, tools))
            result = results[-1]
            print(f"             {result.status} in {result.seconds:.0f} s: {result.summary}", flush=True)
            kit.write(args.out, about, tools.limits, results)
    failed = [result.name for result in results if result.status in (kit.FAILED, kit.ERROR)]
    print(f"wrote {args.out / 'gpu.json'} and {args.out / 'gpu.md'}")
    print(f"FAILED: {', '.join(failed)}" if failed else "nothing that was checked is wrong")
    return 1 if failed else 0


def chosen(only: str | None) -> list[kit.Check]:
    words = only.lower().split(",") if only else [""]
    checks = [*right.CHECKS, *fast.CHECKS]
    for word in words:
        if not any(word in check.name.lower() for check in checks):
            names = ", ".join(check.name for check in checks)
            raise InputError(f"--only {word}: in the name of no check, which are {names}")
    limits = fast.CHECKS[0]  # always, because the other measurements are compared with it
    return [check for check in checks if check is limits or any(word in check.name.lower() for word in words)]


def description(device: torch.device) -> dict:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    versions["python"] = sys.version.split()[0]
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "driver": asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "cuda": torch.version.cuda if cuda else None,
        "versions": versions,
        "commit": asked("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def asked(*command: str) -> str:
    """The first line that a program prints, or "unknown" if it cannot be run."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (said.splitlines() or ["unknown"])[0].strip()
