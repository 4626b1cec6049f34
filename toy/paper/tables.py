"""Results of several seeds in tables: means, spreads, and claims with their verdicts."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from asymflow import opening
from asymflow.errors import InputError
from asymflow.text import count
from toy.paper.differences import ENOUGH, Difference, verdict

Runs = Mapping[int, dict]  # what was measured of the runs of one kind, by their seeds
Measure = Callable[[dict], float | None]  # a number from what was measured; None: there was nothing to measure
Values = Mapping[int, float | None]  # of a measure, by seed
Sides = Mapping[str, tuple[Sequence[Values], Sequence[Values]]]  # by claim: the values of each measure, on both sides

CLASSIFIED = {"frechet_distance", "precision", "recall"}  # what is measured in the features of a classifier
NOT_COMPARED = dict.fromkeys(CLASSIFIED)
MEASURED, LEFT_OUT = ("on the way", "at the end"), "left out"
UNKNOWN = "-"
GUIDED, UNGUIDED, UNCLAMPED = "guided", "unguided", "guided, no clamp"
COLUMNS = {  # of samples: what it is called, and how its numbers are written
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


# ---- What is in a file -----------------------------------------------------------------------------------------------
def read(folder: Path) -> dict[str, Runs]:
    """All results in a folder, by the names of their runs without the seed. InputError if one is of no whole run."""
    kinds: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob("*-seed-*.json")):
        found = opening.read_json(file)
        if not {"run", "scale"} <= found.keys():
            raise InputError(f"{file} is no result of toy.paper: choose another --out")
        if found["scale"]:
            raise InputError(f"{file} is of a quick look, whose figures are no results: choose another --out")
        kinds.setdefault(found["run"]["name"].rpartition("-seed-")[0], {})[found["run"]["seed"]] = found
    return kinds


def comparable(kinds: Mapping[str, Runs]) -> dict[str, Runs]:
    """These kinds without what another classifier than that of their data's yardsticks has measured."""
    classifiers = {f"{data}64": kinds.get(f"{data}-whole", {}).get(0) for data in ("shapes", "emoji")}

    def compared(run: dict) -> dict:
        yardstick = classifiers.get(run["run"].get("config", "shapes64"))
        return by_classifier(run, yardstick.get("classifier")) if yardstick else run

    return {name: {seed: compared(run) for seed, run in runs.items()} for name, runs in kinds.items()}


def by_one_classifier(kinds: Mapping[str, Runs], names: Sequence[str]) -> dict[str, Runs]:
    """These kinds without what another classifier than that of most of their runs of a seed has measured.

    Their differences at a seed compare. Means over the seeds do not, if the classifiers of these are different ones.
    """
    found = {name: dict(kinds[name]) for name in names if name in kinds}
    for seed in {seed for runs in found.values() for seed in runs}:
        these = [runs for runs in found.values() if seed in runs]
        classifiers = Counter(runs[seed].get("classifier") for runs in these if classified(runs[seed]))
        for runs in these:
            runs[seed] = by_classifier(runs[seed], max(classifiers, key=classifiers.__getitem__, default=None))
    return found


def by_classifier(run: dict, classifier: str | None) -> dict:
    """A run, with None for what another classifier than this one has measured: it does not compare.

    classifier: as in a result; the first results do not name theirs.
    """
    if run.get("classifier") == classifier or not classified(run):
        return run
    blank = lambda found: {key: part | NOT_COMPARED if is_classified(part) else part for key, part in found.items()}
    return run | {key: blank(run[key]) for key in MEASURED if key in run} | {LEFT_OUT: True}


def classified(run: dict) -> bool:
    """Whether anything was measured in the features of a classifier; not of `finetuning`, which is otherwise."""
    return any(is_classified(part) for key in MEASURED for part in run.get(key, {}).values())


def is_classified(part: object) -> bool:
    return isinstance(part, dict) and part.keys() >= CLASSIFIED


def held_out(run: dict) -> float:
    """The mean of the held-out losses at all noise levels, after the last step."""
    return mean_loss(last(run))


def mean_loss(found: dict) -> float:
    return statistics.fmean(found["held_out"].values())


def as_trained(run: dict) -> float:
    """The held-out loss after the last step at the noise levels that the training draws: see `loss_as_trained`."""
    return loss_as_trained(last(run))


def loss_as_trained(found: dict) -> float:
    """The held-out loss of the noise levels that the training draws, sigmoid(0.8 + 0.8 normal), between those measured.

    The mean over all levels is for the most part what the lowest of them has, which a training hardly ever draws.
    """
    found = {float(level): loss for level, loss in found["held_out"].items()}
    levels, losses = (torch.tensor(list(column), dtype=torch.float64) for column in (found, found.values()))
    density = torch.exp(-0.5 * ((levels.logit() - 0.8) / 0.8) ** 2) / (levels * (1 - levels))
    return (torch.trapezoid(density * losses, levels) / torch.trapezoid(density, levels)).item()


def last(run: dict) -> dict:
    """What was measured after the last step."""
    return list(run["on the way"].values())[-1]


def at_the_end(key: str, how: str = GUIDED) -> Measure:
    return lambda run: run["at the end"][how][key]


def by_seed(runs: Runs, measure: Measure) -> Values:
    return {seed: measure(run) for seed, run in sorted(runs.items())}


