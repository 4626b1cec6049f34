"""As the data space grows around the same picture, and the network does not: which prediction breaks, and when?

    python -m toy.dimension_sweep            # minutes
    python -m toy.dimension_sweep --quick    # seconds: a look at the code path, not a result

Setup. A swissroll in a plane, turned into D = 8 ... 1024 dimensions: the task stays the same, only empty dimensions are
added. The same network of width 64 learns to predict, for x_sigma = (1 - sigma) x0 + sigma eps,

    asym   P eps - x0    with the rank-2 PCA basis of the data: noise in the plane only
    x0     -x0           the same with rank 0: no noise at all
    u      eps - x0      the same with rank D: noise in all dimensions
    eps    eps           noise in all dimensions, too

and all are trained on the recovered velocity with the same loss, number of steps, start, data and noise. Measured are,
inside the plane, the sliced Wasserstein distance to fresh data over its floor (1 is as good as fresh data), and outside
of it the rms of the coordinates, which are 0 in the data and 1 in the noise.
"""

import argparse
import sys

import torch
from matplotlib.figure import Figure

import nano_asymflow as nano
from nano_asymflow import MLP, POINTS, PREDICTIONS, Flow, random_stream
from toy.common import generate, main

WIDTH, TOP = 64, 20  # TOP ends the axis of SWD / floor
DIMS = (8, 16, 32, 64, 256, 1024)
QUICK_DIMS = (8, 64)


def experiment(args: argparse.Namespace) -> tuple[Figure, dict]:
    dims, sets = (QUICK_DIMS, 1) if args.quick else (DIMS, 2)
    print(f"swissroll, width {WIDTH}, {args.steps} steps, seed {args.seed}")
    print("\n   D  prediction  SWD / floor  off-plane rms")
    runs = []
    for dim in dims:
        data = nano.ToyData("swissroll", dim, seed=args.seed, device=args.device)
        plane = nano.pca_basis(data.sample(10_000, random_stream(args.seed, "pca", args.device)), 2)
        bases = {"asym": plane, "x0": plane[:, :0], "eps": None}
        generator = random_stream(args.seed, "evaluation", args.device)
        fresh = data.position(16 * POINTS, generator).view(16, POINTS, 2)
        reference = nano.profile(fresh).mean(0)
        distance = lambda points, reference=reference: (nano.profile(points) - reference).abs().mean().item()
        floor = distance(fresh)
        noise = torch.randn(sets * POINTS, dim, generator=generator, device=args.device)
        for prediction in PREDICTIONS:
            torch.manual_seed(args.seed)
            network = MLP(dim, WIDTH).to(args.device)
            # With rank D the wrapper changes nothing; leaving it out spares products with a D x D matrix.
            flow = network if prediction == "u" else Flow(network, bases[prediction])
            stream = random_stream(args.seed, "training", args.device)
            nano.train(flow, data.sample, args.steps, 512, stream, name=f"D = {dim}, {prediction}")
            x = generate(flow, noise)
            swd = distance((x @ data.frame).view(sets, POINTS, 2)) / floor
            off = (x @ data.outside).square().mean().sqrt().item()
            runs.append({"dim": dim, "prediction": prediction, "swd_over_floor": swd, "off_plane_rms": off})
            print("{:4}  {:10} {:12.2f} {:14.1e}".format(*runs[-1].values()), flush=True)
    settings = {"toy": "swissroll", "width": WIDTH, "points": sets * POINTS, "floor_swd": floor}
    return draw(runs), settings | {"runs": runs}


def draw(runs: list[dict]) -> Figure:
    """Both measures against D, one line per prediction."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    dims = sorted({r["dim"] for r in runs})
    names = {"asym": "asym, rank 2", "x0": "x0 (rank 0)", "u": "u (rank D)", "eps": "eps"}
    for axis, measure in ((left, "swd_over_floor"), (right, "off_plane_rms")):
        for prediction, color in zip(PREDICTIONS, ("C2", "C0", "C3", "C1"), strict=True):
            values = [r[measure] for r in runs if r["prediction"] == prediction]
            axis.plot(dims, values, "o-", color=color, label=f"predicts {names[prediction]}")
            if axis is left and max(values) > TOP:
                note = {"transform": axis.transAxes, "ha": "right", "va": "top", "color": color}
                axis.text(0.98, 0.97, f"{prediction} leaves the frame: up to {max(values):,.0f}", **note)
        axis.axvline(WIDTH, color="0.8", linewidth=6, zorder=0, label=f"width of the network, {WIDTH}")
        axis.axhline(1, color="0.5", linestyle="--", label="1: fresh data (left), pure noise (right)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(dims, map(str, dims))
        axis.set(xlabel="D, dimension of the data space", yscale="log")
        axis.grid(alpha=0.3)
    left.set(title="inside the plane", ylabel="sliced Wasserstein distance / sample floor", ylim=(0.8, TOP))
    left.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    left.set_yticks([], minor=True)
    right.set(title="outside the plane, where the data is 0", ylabel="rms of the coordinates")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "The same picture in ever more dimensions, the same network: which prediction breaks? (lower is better)"
    )
    return figure


if __name__ == "__main__":
    sys.exit(main("dimension_sweep", experiment, __doc__, steps=3000, quick_steps=200))
