"""The figures of docs/paper.md."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from asymflow.errors import InputError
from asymflow.pictures import GAP, image_grid
from toy.paper.blocks import FINETUNED, QUALITY, RANDOM, RANKS, Kinds, curves
from toy.paper.data import ShapesData
from toy.paper.tables import by_seed

PAPER_RANKS = {"0": 2.68, "2": 2.41, "4": 2.37, "8": 2.34, "16": 2.35, "32": 2.36, RANDOM: 2.63}  # its FIDs
LAST = RANKS["rank-full"]
SAMPLES = 8  # of each model


def rank_figure(kinds: Kinds) -> Figure:
    """The paper's Figure 5 beside ours: a point for each seed, a line through the means."""
    panels = {"the paper: FID, H/16, 160 epochs": {rank: {0: fid} for rank, fid in PAPER_RANKS.items()}}
    for title, (measure, _) in QUALITY.items():
        panels[f"ours: {title}"] = {RANKS[name]: by_seed(kinds[name], measure) for name in RANKS if name in kinds}
    figure = Figure(figsize=(3 * len(panels), 3.2), layout="constrained")
    places = [rank for rank in RANKS.values() if rank != RANDOM]
    for axis, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        known = {rank: [v for v in values.values() if v is not None] for rank, values in found.items()}
        means = {rank: statistics.fmean(values) for rank, values in known.items() if values and rank != RANDOM}
        others = [mean for rank, mean in means.items() if rank != LAST]
        if others and means.get(LAST, 0) > 2 * max(others):  # off the scale
            text = dict(transform=axis.get_xaxis_transform(), ha="right", va="top", color="C0", fontsize=9)
            axis.text(len(places) - 0.6, 0.98, f"{LAST}: {means.pop(LAST):.3g} ↑", **text)
            known.pop(LAST)
            axis.margins(y=0.15)  # below the text
        for rank, values in known.items():
            place, mark, color = ("8", "x", "C3") if rank == RANDOM else (rank, "o", "C0")
            axis.plot([places.index(place)] * len(values), values, mark, color=color, markersize=4)
        axis.plot([places.index(rank) for rank in means], means.values(), color="C0")
        axis.set_xticks(range(len(places)), places)
        axis.set(xlabel="rank (x: a random subspace)", xlim=(-0.5, len(places) - 0.5))
        axis.set_title(title, fontsize=9)
    return figure


def speed_figure(kinds: Kinds) -> Figure:
    """What is measured on the way, over the steps of training: a line for each seed."""
    names = {"rank-0": "C1", "rank-8": "C0", "rank-random-8": "C3"}
    found = {name: curves(kinds, name) for name in names}
    titles = found["rank-8"]
    figure = Figure(figsize=(3 * len(titles), 3.2), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(titles)), titles, strict=True):
        for name, color in names.items():
            for i, curve in enumerate(found[name].get(title, {}).values()):
                label = None if i else f"rank {RANKS[name]}"
                axis.plot(*curve, color=color, linewidth=1, marker=".", label=label)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="step", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].legend(fontsize=8)
    return figure


def samples_figure(pictures: Mapping[str, Path]) -> Figure:
    """The first samples of each rank, and data of their classes. pictures: by rank, of `Lab.ending`."""
    strips = {"data": image_grid(ShapesData().held_out(SAMPLES)[0] / 127.5 - 1, SAMPLES)}
    width, height = strips["data"].size
    for rank, file in pictures.items():
        with Image.open(file) as grid:
            strips[f"rank {rank}"] = grid.convert("RGB").crop((0, 0, width, height))
    return labelled(strips)


def finetuning_figure(picture: Path) -> Figure:
    """What each model of Table 3 draws of the same captions: a row each of `picture`, of `finetuning.measure`."""
    titles = ["data", "their reconstructions", *(title for title, *_ in FINETUNED.values()), "the latents, lifted"]
    with Image.open(picture) as grid:
        step, rest = divmod(grid.height + GAP, len(titles))
        if rest:
            raise InputError(
                f"{picture} has not {len(titles)} rows: it is of another version of toy.paper; move it away"
            )
        rows = [grid.convert("RGB").crop((0, i * step, grid.width, (i + 1) * step - GAP)) for i in range(len(titles))]
    return labelled(dict(zip(titles, rows, strict=True)))


def labelled(strips: Mapping[str, Image.Image]) -> Figure:
    """Rows of pictures, each under its title."""
    width, height = next(iter(strips.values())).size
    figure = Figure(figsize=(8, (8 / width * height + 0.25) * len(strips)), layout="constrained")
    for axis, (title, strip) in zip(figure.subplots(len(strips)), strips.items(), strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
