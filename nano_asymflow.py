"""Asymmetric flow models in one file: predict the data in full, and the noise only where the data lives.

    python nano_asymflow.py --toy swissroll                     # one model, held against the sample floor
    python nano_asymflow.py --toy swissroll --prediction all    # the same next to x0-, u- and eps-prediction

The problem. A flow model turns noise into data. Between a clean point `x0` and standard normal noise `eps` runs a
straight path, x_sigma = (1 - sigma) x0 + sigma eps, with the noise level sigma in [0, 1]. Its velocity is

    dx_sigma / dsigma = u = eps - x0.

A network learns E[u | x_sigma] by least squares; integrating dx/dsigma = u from sigma = 1, pure noise, down to 0 then
gives samples. What should the network put out?
  * u itself (flow matching). Then it has to repeat the noise in all D dimensions. Data such as images lives near a few
    of them; a network that is narrower than D spends all it has on letting noise through, and fails all the same.
  * x0 (JiT). Data is easy to put out. But u = (x_sigma - x0) / sigma, so near the data every error of the network is
    divided by a small sigma, and that in the very directions that make up the picture.
  * eps. Noise again, and u = (eps - x_sigma) / (1 - sigma) divides by zero where sampling starts.

Asymmetric flow (Chen et al. 2026, arXiv 2605.12964) takes the best of each: the velocity inside the r-dimensional
subspace where the data lives, only the data outside of it. Section 1 is the whole method. The rest is what it takes
to see it work: toy data (2), a network (3), training (4), sampling (5), evidence (6) and a command line (7).
"""

import argparse
import itertools
import json
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from math import pi
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm


# ---- 1. The parameterization, and why the velocity comes back --------------------------------------------------------
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
# With r = 0 nothing is inside, and this is x0-prediction (with a minus sign). With r = D nothing is outside, and it is
# u-prediction. Neither needs code of its own.
def asymmetric_velocity(x0: Tensor, eps: Tensor, basis: Tensor) -> Tensor:
    """What the network learns to predict: `u_a = P eps - x0` (arXiv 2605.12964).

    x0, eps: (..., D). basis: (D, r) with orthonormal columns, 0 <= r <= D. Returns (..., D), in the dtype given.
    Raises ValueError if the basis has another shape or is not orthonormal.
    """
    check_basis(basis, x0.shape[-1])
    return project(eps, basis) - x0


def recover_velocity(u_a: Tensor, x_sigma: Tensor, sigma: Tensor, basis: Tensor, sigma_min: float = 0.0) -> Tensor:
    """The full velocity `u = eps - x0`, in closed form, from the asymmetric one (arXiv 2605.12964).

    u_a, x_sigma: (..., D). sigma: a tensor in (0, 1], one for each vector, e.g. (batch, 1). basis: as above.
    Returns (..., D). Only the complement is divided, by sigma or `sigma_min`; rounding errors there grow as 1 / sigma.
    """
    check_basis(basis, x_sigma.shape[-1])
    outside = (x_sigma + u_a - project(x_sigma + u_a, basis)) / sigma.clamp(min=sigma_min)
    return outside + project(u_a - outside, basis)  # u_a inside, and there P takes away what rounding left of `outside`


def project(v: Tensor, basis: Tensor) -> Tensor:
    """`P v` for v (..., D), by two thin products: no D x D matrix."""
    return (v @ basis) @ basis.mT


def check_basis(basis: Tensor, dim: int) -> None:
    """Raise ValueError unless `basis` is (dim, r) with columns that are orthonormal to 1e-4."""
    if basis.ndim != 2 or not basis.shape[1] <= basis.shape[0] == dim:
        raise ValueError(f"basis must have the shape ({dim}, r) with r <= {dim}, but it has {tuple(basis.shape)}")
    gram = basis.detach().mT @ basis.detach()
    if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), rtol=0, atol=1e-4):
        raise ValueError("basis is not orthonormal: basis.T @ basis is not the identity (see torch.linalg.qr)")


