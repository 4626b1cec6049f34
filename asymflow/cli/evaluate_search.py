"""`asymflow evaluate search`: the best guidance, interval and moving average of a model, for few images."""

import argparse
import csv
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asymflow import files, opening, packages
from asymflow.cli.common import at_least, begun_folder, default_device, own_device, this_process
from asymflow.errors import InputError
from asymflow.text import count

ABOUT = """Find the guidance, its interval and the moving average with the least Fréchet distance. All settings are
drawn from the same noise; a coarse grid is refined around the best of it; those that chance cannot tell apart get more
images, until the budget is spent. Then the winner is drawn in full, three times. The run is only read."""
EXAMPLES = """\
examples:
  asymflow evaluate search --model runs/h16 --ema 0.02:0.25 --guidance 1:3.5:0.1 --interval 0,0.7:1:0.02 \\
      --protocol adm --budget 200000 --out search/h16
  torchrun --nproc-per-node 8 -m -- asymflow evaluate search --model models/h16 --protocol adm --out search/h16

A range is START:STOP:STEP, or values with commas between them. --ema takes widths of power-function averages, which are
put together from the snapshots of the run, and decays; START:STOP alone is eight widths, each larger than the last by
the same factor. The same command goes on after a stop. In OUT: search.json, search.csv, search.png, and final/SETTING,
which has results of asymflow evaluate."""
RESULT, TABLE, PICTURE, STATE = "search.json", "search.csv", "search.png", "settings.json"
LENGTHS = 8
MOST = 1000  # values of an axis
DEFAULTS = {"guidance": "1:3.5:0.1", "interval": "0,0.7:1:0.02"}


def values(text: str) -> tuple[float, ...]:
    """The type of an option: START:STOP:STEP, both ends included, or numbers with commas between them."""
    try:
        if ":" not in text:
            found = [float(word) for word in text.split(",")]
        else:
            start, stop, *step = (float(word) for word in text.split(":"))
            number = min(math.floor((stop - start) / step[0] + 1e-6), MOST) if step else LENGTHS - 1
            far = [start + i * step[0] for i in range(number + 1)] if step else np.geomspace(start, stop, LENGTHS)
            found = [round(float(value), 6) for value in far]
            found += [stop] * (bool(found) and abs(found[-1] - stop) > 1e-6)  # the last step may be shorter
    except (ValueError, ZeroDivisionError, OverflowError, MemoryError):
        found = []
    if not found or len(set(found)) < len(found) or not all(map(math.isfinite, found)) or len(found) > MOST:
        raise argparse.ArgumentTypeError(f"it must be START:STOP:STEP, or numbers such as 1,1.5,2, but it is {text!r}")
    return tuple(sorted(found))


def intervals(text: str) -> tuple[tuple[float, float], ...]:
    """The type of --interval: LOW, then the values of the high end, such as 0,0.7:1:0.02."""
    low, _, highs = text.partition(",")
    try:
        found = tuple((float(low), high) for high in values(highs))
    except ValueError:
        found = ()
    if not found or not all(0 <= low < high <= 1 for low, high in found):
        said = f"it must be LOW,START:STOP:STEP within 0 and 1, such as 0,0.7:1:0.02, but it is {text!r}"
        raise argparse.ArgumentTypeError(said)
    return found


