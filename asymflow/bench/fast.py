"""Measurements of speed on this GPU. Each is compared with its limit, which is measured in the same run."""

import io
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from asymflow import cost, streams
from asymflow.backbones.jit import JiT, filled_up
from asymflow.bench.kit import Check, Kit
from asymflow.bench.right import image_shape, shapes, small, without_numbers
from asymflow.bench.trainings import images_per_second, synchronize
from asymflow.cli.info import INTERVAL, passes_for_sampling
from asymflow.cli.info import STEPS as SAMPLER_STEPS
from asymflow.data.folder import to_uint8
from asymflow.model import AsymFlow
from asymflow.parameterization import recover_velocity
from asymflow.patches import patchify
from asymflow.precision import computing
from asymflow.sampling import generate
from asymflow.subspace import Subspace
from asymflow.training.objectives.cost import class_conditional_step, images

WARM_UP = 4  # steps of a training that are not timed
TIMED = {"B/16": 60, "L/16": 24, "H/16": 12}
WORKERS = {"B/16": 14, "L/16": 8, "H/16": 6}  # each loads two batches ahead; these are used up before timing begins
ON_EACH = 128  # images in a step on each GPU, as in a batch of 1,024 on eight
GUIDANCE = 2.3


def medians(timed: dict[str, Callable], device: torch.device, repeats: int = 20) -> dict[str, float]:
    """The median seconds of each function, after three calls that warm up.

    They run in turns, so that a machine that slows down slows all of them.
    """
    times = {name: [] for name in timed}
    for _ in range(repeats + 3):
        for name, function in timed.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[3:])) for name, values in times.items()}


def limits(kit: Kit) -> tuple[str, dict]:
    """The limits for all other measurements: a product of large bfloat16 matrices, and a copy on the device."""
    n, size = (256, 2**22) if kit.tiny else (8192, 2**30)
    a, b = torch.randn(2, n, n, device=kit.device).bfloat16()
    source = torch.empty(size, dtype=torch.uint8, device=kit.device).random_()
    there = torch.empty_like(source)
    seconds = medians({"matmul": lambda: a @ b, "copy": lambda: there.copy_(source)}, kit.device)
    kit.limits |= {"matmul": 2 * n**3 / seconds["matmul"], "copy": 2 * size / seconds["copy"]}
    sheet = cost.peak_flops(kit.device)
    share = f" ({kit.limits['matmul'] / sheet:.0%} of the data sheet)" if sheet else ""
    return (
        f"{n} x {n} bfloat16 product {kit.limits['matmul'] / 1e12:.3g} TFLOP/s{share}; copy of {size / 2**20:.0f} MiB "
        f"{kit.limits['copy'] / 1e9:.4g} GB/s, read and written",
        {**kit.limits, "data_sheet": sheet},
    )


def recovery(kit: Kit) -> tuple[str, dict]:
    """`recover_velocity` on many tokens, compared with a copy: it must read two tensors and write one."""
    tokens = 1024 if kit.tiny else 65536
    subspace = Subspace.random(768, 8).to(kit.device)
    u_a, x_sigma = torch.randn(2, tokens, 768, device=kit.device)
    sigma = torch.rand(tokens, device=kit.device)
    size = 3 * u_a.numel() * u_a.element_size()
    timed = {"eager": lambda: recover_velocity(u_a, x_sigma, sigma, subspace)}
    if kit.cuda:
        fused = torch.compile(recover_velocity)
        timed["compiled"] = lambda: fused(u_a, x_sigma, sigma, subspace)
    seconds = medians(timed, kit.device)
    eager = seconds["eager"]
    shown = f"{size / eager / 1e9:.4g} GB/s, {size / eager / kit.limits['copy']:.0%} of a copy of as many bytes"
    if kit.cuda:
        shown += f"; compiled {size / seconds['compiled'] / kit.limits['copy']:.0%}"
    return f"{tokens} tokens of 768: {1000 * eager:.3g} ms, {shown}", {"bytes": size, "seconds": seconds}


@torch.inference_mode()
def wrapper(kit: Kit) -> tuple[str, dict]:
    """What AsymFlow costs around its backbone, and recovery by thin products next to one with a D x D projection."""
    torch.manual_seed(0)
    count = 1 if kit.tiny else 4
    jit = JiT.from_name(size := "tiny/16" if kit.tiny else "B/16").to(kit.device).eval()
    flow = AsymFlow(jit, Subspace.random(jit.dim, 8)).to(kit.device).eval()
    x, sigma = torch.randn(count, *image_shape(flow), device=kit.device), torch.full((count,), 0.5, device=kit.device)
    labels, tokens = torch.zeros(count, dtype=torch.long, device=kit.device), patchify(x, jit.patch_size)
    projection = flow.subspace.basis @ flow.subspace.basis.mT

    def dense() -> Tensor:
        outside = (2 * tokens - 2 * tokens @ projection) / sigma[:, None, None]
        return outside + (tokens - outside) @ projection

    timed = {
        "backbone alone": lambda: jit(tokens, sigma, labels),
        "AsymFlow around it": lambda: flow(x, sigma, labels=labels),
        "of that, recovery": lambda: recover_velocity(tokens, tokens, sigma, flow.subspace, 0.04),
        "recovery with a dense projection": dense,
    }
    found = medians(timed, kit.device, 3 if kit.tiny else 10)
    shown = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in found.items())
    return f"{count} images, JiT-{size} of rank 8, float32: {shown}", found


