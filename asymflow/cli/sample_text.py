"""`asymflow sample --base`: draw images of prompts with a pixel FLUX.2; each can be made again alone."""

import argparse
import hashlib
import math
import shlex
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from asymflow import files, opening
from asymflow.backbones.flux2.adapter import adapter_patch_size, find
from asymflow.backbones.flux2.pipeline import SIZE, AsymFlux2KleinPipeline, check_base_folder
from asymflow.cli import prompts as prompt_files
from asymflow.cli.common import own_device, this_process
from asymflow.cli.drawing import check_numbers, draw_missing, enough_memory, name, open_record
from asymflow.cli.prompts import SCORERS, Prompt, arrange, check_fit
from asymflow.color import oklab_to_rgb
from asymflow.data.encoders import prompt_tokens
from asymflow.entries import Entry
from asymflow.errors import InputError
from asymflow.patches import token_grid
from asymflow.pixels import decoded, to_rgb, upright
from asymflow.progress import limit_loading_bars
from asymflow.sampling import dynamic_shift, guided, image_noise, sigma_grid

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the file of a LoRA in a folder


def run_prompts(args: argparse.Namespace) -> None:
    asked = read_prompts(args)
    check(args, asked)
    prompts = [prompt.text for prompt in asked]
    loras = [lora(text) for text in args.lora or ()]
    images = [read_upright(path) for path in args.image or ()]
    pipeline = load(args, loras)
    args.max_length = args.max_length or pipeline.flow.backbone.prompt_length
    for prompt in dict.fromkeys(prompts):
        if (tokens := prompt_tokens(pipeline, prompt)) > args.max_length and this_process()[0] == 0:
            used = f"has {tokens} tokens, of which {args.max_length} are used (--max-length)"
            print(f"the prompt {prompt!r:.60} {used}", file=sys.stderr)
    patch_size = pipeline.flow.patch_size
    sizes = [pipeline.reference(image, patch_size).shape[-2:] for image in images]  # also checks the images
    like = sizes[0] if sizes else (SIZE, SIZE)
    height, width = args.height or like[0], args.width or like[1]
    args.shift = dynamic_shift(height, width) if args.shift is None else args.shift
    plan = [(i, prompts[i % len(prompts)]) for i in range(args.first, args.first + args.num)]

    def draw(indices: list[int], prompts: list[str], progress: bool) -> Tensor:
        pipeline.set_progress_bar_config(
            desc="one batch", unit="step", leave=False, disable=not (progress and sys.stderr.isatty())
        )
        drawn = pipeline(
            image=images,
            prompt=prompts,
            height=height,
            width=width,
            sigmas=sigma_grid(args.steps, args.shift)[:-1].tolist(),
            guidance_scale=args.guidance,
            orthogonal_guidance=args.orthogonal,
            clamp_denoised=not args.no_clamp,
            latents=image_noise(args.seed, indices, (3, height, width)),
            max_sequence_length=args.max_length,
            output_type="latent",
        )
        return oklab_to_rgb(drawn.images).cpu()

    now = settings(args, pipeline, prompts, loras, (height, width))
    open_record(args, now, plan, {"make_again": make_again(args, height, width)}, kind="prompt")
    if draw_missing(args, plan, draw) and args.scorer:
        picture = lambda number, place: args.images / name(place * len(prompts) + number)
        print(arrange(args.scorer, args.out / args.scorer, asked, picture))