def add_command(commands) -> None:
    from asymflow.cli.models import MODEL, add_backbone

    p = commands.add_parser("search", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("--model", type=Path, required=True, help=MODEL)
    p.add_argument("--step", type=int, help="of a run: the step at which the averages end, if not the newest")
    add_backbone(p)
    p.add_argument("--ema", metavar="RANGE", help="of a run: to try, such as 0.02:0.25 (default: the first average)")
    p.add_argument("--guidance", type=values, default=DEFAULTS["guidance"], metavar="RANGE", help="scales to try")
    p.add_argument("--interval", type=intervals, default=DEFAULTS["interval"], metavar="LOW,RANGE", help="to try")
    p.add_argument("--orthogonal", type=float, default=0.0, help="0 to 1: take away guidance that only adds contrast")
    p.add_argument(
        "--budget",
        type=at_least(2),
        default=200_000,
        metavar="N",
        help="images to draw before the final, or the first grid if that has more",
    )
    p.add_argument("--start", type=at_least(2), default=2048, metavar="N", help="images of each setting at first")
    p.add_argument("--final", type=at_least(0), metavar="N", help="images of the winner (default: the protocol's)")
    p.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="times that the winner is drawn")
    p.add_argument("--protocol", default="quick", metavar="NAME", help="adm, jit, edm2-dino, quick, or a YAML file")
    p.add_argument("--reference", metavar="WHAT", help="as in asymflow evaluate")
    p.add_argument("--extractor", help="as in asymflow evaluate")
    p.add_argument("--weights", metavar="PATH", help="of the extractor")
    p.add_argument("--steps", type=at_least(1), metavar="N", help="of the sampler")
    p.add_argument("--batch", type=at_least(1), default=64, metavar="N", help="images at a time")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    p.add_argument("--device", default=default_device(), help="such as cpu, cuda or cuda:1")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    packages.need("pydantic", "yaml", "torch_fidelity")
    from asymflow.cli.evaluate_store import UNIT, Store
    from asymflow.evaluation.measures import CAPTIONS
    from asymflow.evaluation.protocol import load_protocol
    from asymflow.evaluation.search import coarse, search

    begun_folder(args.out, STATE, RESULT, TABLE, PICTURE)
    changes = {name: getattr(args, name) for name in ("reference", "extractor", "weights", "steps")}
    protocol = load_protocol(args.protocol, changes)
    if protocol.extractor == "oracle" or not protocol.reference:
        raise InputError(f"a search needs a Fréchet distance: the protocol {protocol.name} has no --reference for it")
    if "frechet_distance" not in protocol.measures or CAPTIONS.keys() & set(protocol.measures):
        raise InputError(
            f"a search is by frechet_distance, of images of classes, but the protocol {protocol.name} measures "
            f"{', '.join(protocol.measures)}"
        )
    axes = Axes(averages(args.model, args.step, args.ema), args.guidance, args.interval)
    store = Store(args, protocol, axes, own_device(args.device))
    first = len(dict.fromkeys(map(axes.same, coarse(axes.sizes))))
    start = max(min(-(-args.start // UNIT), args.budget // (2 * first * UNIT)), 1) * UNIT
    if this_process()[0] == 0:
        begin(args, axes, store)
        words = "so that half of the budget is left for the close ones"
        if 2 * first * start > args.budget:
            words = f"and half of the budget is not left for the close ones: better give {4 * first * start:,}"
        if start < args.start:
            print(f"the first {count(first, 'setting')} get {start:,} images each, {words}", file=sys.stderr)
        drawn, known = store.classes(start)
        if drawn < known:
            print(f"the first {start:,} images have {drawn:,} of {count(known, 'class')}", file=sys.stderr)
    found = search(axes.sizes, store.score, start, args.budget, axes.same)
    report(args, axes, store, found)


@dataclass(frozen=True)
class Axes:
    """What is tried: averages (None: the model as it is), scales, and intervals (low, high)."""

    averages: tuple[str | None, ...]
    scales: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.averages), len(self.scales), len(self.intervals)

    def same(self, point: tuple[int, ...]) -> tuple[int, ...]:
        """Without guidance all intervals are one."""
        return (*point[:2], 0) if self.scales[point[1]] == 1 else point

    def at(self, point: tuple[int, ...]) -> tuple[str | None, float, tuple[float, float]]:
        return self.averages[point[0]], self.scales[point[1]], self.intervals[point[2]]


def averages(model: Path, step: int | None, text: str | None) -> tuple[str | None, ...]:
    """The averages that --ema means. Those that the run cannot give are left out, and listed. InputError if all are."""
    from asymflow.cli.models import choose

    if text is None:
        return (None,)
    try:
        names = [f"{value:.6g}" for value in values(text)]
    except argparse.ArgumentTypeError as e:
        raise InputError(f"--ema: {e}") from None
    found, errors = [], []
    for name in names:
        try:
            choose(model, step, name)
            found.append(name)
        except InputError as e:
            errors.append(e)
    if not found:
        raise errors[0]
    if this_process()[0] == 0:
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
    return tuple(found)


def begin(args: argparse.Namespace, axes: Axes, store) -> None:
    """Say what is to come, and write down what is searched. InputError if OUT has another search."""
    cells = math.prod(axes.sizes)
    print(
        f"{count(cells, 'setting')}: {count(len(axes.averages), 'average')}, {count(len(axes.scales), 'scale')}, "
        f"{count(len(axes.intervals), 'interval')}; {args.budget:,} images in all",
        file=sys.stderr,
    )
    now = {"ema": axes.averages, "guidance": axes.scales, "interval": axes.intervals, **store.identity(None)}
    now = json.loads(json.dumps(now))
    path = args.out / STATE
    before = opening.read_json(path) if path.exists() else now
    if differing := sorted(key for key in {*now, *before} if now.get(key) != before.get(key)):
        raise InputError(f"{args.out} has a search of other {', '.join(differing)}: choose another --out")
    with files.replacing(path) as beside:
        beside.write_text(json.dumps(now) + "\n")


def report(args: argparse.Namespace, axes: Axes, store, found) -> None:
    """Draw the winner in full, and write what came out. All processes take part; the first one writes."""
    from asymflow.evaluation import result

    average, scale, interval = axes.at(found.best)
    finals = [store.final(found.best, i) for i in range(args.repeats)] if args.final != 0 else []
    if this_process()[0]:
        return
    spent, alone = store.passes({point: len(one.influence) for point, one in found.scores.items()})
    keys = ("average", "guidance", "interval")
    rows = []
    for point, one in sorted(found.scores.items()):
        row = dict(zip(keys, axes.at(point), strict=True)) | {"images": len(one.influence), "value": None}
        if math.isfinite(one.value):
            row |= {"value": one.value, "uncertainty": float(one.influence.std() / math.sqrt(len(one.influence)))}
        rows.append(row)
    distances = [one["measures"]["frechet_distance"]["value"] for one in finals]
    summary = {
        "best": {"average": average, "guidance": scale, "interval": interval},
        "cannot_be_told_apart": [
            dict(zip(("average", "guidance", "interval"), axes.at(p), strict=True)) for p in found.rivals
        ],
        "final": {
            "images": finals[0]["images"] if finals else 0,
            "values": distances,
            "folders": [str(store.final_folder(found.best, i).relative_to(args.out)) for i in range(len(finals))],
            "best": min(distances, default=None),
            "mean": float(np.mean(distances)) if distances else None,
            "spread": float(np.std(distances, ddof=1)) if len(distances) > 1 else None,
        },
        "settings": len(found.scores),
        "of": math.prod(axes.sizes),
        "images": found.images,
        "budget_was_enough": found.complete,
        "forward_passes": spent,
        "forward_passes_if_each_were_drawn_alone": alone,
        "protocol": store.protocol.model_dump(mode="json"),
        "order_of_tries": store.tries.order,
        "scored": store.about,
        "versions": result.versions(),
        "scores": rows,
    }
    with files.replacing(args.out / RESULT) as beside:
        beside.write_text(json.dumps(summary, indent=1) + "\n")
    with files.replacing(args.out / TABLE) as beside, io.StringIO() as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("average", "guidance", "low", "high", "images", "value", "uncertainty"))
        for row in rows:
            scores = (row["images"], row["value"], row.get("uncertainty"))
            table.writerow((row["average"], row["guidance"], *row["interval"], *scores))
        beside.write_text(text.getvalue())
    with files.replacing(args.out / PICTURE) as beside:
        picture(summary, store.title).savefig(beside, dpi=100, format="png")
    say(summary, store)
    print(f"written: {args.out / RESULT}, {args.out / TABLE}, {args.out / PICTURE}")


def say(summary: dict, store) -> None:
    best, final = summary["best"], summary["final"]
    average = f", average {best['average']}" if best["average"] else ""
    low, high = best["interval"]
    print(f"{store.title}: guidance {best['guidance']:g} on [{low:g}, {high:g}]{average}")
    tied = len(summary["cannot_be_told_apart"]) - 1
    if tied:
        print(f"  {count(tied, 'other setting')} cannot be told apart from it with so many images")
    if not summary["budget_was_enough"]:
        print("  the budget was spent before it was certain: --budget, in the same --out, goes on")
    if final["values"]:
        spread = f" ± {final['spread']:.3g}" if final["spread"] is not None else ""
        print(f"  {final['images']:,} images: best {final['best']:.4g}, mean {final['mean']:.4g}{spread}")
    saved = summary["forward_passes_if_each_were_drawn_alone"] - summary["forward_passes"]
    alone = summary["forward_passes_if_each_were_drawn_alone"]
    print(
        f"  {summary['settings']:,} of {count(summary['of'], 'setting')} tried, {summary['images']:,} images; shared "
        f"trajectories spared {saved:,} of {alone:,} forward passes ({saved / max(alone, 1):.0%})"
    )


def picture(summary: dict, title: str):
    """A map of guidance by interval for each average, and the least distance over the averages. summary: the result."""
    from matplotlib.figure import Figure

    rows, best = [row for row in summary["scores"] if row["value"] is not None], summary["best"]
    shown = sorted({row["average"] for row in rows}, key=lambda name: float(name or 0))
    curve = len(shown) > 1
    columns = math.ceil(math.sqrt(len(shown) + curve))
    lines = -(-(len(shown) + curve) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    values = [row["value"] for row in rows]
    least = min(values)
    most = max(float(np.quantile(values, 0.6)), least * 1.001)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, average in zip(panels.flat, shown, strict=False):
        panel.set_axis_on()
        own = [row for row in rows if row["average"] == average]
        x, y = [row["guidance"] for row in own], [row["interval"][1] for row in own]
        colors = [row["value"] for row in own]
        drawn = panel.scatter(x, y, c=colors, cmap="viridis_r", vmin=least, vmax=most, s=36, marker="s")
        panel.set(xlim=padded([row["guidance"] for row in rows]), ylim=padded([row["interval"][1] for row in rows]))
        panel.set(xlabel="guidance", ylabel="upper end of the interval")
        panel.set_title(f"average {average}" if average else title, fontsize=9)
        if average == best["average"]:
            ring = dict(markersize=12, markerfacecolor="none", markeredgecolor="#d1495b")
            panel.plot(best["guidance"], best["interval"][1], "o", **ring)
    figure.colorbar(drawn, ax=panels, label=f"{title}, after so many images as each was given", shrink=0.6)
    if curve:
        panel = panels.flat[len(shown)]
        panel.set_axis_on()
        lowest = [min(row["value"] for row in rows if row["average"] == average) for average in shown]
        panel.plot(range(len(shown)), lowest, "o-", color="0.25")
        panel.set_xticks(range(len(shown)), shown)
        panel.set(xlabel="average: width, or decay", ylabel=f"least {title}")
    return figure


def padded(values) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
