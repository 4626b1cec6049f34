"""How far is a trained model from the best possible velocity, when that one is known in closed form?

    python -m toy.closed_form            # minutes
    python -m toy.closed_form --quick    # seconds: a look at the code path, not a result

Setup. Gaussian data in D = 32 dimensions, x0 ~ N(0, C) with C = A diag(lambda) A^T + delta^2 I: four strong directions
and a faint variance in all. With x_sigma = (1 - sigma) x0 + sigma eps and u = eps - x0, everything is jointly Gaussian:

    Cov(x_sigma) = S = (1 - sigma)^2 C + sigma^2 I,     Cov(u, x_sigma) = sigma I - (1 - sigma) C,
    E[u | x_sigma] = u* = (sigma I - (1 - sigma) C) S^-1 x_sigma.

Along an eigenvector of C with variance c, so with s = (1 - sigma)^2 c + sigma^2, u* multiplies by a gain, and an error
remains that no model can avoid:

    gain = (sigma - (1 - sigma) c) / s,     E (u - u*)^2 = (1 + c) - (sigma - (1 - sigma) c)^2 / s = c / s.

Because u - u* is uncorrelated with every function of x_sigma, the loss of a model is exactly this *irreducible* loss
plus its *excess* E |u_pred - u*|^2. The excess is measured without the noise of the loss, at the same points for all.

The width forces a part of it. Outputs of a network of width W span W dimensions, so at each sigma they miss at least
the D - W smallest energies of its best output. Per eigenvector, counted as errors of the velocity, these energies are

    E u*^2 = gain^2 s inside the basis,     E[x0 | x_sigma]^2 / sigma^2 = ((1 - sigma) c / sigma)^2 / s outside of it.

All are means over the D coordinates, weighted by (sigma / max(sigma, 0.05))^2 as in the training, sigma uniform.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from nano_asymflow import flow_loss, random_stream
from toy.common import generate, main, trained_flow

DIM, WIDTH, DELTA = 32, 16, 0.05
STRONG = (4.0, 2.0, 1.0, 0.5)  # lambda
TICKS = (0, 1, 2, 4, 8, 16, DIM)  # every rank is trained, these are named
CURVES = {0: "C0", 4: "C2", 8: "C1", DIM: "C3"}  # ranks that are drawn against sigma
weight = lambda sigma: ((sigma / sigma.clamp(min=0.05)) ** 2)[:, 0]  # of the training loss, sigma (n, 1) to (n,)


class Gaussian:
    """x0 ~ N(0, axes diag(variance) axes^T). axes: (D, D), by falling variance (D,). sigma below: (n, 1)."""

    def __init__(self, seed: int, device: str):
        g = random_stream(seed, "frame")
        self.axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=g)).Q.to(device)
        self.variance = torch.full((DIM,), DELTA**2, device=device)
        self.variance[: len(STRONG)] += torch.tensor(STRONG, device=device)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, DIM, generator=generator, device=generator.device)
        return (z * self.variance.sqrt()) @ self.axes.mT

    def spread(self, sigma: Tensor) -> Tensor:
        """s, the variance of x_sigma along the axes (n, D)."""
        return (1 - sigma) ** 2 * self.variance + sigma**2

    def gain(self, sigma: Tensor) -> Tensor:
        return (sigma - (1 - sigma) * self.variance) / self.spread(sigma)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """u* = E[u | x_sigma] (n, D) for x_sigma (n, D)."""
        return (x @ self.axes * self.gain(sigma)) @ self.axes.mT

    def irreducible(self, sigma: Tensor) -> Tensor:
        """Weighted irreducible loss (n,)."""
        return weight(sigma) * (self.variance / self.spread(sigma)).mean(-1)

    def forced(self, sigma: Tensor, rank: int) -> Tensor:
        """Weighted excess (n,) that a network of WIDTH cannot avoid at this rank."""
        outside = ((1 - sigma) * self.variance / sigma) ** 2 / self.spread(sigma)
        energy = torch.cat([(self.gain(sigma) ** 2 * self.spread(sigma))[:, :rank], outside[:, rank:]], dim=-1)
        return weight(sigma) * energy.sort(-1).values[:, : DIM - WIDTH].sum(-1) / DIM

    @torch.no_grad()
    def excess(self, velocity: Callable, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Weighted excess (n,) of a velocity, each the mean over all points x0, eps (points, D)."""
        points = [(torch.lerp(x0, eps, level), level.expand(len(x0), 1)) for level in sigma]
        return weight(sigma) * torch.stack([(velocity(*p) - self.velocity(*p)).square().mean() for p in points])


