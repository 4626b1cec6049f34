"""The tables and figures of docs/paper.md, from the JSON file of each run.

The page's words are written by hand. What comes between <!-- NAME --> and <!-- end of NAME --> is made here.
"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from asymflow import opening
from asymflow.errors import InputError
from asymflow.files import replacing
from toy.paper.differences import Difference, verdict

Runs = Mapping[int, dict]  # what was measured of the runs of one kind, by their seeds
Measure = Callable[[dict], float | None]

GUIDED, UNGUIDED, UNCLAMPED = "guided", "unguided", "guided, no clamp"
COLUMNS = {  # of the tables: what it is called, and how its numbers are written
    "frechet_distance": ("Fréchet distance", "{:.2f}"),
    "precision": ("precision", "{:.1%}"),
    "recall": ("recall", "{:.1%}"),
    "count": ("count", "{:.1%}"),
    "color": ("colour", "{:.1%}"),
    "shape": ("shape", "{:.1%}"),
    "right": ("all right", "{:.1%}"),
    "sharpness": ("sharpness", "{:.3f}"),
    "residual": ("residual", "{:.1f}"),
    "patches": ("patches", "{:.4f}"),
    "spectrum": ("spectrum", "{:.2f}"),
    "seams": ("seams", "{:.2f}"),
}
RANKS = {"rank-0": "0", "rank-2": "2", "rank-4": "4", "rank-8": "8", "rank-16": "16", "rank-32": "32"}
RANDOM = "random 8"
RANKS |= {"rank-full": "768", "rank-random-8": RANDOM}
PAPER_RANKS = {"0": 2.68, "2": 2.41, "4": 2.37, "8": 2.34, "16": 2.35, "32": 2.36, RANDOM: 2.63}  # its FIDs, Fig. 5
PAPER_CLAMP = {"rank-8": 2.28 - 1.76, "rank-0": 3.27 - 1.90}  # by how much its FID rises without a clamp, Table 1


# ---- What is in a file -----------------------------------------------------------------------------------------------
def held_out(run: dict) -> float:
    """The mean of the losses at all noise levels, after the last step."""
    return mean_loss(list(run["on the way"].values())[-1])


def mean_loss(found: dict) -> float:
    return statistics.fmean(found["held_out"].values())


def at_the_end(how: str, key: str) -> Measure:
    return lambda run: run["at the end"][how][key]


def lost_without_clamp(key: str) -> Measure:
    return lambda run: run["at the end"][UNCLAMPED][key] - run["at the end"][GUIDED][key]


def by_seed(runs: Runs, measure: Measure) -> dict[int, float | None]:
    return {seed: measure(run) for seed, run in sorted(runs.items())}


def read(folder: Path) -> dict[str, Runs]:
    """All results in a folder, by the names of their runs without the seed."""
    kinds: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob("*-seed-*.json")):
        found = opening.read_json(file)
        kinds.setdefault(found["run"]["name"].rpartition("-seed-")[0], {})[found["run"]["seed"]] = found
    return kinds


# ---- Text ------------------------------------------------------------------------------------------------------------
def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def spread(values: Mapping[int, float | None], form: str) -> str:
    """The mean and the standard deviation of the seeds, such as "2.31 ± 0.05"."""
    known = [value for value in values.values() if value is not None]
    if not known:
        return "none"
    mean = form.format(statistics.fmean(known))
    return f"{mean} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else mean


def difference(first: Runs, other: Runs, measure: Measure, form: str) -> tuple[Difference, str]:
    """first - other, and how the table shows it: in bold if it counts."""
    found = Difference.between(by_seed(first, measure), by_seed(other, measure))
    sign = form.replace("{:", "{:+")
    words = f"{sign.format(found.mean)} ± {form.format(found.spread)}" if found.seeds > 1 else sign.format(found.mean)
    return found, f"**{words}**" if found.counts else words


def measured(kinds: Mapping[str, Runs], titles: Mapping[str, str], how: str) -> str:
    """A row for each kind of run, with all that was measured of its samples."""
    rows = []
    for name, title in titles.items():
        if name in kinds:
            cells = [spread(by_seed(kinds[name], at_the_end(how, key)), form) for key, (_, form) in COLUMNS.items()]
            rows.append([title, str(len(kinds[name])), *cells])
    return table(["rank", "seeds", *(title for title, _ in COLUMNS.values())], rows)


def losses(kinds: Mapping[str, Runs], titles: Mapping[str, str]) -> str:
    """A row for each kind of run, with its held-out loss at each noise level."""
    levels = list(next(iter(next(iter(kinds.values())).values()))["on the way"].values())[-1]["held_out"]
    rows = []
    for name, title in titles.items():
        if name in kinds:
            at = [lambda run, k=level: list(run["on the way"].values())[-1]["held_out"][k] for level in levels]
            cells = [spread(by_seed(kinds[name], measure), "{:.4f}") for measure in [held_out, *at]]
            rows.append([title, *cells])
    return table(["rank", "mean", *levels], rows)


def claims(kinds: Mapping[str, Runs], pairs: Mapping[tuple[str, str], str], measures: Mapping[str, tuple]) -> str:
    """A row for each claim that the first of a pair is lower: the differences, and the verdict."""
    rows = []
    for (first, other), claim in pairs.items():
        if first in kinds and other in kinds:
            found = [difference(kinds[first], kinds[other], measure, form) for measure, form in measures.values()]
            rows.append([claim, *(words for _, words in found), verdict([d for d, _ in found])])
    return table(["claim", *measures, "verdict"], rows)


def origin(kinds: Mapping[str, Runs]) -> str:
    """The machines, commits and hours of the runs."""
    runs = [run for by_seed in kinds.values() for run in by_seed.values()]
    hours = {key: sum(run["hours"][key] for run in runs) for key in ("training", "measuring")}
    machines, commits = ("; ".join(sorted({run[key] for run in runs})) for key in ("machine", "commit"))
    return (
        f"*{len(runs)} runs, {hours['training']:.1f} hours of training and {hours['measuring']:.1f} of measuring, two "
        f"processes beside other work, on {machines}, at commit {commits}.*"
    )


# ---- Figure 5 --------------------------------------------------------------------------------------------------------
QUALITY = {
    "held-out loss": (held_out, "{:.4f}"),
    "Fréchet distance": (at_the_end(GUIDED, "frechet_distance"), "{:.2f}"),
}
RANK_CLAIMS = {
    ("rank-8", "rank-0"): "rank 8 is better than rank 0 (x0-prediction)",
    ("rank-8", "rank-full"): "rank 8 is better than rank 768 (u-prediction)",
    ("rank-8", "rank-random-8"): "rank 8 by PCA is better than a random subspace of rank 8",
    ("rank-random-8", "rank-0"): "a random subspace of rank 8 is better than rank 0 (the paper: it is not)",
    ("rank-8", "rank-2"): "rank 8 is better than rank 2",
    ("rank-8", "rank-32"): "rank 8 is better than rank 32",
}


def rank(kinds: Mapping[str, Runs]) -> str:
    parts = [claims(kinds, RANK_CLAIMS, QUALITY), "With guidance 2:", measured(kinds, RANKS, GUIDED)]
    parts += ["Without guidance:", measured(kinds, RANKS, UNGUIDED)]
    parts += ["Held-out losses by noise level:", losses(kinds, RANKS), origin(kinds)]
    return "\n\n".join(parts)


def rank_figure(kinds: Mapping[str, Runs]) -> Figure:
    """The paper's Figure 5 beside ours: a point for each seed, a line through the means."""
    panels = {"the paper: FID, H/16, 160 epochs": {rank: {0: fid} for rank, fid in PAPER_RANKS.items()}}
    for title, (measure, _) in {**QUALITY, "residual": (at_the_end(GUIDED, "residual"), "")}.items():
        panels[f"ours: {title}"] = {RANKS[k]: by_seed(runs, measure) for k, runs in kinds.items() if k in RANKS}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    shown = [rank for rank in RANKS.values() if rank != RANDOM]
    for axis, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for rank, values in found.items():
            known = [value for value in values.values() if value is not None]
            place, color = (shown.index("8"), "C3") if rank == RANDOM else (shown.index(rank), "C0")
            axis.plot([place] * len(known), known, "x" if rank == RANDOM else "o", color=color, markersize=4)
        means = [statistics.fmean(v for v in found[rank].values() if v is not None) for rank in shown if rank in found]
        axis.plot([place for place, rank in enumerate(shown) if rank in found], means, color="C0")
        axis.set_xticks(range(len(shown)), shown)
        axis.set(xlabel="rank (x: a random subspace)", yscale="log" if "loss" in title else "linear")
        axis.set_title(title, fontsize=9)
    return figure


