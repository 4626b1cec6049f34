"""Asymmetric flow models in one file: predict the data in full, and the noise only where the data lives.

    python nano_asymflow.py --toy swissroll                     # one model, held against fresh data
    python nano_asymflow.py --toy swissroll --prediction all    # the same next to x0-, u- and eps-prediction

The problem. A flow model turns noise into data. Between a clean point `x0` and standard normal noise `eps` runs a
straight path, x_sigma = (1 - sigma) x0 + sigma eps, with the noise level sigma in [0, 1]. Its velocity is
dx_sigma / dsigma = u = eps - x0. A network learns E[u | x_sigma] by least squares; integrating dx/dsigma = u from
sigma = 1, pure noise, down to 0 then gives samples. What should the network put out?
  * u itself (flow matching). Then it has to repeat the noise in all D dimensions. Data such as images lives near a few
    of them; a network that is narrower than D spends all it has on letting noise through, and fails all the same.
  * x0 (JiT). Data is easy to put out. But u = (x_sigma - x0) / sigma, so near the data every error of the network is
    divided by a small sigma, and that in the very directions that make up the picture.
  * eps. Noise again, and u = (eps - x_sigma) / (1 - sigma) divides by zero where sampling starts.
Asymmetric flow (Chen et al. 2026, arXiv 2605.12964) takes the best of each: the velocity inside the r-dimensional
subspace where the data lives, only the data outside of it. Section 1 is the whole method; the rest shows it at work.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import pi
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm


# ---- 1. The method: what is predicted, and why the velocity comes back -----------------------------------------------
# Let `basis` be a (D, r) matrix A with orthonormal columns, P = A A^T the projection onto their span, and split every
# vector into v_par = P v and v_perp = v - P v. The network predicts the *asymmetric velocity*
#
#     u_a = P eps - x0                          data at full rank, noise at rank r.
#
# Inside the subspace this is the velocity: P u_a = P (eps - x0) = u_par. Outside it is -x0_perp, without any noise. But
# there the input tells what the noise was, since x_sigma = x0 + sigma u on the path:
#
#     u_perp = (x_sigma_perp - x0_perp) / sigma = (x_sigma_perp + u_a_perp) / sigma.
#
# With r = 0 nothing is inside: it is x0-prediction, but for the sign. With r = D nothing is outside: u-prediction.
def project(v: Tensor, basis: Tensor) -> Tensor:
    """`P v` for v (..., D), by two thin products: no D x D matrix."""
    return (v @ basis) @ basis.mT


def asymmetric_velocity(x0: Tensor, eps: Tensor, basis: Tensor) -> Tensor:
    """THE TARGET: what the network learns to put out, `u_a = P eps - x0`, (..., D) (arXiv 2605.12964).

    Training never calls this. The loss is on the velocity that is recovered from the network's output, and it is least
    where the output is the mean of this. x0, eps: (..., D). basis: (D, r), columns orthonormal, 0 <= r <= D.
    """
    return project(eps, basis) - x0


def recover_velocity(u_a: Tensor, x_sigma: Tensor, sigma: Tensor, basis: Tensor) -> Tensor:
    """The full velocity `u = eps - x0`, (..., D), in closed form, from the asymmetric one (arXiv 2605.12964).

    u_a, x_sigma: (..., D). sigma: in (0, 1], one for each vector, such as (batch, 1). basis: as above.
    Only what is outside of the subspace is divided by sigma; there rounding errors grow as 1 / sigma.
    """
    outside = (x_sigma + u_a - project(x_sigma + u_a, basis)) / sigma
    return outside + project(u_a - outside, basis)  # u_a inside, and there P takes away what rounding left of `outside`


def pca_basis(samples: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions (D, rank) of most energy, not centred, of samples (n, D). Float64, on a CPU."""
    return torch.linalg.eigh((x := samples.cpu().double()).mT @ x).eigenvectors.flip(-1)[:, :rank].to(samples)