def check(args: argparse.Namespace, prompts: list[Prompt]) -> None:
    """Raise errors about options before the model is read, and set how many images there are."""
    if args.scorer:
        check_fit(args.scorer, prompts)
        if args.num is not None or args.first:
            raise InputError(f"--for {args.scorer} draws all images of every prompt: leave out --num and --first")
    if args.num is None:
        args.num = len(prompts) * (SCORERS[args.scorer].images if args.scorer else 1)
    check_numbers(args)
    if args.adapter is None:
        raise InputError("give --adapter too: the base alone is a model of latents")
    if args.guidance < 1:
        raise InputError(f"--guidance must be at least 1, which is none, but it is {args.guidance}")
    for option in ("width", "height", "max_length"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise InputError(f"--{option.replace('_', '-')} must be at least 1, but it is {getattr(args, option)}")
    sigma_grid(args.steps, 1.0 if args.shift is None else args.shift)  # the last four raise InputError themselves
    guided(None, {}, {}, args.guidance, orthogonal=args.orthogonal)
    if args.offload and own_device(args.device).type == "cpu":
        raise InputError("--offload moves the parts of the model to a GPU in turn: it is of no use with --device cpu")
    check_base_folder(args.base)
    patch_size = adapter_patch_size(args.adapter)
    token_grid(torch.empty(1, 3, args.height or patch_size, args.width or patch_size, device="meta"), patch_size)


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either --prompt, once or several times, or --prompts, a file or folder of them")
    if args.prompt is not None:
        return [Prompt(text, f"{number:05}") for number, text in enumerate(args.prompt)]
    return prompt_files.read_prompts(args.prompts)


def read_upright(path: Path) -> Image.Image:
    return decoded(Entry(str(opening.existing_file(path))), lambda image: to_rgb(upright(image)))


def lora(text: str) -> tuple[Path, float]:
    """(safetensors file, weight) from FILE or FILE:WEIGHT. FILE may be a folder; the weight is 1 by default."""
    name, colon, number = text.rpartition(":")
    try:
        name, weight = (name, float(number)) if colon else (text, 1.0)
    except ValueError:  # the colon belongs to the name
        name, weight = text, 1.0
    path = Path(name) / LORA_FILE if Path(name).is_dir() else Path(name)
    if path.suffix != ".safetensors" or not math.isfinite(weight):
        raise InputError(
            f"--lora {text}: expected a safetensors file, or a folder with {LORA_FILE}, and :WEIGHT, a number"
        )
    return opening.existing_file(path), weight


def load(args: argparse.Namespace, loras: list[tuple[Path, float]]) -> AsymFlux2KleinPipeline:
    device = own_device(args.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of diffusers prefer the name `dtype`
        dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[args.precision]
        limit_loading_bars()
        pipeline = AsymFlux2KleinPipeline.from_pretrained(args.base, adapter=args.adapter, torch_dtype=dtype)
    for number, (path, _) in enumerate(loras):
        try:
            opening.read_tensors(path)  # one line if it is damaged; diffusers reads it with its metadata
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{number}")
        except (ValueError, TypeError, RuntimeError, KeyError) as e:
            raise InputError(f"--lora {path} does not fit the model: {' '.join(str(e).split())}") from None
    if loras:
        pipeline.set_adapters([f"lora{number}" for number in range(len(loras))], [weight for _, weight in loras])
    if not args.offload:
        with enough_memory(args):
            return pipeline.to(device)
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def settings(
    args: argparse.Namespace,
    pipeline: AsymFlux2KleinPipeline,
    prompts: list[str],
    loras: list[tuple[Path, float]],
    size: tuple[int, int],
) -> dict:
    """What an image depends on besides its index. Of the base only its projections are known, by their fingerprint."""
    return {
        "base_fingerprint": pipeline.base_fingerprint,
        "adapter_sha256": files.sha256(find(args.adapter)),
        "loras": [[files.sha256(path), weight] for path, weight in loras],
        "references": [files.sha256(path) for path in args.image or ()],
        "prompts_sha256": digest(prompts),
        "seed": args.seed,
        "steps": args.steps,
        "shift": args.shift,
        "guidance": args.guidance,
        "orthogonal": args.orthogonal,
        "clamp": not args.no_clamp,
        "size": list(size),
        "max_length": args.max_length,
        "precision": args.precision,
    }


def digest(prompts: list[str]) -> str:
    """A checksum of prompts. Those with more than one line are told apart from as many prompts."""
    plain = all("\n" not in prompt for prompt in prompts)
    text = "\n".join(prompts) if plain else "".join(f"\0{prompt}" for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()


def make_again(args: argparse.Namespace, height: int, width: int) -> str:
    words = ["asymflow", "sample", "--base", args.base, "--adapter", args.adapter, "--first", "INDEX", "--num", "1"]
    words += ["--out", "FOLDER", "--height", height, "--width", width, "--max-length", args.max_length]
    for option in ("seed", "steps", "shift", "guidance", "orthogonal", "precision"):
        words += [f"--{option}", getattr(args, option)]
    for option in ("prompt", "image", "lora"):
        words += [word for value in getattr(args, option) or () for word in (f"--{option}", value)]
    words += ["--prompts", args.prompts] if args.prompts else []
    words += ["--no-clamp"] if args.no_clamp else []
    return shlex.join(map(str, words))