def pca_basis(samples: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions (D, rank) of most (uncentred) energy of samples (n, D): float64, on the CPU."""
    return torch.linalg.eigh((x := samples.cpu().double()).mT @ x).eigenvectors.flip(-1)[:, :rank].to(samples)


# ---- 2. Toy data: a picture in the plane, lifted into D dimensions ---------------------------------------------------
# Images have many pixels and few degrees of freedom. So have the toys: points of a plane, times a random orthonormal
# frame. `detail` adds a curved component outside the plane: full rank and yet nearly low-rank, again as images are.
def polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


PREDICTIONS = ("asym", "x0", "u", "eps")
TOYS = {  # from uniform a, b (n,) and standard normal z (n, 2) to points (n, 2), standardized below
    "swissroll": lambda a, b, z: polar(1 + 2 * a, 1.5 * pi * (1 + 2 * a)) + 0.085 * z,
    "spirals": lambda a, b, z: polar(a.sqrt(), 3 * pi * a.sqrt() + pi * (b < 0.5)) + 0.025 * z,
    "moons": lambda a, b, z: (polar(1, pi * a) - z.new_tensor([0.5, 0.25])) * (b - 0.5).sign()[:, None] + 0.07 * z,
    "checkerboard": lambda a, b, z: torch.stack([4 * a, 2 * b + (2 * b).floor() + (4 * a).floor() % 2], dim=-1),
    "gaussians": lambda a, b, z: polar(1, (8 * a).floor() * pi / 4) + 0.1 * z,
    "rings": lambda a, b, z: polar(1 + (3 * a).floor(), 2 * pi * b) + 0.08 * z,
}


class ToyData:
    """A toy in `dim` dimensions. `detail`: the rms norm of its component outside the plane over that inside, about.

    `frame` (dim, 2) and `outside` (dim, dim - 2) span the true plane and its complement; only the evaluation uses them.
    """

    def __init__(self, toy: str, dim: int, detail: float = 0.0, seed: int = 0, device: str = "cpu"):
        g = random_stream(seed, "frame")
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q.to(device)
        self.frame, self.outside = axes[:, :2], axes[:, 2:]
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
        x = position @ self.frame.mT
        if self.amplitude:
            x = x + self.amplitude * (position @ self.frequency + self.phase).cos() @ self.outside.mT
        return x

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.lift(self.position(n, generator))


def random_stream(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A generator of its own for every (seed, purpose): what one part of the program draws never shifts another's."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


# ---- 3. The network, and the wrapper that makes it a velocity --------------------------------------------------------
# The network is a residual MLP that is narrower than the data, as every transformer on pixels is: whatever it puts out
# has to pass through `width` numbers. It knows nothing of asymmetric flow. `Flow` does.
class MLP(nn.Module):
    """Five linear layers from x (n, dim) to (n, dim), the last zero at first, and one for sigma (n, 1)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.register_buffer("frequency", pi * torch.arange(1, 33))
        self.noise_level = nn.Linear(64, width)
        self.input = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, dim)
        for weights in self.output.parameters():
            nn.init.zeros_(weights)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        waves = sigma * self.frequency
        h = nn.functional.gelu(self.input(x) + self.noise_level(torch.cat([waves.cos(), waves.sin()], dim=-1)))
        for layer in self.hidden:
            h = h + nn.functional.gelu(layer(h))
        return self.output(h)


class Flow(nn.Module):
    """A velocity model: `flow(x_sigma (n, D), sigma (n, 1))` is u (n, D). Without a basis it predicts eps."""

    def __init__(self, network: nn.Module, basis: Tensor | None):
        super().__init__()
        self.network = network
        self.register_buffer("basis", basis)

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        prediction = self.network(x_sigma, sigma)
        if self.basis is None:  # eps-prediction is not a rank: its own line, inexact above sigma = 0.95
            return (prediction - x_sigma) / (1 - sigma).clamp(min=0.05)
        return recover_velocity(prediction, x_sigma, sigma, self.basis, sigma_min=1e-6)