def odd_sizes(kit: Kit) -> tuple[str, dict]:
    """The two layers of JiT-H's SwiGLU in bfloat16: as they are, and filled up with zeros, as `jit.Linear` does it."""
    tokens, width, hidden = (64, 16, 43) if kit.tiny else (9216, 1280, 3413)
    sizes, timed = {"w12": (width, 2 * hidden), "w3": (hidden, width)}, {}
    for name, (wide, high) in sizes.items():
        x, weight, bias = (
            torch.randn(size, device=kit.device).bfloat16() for size in ((tokens, wide), (high, wide), (high,))
        )
        timed[name] = partial(F.linear, x, weight, bias)
        timed[f"{name} filled up"] = partial(filled_up, x, weight, bias)
    seconds = medians(timed, kit.device)
    rates = {name: 2 * tokens * math.prod(sizes[name.split()[0]]) / s for name, s in seconds.items()}
    shown = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    return f"{tokens} tokens, {width} wide, {hidden} hidden, TFLOP/s: {shown}", rates


def noise(kit: Kit) -> tuple[str, dict]:
    """The noise of an image: is it cheaper to draw it on the CPU and copy it, as we do, or to draw it on the device?"""
    found = {
        side: noise_seconds(kit.device, side, 2 if kit.tiny else 20) for side in ((16,) if kit.tiny else (256, 1024))
    }
    shown = (
        f"{side} x {side} pixels: {', '.join(f'{name} {1000 * seconds:.3g} ms' for name, seconds in times.items())}"
        for side, times in found.items()
    )
    return "; ".join(shown), found


def noise_seconds(device: torch.device, side: int, repeats: int) -> dict[str, float]:
    """decode: a JPEG of this size, for comparison. draw: eps on the CPU. copy: of eps, or of pixels, to the device, and
    from pinned memory to a GPU. generator: eps on the device, by a generator that is seeded anew for each image."""
    cuda, samples = device.type == "cuda", iter(range(10**9))
    pixels, eps = (torch.empty(3, side, side, dtype=t, pin_memory=cuda) for t in (torch.uint8, torch.float32))
    there, generator = torch.empty_like(eps, device=device), torch.Generator(device)
    coarse = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(jpeg, "jpeg", quality=95)

    def draw_there() -> None:
        generator.manual_seed(int(streams.generator(0, streams.NOISE, next(samples)).integers(2**63)))
        there.normal_(generator=generator)

    timed = {
        "decode": lambda: to_uint8(Image.open(jpeg).convert("RGB")),
        "draw": lambda: streams.noise(0, next(samples), eps),
        "copy of eps": lambda: there.copy_(eps, non_blocking=True),
        "copy of pixels": lambda: pixels.to(device, non_blocking=True, copy=True),
        "generator": draw_there,
    }
    return medians(timed, device, repeats)


def training(size: str) -> Callable[[Kit], tuple[str, dict]]:
    config = f"imagenet256_{size.lower().replace('/', '')}"

    def check(kit: Kit) -> tuple[str, dict]:
        """One of eight GPUs with the recipe of the paper: its share of a batch of 1,024, compiled."""
        first = WARM_UP if kit.tiny else WARM_UP + 2 * WORKERS[size]
        settings = shapes() | {
            "train.global_batch_size": 2 if kit.tiny else ON_EACH,
            "train.steps": first + (2 if kit.tiny else TIMED[size]) + 1,  # one more, which is profiled
            "data.workers": WORKERS[size],
        }
        if kit.tiny:
            settings |= {
                "model.size": "tiny/16",
                "train.compile": False,
                "train.micro_batch_size": 1,
                "data.workers": 0,
            }
        found = kit.train(size.replace("/", ""), settings, config=config, unsaved=True, profiled=True, loading=True)
        step = class_conditional_step(flow := without_numbers("tiny/16" if kit.tiny else size))
        each = cost.count(step, lambda step: step(images(1, image_shape(flow)))).flops
        rate, waiting = images_per_second(timed := found["metrics"][first:-1]), share_of_waiting(timed)
        busy = sum(kind["seconds"] for kind in found["spent"]) * rate / settings["train.global_batch_size"]
        figures = {"images_per_second": rate, "flops_an_image": each, "memory": found["memory"], "waiting": waiting}
        figures |= {"busy": busy, "spent": found["spent"][:40]}
        figures["steps"] = [step["images_per_second"] for step in found["metrics"]]
        shown = f"{rate:.4g} images/s, {shares(kit, each * rate)}{peak(found)}"
        return f"{shown}; computing {busy:.0%} of the time, waiting for data {waiting:.1%}", figures

    return check


