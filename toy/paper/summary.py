"""The first table of docs/paper.md, each claim of the paper and what came out here, and its last, what has been run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from toy.paper import blocks
from toy.paper.blocks import BY, QUALITY, Kinds, forms
from toy.paper.differences import Difference, verdict
from toy.paper.tables import UNKNOWN, Sides, Values, table

ONE = {"verdict": (0, 1)}


class Part(NamedTuple):
    """Some claims: their sides, how these are written and judged, and the kinds of runs that they cannot do without."""

    sides: Callable[[Kinds], Sides]
    forms: Mapping[str, str]
    verdicts: Mapping[str, Sequence[int]]
    needed: Sequence[str]


BOTH = ["rank-0", "rank-8"]
PARTS = {  # by where they are below
    "[Figure 5](#ranks-figure-5)": Part(partial(blocks.sides, pairs=blocks.RANK_CLAIMS), forms(QUALITY), BY, BOTH),
    "[Figure 6](#speed-figure-6)": Part(blocks.speed_sides, blocks.SOONER, BY, [*BOTH, "speed-rank-0", "speed-rank-8"]),
    "[Table 1](#the-clamp-table-1)": Part(blocks.clamp_sides, blocks.LOST, ONE, BOTH),
    "[Table 2](#alignment-table-2)": Part(blocks.repa_sides, forms(QUALITY), BY, [*BOTH, "rank-0-repa", "rank-8-repa"]),
    "[Table 3](#from-latents-to-pixels-table-3)": Part(
        partial(blocks.sides, pairs=blocks.FINETUNING_CLAIMS, measures=blocks.FAULTS),
        forms(blocks.FAULTS),
        ONE,
        ["finetuning-plain", "finetuning-reduced"],
    ),
    "[Figure 4](#before-any-training-figure-4)": Part(blocks.lifted_sides, blocks.LIFTED, ONE, ["finetuning-start"]),
}
PUBLISHED = {  # what the paper has for the first side, and for the other
    "rank 8 is better than rank 0 (x0-prediction)": "FID 2.34, 2.68",
    "rank 8 by PCA is better than a random subspace of rank 8": "FID 2.34, 2.63",
    "a random subspace of rank 8 is better than rank 0 (in the paper: not shown)": "FID 2.63, 2.68",
    "rank 8 is better than rank 2": "FID 2.34, 2.41",
    "rank 8 is better than rank 32": "FID 2.34, 2.36",
    "rank 8 has sooner what both have at the end †": "about 40 % sooner",
    "rank 8 loses less than rank 0": "FID +0.52, +1.37",
    "rank 8 is better with alignment": "FID 1.57, 1.76",
    "plain is better than the latent model, finetuned": "HPSv3 12.03, 10.70; FID 20.2, 15.0",
    "variance-reduced is better than plain": "HPSv3 12.99, 12.03; FID 18.5, 20.2",
    "with the perceptual term it is better than without": "HPSv3 13.06, 12.99; FID 19.1, 18.5",
}


def summary(kinds: Kinds) -> str:
    rows = []
    for place, part in PARTS.items():
        if missing := [kind for kind in part.needed if kind not in kinds]:
            rows.append([place, f"not run yet: {', '.join(missing)}", "", "", "", ""])
            continue
        for claim, both in part.sides(kinds).items():
            ours = [
                f"{name} {mean(first, other, form)}, {mean(other, first, form)}"
                for (name, form), first, other in zip(part.forms.items(), *both, strict=True)
            ]
            differences = [Difference.between(*values) for values in zip(*both, strict=True)]
            found = [verdict([differences[i] for i in chosen]) for chosen in part.verdicts.values()]
            rows.append([place, claim, PUBLISHED.get(claim, ""), "; ".join(ours), *found, *[""] * (2 - len(found))])
    return table(["paper", "claim", "the paper's figures", "ours", *BY], rows)


def mean(values: Values, others: Values, form: str) -> str:
    """Of the seeds that both sides have, as in the verdict."""
    known = [values[s] for s in values if values[s] is not None and others.get(s) is not None]
    return form.format(statistics.fmean(known)) if known else UNKNOWN


EXPERIMENTS = {  # by what is in the names of their runs; the first that is
    "finetuning-": "finetuning",
    "emoji": "emoji",
    "-narrow": "narrow",
    "-own-rate": "own-rate",
    "-rate-": "rate",
    "-repa": "repa",
    "seeded": "embedding",
    "": "rank",
}


def runs(kinds: Kinds) -> str:
    """The hours, machines and commits of each experiment."""
    everything = [run for runs in kinds.values() for run in runs.values()]
    found: dict[str, list[dict]] = {}
    for run in everything:
        name = run["run"].get("again") or next(what for mark, what in EXPERIMENTS.items() if mark in run["run"]["name"])
        found.setdefault(name, []).append(run)
    rows = []
    for name, these in [*((f"`{name}`", found[name]) for name in sorted(found)), ("all", everything)]:
        hours = [f"{sum(run['hours'][key] for run in these):.1f}" for key in ("training", "measuring")]
        processors = ", ".join(sorted({run["machine"].partition(", ")[0] for run in these}))
        commits = ", ".join(sorted({run["commit"] for run in these})) if these is not everything else ""
        rows.append([name, str(len(these)), *hours, processors, commits])
    made = table(["experiment", "runs", "hours of training", "of measuring", "processors", "commits"], rows)
    software = "; ".join(sorted({run["machine"].partition(", ")[2] for run in everything}))
    return f"{made}\n\n*Hours of one core beside other work: {software}.*"