def experiment(args: argparse.Namespace) -> tuple[Figure, dict]:
    ranks, points, levels, draws = ((0, 4, DIM), 512, 50, 16) if args.quick else (range(DIM + 1), 2048, 100, 128)
    data, generator = Gaussian(args.seed, args.device), random_stream(args.seed, "evaluation", args.device)
    normal = lambda n: torch.randn(n, DIM, generator=generator, device=args.device)
    midpoints = lambda n: ((torch.arange(n, device=args.device) + 0.5) / n)[:, None]
    grid, fine = midpoints(levels), midpoints(10_000)
    x0, eps, noise = data.sample(points, generator), normal(points), normal(16384)
    irreducible = data.irreducible(fine).mean().item()
    draw_loss = lambda n: flow_loss(data.velocity, data.sample(n, generator), normal(n), midpoints(n)).item()
    losses = torch.tensor([draw_loss(4096) for _ in range(draws)])
    exact, error = losses.mean().item(), losses.std().item() / draws**0.5
    print(f"Gaussian data in D = {DIM}, width {WIDTH}, {args.steps} steps, seed {args.seed}")
    print(f"irreducible loss {irreducible:.5f}; that of u*, by drawing: {exact:.5f} +- {error:.5f}")
    print(f"\nvariance of the samples over the true one: inside the {len(STRONG)} strong directions, outside of them")
    print("rank     excess  excess / irreducible  forced by width  inside  outside")
    runs = []
    for rank in (None, *ranks):
        velocity, forced = data.velocity, torch.zeros(levels)
        if rank is not None:
            velocity = trained_flow(args, f"rank {rank}", data.sample, DIM, WIDTH, data.axes[:, :rank])
            forced = data.forced(grid, rank)
        excess = data.excess(velocity, x0, eps, grid)
        ratio = (generate(velocity, noise) @ data.axes).square().mean(0) / data.variance
        scores = [v.mean().item() for v in (excess, forced, *ratio.tensor_split([len(STRONG)]))]
        row = "exact" if rank is None else rank, scores[0], scores[0] / irreducible, *scores[1:]
        print("{:5} {:9.5f} {:21.4f} {:16.5f} {:7.3f} {:8.3f}".format(*row), flush=True)
        names = "excess", "forced", "variance_inside", "variance_outside", "excess_at_sigma", "forced_at_sigma"
        runs.append({"rank": rank, **dict(zip(names, (*scores, excess.tolist(), forced.tolist()), strict=True))})
    results = {"dim": DIM, "width": WIDTH, "delta": DELTA, "lambda": STRONG, "irreducible": irreducible}
    results |= {"exact_loss": exact, "exact_loss_standard_error": error}
    results |= {"forced_at_rank": [data.forced(fine, r).mean().item() for r in range(DIM + 1)]}
    results |= {"sigma": grid[:, 0].tolist(), "irreducible_at_sigma": data.irreducible(grid).tolist(), "runs": runs}
    return draw(results), results


def draw(results: dict) -> Figure:
    """Excess against the rank, and against sigma for some ranks."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = results["runs"][1:]
    ranks = [r["rank"] for r in runs]
    left.plot(ranks, [r["excess"] for r in runs], "ko-", label="excess of the trained models")
    left.plot(results["forced_at_rank"], "k:", label=f"forced by the width: no network of {WIDTH} has less excess")
    left.axhline(results["irreducible"], color="C4", ls="--", label="irreducible loss")
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks(TICKS, [{0: "0\n(x0-prediction)", DIM: f"{DIM}\n(u-prediction)"}.get(r, r) for r in TICKS])
    left.set(title="averaged over sigma", xlabel="rank of the basis", xlim=(-0.2, DIM * 1.2))
    for run in (r for r in runs if r["rank"] in CURVES):
        color = CURVES[run["rank"]]
        right.plot(results["sigma"], run["excess_at_sigma"], color, label=f"excess, rank {run['rank']}")
        right.plot(results["sigma"], run["forced_at_sigma"], f"{color}:")
    right.plot([], [], "k:", label="forced by the width (same colours)")
    right.plot(results["sigma"], results["irreducible_at_sigma"], "C4--", label="irreducible loss")
    right.set(title="at each noise level", xlabel="sigma (0: data, 1: noise)", ylim=(1e-5, 2))
    for axis in (left, right):
        axis.set(ylabel="squared error of the velocity, weighted as in training", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"How far from the exact velocity? Gaussian data, {len(STRONG)} strong directions of {DIM}")
    return figure


if __name__ == "__main__":
    sys.exit(main("closed_form", experiment, __doc__, steps=3000, quick_steps=400))