# ---- 4. Training: flow matching on the recovered velocity, whatever the network predicts -----------------------------
def flow_loss(flow: Callable, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Mean of `((u_pred - u) sigma / max(sigma, 0.05))^2`: plain above sigma = 0.05, softer below."""
    error = flow(torch.lerp(x0, eps, sigma), sigma) - (eps - x0)  # lerp is (1 - sigma) x0 + sigma eps
    return (error.square().mean(-1, keepdim=True) * (sigma / sigma.clamp(min=0.05)).square()).mean()


def train(flow, sample, steps, batch, generator, loss=flow_loss, lr=2e-3, stop=None, name="training") -> int:
    """Train the module `flow` on `sample(n, generator)` and leave the moving average of its weights in it.

    Adam with cosine decay; the average is over a tenth of the steps. Ends early if `stop()`. Returns the steps done.
    """
    weights = list(flow.parameters())
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))
    options = {"generator": generator, "device": generator.device}
    done = 0
    for done in (bar := tqdm(range(1, steps + 1), desc=name, unit="step", leave=False, mininterval=0.5)):
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
            a.lerp_(w.detach(), max(0.001, 10 / (done + 10)))
        if done % 100 == 1:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if stop and stop():
            break
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(average), weights)
    return done


# ---- 5. Sampling: integrate dx/dsigma = u(x, sigma) from noise to data -----------------------------------------------
@torch.no_grad()
def integrate(velocity: Callable, x: Tensor, steps: int = 50, heun: bool = True) -> Iterator[Tensor]:
    """Yield x at sigma = 1, 1 - 1/steps, ..., 0: from x (n, D), the noise, to the samples.

    Euler's method (order 1) or Heun's (order 2). The last step is always Euler's: at sigma = 0, u may not exist.
    """
    yield x
    for sigma, target in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        u = velocity(x, torch.full_like(x[:, :1], sigma))
        if heun and target > 0:
            u = (u + velocity(x + (target - sigma) * u, torch.full_like(x[:, :1], target))) / 2
        x = x + (target - sigma) * u
        yield x


# ---- 6. The evidence: samples held against fresh data ----------------------------------------------------------------
SETS, FRESH, POINTS = 4, 16, 4096  # sets of samples, sets of data to hold each of them against, points in a set


def projections(points: Tensor) -> Tensor:
    """Points (n, 2) seen along 64 evenly spaced directions of the plane, each sorted: (64, n)."""
    angle = torch.arange(64, device=points.device) * pi / 64
    return (polar(1, angle) @ points.mT).sort(dim=-1).values


def sliced_wasserstein(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Sliced Wasserstein-1 distance, the mean over pairs of sets that are given by their `projections`."""
    return torch.stack([(a - b).abs().mean() for a, b in pairs]).mean().item()


def off_plane_rms(x: Tensor, data: ToyData) -> float:
    """Root mean square of the coordinates of x (n, D) outside the true plane. Pure noise has 1."""
    return (x @ data.outside).square().mean().sqrt().item() if data.dim > 2 else 0.0


def evaluate(flow: Callable, data: ToyData, fresh: list[Tensor], seed: int) -> tuple[float, float, Tensor]:
    """Sample. (SWD to the projections `fresh`, rms off the plane, paths in the plane (steps + 1, POINTS, 2))."""
    generator = random_stream(seed, "sampling", data.device)
    sets, off = [], 0.0
    for noise in torch.randn(SETS, POINTS, data.dim, generator=generator, device=data.device):
        path = [(last := x) @ data.frame for x in integrate(flow, noise)]
        sets.append(projections(path[-1]))
        off += off_plane_rms(last, data) / SETS
    return sliced_wasserstein(itertools.product(sets, fresh)), off, torch.stack(path).cpu()


def recovery_error(dim: int, rank: int, dtype: torch.dtype) -> float:
    """Largest |recover_velocity(asymmetric_velocity(x0, eps)) - (eps - x0)| over 4,096 random points and sigmas."""
    options = {"generator": random_stream(0, "recovery"), "dtype": dtype}
    basis = torch.linalg.qr(torch.randn(dim, dim, **options)).Q[:, :rank]
    x0, eps = torch.randn(2, 4096, dim, **options)
    sigma = 1 - torch.rand(4096, 1, **options)
    u = recover_velocity(asymmetric_velocity(x0, eps, basis), torch.lerp(x0, eps, sigma), sigma, basis)
    return (u - (eps - x0)).abs().max().item()


def draw(file: Path, title: str, points: Tensor, panels: list[tuple[str, Tensor]]) -> None:
    """Above, the data and the samples of each (name, paths), in the plane; below, the paths of 100 samples."""
    figure = Figure(figsize=(3 * len(panels) + 3, 6.5), layout="constrained")
    frame = {"xlim": (-3, 3), "ylim": (-3, 3), "aspect": "equal", "xticks": [], "yticks": []}
    columns = figure.subplots(2, len(panels) + 1, subplot_kw=frame).T
    for (above, below), (name, path) in zip(columns, [("data", points.cpu()[None]), *panels], strict=True):
        unseen = (path[-1].abs() > 3).any(-1).float().mean().item()
        above.set_title(name + (f"\n({unseen:.0%} outside this frame)" if unseen > 0.005 else ""), fontsize=10)
        above.scatter(*path[-1].T, s=2, alpha=0.5, linewidths=0, color="C3" if len(path) > 1 else "C0")
        below.plot(*path[:, :100].permute(2, 0, 1), color="0.8", linewidth=0.6)
        below.scatter(*path[0, :100].T, s=5, color="0.4")
        below.scatter(*path[-1, :100].T, s=5, color="C3" if len(path) > 1 else "C0")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


# ---- 7. The command line ---------------------------------------------------------------------------------------------
def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="nano_asymflow.py", description="Asymmetric flow on toy data, and its evidence.")
    p.add_argument("--toy", choices=TOYS, default="swissroll", help="the picture in the plane")
    p.add_argument("--dim", type=int, default=256, help="D, the dimension that it is lifted into")
    p.add_argument("--rank", type=int, default=2, help="r, the rank of the basis of asym")
    p.add_argument("--prediction", choices=[*PREDICTIONS, "all"], default="asym", help="what the network predicts")
    p.add_argument("--steps", type=int, default=3000, help="training steps")
    p.add_argument("--batch", type=int, default=512, help="samples in a step")
    p.add_argument("--width", type=int, default=128, help="width of the network")
    p.add_argument("--detail", type=float, default=0.0, help="size of the component outside the plane, such as 0.3")
    p.add_argument("--seed", type=int, default=0, help="fixes every bit, on one CPU and number of threads")
    p.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder for TOY.png and results.json")
    p.add_argument("--device", default="cpu", help="such as cpu, cuda or cuda:1")
    args = parse(p, argv, {"dim": 2, "rank": 0, "steps": 0, "batch": 1, "width": 1, "detail": 0, "seed": 0})
    if args.rank > args.dim:
        p.error(f"--rank {args.rank} is more than --dim {args.dim}: a subspace of D dimensions has at most rank D")
    if args.detail and args.dim == 2:
        p.error("--detail needs --dim 3 or more: in two dimensions nothing lies outside the plane")
    return args


