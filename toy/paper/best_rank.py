"""The tables of where the best rank comes from: what the criterion predicts, and what was found."""

import statistics
from collections.abc import Mapping, Sequence

import torch

from toy.paper import criterion
from toy.paper.blocks import Kinds
from toy.paper.criterion import burden, errors
from toy.paper.tables import as_trained, by_seed, shown, table

NETWORKS = {  # what is in the names of the runs of each data and width
    ("shapes", 192): "",
    ("shapes", 96): "-narrow",
    ("emoji", 192): "-emoji",
    ("emoji", 96): "-emoji-narrow",
}


def rooms(width: int) -> dict[str, float]:
    """For how many directions of noise a network may have room, by what might bound it."""
    return {f"the bottleneck, {width // 3}": width // 3, f"the width, {width}": width, "nothing": float("inf")}


def burdens(spectra: Mapping[str, list[float]], data: str, room: float) -> dict[int, float]:
    """The burden of each rank by the criterion."""
    sides = errors(torch.tensor(spectra[data]))
    return {rank: burden(*sides, rank, room) for rank in criterion.RANKS if rank < room}


def predicted(spectra: Mapping[str, list[float]]) -> str:
    """The burden of each rank by the criterion, in units of that of rank 8; the least in bold."""
    rows = []
    for data, width in NETWORKS:
        for bound, room in rooms(width).items():
            found = burdens(spectra, data, room)
            best = min(found, key=found.__getitem__)
            words = {rank: f"{value / found[8]:.2f}" for rank, value in found.items()}
            words[best] = f"**{words[best]}**"
            rows.append([data, str(width), bound, *(words.get(rank, "") for rank in criterion.RANKS)])
    return table(["data", "width", "the room is bounded by", *map(str, criterion.RANKS)], rows)


def best_ranks(kinds: Kinds, spectra: Mapping[str, list[float]]) -> str:
    """The held-out loss of each rank, at the noise levels of the training, and how well each burden goes with it.

    Ranks of fewer seeds than others are in the first table only.
    """
    rows, fits = [], []
    for (data, width), mark in NETWORKS.items():
        found = {r: by_seed(kinds[k], as_trained) for r in criterion.RANKS if (k := f"rank-{r}{mark}") in kinds}
        seeds = set(max(found.values(), key=len, default=()))
        whole = {rank: values for rank, values in found.items() if seeds <= values.keys()}
        means = {rank: statistics.fmean(values[seed] for seed in seeds) for rank, values in whole.items()}
        best = min(means, key=means.__getitem__, default=None)
        words = {rank: shown(values, "{:.4f}") for rank, values in found.items()}
        words |= {best: f"**{words[best]}**"} if means else {}
        rows.append([data, str(width), *(words.get(rank, "") for rank in criterion.RANKS)])
        for bound, room in rooms(width).items():
            predictions = burdens(spectra, data, room)
            both = [rank for rank in means if rank in predictions]
            if len(both) > 3:
                expected = min(both, key=predictions.__getitem__)
                agreement = (correlation(predictions, means, ranks) for ranks in (both, [r for r in both if r]))
                fits.append([data, str(width), bound, str(expected), str(best), *agreement])
    head = ["data", "width", "the room is bounded by", "best rank of those run, predicted", "found", "correlation"]
    head.append("without rank 0")
    return "\n\n".join([table(["data", "width", *map(str, criterion.RANKS)], rows), table(head, fits)])


def correlation(burdens: Mapping[int, float], losses: Mapping[int, float], ranks: Sequence[int]) -> str:
    return f"{statistics.correlation([burdens[rank] for rank in ranks], [losses[rank] for rank in ranks]):.2f}"
