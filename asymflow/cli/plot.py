"""`asymflow plot`: the curves of trainings, and the newest samples of each, in one picture."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

from asymflow import files, opening
from asymflow.cli.common import new_file
from asymflow.cli.models import check_run
from asymflow.entries import Entry, UnreadableError
from asymflow.errors import InputError
from asymflow.pixels import read_image

EXAMPLES = """\
examples:
  asymflow plot runs/shapes --out shapes.png             a training, also while it goes on
  asymflow plot runs/r8 runs/r0 runs/full --out ranks.png

Drawn are the terms of the loss, the gradient norm, the learning rate and the images a second of each step: the steps
themselves in light colours, and the mean of the steps around each, a 25th of those of the run, in a strong one.
Then evaluations, with the settings in which they differ, and the newest grid of samples of each run."""

# The names of asymflow.training.run.folder, whose import needs more than the extra [library] installs.
METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples"
MOST_JOURNAL = 2**33  # bytes
UNCERTAINTY = "uncertainty"  # of evaluations: not drawn
SMOOTHED = 25  # the mean is over the steps of the run, divided by this
SPEED, NORM, RATE = "images_per_second", "grad_norm", "lr"
NOT_TERMS = ("step", NORM, RATE, SPEED, "waiting", "mfu", "gpu_memory")  # all other keys are terms of the loss
TITLES = {NORM: "gradient norm", RATE: "learning rate", SPEED: "images/s", "frechet_distance": "Fréchet distance"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "0.3")  # also for the colour-blind
STYLES, MARKERS = ("-", "--", ":", "-."), "os^DvP*X"
INK = "0.25"
WIDTH, DPI = 7.2, 150  # inches, and pixels in each: as wide as the screen of a phone


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "Draw the curves of one or several trainings, and their newest samples, into one PNG."
    p = commands.add_parser("plot", description=text, epilog=EXAMPLES)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run of train_ddp.py")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the file to write")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out} must end in .png")
    new_file(args.out)
    for i, folder in enumerate(args.runs):
        check_run(folder)
        if folder.resolve() in [other.resolve() for other in args.runs[:i]]:
            raise InputError(f"{folder} is given twice")
    runs = [read_run(folder, label) for folder, label in zip(args.runs, labels(args.runs), strict=True)]
    for remark in (remark for one in runs for remark in one.remarks):
        print(remark, file=sys.stderr)
    drawn = [one for one in runs if one.steps]
    if not drawn:
        raise InputError(f"nothing to draw: no step is in {' or '.join(str(folder / METRICS) for folder in args.runs)}")
    picture = draw(drawn)
    with files.replacing(args.out, new=True) as beside:
        picture.savefig(beside, format="png")
    print(f"{args.out}: {'; '.join(f'{one.label}, step {one.steps[-1]:,}' for one in drawn)}")


def labels(folders: list[Path]) -> list[str]:
    """The names of the folders; if some have the same, their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


# ---- Reading ---------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a picture needs of a run. remarks: lines for the user, about what cannot be drawn."""

    label: str
    steps: list[int]
    curves: dict[str, np.ndarray]
    """The numbers of each step, by key; NaN where there is none."""
    evaluations: dict[str, list["Points"]] = field(default_factory=dict)
    samples: Image.Image | None = None
    samples_step: int = 0
    remarks: list[str] = field(default_factory=list)


@dataclass
class Points:
    """Evaluations with the same settings, such as {"sample.guidance": 2.3}."""

    settings: dict[str, object]
    steps: list[int]
    values: list[float]


def read_run(folder: Path, label: str) -> Run:
    entries, remarks = read_journal(folder / METRICS)
    by_step = {entry["step"]: entry for entry in entries}  # should a step be there twice, the last one counts
    steps = sorted(by_step)
    keys = dict.fromkeys(key for entry in entries for key in entry if key != "step")
    curves = {key: np.array([number(by_step[step].get(key)) for step in steps]) for key in keys}
    curves = {key: values for key, values in curves.items() if not np.isnan(values).all()}
    found = Run(label, steps, curves, remarks=remarks)
    if not steps:
        remarks.append(f"{folder} has no step yet: it is left out")
        return found
    skipped = sum(math.isnan(number(by_step[step].get(NORM))) for step in steps)
    if skipped:
        remarks.append(f"{label}: {skipped:,} of {len(steps):,} steps were not finite and changed nothing: gaps")
    if missing := steps[-1] - steps[0] + 1 - len(steps):
        remarks.append(f"{label}: {missing:,} steps between {steps[0]} and {steps[-1]} are not in {METRICS}")
    read_evaluations(folder, found)
    read_samples(folder / SAMPLES, found)
    return found


