"""Can a latent flow become a pixel flow without starting over?

    python -m toy.latent_to_pixel            # some minutes on two cores; --quick for a look

A latent z is a point of the swiss roll in the plane. Its pixels, in D = 64 dimensions, hold more: a curved detail
outside of the plane, which the encoder threw away,

    x0 = s (z A^T + detail(z)),        s = 1/2, A (D, 2) with orthonormal columns, encode(x0) = A^T x0 / s = z.

A flow is trained on z, by u-prediction. Then (Chen et al. 2026, arXiv 2605.12964, on finetuning latent models):

  1. Align. Orthogonal Procrustes over pairs (z, x0) gives back A and s, which the pixel model is not told.
  2. Lift. Input projection W_in A^T, output projection A W_out, and `ScaledFlow` around them, which shows the network
     the latent path: so the samples are those of the latent flow, before any training.
  3. Finetune on pixels: lifted weights with the paper's variance-reduced loss (without its perceptual part, LPIPS) or
     with plain flow matching, next to new ones (asymmetric, PCA basis of rank 2). All else is equal.
  4. What does the variance-reduced loss reduce? The variance of its gradient over batches, over that of the plain one.

The measures of 3: sliced Wasserstein distance (SWD) in the plane, over that of two sets of fresh data; and the detail
error, the rms of (detail of a sample - detail of the data at the same place), over the rms of the data's detail.
"""

import itertools
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import nano_asymflow as nano
from toy.common import generate, main

DIM, WIDTH, BATCH, SCALE, DETAIL = 64, 128, 512, 0.5, 0.3
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99)


