"""`asymflow sample`: draw images, each of which can be made again alone. For images of prompts see `sample_text`."""

import argparse
import math
import os
import re
import shlex
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from asymflow import packages
from asymflow.cli.common import default_device, image_size, interval, own_device
from asymflow.cli.drawing import RECORD, check_numbers, draw_missing, open_record
from asymflow.cli.models import CLASSES, MODEL, Choice, add_choice, class_names, find_model, identity, load_model
from asymflow.cli.prompts import KINDS, SCORERS
from asymflow.color import clamp_to_gamut, oklab_to_rgb
from asymflow.errors import InputError
from asymflow.extensions import check_name, find, is_own
from asymflow.model import AsymFlow
from asymflow.patches import token_grid
from asymflow.precision import Precision, computing, usual_precision
from asymflow.sampling import METHODS, generate, guided, sigma_grid
from asymflow.text import count

EXAMPLES = """\
examples:
  asymflow sample --model runs/h16 --classes 207,360 --num 16 --out runs/dogs    the newest checkpoint of a training
  asymflow sample --model asymflow_h_16_r8_imagenet.safetensors --classes all --num 50000 --out runs/fid
  torchrun --nproc-per-node 8 -m -- asymflow sample --model runs/h16 --num 50000 --out runs/fid    on 8 GPUs
  asymflow sample --base FLUX.2-klein-base-9B --adapter AsymFLUX.2-klein-9B --prompt "a red square" --out runs/red
  asymflow sample --base BASE --adapter ADAPTER --prompt "make it blue" --image photo.png --offload --out runs/blue

Image i is of the i-th class or prompt of the list, over and over, from its own noise: neither --batch, nor the number
of processes, nor --num changes it (beyond rounding). --first 17 --num 1 makes image 17 again. The same command goes on
where it stopped. The defaults for --model are the paper's for ImageNet, those for --base are its for FLUX.2 klein."""
DEFAULTS = {
    "--model": dict(
        num=16,
        steps=50,
        guidance=2.3,
        orthogonal=0.0,
        batch=16,
        classes="all",
        method="heun",
        shift=1.0,
        interval=(0.0, 0.88),
    ),
    "--base": dict(steps=38, guidance=4.0, orthogonal=1.0, batch=1, precision="bf16"),
}


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "sample",
        description="Draw images of classes or of prompts: PNG files, a grid of the first ones, a JSON record.",
        epilog=EXAMPLES,
    )
    p.add_argument("--out", type=Path, required=True, help=f"folder for images/000000.png, ..., grid.png and {RECORD}")
    p.add_argument("--num", type=int, help="how many images (default: 16, or one for each prompt)")
    p.add_argument("--first", type=int, default=0, help="index of the first image")
    p.add_argument("--seed", type=int, default=0, help="with its index, fixes the noise of an image")
    p.add_argument("--steps", type=int, help="steps of the sampler (default: 50; 38 with --base)")
    p.add_argument(
        "--shift",
        type=float,
        help="above 1: more steps at high noise levels (default: 1; 17 sqrt(pixels) / 1024 with --base)",
    )
    p.add_argument("--guidance", type=float, help="its scale; 1 is none (default: 2.3; 4 with --base)")
    p.add_argument(
        "--orthogonal",
        type=float,
        help="0 to 1: take away guidance that only adds contrast (default: 0; 1 with --base)",
    )
    p.add_argument("--batch", type=int, help="images at a time (default: 16; 1 with --base)")
    p.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="of products of matrices, but not in attention, that is in float32 (default: bf16 on a GPU that has it, "
        "else float32); with --base, of weights and all (default: bf16)",
    )
    p.add_argument("--device", default=default_device(), help="such as cpu, cuda or cuda:1")

    classes = p.add_argument_group("images of classes")
    classes.add_argument("--model", type=Path, help=MODEL)
    add_choice(classes)
    classes.add_argument(
        "--classes", help='numbers or names, see `asymflow info MODEL`, such as 207,otter, or "all" (default: all)'
    )
    methods = f"{', '.join(METHODS)}, or package.module:function of your own; heun evaluates the model twice a step"
    classes.add_argument("--method", help=f"{methods} (default: heun)")
    classes.add_argument("--interval", type=interval, help="noise levels where guidance acts (default: 0,0.88)")
    classes.add_argument("--clamp", action="store_true", help="keep the denoised image displayable on the way")
    classes.add_argument(
        "--size", type=image_size, help="pixels, such as 256 or 256x384 (height x width), if not as trained"
    )

    prompts = p.add_argument_group("images of prompts")
    prompts.add_argument("--base", type=Path, help="folder of a FLUX.2 klein base model, in diffusers' layout")
    prompts.add_argument("--adapter", type=Path, help="folder, file or repository of the adapter to pixels")
    prompts.add_argument("--prompt", action="append", help="may be given several times")
    prompts.add_argument("--prompts", type=Path, metavar="PATH", help=f"of prompts: {KINDS}")
    prompts.add_argument("--for", dest="scorer", choices=SCORERS, help="also the folder that this scorer reads")
    prompts.add_argument("--width", type=int, help="pixels (default: of the first --image, or 1024)")
    prompts.add_argument("--height", type=int, help="pixels (default: of the first --image, or 1024)")
    prompts.add_argument("--image", type=Path, action="append", help="reference image; may be given several times")
    prompts.add_argument(
        "--lora", type=os.path.expanduser, action="append", metavar="FILE[:WEIGHT]", help="a further LoRA, for style"
    )
    prompts.add_argument("--max-length", type=int, help="tokens of a prompt (default: as trained, or 512)")
    prompts.add_argument("--no-clamp", action="store_true", help="leave the denoised image as it is on the way")
    prompts.add_argument("--offload", action="store_true", help="keep only what runs on the device, to save memory")
    # For each of the two: its own options, as {name of the value: option}.
    own = {
        kind: {action.dest: action.option_strings[0] for action in group._group_actions}
        for kind, group in (("--model", classes), ("--base", prompts))
    }
    p.set_defaults(run=partial(run, own))


