"""Measurements of speed on this GPU. Each is compared with its limit, which is measured in the same run."""

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch

from asymflow import cost
from asymflow.backbones.jit import JiT
from asymflow.bench.kit import Check, Kit, NotRunError
from asymflow.bench.noise import measure_noise
from asymflow.bench.right import shapes, small, without_numbers
from asymflow.bench.trainings import images_per_second, median, synchronize
from asymflow.cli.info import INTERVAL, operations
from asymflow.cli.info import STEPS as SAMPLER_STEPS
from asymflow.model import AsymFlow
from asymflow.parameterization import recover_velocity
from asymflow.precision import computing
from asymflow.sampling import generate
from asymflow.subspace import Subspace

WARM_UP = 4  # steps of a training that are not timed
TIMED = {"B/16": 60, "L/16": 24, "H/16": 12}
WORKERS = {"B/16": 8, "L/16": 4, "H/16": 2}  # each loads two batches ahead; these are used up before timing begins
ON_EACH = 128  # images in a step on each GPU, as in a batch of 1,024 on eight
GUIDANCE = 2.3


def seconds(function: Callable, device: torch.device, repeats: int) -> float:
    """The median time of `repeats` calls, after three that warm up."""
    times = []
    for _ in range(repeats + 3):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[3:])


def limits(kit: Kit) -> tuple[str, dict]:
    """The limits for all other measurements: a product of large bfloat16 matrices, and a copy on the device."""
    n, size = (256, 2**22) if kit.tiny else (8192, 2**30)
    a, b = torch.randn(2, n, n, device=kit.device).bfloat16()
    kit.limits["matmul"] = 2 * n**3 / seconds(lambda: a @ b, kit.device, 20)
    source = torch.empty(size, dtype=torch.uint8, device=kit.device).random_()
    there = torch.empty_like(source)
    kit.limits["copy"] = 2 * size / seconds(lambda: there.copy_(source), kit.device, 20)
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
    eager = seconds(lambda: recover_velocity(u_a, x_sigma, sigma, subspace), kit.device, 20)
    figures = {"bytes": size, "eager_seconds": eager}
    shown = f"{size / eager / 1e9:.4g} GB/s, {size / eager / kit.limits['copy']:.0%} of a copy of as many bytes"
    if kit.cuda:
        fused = torch.compile(recover_velocity)
        figures["compiled_seconds"] = seconds(lambda: fused(u_a, x_sigma, sigma, subspace), kit.device, 20)
        shown += f"; compiled {size / figures['compiled_seconds'] / kit.limits['copy']:.0%}"
    return f"{tokens} tokens of 768: {1000 * eager:.3g} ms, {shown}", figures


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
        flow, side = without_numbers("tiny/16" if kit.tiny else size)
        each = cost.flops(flow, (3, side, side), training=True, recomputed=False)
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
    rates, figures = {}, {}
    for name, resident in (("loaded", False), ("resident", True)):
        found = kit.train(name, settings, config=config, unsaved=True, resident=resident, loading=not resident)
        rates[name] = images_per_second(found["metrics"][first:])
    figures["milliseconds_an_image"] = measure_noise(kit.device, *([(16,), 2] if kit.tiny else []))
    lost = 1 - rates["loaded"] / rates["resident"]
    return (
        f"{rates['loaded']:.4g} images/s with drawing, loading and copying, {rates['resident']:.4g} without: "
        f"{lost:.1%} of the time is not hidden behind the computation",
        {**rates, **figures},
    )


def sampling(kit: Kit) -> tuple[str, dict]:
    """Sampling as with `asymflow sample --precision bf16`: guidance on the interval, Heun, weights in float32."""
    size, batch, steps = ("tiny/16", 2, 3) if kit.tiny else ("H/16", 16, SAMPLER_STEPS)
    with torch.device(kit.device):
        jit = JiT.from_name(size)
    flow = AsymFlow(jit, Subspace.random(jit.dim, 8)).to(kit.device).eval()
    counted, side = without_numbers(size)
    each = operations(counted, (3, side, side))["sampling"]["guided"] * steps / SAMPLER_STEPS
    options = dict(guidance=GUIDANCE, interval=INTERVAL)
    draw = lambda steps: generate(flow, list(range(batch)), range(batch), seed=0, steps=steps, **options)
    with computing(flow, "bf16"):
        draw(2)
        synchronize(kit.device)
        started = time.perf_counter()
        images = draw(steps)
        synchronize(kit.device)
    a_picture = (time.perf_counter() - started) / batch
    if not images.isfinite().all():
        raise ValueError("samples are not finite")
    return (
        f"JiT-{size}, {steps} Heun steps, {batch} images at a time: {a_picture:.3g} s an image, "
        f"{shares(kit, each / a_picture)}",
        {"seconds_an_image": a_picture, "flops_an_image": each},
    )


def finetuning(kit: Kit) -> tuple[str, dict]:
    kit.need("deepspeed", "diffusers", "peft", "accelerate")
    from asymflow.bench import flux2

    if kit.cuda:
        free = torch.cuda.mem_get_info()[0]
        sizes = [size for size, needed in (("9B", 40), ("4B", 24)) if free > needed * 2**30]
        if not sizes:
            raise NotRunError(f"{free / 2**30:.0f} GiB of memory are free: too little for the 4B model")
    size = "tiny" if kit.tiny else sizes[0] if kit.cuda else None
    if size is None:
        raise NotRunError("not on a CPU")
    packages = all(importlib.util.find_spec(name) for name in ("lpips", "torchvision"))
    lpips = packages and not kit.tiny  # convolutions in bfloat16 are slow on a CPU
    options = dict(image_size=None, text_length=None, lora_rank=None, no_checkpointing=False, no_lpips=not lpips)
    args = argparse.Namespace(size=size, batch=1, steps=2 if kit.tiny else 5, **options)
    found = flux2.measure(args, kit.trainings, kit.work, timeout=max(kit.left, 5))
    step, evaluation = found["training_step"], found["guided_evaluation"]
    without = "" if lpips else ", without LPIPS"
    held = found["memory"]["peak"]
    weighed = f"; peak {held['measured'] / 2**30:.1f} GiB, counted {held['counted'] / 2**30:.1f}" if kit.cuda else ""
    return (
        f"{size}, {' x '.join(map(str, found['image'][1:]))}{without}: {step['seconds']:.3g} s, "
        f"{shares(kit, step['flops_per_second'])}{weighed}; guided evaluation {evaluation['seconds']:.3g} s",
        found,
    )


CHECKS = [
    Check("limits", limits, 2, measures=True),
    Check("recovery", recovery, 3, measures=True),
    Check("training H/16", training("H/16"), 108, measures=True),
    Check("sampling H/16", sampling, 15, measures=True),
    Check("finetuning FLUX.2", finetuning, 77, measures=True),
    Check("training B/16", training("B/16"), 60, measures=True),
    Check("training L/16", training("L/16"), 70, measures=True),
    Check("waiting for data", waiting_for_data, 45, measures=True),
]
