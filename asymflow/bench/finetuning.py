"""The check "finetuning FLUX.2": seconds and memory of a training step and of an evaluation, beside what is counted.

It runs the real training, `train_ddp.py` with the shipped configuration: the engine, the loss with the latent model and
LPIPS, the optimizer, the average, the data loader. Only the weights of the transformer and of VGG16, and the encoded
images, are random. Nothing is downloaded.
"""

import importlib.util
import io
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import save, save_file

from asymflow import cost
from asymflow.bench.fast import shares
from asymflow.bench.kit import Kit, NotRunError
from asymflow.bench.trainings import synchronize
from asymflow.cli.common import default_device
from asymflow.data.encode import index_of
from asymflow.data.encoded import EMPTY_PROMPT
from asymflow.data.shards import ENCODED, META
from asymflow.data.writing import Sample, Writer
from asymflow.sampling import guided
from asymflow.subspace import Subspace
from asymflow.training.objectives import klein

TINY = dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    joint_attention_dim=96,
    axes_dims_rope=(8, 8, 8, 8),
    guidance_embeds=False,
)
NEEDED = {"9B": 40, "4B": 24}  # GiB of a GPU
IMAGES = 4  # encoded images, of 17 MB each at 1024 x 1024


def measure(kit: Kit) -> tuple[str, dict]:
    """A training step of FLUX.2 klein, and a guided evaluation as in sampling. `--tiny`: of a tiny transformer."""
    args = kit.args
    name, config = ("tiny", TINY) if kit.tiny else (size := fitting(args.size), klein.KLEIN[f"FLUX.2-klein-{size}"])
    image = args.image_size or ((64, 64) if kit.tiny else (1024, 1024))
    length, rank = args.text_length or (32 if kit.tiny else 512), args.lora_rank or (8 if kit.tiny else 256)
    packages = all(importlib.util.find_spec(package) for package in ("lpips", "torchvision"))
    lpips = packages and not args.no_lpips and not kit.tiny  # convolutions in bfloat16 are slow on a CPU
    options = dict(lora_rank=rank, checkpointing=not args.no_checkpointing, lpips=lpips)
    step = klein.klein_step(latent := klein.empty_transformer(config), **options)
    klein.noise_batch(step, image, args.batch, length, "meta")  # raises InputError if the size is impossible
    write_data(kit.work, latent, image, length)
    places = [kit.work / "base", kit.work / "subspace.safetensors", kit.work / "shards"]
    steps = 2 if kit.tiny else 5
    settings = klein.settings(**options) | dict(zip(klein.PLACES, places, strict=True))
    settings |= {
        "train.steps": steps + 1,
        "train.global_batch_size": args.batch,
        "train.micro_batch_size": args.batch,
        "checkpoint.every": steps + 1,
        "checkpoint.keep_every": None,
        "sample.every": None,
    }
    watched = dict(unsaved=True, states=True, random_base=True, guided=steps)
    found = kit.train("run", settings, config=klein.CONFIGURATION, **watched)
    first, *seconds = [args.batch / m["images_per_second"] for m in found["metrics"]]
    kinds, memory = step.memory(stage=2), found["memory"]
    counted = cost.count(step, lambda step: step(klein.noise_batch(step, image, args.batch, length)))
    peak = sum(kinds.values()) + counted.peak
    figures = {
        "model": name,
        "image": (klein.CHANNELS, *image),
        "batch": args.batch,
        "checkpointing": not args.no_checkpointing,
        "lpips": lpips,
        "parameters": klein.parameters(step),
        "losses": [m["loss"] for m in found["metrics"]],
        "kept": {"counted": kinds, "measured": found["states"]},
        "memory": {
            "before": {
                "counted": peak - counted.peak - kinds["gradients"] - kinds["buckets"],
                "measured": memory["before"],
            },
            "peak": {"counted": peak, "measured": memory.get("peak")},
        },
        "first_seconds": first,
        "training_step": timed(seconds, counted.flops),
        "guided_evaluation": timed(found["guided_seconds"], 2 * klein.forward_flops(step, image, length) * args.batch),
    }
    trained, evaluated = figures["training_step"], figures["guided_evaluation"]
    images = f"{args.batch} of {image[0]} x {image[1]}{'' if lpips else ', without LPIPS'}"
    speed = shares(kit, trained["flops"] / trained["seconds"])
    weighed = f"; peak {memory['peak'] / 2**30:.1f} GiB, counted {peak / 2**30:.1f}" if kit.cuda else ""
    guided_too = f"guided evaluation {evaluated['seconds']:.3g} s"
    return f"{name}, {images}: {trained['seconds']:.3g} s, {speed}{weighed}; {guided_too}", figures


