"""Which runs an experiment consists of, the most decisive first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from asymflow import opening
from toy.paper.runs import EMBEDDED, Run, of_rank
from toy.paper.tables import held_out

RANKS = ("8", "0", "random 8", "2", "4", "16", "32", "full")
IN_FIGURE_6 = ("rank-8-", "rank-0-", "rank-random-8-")  # what is measured of samples on the way, too
SEEDS = (0, 1, 2)
SEARCHED = 3  # the seed of the search for learning rates: none of the others
NARROW_RANKS = ("8", "0", "16", "4", "24")
RATE = 6e-4  # of the configurations
RATES = (3e-4, RATE, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3)
RATED = ("8", "0", "random 8", "full")  # whose learning rate is looked for


def rank(out: Path) -> list[Run]:
    """Figures 5 and 6 and Table 1: which rank is best, how fast is it, and what does it lose without a clamp?"""
    runs = [of_rank(rank, seed) for ranks in (RANKS[:2], RANKS[2:]) for seed in SEEDS for rank in ranks]
    return [run if run.name.startswith(IN_FIGURE_6) else replace(run, drawn="at the end") for run in runs]


def guidance(out: Path) -> list[Run]:
    """What was trained for `rank`, drawn with more and less guidance: does one rank want another than the other?"""
    return again("guidance", of_ranks(RANKS[:2]))


def speed(out: Path) -> list[Run]:
    """What was trained for `rank`, drawn with guidance on the way, too: is rank 8 ahead in such samples?"""
    return again("speed", of_ranks(RANKS[:2]))


def directions(out: Path) -> list[Run]:
    """The held-out losses of what was trained before, inside of rank 8's subspace and outside: where is the gain?"""
    return again("directions", [*of_ranks(RANKS[:3]), *embedding(out)])


def embedding(out: Path) -> list[Run]:
    """Ranks 8 and 32 without their start of the patch embedding, and rank 0 with that of rank 8.

    Is the gain that of what is predicted, or that of where the embedding starts?
    """
    settings = (f"model.backbone={EMBEDDED}", "model.size=null")
    return [
        replace(of_rank(rank, seed, mark, settings), given=given, drawn="at the end")
        for seed in SEEDS
        for rank, mark, given in (
            ("8", "-unseeded", ""),
            ("0", "-seeded", "model.options.directions"),
            ("32", "-unseeded", ""),
        )
    ]


def switch(out: Path) -> list[Run]:
    """Ranks 32 and 8 of `embedding` in one drawing: at which noise levels does rank 32 go wrong?"""
    return again("switch", [run for run in embedding(out) if run.name.startswith("rank-32-")])


def renew(out: Path) -> list[Run]:
    """What was trained for `embedding`, drawn with new noise in each step: do the errors of rank 32 add up?"""
    return again("renew", embedding(out))


def of_ranks(ranks: Sequence[str]) -> list[Run]:
    return [of_rank(rank, seed) for seed in SEEDS for rank in ranks]


def again(what: str, runs: Sequence[Run]) -> list[Run]:
    """What was trained for these runs, to be measured in another way."""
    return [replace(run, name=f"{what}-{run.name}", again=what, trained=run.name, drawn="always") for run in runs]


def rate(out: Path) -> list[Run]:
    """The search for learning rates: shorter runs, of which only the held-out losses are measured."""
    runs = [of_rank(rank, SEARCHED, f"-rate-{r:g}", (f"optimizer.lr={r:g}",)) for rank in RATED for r in RATES]
    return [replace(run, settings=(*run.settings, "train.steps=1000"), drawn="never") for run in runs]


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest of these losses; None if a lower rate, or the next higher one, has not been tried."""
    best = min(sorted(losses), key=losses.__getitem__, default=RATES[-1])
    return best if losses.keys() >= set(RATES[: RATES.index(best) + 2]) else None


def own_rate(out: Path) -> list[Run]:
    """The runs of `rank` again, each with the learning rate of the lowest held-out loss in `rate`, which goes first.

    Where that is the rate of the configuration, the runs of `rank` are these runs.
    """
    best = {}
    for rank in RATED:
        files = {r: out / f"{of_rank(rank, SEARCHED, f'-rate-{r:g}').name}.json" for r in RATES}
        found = {r: held_out(opening.read_json(file)) for r, file in files.items() if file.exists()}
        if (own := best_rate(found)) is None:
            print(f"rank {rank} has no learning rate of its own yet: python -m toy.paper rate", flush=True)
        else:
            best[rank] = own
    rated = [(rank, r) for rank, r in best.items() if r != RATE]
    runs = [of_rank(rank, seed, "-own-rate", (f"optimizer.lr={r:g}",)) for seed in SEEDS for rank, r in rated]
    return [replace(run, drawn="at the end") for run in runs]


def repa(out: Path) -> list[Run]:
    """Table 2: whom does alignment help more? Against the runs of `rank`, which have none; then rank 8 with a tenth."""
    settings = ("loss.repa.after=2", "loss.repa.hidden=512")
    runs = [of_rank(r, seed, "-repa", settings) for seed in SEEDS for r in RANKS[:2]]
    runs += [of_rank("8", seed, "-repa-weak", (*settings, "loss.repa.weight=0.05")) for seed in SEEDS]
    return [replace(run, repa=True, drawn="at the end") for run in runs]


def narrow(out: Path, mark: str = "-narrow", config: str = "shapes64") -> list[Run]:
    """Held-out losses by rank with half the width and half the bottleneck, against those of `rank`."""
    half = ("model.options.width=96", "model.options.heads=3", "model.options.bottleneck=32")
    return [replace(of_rank(r, s, mark, half), config=config, drawn="never") for s in SEEDS for r in NARROW_RANKS]


def emoji(out: Path) -> list[Run]:
    """The same for emoji, and of three ranks all measures but the oracle's."""
    runs = [
        replace(
            of_rank(r, seed, "-emoji"), config="emoji64", drawn="at the end" if r in ("8", "0", "full") else "never"
        )
        for seed in SEEDS
        for r in ("8", "0", "full", "random 8", "32", "16", "4", "48")
    ]
    return runs + narrow(out, "-emoji-narrow", "emoji64")


PLANS: dict[str, Callable[[Path], list[Run]]] = {
    "rank": rank,
    "directions": directions,
    "guidance": guidance,
    "speed": speed,
    "embedding": embedding,
    "switch": switch,
    "renew": renew,
    "repa": repa,
    "rate": rate,
    "own-rate": own_rate,
    "narrow": narrow,
    "emoji": emoji,
}
