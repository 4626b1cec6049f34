"""Which rank is best, from x0-prediction (rank 0) to u-prediction (rank D), and does detail outside the plane move it?

    python -m toy.rank_sweep            # minutes
    python -m toy.rank_sweep --quick    # seconds: a look at the code path, not a result

Setup. A swissroll y in the plane is lifted into D = 64 dimensions, x0 = frame y + outside curve(y). Without detail the
curve is zero and the data lies in a plane. With detail 0.3 it is a fixed wavy function of y, of rms norm 0.3 |y|,
about: the data is a curved surface of full rank near the plane. The basis of rank r holds the first r PCA directions;
the network, its start, the data and the noise are the same for every r.

Two numbers say how good samples x are, inside the plane and outside of it:

    SWD / floor   sliced Wasserstein distance of the positions y = frame^T x to fresh data; 1 is as good as fresh data
    off surface   rms of |outside^T x - curve(y)|, the distance outside the plane from the surface; 0 for fresh data
"""

import argparse
import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor

from nano_asymflow import POINTS, ToyData, pca_basis, profile, random_stream
from toy.common import generate, main, trained_flow

DIM, WIDTH = 64, 64
DETAILS = (0.0, 0.3)
RANKS = (0, 1, 2, 3, 4, 8, 16, 32, DIM)
QUICK_RANKS = (0, 2, 8, DIM)


def experiment(args: argparse.Namespace) -> tuple[Figure, dict]:
    ranks, sets = (QUICK_RANKS, 1) if args.quick else (RANKS, 4)
    print(f"swissroll in D = {DIM}, width {WIDTH}, {args.steps} steps, seed {args.seed}")
    print("\ndetail  rank  SWD / floor  off surface")
    runs = []
    for detail in DETAILS:
        data = ToyData("swissroll", DIM, detail, args.seed, args.device)
        basis = pca_basis(data.sample(10_000, random_stream(args.seed, "pca", args.device)), DIM)
        generator = random_stream(args.seed, "evaluation", args.device)
        fresh = data.position(16 * POINTS, generator).view(16, POINTS, 2)
        reference = profile(fresh).mean(0)
        distance = lambda points, reference=reference: (profile(points) - reference).abs().mean().item()
        floor = distance(fresh)
        noise = torch.randn(sets * POINTS, DIM, generator=generator, device=args.device)
        for rank in ranks:
            label = f"detail {detail}, rank {rank}"
            flow = trained_flow(args, label, data.sample, DIM, WIDTH, basis[:, :rank])
            x = generate(flow, noise)
            swd = distance((x @ data.frame).view(sets, POINTS, 2)) / floor
            runs.append({"detail": detail, "rank": rank, "swd_over_floor": swd, "off_surface": off_surface(x, data)})
            print("{:6} {:5} {:12.2f} {:12.4f}".format(*runs[-1].values()), flush=True)
        inside, outside = (best_ranks(runs, detail, measure) for measure in ("swd_over_floor", "off_surface"))
        print(f"best rank with detail {detail}: {inside} inside the plane, {outside} outside of it\n")
    settings = {"toy": "swissroll", "dim": DIM, "width": WIDTH, "points": sets * POINTS, "floor_swd": floor}
    return draw(runs, ranks), settings | {"runs": runs}


def off_surface(x: Tensor, data: ToyData) -> float:
    """Root mean square distance of x (n, D), outside the plane, from the surface at its own position in the plane."""
    return ((x - data.lift(x @ data.frame)) @ data.outside).square().sum(-1).mean().sqrt().item()


def best_ranks(runs: list[dict], detail: float, measure: str) -> str:
    """The best rank of one curve, and those within 5 % of it: "2 or 3"."""
    values = {r["rank"]: r[measure] for r in runs if r["detail"] == detail}
    return " or ".join(str(rank) for rank, value in values.items() if value <= 1.05 * min(values.values()))


def draw(runs: list[dict], ranks: tuple[int, ...]) -> Figure:
    """Both measures against the rank, one line per detail, stars on the best of each line."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for detail, color in zip(DETAILS, ("C0", "C3"), strict=True):
        name = f"detail {detail}" if detail else "no detail: data in a plane"
        for axis, measure in ((left, "swd_over_floor"), (right, "off_surface")):
            values = [r[measure] for r in runs if r["detail"] == detail]
            best = best_ranks(runs, detail, measure)
            axis.plot(values, "o-", color=color, label=f"{name}; best rank: {best}")
            for i in (ranks.index(int(rank)) for rank in best.split(" or ")):
                axis.plot(i, values[i], "*", color=color, markersize=18)
    left.axhline(1, color="0.5", linestyle="--", label="fresh data")
    left.set(title="inside the plane", ylabel="sliced Wasserstein distance / sample floor", yscale="log")
    size = max(DETAILS) * 2**0.5
    right.axhline(size, color="0.5", linestyle="--", label=f"size of detail {max(DETAILS)}: what a flat sample misses")
    right.set(title="outside the plane", ylabel="rms distance from the data's surface", yscale="log")
    right.set_ylim(top=50)  # room for the legend
    for axis in (left, right):
        names = [{0: "0\n(x0-prediction)", DIM: f"{DIM}\n(u-prediction)"}.get(r, str(r)) for r in ranks]
        axis.set_xticks(range(len(ranks)), names)
        axis.set_xlabel("rank of the basis")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=9)
    left.set_yticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"], minor=False)
    left.set_yticks([], minor=True)
    figure.suptitle(f"One curve from x0- to u-prediction: a swissroll in D = {DIM} dimensions (lower is better)")
    return figure


if __name__ == "__main__":
    sys.exit(main("rank_sweep", experiment, __doc__, steps=3000, quick_steps=200))
