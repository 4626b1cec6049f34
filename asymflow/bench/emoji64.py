"""Asymmetric and x0-prediction on real images, trained for a few minutes: `python -m asymflow.bench emoji64`.

train_ddp.py trains the configuration emoji64 at ranks 8 and 0, with the same model, images, noise and number of steps.
Some first steps of both show how many steps fit into the time; then both continue to that many. DIR gets samples of the
average from the same noise and classes, rank-8.png and rank-0.png; emoji64.png, with both and the curves of the loss;
and emoji64.json.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from asymflow.bench.trainings import FailedError, Trainings, images_per_second, metrics
from asymflow.cli.common import at_least, default_device, usable_device
from asymflow.errors import InputError
from asymflow.files import existing_file
from asymflow.parser import Parser
from asymflow.training.config.reading import load_config

RANKS = (8, 0)
NAMES = {8: "asymmetric, rank 8", 0: "x0-prediction, rank 0"}
TRIAL, WARM_UP = 60, 20  # steps that show how many fit, and how many of these are not timed
OWN = ("data.path", "subspace.rank", "train.steps", "sample.every", "checkpoint.every")  # keys that --set may not have
RESERVE = 15  # seconds for starting, the last samples, and the figure


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m asymflow.bench emoji64", description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="emoji64.tar: see the README")
    p.add_argument("--out", type=Path, required=True, help="folder for the figures")
    p.add_argument("--minutes", type=at_least(1), default=4, metavar="N", help="for both trainings together")
    p.add_argument("--steps", type=at_least(1), metavar="N", help="of each training, instead of as many as fit")
    p.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    p.add_argument("--set", action="append", default=[], metavar="a.b=c", help="passed on to train_ddp.py")
    args = p.parse_args(argv)
    try:
        usable_device(args.device)
        existing_file(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        found = compare(args)
    except (InputError, FailedError, OSError) as e:
        p.error(str(e))
    for rank, run in found["ranks"].items():
        print(f"{NAMES[int(rank)]:22} loss {run['loss_of_last_100']:.4f}, {run['images_per_second']:.4g} images/s")
    print(f"{found['steps']} steps each; wrote {args.out / 'emoji64.png'}")
    return 0


def compare(args: argparse.Namespace) -> dict:
    """Train both, and write what came out."""
    if taken := [setting for setting in args.set if setting.split("=")[0] in OWN]:
        raise InputError(f"--set {taken[0]}: this is set here, by --data, --steps and --minutes")
    until = time.monotonic() + 60 * args.minutes
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    given = [f"data.path={args.data}", *args.set]
    batch = load_config("emoji64", given).train.global_batch_size
    with (
        tempfile.TemporaryDirectory(prefix="asymflow-emoji64-") as work,
        Trainings(args.out / "emoji64.log", **hidden) as trainings,
    ):
        runs = {rank: Path(work, f"rank-{rank}") for rank in RANKS}

        def train(rank: int, steps: int, timeout: float) -> None:
            # Four grids of samples, so that a training that is cut off has a recent one.
            settings = {"subspace.rank": rank, "train.steps": steps, "checkpoint.every": 10**6}
            settings |= {"sample.every": max(TRIAL, steps // 4)}
            settings |= {"ema.snapshot_every": None, **dict(setting.split("=", 1) for setting in given)}
            trainings.run(runs[rank], "emoji64", settings, max(timeout, 10))

        steps = args.steps
        if steps is None:
            began = time.monotonic()
            for rank in RANKS:
                train(rank, TRIAL, until - time.monotonic())
            print(f"{TRIAL} steps of both took {time.monotonic() - began:.0f} s", flush=True)
            each = sum(batch / images_per_second(metrics(run)[WARM_UP:]) for run in runs.values())
            steps = TRIAL + max(0, int(0.9 * (until - time.monotonic() - 2 * RESERVE) / each))
        for number, rank in enumerate(RANKS):
            print(f"{NAMES[rank]}: {steps} steps ...", flush=True)
            share = (until - time.monotonic()) / (len(RANKS) - number) + RESERVE
            try:
                train(rank, steps, 10**6 if args.steps else share)
            except FailedError as e:
                if not metrics(runs[rank]):
                    raise
                print(f"it did not get there: {e}", flush=True)
        return report(args, runs, {rank: metrics(run) for rank, run in runs.items()})


def report(args: argparse.Namespace, runs: dict[int, Path], logged: dict[int, list[dict]]) -> dict:
    drawn = {rank: max((run / "samples").glob("*.png")) for rank, run in runs.items()}  # the last: names are steps
    for rank, grid in drawn.items():
        shutil.copyfile(grid, args.out / f"rank-{rank}.png")
    grids = {rank: np.asarray(Image.open(grid)) for rank, grid in drawn.items()}
    steps = min(map(len, logged.values()))
    losses = {rank: [step["loss"] for step in entries[:steps]] for rank, entries in logged.items()}
    found = {
        "steps": steps,
        "ranks": {
            str(rank): {
                "loss": losses[rank],
                "loss_of_last_100": float(np.mean(losses[rank][-100:])),
                "images_per_second": images_per_second(entries[-100:]),
                "samples": drawn[rank].stem,
            }
            for rank, entries in logged.items()
        },
    }
    (args.out / "emoji64.json").write_text(json.dumps(found) + "\n")
    titles = {rank: f"{NAMES[rank]}, step {int(grid.stem):,}" for rank, grid in drawn.items()}
    picture(grids, losses, titles).savefig(args.out / "emoji64.png", dpi=110)
    return found


def picture(grids: dict[int, np.ndarray], losses: dict[int, list[float]], titles: dict[int, str]) -> Figure:
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    *drawn, curves = figure.subplots(1, len(grids) + 1)
    for axis, (rank, grid) in zip(drawn, grids.items(), strict=True):
        axis.imshow(grid)
        axis.set_title(titles[rank])
        axis.set_axis_off()
    for rank, values in losses.items():
        window = min(50, len(values))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        curves.plot(np.arange(window, window + len(smooth)), smooth, label=NAMES[rank])
    curves.set(yscale="log", xlabel="step", title=f"flow-matching loss (mean of {window} steps)")
    curves.legend()
    return figure
