"""What the wrapper costs next to its backbone: `python -m asymflow.bench wrapper`, on a CPU or a GPU."""

import argparse
import time
from collections.abc import Callable

import torch

from asymflow.backbones.jit import JiT
from asymflow.cli.common import at_least, default_device, usable_device
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.parameterization import recover_velocity
from asymflow.parser import Parser
from asymflow.patches import patchify
from asymflow.subspace import Subspace


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m asymflow.bench wrapper", description="Time a forward pass with and without the wrapper.")
    p.add_argument("--model", default="B/16", help="a JiT, SIZE/PATCH")
    p.add_argument("--rank", type=at_least(0), default=8, help="of the subspace")
    p.add_argument("--batch", type=at_least(1), default=4, help="images at a time")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone")
    p.add_argument("--repeats", type=at_least(1), default=10, help="the median of so many calls is shown")
    p.add_argument("--device", default=default_device(), help="such as cpu or cuda")
    args = p.parse_args(argv)
    try:
        run(args)
    except InputError as e:
        p.error(str(e))


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    device = usable_device(args.device)
    torch.manual_seed(0)
    jit = JiT.from_name(args.model).to(device, getattr(torch, args.dtype)).eval()
    flow = AsymFlow(jit, Subspace.random(jit.dim, args.rank)).to(device).eval()
    side = jit.grid[0] * jit.patch_size
    x, sigma = torch.randn(args.batch, 3, side, side, device=device), torch.full((args.batch,), 0.5, device=device)
    labels, tokens = torch.zeros(args.batch, dtype=torch.long, device=device), patchify(x, jit.patch_size)
    narrow, projection = tokens.to(getattr(torch, args.dtype)), flow.subspace.basis @ flow.subspace.basis.mT

    def dense() -> torch.Tensor:  # recovery with a D x D projection, for comparison
        outside = (2 * tokens - 2 * tokens @ projection) / sigma[:, None, None]
        return outside + (tokens - outside) @ projection

    timed = {
        f"backbone alone (JiT-{args.model})": lambda: jit(narrow, sigma, labels),
        f"AsymFlow around it, rank {args.rank}": lambda: flow(x, sigma, labels=labels),
        "of that, recovery": lambda: recover_velocity(tokens, tokens, sigma, flow.subspace, 0.04),
        "recovery with a dense projection": dense,
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.batch} images of {side} x {side}, {args.dtype}, {where}, torch {torch.__version__}")
    for name, seconds in medians(timed, args.repeats, device).items():
        print(f"{name:36} {1000 * seconds:10.2f} ms")


def medians(timed: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """The median time of each function. They run in turns, so that a machine that slows down slows all of them."""

    def once(function: Callable) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    rounds = [[once(function) for function in timed.values()] for _ in range(repeats + 1)][1:]  # the first warms up
    return {name: sorted(times)[repeats // 2] for name, times in zip(timed, zip(*rounds, strict=True), strict=True)}