def read_journal(path: Path) -> tuple[list[dict], list[str]]:
    """The objects with a step in a file of JSON lines, and remarks. A last line without an end is being written."""
    if not path.exists():
        return [], []
    *lines, _ = opening.read_bytes(path, most=MOST_JOURNAL).split(b"\n")
    entries = [entry for line in lines if (entry := entry_of(line)) is not None]
    bad = len(lines) - len(entries)
    return entries, [f"{path}: {bad:,} of {len(lines):,} lines cannot be read, and are left out"] * (bad > 0)


def entry_of(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
        step = entry["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if type(step) is int and 0 <= step < 2**53 else None


def number(value: object) -> float:
    """A number of JSON; NaN if it is none, or infinite, or so large that it is no measurement."""
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan
    return found if abs(found) < 1e200 else math.nan


def read_evaluations(folder: Path, run: Run) -> None:
    """The numbers in evaluations.jsonl, for each key, and apart for each kind of settings."""
    entries, remarks = read_journal(folder / EVALUATIONS)
    run.remarks += remarks
    settings = [
        flat({key: value for key, value in entry.items() if isinstance(value, dict) and key != UNCERTAINTY})
        for entry in entries
    ]
    keys = {key: 0 for entry in entries for key in entry if key != "step" and not isinstance(entry[key], dict)}
    for key in keys:
        kinds: dict[str, Points] = {}
        for entry, own in zip(entries, settings, strict=True):
            points = kinds.setdefault(repr(sorted(own.items())), Points(own, [], []))
            if not math.isnan(value := number(entry.get(key))):
                points.steps.append(entry["step"])
                points.values.append(value)
            elif key in entry:
                run.remarks.append(f"{run.label}: the {title(key)} of step {entry['step']} was not measured: not drawn")
        if kinds := [points for points in kinds.values() if points.steps]:
            run.evaluations[key] = kinds


def flat(values: dict, above: str = "") -> dict[str, object]:
    """Nested settings as {a.b.c: value}, without those that are null, which earlier versions may not have."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return {key: value for key, value in found.items() if value is not None}


def read_samples(folder: Path, run: Run) -> None:
    """The newest grid of samples."""
    grids = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    if not grids:
        run.remarks.append(f"{run.label}: no samples yet")
        return
    newest = max(grids)
    try:
        run.samples, run.samples_step = read_image(Entry(str(grids[newest]))), newest
    except UnreadableError as e:
        run.remarks.append(f"{run.label}: its samples are not drawn: {e}")


# ---- Drawing ---------------------------------------------------------------------------------------------------------
def draw(runs: list[Run]) -> Figure:
    """The picture. Terms of the loss are as wide as the page if there is one, all else is in two columns."""
    terms = list(dict.fromkeys(key for one in runs for key in one.curves if key not in NOT_TERMS))
    others = [key for key in (NORM, RATE, SPEED) if any(key in one.curves for one in runs)]
    evaluated = list(dict.fromkeys(key for one in runs for key in one.evaluations))
    panels = [*[(draw_curves, key) for key in (*terms, *others)], *[(draw_points, key) for key in evaluated]]
    rows = [panels[:1], *in_pairs(panels[1:])] if len(terms) == 1 else in_pairs(panels)
    with_samples = [one for one in runs if one.samples]
    across = min(len(with_samples), 3)
    grids = [with_samples[i : i + across] for i in range(0, len(with_samples), across or 1)]
    heights = [2.4] * len(rows) + [height_of(row, across) for row in grids]
    with matplotlib.rc_context({"agg.path.chunksize": 10_000}):  # else a curve of a million steps is refused
        page = Figure(figsize=(WIDTH, sum(heights) + 0.4), dpi=DPI, layout="constrained")
        places = page.add_gridspec(len(heights), 1, height_ratios=heights)
        for i, row in enumerate(rows):
            for (draw_panel, key), axis in zip(row, axes_of(page, places[i], len(row)), strict=True):
                draw_panel(axis, runs, key)
                finish(axis, title(key))
        for i, row in enumerate(grids, len(rows)):
            for one, axis in zip(row, axes_of(page, places[i], across), strict=False):
                axis.imshow(one.samples)
                axis.set_axis_off()
                of = f"{one.label}, " if len(runs) > 1 else "samples, "
                axis.set_title(f"{of}step {one.samples_step:,}", fontsize=10, color=INK)
    if len(runs) > 1:
        lines = [Line2D([], [], color=color(i), linestyle=style(i)) for i in range(len(runs))]
        page.legend(lines, [one.label for one in runs], loc="outside upper center", ncols=3, fontsize=10, frameon=False)
    else:
        page.suptitle(f"{runs[0].label}, step {runs[0].steps[-1]:,}", fontsize=11, color=INK)
    return page


def in_pairs(items: list) -> list[list]:
    return [items[i : i + 2] for i in range(0, len(items), 2)]


def axes_of(page: Figure, row: SubplotSpec, count: int) -> Iterator[Axes]:
    """The axes of a row of the page, `count` of them, of the same width. They are made when they are asked for."""
    return (page.add_subplot(place) for place in row.subgridspec(1, count))


def height_of(row: list[Run], across: int) -> float:
    """The height of a row of grids, in inches, with its titles."""
    tallest = max(one.samples.height / one.samples.width for one in row)
    return min(max(WIDTH / across * tallest, 0.5), 4.5) + 0.3


def draw_curves(axis: Axes, runs: list[Run], key: str) -> None:
    shown = []
    for i, one in enumerate(runs):
        if key not in one.curves:
            continue
        values, look = one.curves[key], dict(color=color(i), linestyle=style(i))
        lone = "." if len(values) == 1 else None
        if key == RATE:
            axis.plot(one.steps, values, linewidth=1.4, marker=lone, **look)
        else:
            smooth = smoothed(values, len(values) // SMOOTHED // 2)
            axis.plot(one.steps, values, color=color(i), linewidth=0.6, alpha=0.25, marker=lone)
            axis.plot(one.steps, smooth, linewidth=1.4, **look)
        shown.append(values)
    everything = np.concatenate(shown)
    everything = everything[~np.isnan(everything)]
    if key in (RATE, SPEED):
        axis.set_ylim(0, 1.05 * everything.max() or 1)
    elif everything.min() > 0:
        logarithmic(axis)
        low, high = np.quantile(everything, (0.001, 0.999))
        axis.set_ylim(low / 1.1, high * 1.1)  # a single wild step is cut off


def draw_points(axis: Axes, runs: list[Run], key: str) -> None:
    positive, differing, kinds = True, differing_settings(runs), []
    for i, one in enumerate(runs):
        for points in one.evaluations.get(key, []):
            order = np.argsort(points.steps, kind="stable")
            values = np.array(points.values)[order]
            positive &= values.min() > 0
            label = ", ".join(f"{name.rpartition('.')[2]} {points.settings.get(name)}" for name in differing)
            kinds += [label] if label not in kinds else []
            look = dict(color=color(i), linestyle=style(i), marker=MARKERS[kinds.index(label) % len(MARKERS)])
            axis.plot(np.array(points.steps)[order], values, markersize=4, linewidth=1.2, **look, label=label)
    if any(line.get_label()[:1] not in ("", "_") for line in axis.lines):
        axis.legend(fontsize=7, frameon=False)
    if positive:
        logarithmic(axis)


def differing_settings(runs: list[Run]) -> list[str]:
    """The settings in which evaluations differ, of one run or of several: such numbers cannot be compared."""
    found = [points.settings for one in runs for kinds in one.evaluations.values() for points in kinds]
    names = dict.fromkeys(name for settings in found for name in settings)
    return [name for name in names if len({repr(settings.get(name)) for settings in found}) > 1]


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of the values up to `reach` steps before and after each, without NaN; NaN where the value is NaN.

    Near the beginning the mean reaches as far forward as back, since a loss falls steeply there. At the end it does
    not, for the last point would be as noisy as the last step.
    """
    index = np.arange(len(values))
    low = np.maximum(index - reach, 0)
    high = np.minimum(index + np.minimum(reach, index), len(values) - 1) + 1
    known = ~np.isnan(values)
    count = sums(known.astype(float), low, high)
    return np.where(known, sums(np.where(known, values, 0), low, high) / np.maximum(count, 1), np.nan)


def sums(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """values[low[i] : high[i]].sum() for each i.

    Not the difference of two cumulative sums, in which one huge value takes all digits from those after it.
    """
    totals, low, left = np.zeros(len(low)), low.copy(), high - low
    blocks, size = values, 1  # blocks[i] is the sum of `size` values from i on
    while left.any():
        odd = left & 1 == 1
        totals[odd] += blocks[low[odd]]
        low[odd] += size
        left >>= 1
        blocks, size = blocks[:-size] + blocks[size:], 2 * size
    return totals


class PlainNumbers(LogFormatter):
    """Labels for some of the ticks of a logarithmic axis, such as 0.3 and not 3e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def logarithmic(axis: Axes) -> None:
    axis.set_yscale("log")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(PlainNumbers(minor_thresholds=(1.2, 0.5)))


def finish(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=10, color=INK)
    axis.grid(color="0.92", which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8, which="both")
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def title(key: str) -> str:
    return TITLES.get(key, key)


def color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def style(i: int) -> str:
    return STYLES[i // len(COLORS) % len(STYLES)]