# ---- Figure 6 --------------------------------------------------------------------------------------------------------
SPEED = {"held-out loss": mean_loss, "Fréchet distance, unguided": lambda found: found["frechet_distance"]}


def curve(run: dict, measure: Callable[[dict], float]) -> tuple[list[int], list[float]]:
    return [int(step) for step in run["on the way"]], [measure(found) for found in run["on the way"].values()]


def reached(run: dict, level: float, measure: Callable[[dict], float]) -> float | None:
    """The step at which a curve comes down to a level, between two measurements by a straight line; None: never."""
    steps, values = curve(run, measure)
    for i, value in enumerate(values):
        if value <= level:
            share = 0.0 if i == 0 else (values[i - 1] - level) / (values[i - 1] - value)
            return steps[i] if i == 0 else steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def speed(kinds: Mapping[str, Runs]) -> str:
    rows = []
    for title, measure in SPEED.items():
        saved = {}
        for seed in sorted(kinds["rank-0"].keys() & kinds["rank-8"].keys()):
            slow, fast = kinds["rank-0"][seed], kinds["rank-8"][seed]
            steps, values = curve(slow, measure)
            step = reached(fast, values[-1], measure)
            saved[seed] = None if step is None else 1 - step / steps[-1]
        each = " · ".join("never" if value is None else f"{value:.0%}" for value in saved.values())
        rows.append([title, each, spread(saved, "{:.0%}")])
    return table(["rank 8 reaches the last value of rank 0 sooner by", "seeds", "mean"], rows)