def procrustes(z: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """The orthonormal A (D, r) and the scale s that bring latents z (n, r) closest to pixels x (n, D), in float64.

    A = V_r U^T for C = z^T x = U S V^T, and s^2 = tr(A^T G A) / |z|^2 with G = x^T x.
    """
    z, x = z.cpu().double(), x.cpu().double()
    u, _, vt = torch.linalg.svd(z.mT @ x, full_matrices=False)
    basis = vt.mT @ u.mT
    return basis, ((x @ basis).square().sum() / z.square().sum()).sqrt().item()


def zoom(sigma, scale: float):
    """k = 1 / (s + (1 - s) sigma): from pixel to latent units at noise level sigma, of which tau = k sigma is left."""
    return 1 / (scale + (1 - scale) * sigma)


class ScaledFlow(nn.Module):
    """Pixel velocity u (n, D) from a network in latent units: `flow(x_sigma (n, D), sigma (n, 1))`.

    Where A^T x0 = s z, the network sees the latent path, k A^T x_sigma = (1 - tau) z + tau A^T eps. With its prediction
    u_a = P eps - x0 / s, the velocity is (s = 1: that of `nano_asymflow.recover_velocity`)

        u_par = k (s u_a_par + (1 - s) x_sigma_par),        u_perp = (x_sigma_perp + s u_a_perp) / sigma.
    """

    def __init__(self, network: nn.Module, basis: Tensor, scale: float):
        super().__init__()
        self.network, self.scale = network, scale
        self.register_buffer("basis", basis)

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        s, k = self.scale, zoom(sigma, self.scale)
        u_a = self.network(k * x_sigma, k * sigma)
        inside, outside = k * (s * u_a + (1 - s) * x_sigma), x_sigma + s * u_a
        outside = (outside - nano.project(outside, self.basis)) / sigma.clamp(min=1e-6)
        return outside + nano.project(inside - outside, self.basis)


def lift(network: nano.MLP, basis: Tensor) -> nano.MLP:
    """The network on latents (n, r) as one on pixels (n, D)."""
    pixel = deepcopy(network)
    pixel.input.weight = nn.Parameter(network.input.weight.detach() @ basis.mT)
    pixel.output.weight = nn.Parameter(basis @ network.output.weight.detach())
    return pixel


@torch.no_grad()
def walk(velocity: Callable, x: Tensor, grid: list[float], weight: Callable) -> Tensor:
    """Integrate along `grid` from the noise x (n, d). `weight(sigma, target)` of the velocity ahead: Heun has 1/2."""
    for sigma, target in itertools.pairwise(grid):
        u = velocity(x, torch.full_like(x[:, :1], sigma))
        if target > 0 and (w := weight(sigma, target)):  # the last step is Euler's, as in `nano_asymflow.integrate`
            u = torch.lerp(u, velocity(x + (target - sigma) * u, torch.full_like(x[:, :1], target)), w)
        x = x + (target - sigma) * u
    return x


def same_model(latent: Callable, pixel: ScaledFlow, noise: Tensor, grids: list[int]) -> dict:
    """Print how far the lifted flow is from the latent one, in float64: velocities, and samples of one noise (n, D).

    (k x_sigma, tau) is a projective map of (x_sigma, sigma). It takes lines to lines, so an Euler step in pixels *is*
    the latent one from tau to tau'. Heun's is so to order 2, or, with the weight k / (2 k') instead of 1/2, exactly.
    """
    s, basis = pixel.scale, pixel.basis
    sigma = torch.linspace(1e-3, 1, len(noise)).to(noise)[:, None]
    x_sigma, k = 2 * noise, zoom(sigma, s)
    with torch.no_grad():
        inside = k * (s * latent(k * x_sigma @ basis, k * sigma) + (1 - s) * x_sigma @ basis)
        velocity = (pixel(x_sigma, sigma) @ basis - inside).abs().max().item()
        u = nano.recover_velocity(pixel.network(x_sigma, sigma), x_sigma, sigma, basis)
        unscaled = (torch.dist(ScaledFlow(pixel.network, basis, 1.0)(x_sigma, sigma), u) / u.norm()).item()
    print(f"\n2. lifted = latent: velocity in the plane to {velocity:.0e}; s = 1 is nano_asymflow to {unscaled:.0e}")
    print("   mean distance of samples after " + "".join(f"{n:4} steps" for n in grids))
    euler, heun, exact = (lambda *_: 0), (lambda *_: 0.5), (lambda sigma, target: zoom(sigma, s) / zoom(target, s) / 2)
    distances = {}
    for name, there, here in (("Euler", euler, euler), ("Heun", heun, heun), ("Heun, weight k / 2k'", heun, exact)):
        distances[name] = []
        for grid in ([i / steps for i in range(steps, -1, -1)] for steps in grids):
            z = walk(latent, noise @ basis, [zoom(sigma, s) * sigma for sigma in grid], there)
            distances[name].append((walk(pixel, noise, grid, here) / s - z @ basis.mT).norm(dim=1).mean().item())
        print(f"   {name:30} " + "".join(f"{value:10.1e}" for value in distances[name]), flush=True)
    return {"velocity": velocity, "s = 1": unscaled, "steps": grids, "distances": distances}


def variance_reduced_loss(flow: Callable, x0: Tensor, eps: Tensor, sigma: Tensor, *, latent, basis, scale, encode):
    """The loss of the finetuning, with the frozen flow `latent`. With c = 0 it is `flow_loss`.

    x0_low = s A z is the lifted latent, x0_ref what `latent` takes it for under the same noise, and d_low = x0_low -
    x0_ref what it could not foresee. The share c of that in the error d = x0 - x0_pred is taken out of the target:

        target = x0 - (1 - w) c d_low,        c = clamp(<d, d_low> / max(<d_low, d_low>, 1e-4), 0, 1),
        loss = mean((x0_pred - target)^2 / max(sigma, 0.05)^2),   w = (1 - sigma)^2 / ((1 - sigma)^2 + (0.3 sigma)^2).
    """
    x_sigma, tau = torch.lerp(x0, eps, sigma), zoom(sigma, scale) * sigma
    x0_pred = x_sigma - sigma * flow(x_sigma, sigma)
    with torch.no_grad():
        z_tau = torch.lerp(encode(x0), eps @ basis, tau)
        d_low = scale * (encode(x0) - (z_tau - tau * latent(z_tau, tau))) @ basis.mT
        c = ((x0 - x0_pred) * d_low).mean(1, True) / d_low.square().mean(1, True).clamp(min=1e-4)
        w = (1 - sigma).square() / ((1 - sigma).square() + (0.3 * sigma).square())
        target = x0 - (1 - w) * c.clamp(0, 1) * d_low
    return ((x0_pred - target) / sigma.clamp(min=0.05)).square().mean()


def gradient_variance(
    flow: nn.Module, loss: Callable, sample: Callable, generator, level: Callable, batches: int
) -> float:
    """E|g - E g|^2 of the gradient g over these `batches`, without bias; `level` maps the uniform noise levels."""
    total, square, options = 0, 0.0, {"generator": generator, "device": generator.device}
    for _ in range(batches):
        x0, eps = sample(BATCH, generator), torch.randn(BATCH, DIM, **options)
        ends = torch.arange(1, BATCH + 1, device=generator.device)[:, None]
        sigma = level((ends - torch.rand(BATCH, 1, **options)) / BATCH)  # stratified, as in training
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss(flow, x0, eps, sigma), flow.parameters())])
        total, square = total + g, square + g.square().sum().item()
    return (square - total.square().sum().item() / batches) / (batches - 1)


