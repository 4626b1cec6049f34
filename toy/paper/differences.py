"""When one model counts as better than another, by the rule of docs/paper.md, which is older than the runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHOWN, SO_FAR, NOT, OPPOSITE = "shown", "shown so far", "not shown", "the opposite is shown"
TOO_FEW = "too few seeds"
ENOUGH = 3  # seeds


@dataclass(frozen=True)
class Difference:
    """first - other, of a measure of two models at the same seeds. spread: its standard deviation between seeds."""

    mean: float
    spread: float
    seeds: int

    @classmethod
    def between(cls, first: Mapping[int, float | None], other: Mapping[int, float | None]) -> "Difference":
        """Of the values by seed, at the seeds that both have. With one alone nothing is known of the spread.

        A value of None: there was nothing to measure.
        """
        seeds = [s for s in first if first[s] is not None and other.get(s) is not None]
        found = [first[seed] - other[seed] for seed in seeds]
        mean = statistics.fmean(found) if found else float("nan")
        return cls(mean, statistics.stdev(found) if len(found) > 1 else float("inf"), len(found))

    @property
    def counts(self) -> bool:
        return abs(self.mean) > 2 * self.spread


def verdict(differences: Sequence[Difference]) -> str:
    """Of the claim that the first is lower, judged by each of these differences.

    Shown: each of them counts. Shown so far: one counts, and none to the contrary. The opposite is shown: each of them
    counts, the other way round.
    """
    if any(d.seeds < ENOUGH for d in differences):
        return TOO_FEW
    lower = [d.counts and d.mean < 0 for d in differences]
    higher = [d.counts and d.mean > 0 for d in differences]
    if all(lower):
        return SHOWN
    if all(higher):
        return OPPOSITE
    return SO_FAR if any(lower) and not any(higher) else NOT
