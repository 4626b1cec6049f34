"""The first table of docs/paper.md: each claim of the paper, its figures, and what came out here."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from toy.paper import blocks
from toy.paper.blocks import BY, QUALITY, Kinds, forms
from toy.paper.differences import Difference, verdict
from toy.paper.tables import Sides, Values, table

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
    return form.format(statistics.fmean(known)) if known else "none"