def experiment(args) -> tuple[Figure, dict]:
    data = nano.ToyData("swissroll", DIM, DETAIL, args.seed, args.device)
    stream = lambda purpose: nano.random_stream(args.seed, purpose, args.device)
    sample = lambda n, generator: SCALE * data.sample(n, generator)
    encode, detail = (lambda x: x @ data.frame / SCALE), (lambda x: x @ data.outside / SCALE)
    results = {"procrustes": {}, "runs": [], "gradient_variance": {}}

    torch.manual_seed(args.seed)
    latent = nano.Flow(nano.MLP(2, WIDTH), torch.eye(2)).to(args.device)
    nano.train(latent, data.position, args.steps, BATCH, stream("latent"), name="latent flow")

    print("1. Procrustes over 10,000 pairs   largest |A^T A_true - 1|  s, truly 0.5")
    x = sample(10_000, stream("pairs"))
    for name, pixels in (("without detail", nano.project(x, data.frame)), ("with detail", x)):
        basis, scale = procrustes(encode(pixels), pixels)
        tilt = (basis.mT @ data.frame.cpu().double() - torch.eye(2)).abs().max().item()
        results["procrustes"][name] = {"tilt": tilt, "scale": scale}
        print(f"   {name:30} {tilt:24.1e} {scale:13.6f}")

    twin = deepcopy(latent).cpu().double()
    lifted = ScaledFlow(lift(twin.network, basis), basis, scale)
    noise = torch.randn(256, DIM, dtype=torch.float64, generator=nano.random_stream(args.seed, "same"))
    results["same_model"] = same_model(twin, lifted, noise, [25, 50, 100] if args.quick else [50, 100, 200, 400])
    lifted, basis = lifted.float().to(args.device), basis.float().to(args.device)

    points, sets = (1024, 1) if args.quick else (4096, 4)
    fresh = sample(8 * points, stream("evaluation"))
    seen = encode(fresh).view(8, points, 2)
    reference = nano.profile(seen).mean(0)
    distance = lambda points: (nano.profile(points) - reference).abs().mean().item()
    results["floor_swd"] = floor = distance(seen)
    usual = detail(fresh).square().mean().sqrt().item()
    panels = {"data, seen in its plane": (seen[0].cpu(), torch.zeros(points))}

    def evaluate(name: str, steps: int, flow: Callable) -> None:
        generator = stream("sampling")
        noise = torch.randn(sets, points, DIM, generator=generator, device=args.device)
        x = torch.cat([generate(flow, part) for part in noise])
        swd = distance(encode(x).view(sets, points, 2)) / floor
        missed = detail(x) - detail(SCALE * data.lift(encode(x)))
        error = missed.square().mean().sqrt().item() / usual
        results["runs"].append({"model": name, "steps": steps, "swd_over_floor": swd, "detail_error": error})
        print(f"   {name:30} {steps:5} {swd:12.2f} {error:13.3f}", flush=True)
        panels[name] = encode(x[:points]).cpu(), missed[:points].square().mean(1).sqrt().cpu() / usual

    print("\n3. finetuning                     steps  SWD / floor  detail error")
    evaluate("lifted, untrained", 0, lifted)
    reduced = partial(variance_reduced_loss, latent=latent, basis=basis, scale=scale, encode=encode)
    new = nano.Flow(nano.MLP(DIM, WIDTH), nano.pca_basis(x, 2)).to(args.device)
    starts = {"lifted, variance-reduced loss": lifted, "lifted, plain loss": lifted, "from scratch, plain loss": new}
    for name, part in itertools.product(starts, (4, 1) if args.quick else (16, 8, 4, 2, 1)):
        flow, steps, loss = deepcopy(starts[name]), args.steps // part, reduced if "reduced" in name else nano.flow_loss
        nano.train(flow, sample, steps, BATCH, stream("training"), loss=loss, lr=1e-3, name=f"{name}, {steps} steps")
        evaluate(name, steps, flow)

    print("\n4. variance of the gradient of the untrained lifted flow, variance-reduced loss over plain loss")
    levels = {"uniform levels, as in 3": lambda v: v}  # v is uniform in (0, 1]
    levels["the paper's levels"] = lambda v: torch.special.ndtri(v).add(math.log(17)).sigmoid()
    levels |= {f"sigma = {sigma}": lambda v, sigma=sigma: 0 * v + sigma for sigma in SIGMAS}
    for name, level in tqdm(levels.items(), desc="gradients", leave=False):
        a, b = (
            gradient_variance(lifted, loss, sample, stream("gradients"), level, 8 if args.quick else 64)
            for loss in (reduced, nano.flow_loss)
        )
        results["gradient_variance"][name] = a / b
        tqdm.write(f"   {name:30} {a / b:8.3f}")
    return picture(results, panels), results