def parse(p: argparse.ArgumentParser, argv: list[str] | None, lowest: dict[str, int]) -> argparse.Namespace:
    """Parse, check the `lowest` values, --device and --out. What makes no sense ends in one line and exit code 2."""
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message}\n")
    args = p.parse_args(argv)
    for name, low in lowest.items():
        if not low <= (value := getattr(args, name)) < 2**63:  # refuses NaN and infinity too
            p.error(f"--{name} must be at least {low} and below 2^63, but it is {value}")
    try:
        torch.ones(1, device=args.device).item()
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        p.error(f"--out {args.out} cannot be written to: {e.strerror}")
    except (RuntimeError, AssertionError, ImportError) as e:
        p.error(f"--device {args.device} cannot be used here: {str(e).splitlines()[0].split('. ')[0]}")
    return args


def experiment(args: argparse.Namespace, stop: threading.Event) -> None:
    data = ToyData(args.toy, args.dim, args.detail, args.seed, args.device)
    basis = pca_basis(data.sample(10_000, random_stream(args.seed, "pca", args.device)), args.rank)
    bases = {"asym": basis, "x0": basis[:, :0], "u": torch.eye(args.dim, device=args.device), "eps": None}
    generator = random_stream(args.seed, "evaluation", args.device)
    points = [data.sample(POINTS, generator) for _ in range(FRESH)]
    fresh = [projections(x @ data.frame) for x in points]
    floor = sliced_wasserstein(itertools.combinations(fresh, 2))
    double, single = (recovery_error(args.dim, args.rank, dtype) for dtype in (torch.float64, torch.float32))
    print(f"{args.toy} in D = {args.dim} dimensions, {args.steps} steps of {args.batch}, seed {args.seed}")
    print(f"recovery of the velocity, largest error: {double:.1e} in float64, {single:.1e} in float32")
    print("\nprediction   rank     SWD  SWD / floor  off-plane rms  seconds")
    row = "{:11} {:>5} {:7.4f} {:12.2f} {:14.4f} {:>8}".format
    print(row("fresh data", "", floor, 1, off_plane_rms(points[0], data), ""))
    runs, panels = [], []
    for prediction in PREDICTIONS if args.prediction == "all" else [args.prediction]:
        start = time.perf_counter()
        torch.manual_seed(args.seed)  # the same network, data and noise for every prediction; only the basis differs
        flow = Flow(MLP(args.dim, args.width), bases[prediction]).to(args.device)
        stream = random_stream(args.seed, "training", args.device)
        steps = train(flow, data.sample, args.steps, args.batch, stream, stop=stop.is_set, name=prediction)
        swd, off, path = evaluate(flow, data, fresh, args.seed)
        rank = None if prediction == "eps" else bases[prediction].shape[1]
        seconds = round(time.perf_counter() - start, 1)
        runs.append(dict(prediction=prediction, rank=rank, swd=swd, off_subspace_rms=off, seconds=seconds, steps=steps))
        panels.append((f"{prediction}: SWD {swd / floor:.2f} x floor", path))
        print(row(prediction, "-" if rank is None else rank, swd, swd / floor, off, seconds), flush=True)
        if stop.is_set():
            print(f"Interrupted at step {steps} of {prediction}: what was trained so far is evaluated and written.")
            break
    results = vars(args) | {"torch": torch.__version__, "threads": torch.get_num_threads(), "floor_swd": floor}
    results |= {"recovery_max_error": double, "recovery_max_error_float32": single, "runs": runs}
    picture, file = (keep_earlier(args.out / name) for name in (f"{args.toy}.png", "results.json"))
    file.write_text(json.dumps(results | {"interrupted": stop.is_set()}, indent=2, default=str) + "\n")
    draw(picture, f"{args.toy} in D = {args.dim}, seen in its plane", points[0] @ data.frame, panels)
    print(f"\nwrote {picture} and {file}")


def keep_earlier(file: Path) -> Path:
    """Make way for `file`: what an earlier run wrote is renamed, never overwritten."""
    if file.exists() or file.is_symlink():
        older = next(o for n in itertools.count(1) if not (o := file.with_stem(f"{file.stem}.{n}")).exists())
        print(f"{file} of an earlier run is now {file.rename(older)}")
    return file


def main(argv: list[str] | None = None, stop: threading.Event | None = None) -> int:
    try:
        experiment(arguments(argv), stop or threading.Event())
    except (ValueError, OSError, RuntimeError) as e:  # a RuntimeError: mostly, not enough memory
        print(f"nano_asymflow.py: error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # the first Ctrl-C ends the training, a second one everything
    ctrl_c = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: (ctrl_c.set(), signal.signal(signal.SIGINT, signal.SIG_DFL)))
    sys.exit(main(stop=ctrl_c))