# ---- 2. The network, and the wrapper that makes it a velocity --------------------------------------------------------
# The network is a residual MLP that is narrower than the data, as every transformer on pixels is: whatever it puts out
# has to pass through `width` numbers. It knows nothing of asymmetric flow. `Flow` does.
class MLP(nn.Module):
    """Five linear layers from x (n, dim) to (n, dim), the last zero at first. sigma (n, 1) steers the inner three."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.register_buffer("frequency", pi * torch.arange(1, 33))
        self.noise_level = nn.Linear(64, 6 * width)
        self.input = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        waves = sigma * self.frequency
        steering = self.noise_level(torch.cat([waves.cos(), waves.sin()], dim=-1)).chunk(6, dim=-1)
        h = nn.functional.gelu(self.input(x))
        for layer, scale, shift in zip(self.hidden, steering[:3], steering[3:], strict=True):
            h = h + nn.functional.gelu((1 + scale) * layer(h) + shift)
        return self.output(h)


class Flow(nn.Module):
    """A velocity model: `flow(x_sigma (n, D), sigma (n, 1))` is u (n, D). Without a basis it predicts eps."""

    def __init__(self, network: nn.Module, basis: Tensor | None):
        super().__init__()
        if basis is not None:
            eye = torch.eye(basis.shape[-1]).to(basis)
            if basis.ndim != 2 or not torch.allclose(basis.mT @ basis, eye, rtol=0, atol=1e-4):
                raise ValueError(f"the columns of the basis {tuple(basis.shape)} are not orthonormal: see linalg.qr")
        self.network = network
        self.register_buffer("basis", basis)

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        prediction = self.network(x_sigma, sigma)
        if self.basis is None:  # eps-prediction is not a rank: it has a line of its own, inexact above sigma = 0.95
            return (prediction - x_sigma) / (1 - sigma).clamp(min=0.05)
        return recover_velocity(prediction, x_sigma, sigma.clamp(min=1e-6), self.basis)


# ---- 3. Training: flow matching on the recovered velocity, whatever the network predicts -----------------------------
def flow_loss(flow: Callable, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Mean of `((u_pred - u) sigma / max(sigma, 0.05))^2`: plain above sigma = 0.05, softer below."""
    error = flow(torch.lerp(x0, eps, sigma), sigma) - (eps - x0)  # lerp is (1 - sigma) x0 + sigma eps
    return (error.square().mean(-1, keepdim=True) * (sigma / sigma.clamp(min=0.05)).square()).mean()


def train(flow, sample, steps, batch, generator, loss=flow_loss, lr=3e-3, name="training") -> None:
    """Train the module `flow` on `sample(n, generator)`, (n, D); leave the average over its last steps in it."""
    weights = list(flow.parameters())
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))
    options = {"generator": generator, "device": generator.device}
    for step in (bar := tqdm(range(1, steps + 1), desc=name, unit="step", leave=False, mininterval=0.5)):
        x0 = sample(batch, generator)
        eps = torch.randn(x0.shape, **options)
        # Uniform noise levels in (0, 1], one in each of `batch` equal intervals: less variance, at no cost.
        sigma = (torch.arange(1, batch + 1, device=generator.device)[:, None] - torch.rand(batch, 1, **options)) / batch
        value = loss(flow, x0, eps, sigma)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        for a, w in zip(average, weights, strict=True):
            a.lerp_(w.detach(), max(0.001, 10 / (step + 10)))
        bar.set_postfix(loss=value.item(), refresh=False)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(average), weights)


# ---- 4. Sampling: integrate dx/dsigma = u(x, sigma) from noise to data -----------------------------------------------
@torch.no_grad()
def integrate(velocity: Callable, x: Tensor, steps: int = 50, heun: bool = True) -> Iterator[Tensor]:
    """Yield x (n, D) at sigma = 1, 1 - 1/steps, ..., 0, from noise to samples, by Heun's method or Euler's."""
    yield x
    for sigma, target in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        u = velocity(x, torch.full_like(x[:, :1], sigma))
        if heun and target > 0:  # the last step is always Euler's: at sigma = 0, u may not exist
            u = (u + velocity(x + (target - sigma) * u, torch.full_like(x[:, :1], target))) / 2
        x = x + (target - sigma) * u
        yield x


# ---- 5. Toys: a picture in the plane, lifted into D dimensions -------------------------------------------------------
# Images have many pixels and few degrees of freedom. So have the toys: points of a plane, times a random orthonormal
# frame. `detail` adds a curved component outside the plane: full rank and yet nearly low-rank, again as images are.
def polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