def minus(first: Values, other: Values) -> Values:
    """first - other, where both are known."""
    return {s: first[s] - other[s] for s in first if first[s] is not None and other.get(s) is not None}


# ---- Tables ----------------------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def folded(title: str, made: str) -> str:
    """A long table that a reader may open."""
    return f"<details markdown>\n<summary>{title}</summary>\n\n{made}\n\n</details>"


def shown(values: Values, form: str) -> str:
    """The mean and the standard deviation of the seeds, such as "2.31 ± 0.05, 2 of 3 seeds" if one has no value."""
    known = [value for value in values.values() if value is not None]
    if not known:
        return UNKNOWN if values else ""
    mean = form.format(statistics.fmean(known))
    words = f"{mean} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else mean
    return words if len(known) == len(values) else f"{words}, {len(known)} of {len(values)} seeds"


def shown_difference(found: Difference, form: str) -> str:
    """In bold if it counts, of as many seeds as a verdict takes."""
    mean = form.replace("{:", "{:+").format(found.mean)
    if found.seeds < 2:
        return f"{mean}, one seed" if found.seeds else UNKNOWN
    words = f"{mean} ± {form.format(found.spread)}" + (f", {found.seeds} seeds" if found.seeds < ENOUGH else "")
    return f"**{words}**" if found.counts and found.seeds >= ENOUGH else words


def claims(sides: Sides, measures: Mapping[str, str], verdicts: Mapping[str, Sequence[int]] | None = None) -> str:
    """A row for each claim that its first side is lower: the differences, and the verdicts.

    measures: how the numbers of each are written. verdicts: the numbers of the measures that each is by; None: one, by
    all.
    """
    verdicts = verdicts or {"verdict": range(len(measures))}
    rows = []
    for claim, both in sides.items():
        found = [Difference.between(*values) for values in zip(*both, strict=True)]
        words = [shown_difference(d, form) for d, form in zip(found, measures.values(), strict=True)]
        rows.append([claim, *words, *(verdict([found[i] for i in chosen]) for chosen in verdicts.values())])
    return table(["claim", *(f"difference in {name}" for name in measures), *verdicts], rows)


WAYS = {GUIDED: "with guidance 2", UNGUIDED: "without guidance", UNCLAMPED: "with guidance 2, without a clamp"}


def all_measures(kinds: Mapping[str, Runs], titles: Mapping[str, str]) -> str:
    measured = folded("Held-out losses by noise level", losses(kinds, titles))
    return "\n\n".join([all_samples(kinds, titles, (GUIDED, UNGUIDED)), measured])


def all_samples(kinds: Mapping[str, Runs], titles: Mapping[str, str], ways: Sequence[str]) -> str:
    return "\n\n".join(folded(f"Samples {WAYS[how]}", samples(kinds, titles, how)) for how in ways)


def samples(kinds: Mapping[str, Runs], titles: Mapping[str, str], how: str = GUIDED) -> str:
    """A row for each kind of run, with all that was measured of its samples: of emoji nothing by the oracle."""
    drawn = {name: {s: run for s, run in kinds.get(name, {}).items() if how in run["at the end"]} for name in titles}
    measured = {key for runs in drawn.values() for run in runs.values() for key in run["at the end"][how]}
    columns = {key: column for key, column in COLUMNS.items() if key in measured}
    rows = []
    for name, runs in drawn.items():
        cells = [shown(by_seed(runs, at_the_end(key, how)), form) for key, (_, form) in columns.items()]
        rows += [[titles[name], str(len(runs)), *cells]] if runs else []
    return table(["", "seeds", *(title for title, _ in columns.values())], rows)


def losses(kinds: Mapping[str, Runs], titles: Mapping[str, str]) -> str:
    """A row for each kind of run, with its held-out loss at each noise level."""
    rows, levels = [], []
    for name, title in titles.items():
        if runs := {s: run for s, run in kinds.get(name, {}).items() if "on the way" in run}:
            levels = list(last(next(iter(runs.values())))["held_out"])
            at = [lambda run, level=level: last(run)["held_out"][level] for level in levels]
            rows.append([title, *(shown(by_seed(runs, m), "{:.4f}") for m in (held_out, as_trained, *at))])
    return table(["rank", "mean", "as trained", *levels], rows)


def remarks(kinds: Mapping[str, Runs], names: Sequence[str]) -> list[str]:
    """What a reader of a table of these kinds has to know beside it: a paragraph, or none."""
    runs = [run for name in names for run in kinds.get(name, {}).values()]
    drawn = [run for run in runs if (classified(run) or run["at the end"].keys() >= CLASSIFIED) and LEFT_OUT not in run]
    classifiers, words = {run.get("classifier") for run in drawn}, []
    if left_out := sum(LEFT_OUT in run for run in runs):
        words.append(
            f"Fréchet distance, precision and recall of {count(left_out, 'run')} are left out: another classifier "
            "measured them ([why](#what-is-measured))."
        )
    if len(classifiers) > 1:
        words.append(f"These three are by {len(classifiers)} classifiers: compare them within a seed only.")
    if len(teachers := {run.get("teacher") for run in runs if run["run"].get("repa")}) > 1:
        words.append(f"They are aligned with {len(teachers)} networks, trained alike on as many machines.")
    return [f"*{' '.join(words)}*"] if words else []