def run(own: dict[str, dict[str, str]], args: argparse.Namespace) -> None:
    """Draw images of classes if --model is given, of prompts if --base is. own: the options of each of the two."""
    if (args.model is None) == (args.base is None):
        raise InputError("give one of --model, for images of classes, and --base, for images of prompts")
    given, other = ("--model", "--base") if args.base is None else ("--base", "--model")
    values = {option: getattr(args, name) for name, option in own[other].items()}
    if strange := [option for option, value in values.items() if value is not None and value is not False]:
        raise InputError(f"{', '.join(strange)}: for {other} only, but {given} is given")
    for name, value in DEFAULTS[given].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.base is None:
        run_classes(args)
    else:
        packages.need("diffusers", "transformers", "peft", "accelerate")
        from asymflow.cli.sample_text import run_prompts

        run_prompts(args)


def run_classes(args: argparse.Namespace) -> None:
    check(args)
    device = own_device(args.device)
    args.precision = args.precision or usual_precision(device)
    found = find_model(args.model, args.step, args.ema)
    flow = load_model(found, device, args.backbone)
    if missing := [name for name in ("num_classes", "grid") if not hasattr(flow.backbone, name)]:
        raise InputError(f"{type(flow.backbone).__name__} has no attribute {missing[0]}, which drawing needs")
    if flow.channels != 3 or not flow.backbone.num_classes:
        has = f"{count(flow.channels, 'channel')} and {count(flow.backbone.num_classes, 'class')}"
        raise InputError(f"{args.model} has {has}: images are drawn of models with 3 channels and at least one class")
    folder = found.run if isinstance(found, Choice) else found
    names = class_names(folder)
    if len(names) > flow.backbone.num_classes:  # fewer have names if data.fewer_classes allowed it
        has = f"names {count(len(names), 'class')}, but the model has {flow.backbone.num_classes}"
        raise InputError(f"{folder / CLASSES} is of another model: it {has}: remove it to do without names")
    classes = class_list(args.classes, flow.backbone.num_classes, names)
    height, width = args.size = args.size or tuple(n * flow.patch_size for n in flow.backbone.grid)
    token_grid(torch.empty(1, flow.channels, height, width, device="meta"), flow.patch_size)  # checks the size
    plan = [(i, classes[i % len(classes)]) for i in range(args.first, args.first + args.num)]
    open_record(args, settings(args, found, flow, classes), plan, make_again(args, found))
    with computing(flow, args.precision):
        draw_missing(args, plan, lambda indices, labels, progress: draw(flow, args, labels, indices, progress))


def check(args: argparse.Namespace) -> None:
    """Raise errors about options before the model is read."""
    check_numbers(args)
    if wrong := check_name(args.method, METHODS):
        raise InputError(f"--method {wrong}")
    if not math.isfinite(args.shift):
        raise InputError(f"--shift must be finite, but it is {args.shift}")
    sigma_grid(args.steps, args.shift)  # these two raise InputError if an option is out of range
    guided(None, {}, {}, args.guidance, args.interval, args.orthogonal)