def timed(seconds: list[float], flops: int) -> dict:
    return {"seconds": float(np.median(seconds)), "flops": flops}


def fitting(size: str | None) -> str:
    """`size`, or the largest that fits into the free memory of the GPU."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    sizes = [size] if size else [name for name, needed in NEEDED.items() if free > needed]
    if not sizes:
        raise NotRunError(f"{free:.0f} GiB of memory are free: too little for the 4B model")
    return sizes[0]


# ---- Random data and weights -----------------------------------------------------------------------------------------
def write_data(folder: Path, latent: Flux2Transformer2DModel, size: tuple[int, int], text_length: int) -> None:
    """Write a base model without weights, a random subspace, and encoded shards of noise, in their real formats."""
    c, patch = latent.config, klein.PATCH
    latent.save_config(folder / "base" / "transformer")
    about = dict(patch_size=patch, token_order="channel_first", color_space="oklab")
    Subspace.random(klein.CHANNELS * patch**2, c.in_channels, **about).save(folder / "subspace.safetensors")
    shards, (height, width) = folder / "shards", size
    shards.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)

    def sample(number: int) -> Sample:
        pixels = (noise(height, width, 3) * 40 + 128).clamp(0, 255).byte().numpy()
        facts = {"caption": "noise", "name": str(number), "width": width, "height": height, "bucket": size}
        tensors = {
            "latent": noise(c.in_channels, height // patch, width // patch),
            "prompt": noise(text_length, c.joint_attention_dim, dtype=torch.bfloat16),
        }
        content = {"png": as_png(Image.fromarray(pixels)), "json": json.dumps(facts).encode()}
        return number, {**content, "safetensors": save(tensors)}

    Writer(shards, ENCODED, IMAGES).write(0, map(sample, range(IMAGES)), partial(index_of, 0, []))
    save_file({"prompt": noise(text_length, c.joint_attention_dim, dtype=torch.bfloat16)}, shards / EMPTY_PROMPT)
    shape = {"rank": c.in_channels, "patch_size": patch, "prompt_shape": (text_length, c.joint_attention_dim)}
    (shards / META).write_text(json.dumps({"format": ENCODED.format, "shards": 1, "buckets": [size], **shape}))


def as_png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="png", compress_level=1)
    return content.getvalue()


def random_transformer(base: Path, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """Replaces `finetuning.load_transformer`: a random transformer of the same configuration, on the GPU if any."""
    config = json.loads((base / "transformer" / "config.json").read_text())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not a cast afterwards, which would need memory for both dtypes
    try:
        with torch.device(default_device()):
            return Flux2Transformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def guided_seconds(training, times: int) -> list[float]:
    """The seconds of each of `times` guided evaluations of a training's model, after one that is not timed."""
    flow, device = training.engine.module.eval(), training.device
    batch = next(iter(training.objective.batches(training.dataset, 0, 1).run(0, 1))).to(device)
    prompts = ({"encoder_hidden_states": prompt} for prompt in (batch.prompts, batch.prompts.flip(1)))
    velocity = guided(flow, *prompts, scale=4.0, orthogonal=1.0)  # both prompts in one call
    sigma = torch.full((len(batch.eps),), 0.5, device=device)
    seconds = []
    for _ in range(times + 1):
        synchronize(device)
        started = time.perf_counter()
        velocity(batch.eps, sigma)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]
