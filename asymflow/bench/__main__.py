"""Does everything work on this machine, and how fast? `python -m asymflow.bench --out DIR`, in a few minutes on a GPU.

Trainings are run by the real train_ddp.py, on generated images. DIR/bench.json has all figures, DIR/bench.md a table of
them; both are rewritten after every check, but a DIR that has those of an earlier run is refused. The most important
checks come first; those for which there is no time left are listed as not run. The exit code is 1 if a check failed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from asymflow.packages import importing

with importing(__name__):
    import torch

    from asymflow.bench import kit
    from asymflow.bench.emoji64 import RANKS, emoji64
    from asymflow.bench.fast import CHECKS as MEASUREMENTS
    from asymflow.bench.right import CHECKS as COMPARISONS
    from asymflow.bench.trainings import Trainings
    from asymflow.cli.common import at_least, default_device, image_size, new_file, usable_device
    from asymflow.errors import InputError
    from asymflow.opening import existing_file
    from asymflow.parser import Parser

CHECKS = [*COMPARISONS, *MEASUREMENTS, kit.Check("emoji64", emoji64, 60, measures=True, anywhere=True)]
FINETUNING = ("size", "batch", "image_size", "text_length", "lora_rank", "no_checkpointing", "no_lpips")
OF_ONE_CHECK = {"data": "emoji64"} | dict.fromkeys(FINETUNING, "finetuning FLUX.2")  # options, and what needs them
WRITTEN = ("bench.json", "bench.md", "emoji64.png", *(f"rank-{rank}.png" for rank in RANKS))
VERSIONS = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "lpips", "numpy")
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # torch.use_deterministic_algorithms requires it


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m asymflow.bench", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for bench.json, bench.md, bench.log and pictures")
    p.add_argument("--minutes", type=at_least(1), default=8, metavar="N", help="no check goes on after these")
    p.add_argument("--tiny", action="store_true", help="the same in small, which takes two minutes on a CPU")
    p.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    names = ", ".join(check.name for check in CHECKS)
    p.add_argument(
        "--only", metavar="WORDS", help=f"checks whose names have one of these, such as zero,memory: {names}"
    )
    p.add_argument("--data", type=Path, help="emoji64.tar, for the check emoji64: see docs/emoji64.md")
    group = p.add_argument_group("finetuning FLUX.2")
    group.add_argument("--size", choices=("9B", "4B"), help="of the transformer (default: the largest that fits)")
    group.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="images at a time")
    group.add_argument("--image-size", type=image_size, metavar="N|HxW", help="in pixels (default: 1024)")
    group.add_argument("--text-length", type=at_least(1), metavar="N", help="tokens of a prompt (default: 512)")
    group.add_argument("--lora-rank", type=at_least(1), metavar="R", help="of the adapters (default: 256)")
    group.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    group.add_argument("--no-lpips", action="store_true", help="without the perceptual term")
    args = p.parse_args(argv)
    try:
        device, checks = usable_device(args.device), chosen(args.only)
        for option, check in OF_ONE_CHECK.items():
            if getattr(args, option) != p.get_default(option) and check not in {each.name for each in checks}:
                raise InputError(f"--{option.replace('_', '-')} is for the check {check}, which --only leaves out")
        if args.tiny and args.size:
            raise InputError(
                f"--size {args.size} is of FLUX.2, and --tiny takes a tiny model: leave out one of the two"
            )
        if args.data:
            existing_file(args.data)
        for name in WRITTEN:
            new_file(args.out / name)
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
        Trainings(args.out / "bench.log", **DETERMINISTIC, **hidden) as trainings,
    ):
        tools = kit.Kit(device, args, Path(work), trainings, deadline)
        for check in checks:
            print(f"{tools.left:5.0f} s left: {check.name} ...", flush=True)
            results.append(kit.run(check, tools))
            result = results[-1]
            print(f"             {result.status} in {result.seconds:.0f} s: {result.summary}", flush=True)
            kit.write(args.out, about, tools.limits, results)
    failed = [result.name for result in results if result.status in (kit.FAILED, kit.ERROR)]
    print(f"wrote {args.out / 'bench.json'} and {args.out / 'bench.md'}")
    print(f"FAILED: {', '.join(failed)}" if failed else "nothing that was checked is wrong")
    return 1 if failed else 0


def chosen(only: str | None) -> list[kit.Check]:
    words = [word.strip() for word in only.lower().split(",") if word.strip()] if only else [""]
    for word in words:
        if not any(word in check.name.lower() for check in CHECKS):
            names = ", ".join(check.name for check in CHECKS)
            raise InputError(f"--only {word}: in the name of no check, which are {names}")
    limits = MEASUREMENTS[0]  # always, because the other measurements are compared with it
    return [check for check in CHECKS if check is limits or any(word in check.name.lower() for word in words)]


def description(device: torch.device) -> dict:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
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


if __name__ == "__main__":
    sys.exit(main())
