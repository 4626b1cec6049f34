"""Which runs an experiment consists of, the most decisive first."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from asymflow import opening
from asymflow.errors import InputError
from toy.paper.runs import Run

RANKS = ("8", "0", "random 8", "2", "4", "16", "32", "full")
SEEDS = (0, 1, 2)
SEARCHED = 3  # the seed of the search for learning rates: none of the others
NARROW_RANKS = ("8", "0", "16", "4", "24")
RATES = (3e-4, 6e-4, 1.2e-3)
RATED = ("8", "0", "random 8", "full")  # whose learning rate is looked for


def of_rank(rank: str, seed: int, mark: str = "", settings: tuple[str, ...] = ()) -> Run:
    """A run whose subspace has this rank: "8", "full" or "random 8". mark: goes into its name."""
    random = int(rank.removeprefix("random ")) if rank.startswith("random") else 0
    settings += () if random else (f"subspace.rank={rank}",)
    return Run(f"rank-{rank.replace(' ', '-')}{mark}-seed-{seed}", seed, settings, random=random)


def rank(out: Path) -> list[Run]:
    """Figures 5 and 6 and Table 1: which rank is best, how fast is it, and what does it lose without a clamp?"""
    return [of_rank(rank, seed) for ranks in (RANKS[:2], RANKS[2:]) for seed in SEEDS for rank in ranks]


def rate(out: Path) -> list[Run]:
    """The search for learning rates: shorter runs, of which only the held-out losses are measured."""
    runs = [of_rank(rank, SEARCHED, f"-rate-{r:g}", (f"optimizer.lr={r:g}",)) for rank in RATED for r in RATES]
    return [replace(run, settings=(*run.settings, "train.steps=1000"), drawn=False) for run in runs]


def own_rate(out: Path) -> list[Run]:
    """The runs of `rank` again, each with the learning rate of the lowest held-out loss in `rate`."""
    runs = []
    for seed in SEEDS:
        for rank in RATED:
            best = min(RATES, key=lambda r: held_out(out / f"{of_rank(rank, SEARCHED, f'-rate-{r:g}').name}.json"))
            runs.append(of_rank(rank, seed, "-own-rate", (f"optimizer.lr={best:g}",)))
    return runs


def held_out(file: Path) -> float:
    """The mean held-out loss at the end of a run."""
    if not file.exists():
        raise InputError(f"{file} is not there: python -m toy.paper rate")
    return statistics.fmean(list(opening.read_json(file)["on the way"].values())[-1]["held_out"].values())


def repa(out: Path) -> list[Run]:
    """Table 2: whom does alignment help more? Against the runs of `rank`, which have none."""
    settings = ("loss.repa.after=2", "loss.repa.hidden=512")
    return [replace(of_rank(rank, seed, "-repa", settings), repa=True) for seed in SEEDS for rank in RANKS[:2]]


def narrow(out: Path, mark: str = "-narrow", config: str = "shapes64") -> list[Run]:
    """Held-out losses by rank with half the width and half the bottleneck, against those of `rank`."""
    half = ("model.options.width=96", "model.options.heads=3", "model.options.bottleneck=32")
    return [replace(of_rank(r, s, mark, half), config=config, drawn=False) for s in SEEDS for r in NARROW_RANKS]


def emoji(out: Path) -> list[Run]:
    """The same for emoji, and of three ranks all measures but the oracle's."""
    runs = [
        replace(of_rank(r, seed, "-emoji"), config="emoji64", drawn=r in ("8", "0", "full"))
        for seed in SEEDS
        for r in ("8", "0", "full", "random 8", "32", "16", "4", "48")
    ]
    return runs + narrow(out, "-emoji-narrow", "emoji64")


PLANS: dict[str, Callable[[Path], list[Run]]] = {
    "rank": rank,
    "repa": repa,
    "rate": rate,
    "own-rate": own_rate,
    "narrow": narrow,
    "emoji": emoji,
}
