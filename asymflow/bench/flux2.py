"""Time and memory of a FLUX.2-sized finetuning: `python -m asymflow.bench flux2`.

It runs the real training, `train_ddp.py` with the shipped configuration, on one GPU: the engine, the loss with the
latent model and LPIPS, the optimizer, the average, the data loader. Only the weights of the transformer and of VGG16,
and the encoded images, are random. Nothing is downloaded. By default it is the 9B model at 1024 x 1024 pixels, for one
GPU of 80 GB. Measurements are printed beside what `asymflow info` counts.
"""

import argparse
import io
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import save, save_file

from asymflow import cost
from asymflow.bench.trainings import FailedError, Trainings, median, synchronize
from asymflow.cli.common import at_least, default_device, image_size, usable_device
from asymflow.data.encode import index_of
from asymflow.data.encoded import EMPTY_PROMPT, ENCODED
from asymflow.data.shards import META
from asymflow.data.writing import Sample, Writer
from asymflow.errors import InputError
from asymflow.parser import Parser
from asymflow.sampling import guided
from asymflow.subspace import Subspace
from asymflow.training.objectives import cost as counted

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
SIZES = {"9B": counted.KLEIN["FLUX.2-klein-9B"], "4B": counted.KLEIN["FLUX.2-klein-4B"], "tiny": TINY}
IMAGES = 4  # encoded images, of 17 MB each at 1024 x 1024


def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="python -m asymflow.bench flux2", description=__doc__)
    p.add_argument("--size", choices=SIZES, default="9B", help="of the transformer; tiny runs on a CPU in seconds")
    p.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="images at a time")
    p.add_argument("--image-size", type=image_size, metavar="N|HxW", help="in pixels (default: 1024; tiny: 64)")
    p.add_argument("--text-length", type=at_least(1), metavar="N", help="tokens of a prompt (default: 512; tiny: 32)")
    p.add_argument("--lora-rank", type=at_least(1), metavar="R", help="of the adapters (default: 256; tiny: 8)")
    p.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    p.add_argument("--no-lpips", action="store_true", help="without the perceptual term")
    p.add_argument("--steps", type=at_least(1), default=5, metavar="N", help="timed, after one that is not")
    p.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    try:
        usable_device(args.device)
        with tempfile.TemporaryDirectory() as folder:
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
            with Trainings(Path(folder, "log"), **hidden) as trainings:
                found = measure(args, trainings, Path(folder))
    except (InputError, FailedError) as e:
        p.error(str(e))
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def measure(args: argparse.Namespace, trainings: Trainings, folder: Path, timeout: float = 1800) -> dict:
    """Bytes, seconds and FLOPs a second of training steps, and of a guided evaluation as in sampling."""
    tiny = args.size == "tiny"
    size = args.image_size or ((64, 64) if tiny else (1024, 1024))
    length = args.text_length or (32 if tiny else counted.TEXT_LENGTH)
    rank = args.lora_rank or (8 if tiny else counted.LORA_RANK)
    latent = counted.empty_transformer(SIZES[args.size])
    options = dict(lora_rank=rank, checkpointing=not args.no_checkpointing, lpips=not args.no_lpips)
    step = counted.Step(latent, **options)
    counted.inputs(step, size, args.batch, length, "meta")  # raises InputError if the size is impossible
    write_data(folder, latent, size, length)
    found = trainings.run(
        folder / "run",
        "asymflux2_klein_9b",
        {
            "finetune.base": folder / "base",
            "finetune.subspace": folder / "subspace.safetensors",
            "data.path": folder / "shards",
            **{key: value for key, value in counted.settings(**options).items() if key not in counted.PLACES},
            "train.steps": args.steps + 1,
            "train.global_batch_size": args.batch,
            "train.micro_batch_size": args.batch,
            "checkpoint.every": args.steps + 1,
            "checkpoint.keep_every": None,
            "sample.every": None,
        },
        timeout,
        unsaved=True,
        states=True,
        random_base=True,
        guided=args.steps,
    )
    first, *seconds = [args.batch / m["images_per_second"] for m in found["metrics"]]
    a_step, an_evaluation = median(seconds), median(found["guided_seconds"])
    flops = counted.step_flops(step, size, length) * args.batch
    with counted.all_kept(step):
        useful = counted.step_flops(step, size, length) * args.batch
    guided_flops = 2 * counted.forward_flops(step, size, length) * args.batch
    _, activations = counted.activations(step, size, args.batch, length)
    kinds, memory = counted.training_memory(step, stage=2), found["memory"]
    before_a_step = sum(kinds.values()) - kinds["gradients"] - kinds["buckets"]
    cuda = found["device"].startswith("cuda")
    most = cost.peak_flops(torch.device(found["device"]))
    return {
        "model": args.size,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "image": (counted.CHANNELS, *size),
        "batch": args.batch,
        "checkpointing": not args.no_checkpointing,
        "lpips": not args.no_lpips,
        "parameters": counted.parameters(step),
        "losses": [m["loss"] for m in found["metrics"]],
        "kept": {"counted": kinds, "measured": found["states"]},
        "memory": {
            "states": {"counted": before_a_step, "measured": memory["before"]},
            "peak": {"counted": sum(kinds.values()) + activations, "measured": memory.get("peak")},
        },
        "training_step": {
            "first_seconds": first,
            "seconds": a_step,
            "flops": flops,
            "flops_per_second": flops / a_step,
            "mfu": useful / a_step / most if most else None,  # without recomputation
        },
        "guided_evaluation": {
            "seconds": an_evaluation,
            "flops": guided_flops,
            "flops_per_second": guided_flops / an_evaluation,
            "mfu": guided_flops / an_evaluation / most if most else None,
        },
    }


# ---- Random data and weights -----------------------------------------------------------------------------------------
def write_data(folder: Path, latent: Flux2Transformer2DModel, size: tuple[int, int], text_length: int) -> None:
    """Write a base model without weights, a random subspace, and encoded shards of noise, in their real formats."""
    c, patch = latent.config, counted.PATCH
    latent.save_config(folder / "base" / "transformer")
    about = dict(patch_size=patch, token_order="channel_first", color_space="oklab")
    Subspace.random(counted.CHANNELS * patch**2, c.in_channels, **about).save(folder / "subspace.safetensors")
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

    Writer(shards, ENCODED, IMAGES).write(0, map(sample, range(IMAGES)), partial(index_of, 0))
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


# ---- For people ------------------------------------------------------------------------------------------------------
def as_text(found: dict) -> str:
    height, width = found["image"][1:]
    images = f"{found['batch']} of {height} x {width}"
    lines = [f"FLUX.2 klein {found['model']}, {images}, {found['device']}, torch {found['torch']}"]
    for name, number in found["memory"].items():
        measured = "not measured on a CPU" if number["measured"] is None else f"{number['measured'] / 2**30:.2f} GiB"
        lines.append(f"{name + ' of memory':20}{measured}, counted: {number['counted'] / 2**30:.2f} GiB")
    for name in ("training_step", "guided_evaluation"):
        one = found[name]
        mfu = "" if one["mfu"] is None else f", MFU {one['mfu']:.1%}"
        speed = f"{one['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu}"
        lines.append(f"{name.replace('_', ' '):20}{one['seconds']:.3f} s, {speed}")
    return "\n".join(lines)
