"""Where to draw the noise of an image, on the CPU or on the device: `python -m asymflow.bench noise`."""

import io
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from asymflow import streams
from asymflow.cli.common import default_device, usable_device
from asymflow.data.folder import to_uint8
from asymflow.errors import InputError
from asymflow.parser import Parser


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m asymflow.bench noise", description="Time the noise of an image, by where it is drawn.")
    p.add_argument("--device", default=default_device(), help="such as cpu or cuda")
    args = p.parse_args(argv)
    try:
        device = usable_device(args.device)
    except InputError as e:
        p.error(str(e))
    print(json.dumps({"device": args.device, "torch": torch.__version__, **measure_noise(device)}, indent=2))


def measure_noise(device: torch.device, sides: tuple[int, ...] = (256, 1024), repeats: int = 20) -> dict:
    """{side: {what: milliseconds}} for an image of `side` x `side` pixels, each the median of `repeats`.

    decode: decoding a JPEG on the CPU, for comparison. draw: drawing eps on the CPU, as in training. copy_eps,
    copy_pixels: copying to the device, from pinned memory if it is a GPU; bytes_eps and bytes_pixels are their sizes.
    generator: drawing eps on the device, by a generator that is seeded anew for each image, from (seed, sample).

    CPU work is measured in CPU time, work on a GPU from the call until it is done.
    """
    return {side: measured(device, side, repeats) for side in sides}


def measured(device: torch.device, side: int, repeats: int) -> dict[str, float]:
    cuda, samples = device.type == "cuda", iter(range(10**9))
    pixels, eps = (torch.empty(3, side, side, dtype=t, pin_memory=cuda) for t in (torch.uint8, torch.float32))
    there, generator = torch.empty_like(eps, device=device), torch.Generator(device)
    coarse = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(jpeg, "jpeg", quality=95)

    def draw_there() -> None:
        generator.manual_seed(int(streams.generator(0, streams.NOISE, next(samples)).integers(2**63)))
        there.normal_(generator=generator)

    on_cpu = {
        "decode": lambda: to_uint8(Image.open(jpeg).convert("RGB")),
        "draw": lambda: streams.noise(0, next(samples), eps),
    }
    on_device = {
        "copy_eps": lambda: there.copy_(eps, non_blocking=True),
        "copy_pixels": lambda: pixels.to(device, non_blocking=True, copy=True),
        "generator": draw_there,
    }
    found = {name: milliseconds(function, repeats) for name, function in on_cpu.items()}
    found |= {name: milliseconds(function, repeats, device if cuda else None) for name, function in on_device.items()}
    return {**found, "bytes_eps": eps.nbytes, "bytes_pixels": pixels.nbytes}


def milliseconds(function: Callable, repeats: int, gpu: torch.device | None = None) -> float:
    times = []
    for _ in range(repeats + 1):
        if gpu:
            torch.cuda.synchronize(gpu)
        started = time.perf_counter() if gpu else time.process_time()
        function()
        if gpu:
            torch.cuda.synchronize(gpu)
        times.append((time.perf_counter() if gpu else time.process_time()) - started)
    return round(1000 * statistics.median(times[1:]), 3)  # the first warms up
