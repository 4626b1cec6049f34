"""Asymmetric and x0-prediction on real images, trained for the time that is left: the check "emoji64".

train_ddp.py trains the configuration emoji64 at ranks 8 and 0, with the same model, images, noise and number of steps.
Some first steps of both show how many fit into the time; then both continue to that many. The folder gets samples of
the average from the same noise and classes, rank-8.png and rank-0.png, and emoji64.png, with both and the curves of the
loss.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from asymflow.bench.kit import PACKAGES, Kit, NotRunError
from asymflow.bench.trainings import FailedError, images_per_second, metrics

RANKS = {8: "asymmetric, rank 8", 0: "x0-prediction, rank 0"}
TRIAL, WARM_UP = 60, 20  # steps that show how many fit, and how many of these are not timed
RESERVE = 15  # seconds for starting, the last samples, and the figure
ON_A_CPU = {"train.precision": "fp32", "sample.num": 16, "sample.steps": 10}  # else a step, or a grid, takes minutes
TINY = {
    "model.options": "{width: 32, depth: 2, heads: 2, bottleneck: 16, in_context_start: 1, in_context_tokens: 2}",
    "data.workers": 0,
    "sample.num": 4,
    "sample.steps": 2,
    "train.precision": "fp32",
}


def emoji64(kit: Kit) -> tuple[str, dict]:
    if not kit.args.data:
        raise NotRunError("give --data emoji64.tar: see docs/emoji64.md")
    kit.need("matplotlib", *PACKAGES)
    batch, workers = (128, max((os.cpu_count() or 4) - 2, 2)) if kit.cuda else (32, 2)
    settings = {"data.path": kit.args.data, "train.global_batch_size": batch, "data.workers": workers}
    settings |= {"ema.snapshot_every": None, "checkpoint.every": 10**6}
    settings |= TINY if kit.tiny else {} if kit.cuda else ON_A_CPU
    runs = {rank: kit.work / f"rank-{rank}" for rank in RANKS}
    trial, warm_up = (3, 1) if kit.tiny else (TRIAL, WARM_UP)

    def train(rank: int, steps: int, until: float) -> None:
        # Four grids of samples, so that a training that is cut off has a recent one.
        every = {"subspace.rank": rank, "train.steps": steps, "sample.every": max(trial, steps // 4)}
        kit.trainings.run(runs[rank], "emoji64", settings | every, max(until - time.monotonic(), 10))

    for rank in RANKS:
        train(rank, trial, kit.deadline)
    each = sum(batch / images_per_second(metrics(run)[warm_up:]) for run in runs.values())
    steps = trial if kit.tiny else trial + max(0, int(0.9 * (kit.left - 2 * RESERVE) / each))
    for number, rank in enumerate(RANKS):
        print(f"             {RANKS[rank]}: {steps} steps", flush=True)
        try:
            until = time.monotonic() + kit.left / (len(RANKS) - number) + RESERVE
            train(rank, steps, min(until, kit.deadline))
        except FailedError as e:
            print(f"             it did not get there: {e}", flush=True)
    return report(runs, kit.args.out)


def report(runs: dict[int, Path], out: Path) -> tuple[str, dict]:
    logged = {rank: metrics(run) for rank, run in runs.items()}
    grids = {rank: max((run / "samples").glob("*.png")) for rank, run in runs.items()}  # the last: names are steps
    steps = min(map(len, logged.values()))
    losses = {rank: [step["loss"] for step in entries[:steps]] for rank, entries in logged.items()}
    rates = {rank: images_per_second(entries[-100:]) for rank, entries in logged.items()}
    for rank, grid in grids.items():
        shutil.copyfile(grid, out / f"rank-{rank}.png")
    draw(grids, losses, out / "emoji64.png")
    last = {rank: float(np.mean(values[-100:])) for rank, values in losses.items()}
    shown = (f"{RANKS[rank]}: loss {last[rank]:.4f}, {rates[rank]:.4g} images/s" for rank in runs)
    figures = {
        str(rank): {"loss": losses[rank], "images_per_second": rates[rank], "samples": grids[rank].stem}
        for rank in runs
    }
    return f"{steps} steps each, emoji64.png; {'; '.join(shown)}", figures


def draw(grids: dict[int, Path], losses: dict[int, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    *drawn, curves = figure.subplots(1, len(grids) + 1)
    for axis, (rank, grid) in zip(drawn, grids.items(), strict=True):
        axis.imshow(np.asarray(Image.open(grid)))
        axis.set_title(f"{RANKS[rank]}, step {int(grid.stem):,}")
        axis.set_axis_off()
    for rank, values in losses.items():
        window = min(50, len(values))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        curves.plot(np.arange(window, window + len(smooth)), smooth, label=RANKS[rank])
    curves.set(yscale="log", xlabel="step", title=f"flow-matching loss (mean of {window} steps)")
    curves.legend()
    figure.savefig(path, dpi=110)