def speed_figure(kinds: Mapping[str, Runs]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (title, measure) in zip(figure.subplots(1, len(SPEED)), SPEED.items(), strict=True):
        for name, color in (("rank-0", "C1"), ("rank-8", "C0"), ("rank-random-8", "C3")):
            for i, run in enumerate(kinds.get(name, {}).values()):
                label = None if i else f"rank {RANKS[name]}"
                axis.plot(*curve(run, measure), color=color, linewidth=1, marker=".", label=label)
        axis.set(title=title, xlabel="step", yscale="log")
    axis.legend(fontsize=8)
    return figure


# ---- Table 1 ---------------------------------------------------------------------------------------------------------
CLAMP = {
    "Fréchet distance": (lost_without_clamp("frechet_distance"), "{:.2f}"),
    "residual": (lost_without_clamp("residual"), "{:.2f}"),
}


def clamp(kinds: Mapping[str, Runs]) -> str:
    rows = []
    for name in PAPER_CLAMP:
        lost = [spread(by_seed(kinds[name], measure), form) for measure, form in CLAMP.values()]
        rows.append([f"rank {RANKS[name]}", f"{PAPER_CLAMP[name]:.2f}", *lost])
    head = ["without a clamp, this much is lost", "the paper: FID", *(f"ours: {title}" for title in CLAMP)]
    less = {("rank-8", "rank-0"): "rank 8 loses less than rank 0"}
    return "\n\n".join([table(head, rows), claims(kinds, less, CLAMP)])


# ---- The page --------------------------------------------------------------------------------------------------------
BLOCKS = {"rank": rank, "speed": speed, "clamp": clamp}
FIGURES = {"paper_rank": rank_figure, "paper_speed": speed_figure}


def write(folder: Path, docs: Path) -> None:
    """Put the tables of the results in a folder into docs/paper.md, and the figures beside it."""
    kinds = read(folder)
    if missing := {"rank-0", "rank-8"} - kinds.keys():
        raise InputError(f"{folder} has no results of {' and '.join(sorted(missing))}: python -m toy.paper rank")
    page = docs / "paper.md"
    text = page.read_text(encoding="utf-8")
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if not (start in text and end in text):
            raise InputError(f"{page} has no place for the table {name!r}: {start} ... {end}")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n\n{make(kinds)}\n\n{end}{after}"
    for name, draw in FIGURES.items():
        with replacing(docs / f"{name}.png") as beside:
            draw(kinds).savefig(beside, dpi=80, format="png")
    with replacing(page) as beside:
        beside.write_text(text, encoding="utf-8")
