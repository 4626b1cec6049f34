"""What the experiments share: their command line, a trained flow, its samples, and the two files that each leaves.

An experiment is a function from the parsed arguments to its figure and its results. `main` does the rest:

    def experiment(args) -> tuple[Figure, dict]: ...

    if __name__ == "__main__":
        sys.exit(main("rank_sweep", experiment, __doc__, steps=3000, quick_steps=200))
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from asymflow import packages
from asymflow.errors import InputError
from asymflow.text import count
from nano_asymflow import MLP, Flow, integrate, random_stream, train


def main(
    name: str,
    experiment: Callable[[argparse.Namespace], tuple[Figure, dict]],
    about: str,
    *,
    steps: int = 0,
    quick_steps: int = 0,
    devices: bool = True,
    argv: list[str] | None = None,
) -> int:
    """Run `experiment(args)` and save its figure and results as NAME.png and NAME.json. Returns the exit code.

    args has `quick`, `seed`, `steps` (`quick_steps` under --quick, unless given), `out` and `device`. What the user
    got wrong ends in one line and code 2, Ctrl-C in one line and code 130.

    steps: 0 for an experiment that trains nothing, which then has no --steps. devices: False for one that runs on the
    CPU only, and has no --device.
    """
    args = arguments(name, about, steps, quick_steps, devices, sys.argv[1:] if argv is None else argv)
    start = time.perf_counter()
    try:
        figure, results = experiment(args)
        seconds = round(time.perf_counter() - start, 1)
        settings = {k: getattr(args, k) for k in ("quick", "seed", "steps", "device")} | {"torch": torch.__version__}
        picture, file = (keep_earlier(args.out / f"{name}.{kind}") for kind in ("png", "json"))
        figure.savefig(picture, dpi=110)
        file.write_text(json.dumps({"experiment": name, **settings, **results, "seconds": seconds}, indent=2) + "\n")
    except ModuleNotFoundError as e:
        if (text := packages.advice(e)) is None:
            raise
        print(f"toy.{name}: error: {text}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as e:  # a RuntimeError: mostly, not enough memory
        print(f"toy.{name}: error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted: no figure and no results are written.", file=sys.stderr)
        return 130
    print(f"\nwrote {picture} and {file} after {seconds:.0f} s")
    if args.quick:
        print("--quick shows that it runs. Its figures are no results: the networks are hardly trained.")
    return 0


def arguments(
    name: str, about: str, steps: int, quick_steps: int, devices: bool, argv: list[str]
) -> argparse.Namespace:
    p = argparse.ArgumentParser(f"toy.{name}", description=about.strip().splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="a small version, well within a minute: a look, not a result")
    p.add_argument("--seed", type=int, default=0, help="fixes every bit, on one CPU and number of threads")
    said = f"training steps of each model ({steps}, with --quick {quick_steps})"
    p.set_defaults(steps=quick_steps if "--quick" in argv else steps, device="cpu")
    if steps:
        p.add_argument("--steps", type=int, default=p.get_default("steps"), help=said)
    p.add_argument("--out", type=Path, default=Path("runs/toy") / name, help=f"folder for {name}.png and {name}.json")
    if devices:
        p.add_argument("--device", default="cpu", help="such as cpu, cuda or cuda:1")
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")  # one line
    args = p.parse_args(argv)
    for option in ("seed", "steps"):
        if not 0 <= (value := getattr(args, option)) < 2**63:
            p.error(f"--{option} must be at least 0 and below 2^63, but it is {value}")
    try:
        torch.ones(1, device=args.device).item()
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        p.error(f"--out {args.out} cannot be written to: {e.strerror}")
    except (RuntimeError, AssertionError, ImportError) as e:
        p.error(f"--device {args.device} cannot be used here: {str(e).splitlines()[0].split('. ')[0]}")
    return args


def in_one_line(program: str, run: Callable[[], None]) -> int:
    """Run what takes hours, and goes on where it was stopped. Returns the exit code.

    What the user got wrong ends in one line and code 2, Ctrl-C in one line and code 130.
    """
    try:
        run()
    except (InputError, OSError) as e:
        print(f"{program}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def keep_earlier(file: Path) -> Path:
    """Make way for `file`: what an earlier run wrote is renamed, never overwritten."""
    if file.exists() or file.is_symlink():
        older = next(o for n in itertools.count(1) if not (o := file.with_stem(f"{file.stem}.{n}")).exists())
        print(f"{file} of an earlier run is now {file.rename(older)}")
    return file


def trained_flow(
    args: argparse.Namespace, name: str, sample: Callable, dim: int, width: int, basis: Tensor | None, batch: int = 512
) -> Flow:
    """A `Flow` with an MLP of `width`, trained for `args.steps` on `sample(n, generator)`, which gives (n, dim).

    The same network, data and noise for every basis (dim, r): models that are compared differ in nothing else.
    """
    torch.manual_seed(args.seed)
    flow = Flow(MLP(dim, width), basis).to(args.device)
    train(flow, sample, args.steps, batch, random_stream(args.seed, "training", args.device), name=name)
    return flow


def generate(velocity: Callable, noise: Tensor, steps: int = 50) -> Tensor:
    """Samples (n, D) for noise (n, D): the end of the path, by Heun's method."""
    return deque(integrate(velocity, noise, steps), maxlen=1).pop()


# ---- Where figures come from -----------------------------------------------------------------------------------------
def commit() -> str:
    """The commit of this tree, with a "+" if files differ from it; "unknown" without git."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def machine() -> str:
    """The processor, the threads that torch uses, and torch's version."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else ()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    return f"{model}, {count(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"