def shares(kit: Kit, rate: float) -> str:
    """A rate in words: as a share of the measured peak, and of the data sheet's if that is known."""
    sheet = cost.peak_flops(kit.device)
    shown = [f"{rate / kit.limits['matmul']:.1%} of the measured matmul peak"] if "matmul" in kit.limits else []
    shown += [f"{rate / sheet:.1%} of the data sheet"] if sheet else []
    return f"{rate / 1e12:.4g} TFLOP/s: {', '.join(shown) or 'no peak is known'}"


def share_of_waiting(steps: list[dict]) -> float:
    seconds = [1 / step["images_per_second"] for step in steps]
    return sum(step["waiting"] * s for step, s in zip(steps, seconds, strict=True)) / sum(seconds)


def peak(found: dict) -> str:
    return f"; {found['memory']['peak'] / 2**30:.1f} GiB at most" if "peak" in found["memory"] else ""


def waiting_for_data(kit: Kit) -> tuple[str, dict]:
    """Compare steps on images from the loader with steps on one batch that is on the GPU already."""
    first = WARM_UP if kit.tiny else WARM_UP + 2 * WORKERS["B/16"]
    size = small(kit) | {"checkpoint.every": 10**6} if kit.tiny else shapes() | {"model.size": "B/16"}
    settings = size | {
        "train.steps": first + (4 if kit.tiny else 50),
        "train.global_batch_size": 8 if kit.tiny else 64,
        "train.micro_batch_size": 8 if kit.tiny else 64,
        "train.compile": False,
        "data.workers": 1 if kit.tiny else WORKERS["B/16"],
    }
    config = "shapes_tiny" if kit.tiny else "imagenet256_b16"
    rates = {}
    for name, resident in (("loaded", False), ("resident", True)):
        found = kit.train(name, settings, config=config, unsaved=True, resident=resident, loading=not resident)
        rates[name] = images_per_second(found["metrics"][first:])
    lost = 1 - rates["loaded"] / rates["resident"]
    return (
        f"{rates['loaded']:.4g} images/s with drawing, loading and copying, {rates['resident']:.4g} without: "
        f"{lost:.1%} of the time is not hidden behind the computation",
        rates,
    )


def sampling(kit: Kit) -> tuple[str, dict]:
    """Sampling as with `asymflow sample --precision bf16`: guidance on the interval, Heun, weights in float32."""
    size, batch, steps = ("tiny/16", 2, 3) if kit.tiny else ("H/16", 16, SAMPLER_STEPS)
    with torch.device(kit.device):
        jit = JiT.from_name(size)
    flow = AsymFlow(jit, Subspace.random(jit.dim, 8)).to(kit.device).eval()
    each = cost.forward_flops(counted := without_numbers(size), image_shape(counted))
    each *= passes_for_sampling(GUIDANCE) * steps / SAMPLER_STEPS
    options = dict(guidance=GUIDANCE, interval=INTERVAL)
    draw = lambda steps: generate(flow, list(range(batch)), range(batch), seed=0, steps=steps, **options)
    with computing(flow, "bf16"):
        draw(2)
        synchronize(kit.device)
        started = time.perf_counter()
        drawn = draw(steps)
        synchronize(kit.device)
    a_picture = (time.perf_counter() - started) / batch
    if not drawn.isfinite().all():
        raise ValueError("samples are not finite")
    return (
        f"JiT-{size}, {steps} Heun steps, {batch} images at a time: {a_picture:.3g} s an image, "
        f"{shares(kit, each / a_picture)}",
        {"seconds_an_image": a_picture, "flops_an_image": each},
    )


def finetuning(kit: Kit) -> tuple[str, dict]:
    kit.need("deepspeed", "diffusers", "peft", "accelerate")
    from asymflow.bench.finetuning import measure

    return measure(kit)


CHECKS = [
    Check("limits", limits, 2, measures=True),
    Check("recovery", recovery, 3, measures=True),
    Check("training H/16", training("H/16"), 108, measures=True),
    Check("sampling H/16", sampling, 15, measures=True),
    Check("finetuning FLUX.2", finetuning, 77, measures=True),
    Check("training B/16", training("B/16"), 60, measures=True),
    Check("training L/16", training("L/16"), 70, measures=True),
    Check("wrapper", wrapper, 3, measures=True, anywhere=True),
    Check("odd sizes", odd_sizes, 2, measures=True),
    Check("noise", noise, 8, measures=True, anywhere=True),
    Check("waiting for data", waiting_for_data, 45, measures=True),
]