def picture(results: dict, panels: dict) -> Figure:
    figure = Figure(figsize=(16, 7.5), layout="constrained")
    figure.suptitle(
        "A latent flow becomes a pixel flow, D = 64: the same samples once lifted, then finetuned to add the detail"
    )
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axes = above.subplots(1, len(panels))
    for axis, (name, (place, error)) in zip(axes, panels.items(), strict=True):
        dots = axis.scatter(*place.T, c=error, s=3, linewidths=0, vmin=0, vmax=1.2, cmap="viridis_r")
        axis.set(title=name, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
    above.colorbar(dots, ax=axes, label="detail error of the sample", shrink=0.8)
    same, plane, detail, variance = below.subplots(1, 4)
    for style, (name, distances) in zip(("s-", "o-", "x:"), results["same_model"]["distances"].items(), strict=True):
        same.loglog(results["same_model"]["steps"], distances, style, label=name)
    for axis, key in ((plane, "swd_over_floor"), (detail, "detail_error")):
        for style, name in zip(("s-", "x:", "o-"), list(panels)[2:], strict=True):
            runs = [(run["steps"], run[key]) for run in results["runs"] if run["model"] == name]
            axis.plot(*zip(*runs, strict=True), style, label=name)
        axis.axhline(results["runs"][0][key], color="0.5", linestyle="--", label="lifted, untrained")
    variance.plot(SIGMAS, list(results["gradient_variance"].values())[2:], "o-")
    same.minorticks_off()
    same.set_xticks(results["same_model"]["steps"], results["same_model"]["steps"])
    same.set(title="lifted, untrained, against latent flow", xlabel="sampling steps", ylabel="distance of samples")
    plane.set(title="distance in the plane", xlabel="finetuning steps", ylabel="SWD / floor", ylim=(0, None))
    detail.set(title="detail outside of the plane", xlabel="finetuning steps", ylabel="detail error", ylim=(0, None))
    variance.set(title="gradient variance, reduced / plain", xlabel="noise level sigma", ylim=(0, 1.05))
    for axis in (same, plane, detail):
        axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main("latent_to_pixel", experiment, __doc__, steps=4000, quick_steps=300))
