"""The tables of what was asked after the first results of ranks: where does the gain come from?"""

import statistics

from toy.paper.blocks import ON_THE_WAY, RANKS, Kinds, compared, curve, sooner
from toy.paper.measures import LEVELS
from toy.paper.runs import EULER, SWITCHED_AT
from toy.paper.tables import (
    COLUMNS,
    GUIDED,
    UNGUIDED,
    all_measures,
    at_the_end,
    by_one_classifier,
    by_seed,
    remarks,
    shown,
    table,
)

SWITCHED = "switch-rank-32-unseeded"
STARTS = {"rank-0": "0", "rank-0-seeded": "0, start of rank 8", "rank-8-unseeded": "8, random start", "rank-8": "8"}
STARTS |= {"rank-32-unseeded": "32, random start", "rank-32": "32"}
PARTED = {f"directions-rank-{rank}": rank.replace("-", " ") for rank in ("0", "8", "random-8")}
PARTED |= {f"directions-{name}": title for name, title in STARTS.items() if name not in RANKS}


def directions(kinds: Kinds) -> str:
    """The held-out losses along the first eight directions of the data, and along all others."""
    rows = []
    for part in ("inside", "outside"):
        for name in filter(kinds.__contains__, PARTED):
            at = lambda run, part=part: list(run["at the end"][part].values())
            mean = by_seed(kinds[name], lambda run, at=at: statistics.fmean(at(run)))
            levels = [by_seed(kinds[name], lambda run, at=at, i=i: at(run)[i]) for i in range(len(LEVELS))]
            rows.append([part, PARTED[name], *(shown(values, "{:.4f}") for values in [mean, *levels])])
    return table(["", "rank", "mean", *map(str, LEVELS)], rows)


def guidance(kinds: Kinds) -> str:
    """Samples of ranks 0 and 8 with more and less guidance; two of the four are in the results of `rank`."""
    measured = {"1": ("", UNGUIDED), "1.5": ("guidance-", "guidance 1.5"), "2": ("", GUIDED)}
    measured["3"] = ("guidance-", "guidance 3")
    rows = []
    for key in ("frechet_distance", "residual", "right"):
        title, form = COLUMNS[key]
        for name in ("rank-0", "rank-8"):
            values = [by_seed(kinds[f"{mark}{name}"], at_the_end(key, how)) for mark, how in measured.values()]
            rows.append([title, RANKS[name], *(shown(found, form) for found in values)])
    made = table(["with guidance", "rank", *measured], rows)
    return "\n\n".join([made, *remarks(kinds, ["guidance-rank-0", "guidance-rank-8"])])


def switch(kinds: Kinds) -> str:
    """Samples without guidance that ranks 8 and 32 draw together, between those of each alone."""
    kinds = by_one_classifier(kinds, ["rank-8-unseeded", SWITCHED, "rank-32-unseeded"])
    drawn = [("rank 8", "rank-8-unseeded", UNGUIDED)]
    drawn += [(f"rank 32 to {level:g}, then rank 8", SWITCHED, f"above {level:g}") for level in SWITCHED_AT]
    drawn += [(f"rank 8 to {level:g}, then rank 32", SWITCHED, f"below {level:g}") for level in SWITCHED_AT]
    drawn += [("rank 32", "rank-32-unseeded", UNGUIDED)]
    rows = [
        [title, *(shown(by_seed(kinds[kind], at_the_end(key, how)), form) for key, (_, form) in COLUMNS.items())]
        for title, kind, how in drawn
    ]
    made = table(["drawn by", *(title for title, _ in COLUMNS.values())], rows)
    return "\n\n".join([made, *remarks(kinds, list(kinds))])


RENEWING = {"renew-rank-0-seeded": "0", "renew-rank-8-unseeded": "8", "renew-rank-32-unseeded": "32"}


def renew(kinds: Kinds) -> str:
    """Samples of Euler's method without guidance, with and without new noise in each step."""
    kinds = by_one_classifier(kinds, list(RENEWING))
    rows = [
        [how, title, *(shown(by_seed(kinds[kind], at_the_end(key, how)), form) for key, (_, form) in COLUMNS.items())]
        for how in EULER
        for kind, title in RENEWING.items()
    ]
    made = table(["drawn with", "rank", *(title for title, _ in COLUMNS.values())], rows)
    return "\n\n".join([made, *remarks(kinds, list(kinds))])


START_CLAIMS = {
    "rank 0 is better with the start of rank 8 than without": ("rank-0-seeded", "rank-0"),
    "rank 8 is better with its start than without": ("rank-8", "rank-8-unseeded"),
    "rank 8 is better than rank 0, both with the start of rank 8": ("rank-8", "rank-0-seeded"),
    "rank 8 is better than rank 0, both with a random start": ("rank-8-unseeded", "rank-0"),
    "rank 32 is better with its start than without": ("rank-32", "rank-32-unseeded"),
}


def embedding(kinds: Kinds) -> str:
    """Ranks with and without the start of the patch embedding that their subspace gives."""
    rows = []
    run = {claim: names for claim, names in START_CLAIMS.items() if kinds.keys() >= set(names)}
    for claim, names in run.items():
        first, other = (kinds[name] for name in names)
        saved = [
            {s: sooner(*(curve(runs[s]["on the way"], m) for runs in (first, other))) for s in first if s in other}
            for m in ON_THE_WAY.values()
        ]
        rows.append([claim, *(shown(values, "{:.0%}") for values in saved)])
    parts = [compared(kinds, START_CLAIMS), "By how much it is sooner where both are at the end:"]
    parts += [table(["", *ON_THE_WAY], rows), all_measures(kinds, STARTS)]
    return "\n\n".join([*parts, *remarks(kinds, list(STARTS))])