PREDICTIONS, POINTS = ("asym", "x0", "u", "eps"), 4096  # what is compared, by so many samples
TOYS = {  # from uniform a, b (n,) and standard normal z (n, 2) to points (n, 2), standardized below
    "swissroll": lambda a, b, z: polar(1 + 2 * a, 1.5 * pi * (1 + 2 * a)) + 0.085 * z,
    "spirals": lambda a, b, z: polar(a.sqrt(), 1.5 * pi * a.sqrt() + pi * (b < 0.5)) + 0.03 * z,
    "moons": lambda a, b, z: (polar(1, pi * a) - z.new_tensor([0.5, 0.25])) * (b - 0.5).sign()[:, None] + 0.07 * z,
    "checkerboard": lambda a, b, z: torch.stack([3 * a, 2 * b + (2 * b).floor() + (3 * a).floor() % 2], dim=-1),
    "gaussians": lambda a, b, z: polar(1, (6 * a).floor() * pi / 3) + 0.1 * z,
    "rings": lambda a, b, z: polar(1 + (2 * a).floor(), 2 * pi * b) + 0.1 * z,
}


def random_stream(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A generator of its own for every (seed, purpose): what one part of the program draws never shifts another's."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


class ToyData:
    """A toy in `dim` dimensions. `detail`: the rms norm of its component outside the plane over that inside, about."""

    def __init__(self, toy: str, dim: int, detail: float = 0.0, seed: int = 0, device: str = "cpu"):
        g = random_stream(seed, "frame")
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q.to(device)
        self.frame, self.outside = axes[:, :2], axes[:, 2:]  # the true plane: only the evaluation looks at it
        self.frequency = 3 * torch.randn(2, dim - 2, generator=g).to(device)
        self.phase = 2 * pi * torch.rand(dim - 2, generator=g).to(device)
        self.amplitude = 2 * detail / max(dim - 2, 1) ** 0.5  # energy: 2 in the plane, 1/2 in each cosine
        self.toy, self.dim, self.device, self.mean, self.std = TOYS[toy], dim, device, 0.0, 1.0
        self.std, self.mean = torch.std_mean(self.position(2**18, random_stream(0, "standardize", device)), dim=0)

    def position(self, n: int, generator: torch.Generator) -> Tensor:
        """Points (n, 2) of the picture; each axis has mean 0 and variance 1."""
        a, b = torch.rand(2, n, generator=generator, device=self.device)
        z = torch.randn(n, 2, generator=generator, device=self.device)
        return (self.toy(a, b, z) - self.mean) / self.std

    def lift(self, position: Tensor) -> Tensor:
        """Points of the plane (n, 2) to points of the data space (n, dim)."""
        plane, angle = position @ self.frame.mT, position @ self.frequency + self.phase
        return plane + self.amplitude * angle.cos() @ self.outside.mT if self.amplitude else plane

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.lift(self.position(n, generator))


# ---- 6. The evidence: samples held against fresh data ----------------------------------------------------------------
def profile(points: Tensor) -> Tensor:
    """Points (..., n, 2) seen along 64 lines, and sorted: (..., n, 64), to be compared one by one."""
    return (points @ polar(1, torch.arange(64, device=points.device) * pi / 64).mT).sort(dim=-2).values


def draw(file: Path, panels: list[tuple[str, Tensor]]) -> None:
    """For each (name, paths (steps + 1, n, 2)): above, the ends of the paths; below, a hundred paths from noise."""
    figure = Figure(figsize=(3 * len(panels), 6.5), layout="constrained")
    frame = {"xlim": (-3, 3), "ylim": (-3, 3), "aspect": "equal", "xticks": [], "yticks": []}
    for (above, below), (name, path) in zip(figure.subplots(2, len(panels), subplot_kw=frame).T, panels, strict=True):
        color = "C3" if len(path) > 1 else "C0"  # the data has ends only
        above.set_title(name)
        above.scatter(*path[-1].T, s=2, alpha=0.5, linewidths=0, color=color)
        below.plot(*path[:, :100].permute(2, 0, 1), color="0.8", linewidth=0.6)
        below.scatter(*path[0, :100].T, s=5, color="0.4")
        below.scatter(*path[-1, :100].T, s=5, color=color)
    figure.savefig(file, dpi=110)


# ---- 7. The command line ---------------------------------------------------------------------------------------------
def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nano_asymflow.py", description="Asymmetric flow on toy data, and its evidence.")
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")  # one line, without the usage before it
    p.add_argument("--toy", choices=TOYS, default="swissroll", help="the picture in the plane")
    p.add_argument("--dim", type=int, default=256, help="D, the dimension that it is lifted into")
    p.add_argument("--rank", type=int, default=2, help="r, the rank of the basis of asym")
    p.add_argument("--prediction", choices=[*PREDICTIONS, "all"], default="asym", help="what the network predicts")
    p.add_argument("--steps", type=int, default=4000, help="training steps")
    p.add_argument("--batch", type=int, default=256, help="samples in a step")
    p.add_argument("--width", type=int, default=128, help="width of the network")
    p.add_argument("--detail", type=float, default=0.0, help="size of the component outside the plane, such as 0.3")
    p.add_argument("--seed", type=int, default=0, help="fixes every bit, on one kind of processor")
    p.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder for TOY.png and results.json")
    p.add_argument("--device", type=torch.device, default="cpu", help="such as cpu, cuda or cuda:1")
    args = p.parse_args(argv)
    lowest = {"dim": 2, "rank": 0, "steps": 0, "batch": 1, "width": 1, "detail": 0, "seed": 0}
    highest = {"rank": args.dim, "detail": 1e9 if args.dim > 2 else 0}  # in a plane nothing is outside the plane
    for name, low in lowest.items():
        if not low <= (value := getattr(args, name)) <= highest.get(name, 1e18):
            p.error(f"--{name} must be at least {low}, and at most {highest.get(name, 1e18):g}, but it is {value}")
    if args.rank != p.get_default("rank") and args.prediction not in ("asym", "all"):
        p.error(f"--rank {args.rank} is of asym, but --prediction is {args.prediction}: leave --rank out")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train each prediction from the same start, on the same data and noise; print, write and draw what it is worth."""
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for so small a network, more threads wait for each other longer than they work
    stream = lambda purpose: random_stream(args.seed, purpose, args.device)
    data = ToyData(args.toy, args.dim, args.detail, args.seed, args.device)
    basis = pca_basis(data.sample(10_000, stream("pca")), args.rank)
    bases = {"asym": basis, "x0": basis[:, :0], "u": torch.eye(args.dim, device=args.device), "eps": None}
    fresh = data.position(16 * POINTS, stream("fresh data")).view(16, POINTS, 2)
    reference = profile(fresh).mean(0)
    distance = lambda points: (profile(points) - reference).abs().mean().item()  # sliced Wasserstein-1
    noise = torch.randn(POINTS, args.dim, generator=stream("sampling"), device=args.device)
    start, floor = distance(noise @ data.frame), distance(fresh)
    print(f"{args.toy} in D = {args.dim} dimensions, {args.steps} steps of {args.batch}, seed {args.seed}")
    print(f"distance to the data in the plane: {start:.4f} of noise (score 0 %), {floor:.4f} of fresh data (100 %)\n")
    print("prediction   rank   score  noise left outside the plane  seconds")
    runs, panels = [], [(f"{args.toy}, seen in its plane", fresh[:1].cpu())]
    for prediction in PREDICTIONS if args.prediction == "all" else [args.prediction]:
        began = time.perf_counter()
        torch.manual_seed(args.seed)
        flow = Flow(MLP(args.dim, args.width), bases[prediction]).to(args.device)
        train(flow, data.sample, args.steps, args.batch, stream("training"), name=prediction)
        path = torch.stack([(x := point) @ data.frame for point in integrate(flow, noise)])
        score = (start - distance(path[-1])) / (start - floor)
        outside = (x @ data.outside).square().mean().sqrt().item() if args.dim > 2 else 0.0
        rank, seconds = "-" if prediction == "eps" else bases[prediction].shape[1], time.perf_counter() - began
        print(f"{prediction:11} {rank:>5} {score:7.0%} {outside:29.1%} {seconds:8.1f}", flush=True)
        runs.append(dict(prediction=prediction, rank=rank, score=score, outside_rms=outside, seconds=seconds))
        panels.append((f"{prediction}: score {score:.0%}", path.cpu()))
    picture, file = args.out / f"{args.toy}.png", args.out / "results.json"
    print(f"\n{'replacing' if picture.exists() or file.exists() else 'writing'} {picture} and {file}")
    results = vars(args) | {"torch": torch.__version__, "noise": start, "floor": floor, "runs": runs}
    file.write_text(json.dumps(results, indent=2, default=str) + "\n")
    draw(picture, panels)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError, AssertionError, ImportError) as e:
        sys.exit(f"nano_asymflow.py: error: {str(e).partition(chr(10))[0] or 'interrupted'}")