def draw(flow: AsymFlow, args: argparse.Namespace, labels: list[int], indices: list[int], progress: bool) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1], on the CPU."""
    oklab = flow.subspace.color_space == "oklab"
    clamp = clamp_to_gamut if oklab else lambda x0: x0.clamp(-1, 1)
    images = generate(
        flow,
        labels,
        indices,
        seed=args.seed,
        size=args.size,
        steps=args.steps,
        guidance=args.guidance,
        interval=args.interval,
        method=find(args.method, {}, "--method") if is_own(args.method) else args.method,
        shift=args.shift,
        orthogonal=args.orthogonal,
        denoised_hook=(lambda x0, sigma: clamp(x0)) if args.clamp else None,
        progress=progress,
    )
    return (oklab_to_rgb(images) if oklab else images).float().cpu()


# ---- The record: all that determines the images, so that a folder never mixes images of different settings -----------
def settings(args: argparse.Namespace, found: Path | Choice, flow: AsymFlow, classes: list[int]) -> dict:
    """Everything that an image depends on besides its index."""
    return {
        **identity(found),
        "sigma_min": flow.sigma_min,
        "noise_scale": flow.noise_scale,
        "classes": "all" if args.classes == "all" else classes,
        "seed": args.seed,
        "steps": args.steps,
        "method": args.method,
        "shift": args.shift,
        "guidance": args.guidance,
        "interval": list(args.interval),
        "orthogonal": args.orthogonal,
        "clamp": args.clamp,
        "size": list(args.size),
        "precision": args.precision,
    }


def make_again(args: argparse.Namespace, found: Path | Choice) -> dict[str, str]:
    """The command that makes one image again, and the path of the training run, if the model is of one."""
    options = ["seed", "steps", "method", "shift", "guidance", "orthogonal", "precision", "classes"]
    words = ["asymflow", "sample", "--model", str(args.model), "--first", "INDEX", "--num", "1", "--out", "FOLDER"]
    for option in options:
        words += [f"--{option}", str(getattr(args, option))]
    words += ["--interval", ",".join(map(str, args.interval))]
    words += ["--size", "x".join(map(str, args.size))]
    words += ["--clamp"] if args.clamp else []
    words += ["--backbone", args.backbone] if args.backbone else []
    if isinstance(found, Choice):
        words += ["--step", str(found.step), "--ema", found.average]
        return {"make_again": shlex.join(words), "run": str(found.run)}
    return {"make_again": shlex.join(words)}


# ---- Values of options -----------------------------------------------------------------------------------------------
def class_list(text: str, num_classes: int, names: list[str]) -> list[int]:
    """The classes that --classes means. names: of the classes, by number; empty if they are not known.

    A number is the number of a class, also where classes have numbers for names. A name counts as it is written; if
    there is none such, in capital and small letters.
    """
    if text == "all":
        return list(range(num_classes))
    if not text.isdecimal() and (found := named(text, names)) is not None:  # it may have a comma in it
        return [found]
    classes = []
    for word in map(str.strip, text.split(",")):
        found = named(word, names)
        if re.fullmatch("-?[0-9]+", word):
            if not 0 <= int(word) < num_classes:
                last = num_classes - 1
                raise InputError(f"--classes {word} is not a class of this model: they run from 0 to {last}")
            if found not in (None, int(word)):
                print(f"--classes {word} is class number {word}: that named {word} is {found}", file=sys.stderr)
            classes.append(int(word))
        elif found is not None:
            classes.append(found)
        else:
            near = get_close_matches(word, names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "numbers, such as 207,360, names, or all"
            known = "" if names else ", and this model has no names of classes"
            raise InputError(f"--classes {word!r:.60} is no class{known}: {hint}")
    return classes


def named(word: str, names: list[str]) -> int | None:
    """The class of this name; None if there is none. InputError if several classes could be meant."""
    exact = [i for i, name in enumerate(names) if name == word]
    found = exact or [i for i, name in enumerate(names) if name.casefold() == word.casefold()]
    if len(found) > 1:
        which = " or ".join(f"class {i} ({names[i]})" for i in found[:4])
        how = "give the number of one" if exact else "write one as it is written there, or give its number"
        raise InputError(f"--classes {word!r:.60} may be {which}: {how}")
    return found[0] if found else None
