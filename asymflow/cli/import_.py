"""`asymflow import`: convert a published checkpoint to a model folder, or a published subspace to a subspace file."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import torch

from asymflow import hub
from asymflow.backbones.jit.published import WEIGHTS as SETS
from asymflow.backbones.jit.published import load_published
from asymflow.cli import info_memory
from asymflow.cli.common import at_least, new_folder, replacing_folder
from asymflow.cli.models import CLASSES
from asymflow.cost import parameters
from asymflow.errors import InputError
from asymflow.model import CONFIG, WEIGHTS, AsymFlow
from asymflow.subspace import Subspace

TEXT = """Read a published checkpoint, and write it as this library does: a folder with config.json and
model.safetensors, for AsymFlow.from_pretrained and all commands. Or a subspace of the reference, as FILE.safetensors.
A name on the Hugging Face Hub is downloaded first; it stays in the cache of the Hub.
These can be read: Lakonik/AsymFlow-ImageNet, JiT as safetensors, LTH14/JiT's .pth, and subspaces (proj_mat_p16)."""

FILE = (
    "the published file; or on the Hub: ORG/NAME/FILE.safetensors, or ORG/NAME with config.json and model.safetensors"
)

EXAMPLES = """\
examples:
  asymflow import asymflow_h_16_r8_imagenet.safetensors --out models/asymflow-h16
  asymflow import Lakonik/AsymFlow-ImageNet/FILE.safetensors --out models/asymflow-h16      downloads it
  asymflow import checkpoint-last.pth --weights ema2 --out models/jit-b16
  asymflow import subspace_p16_r8.pt --out imagenet-r8.safetensors"""


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("import", description=TEXT, epilog=EXAMPLES)
    p.add_argument("file", type=Path, metavar="FILE", help=FILE)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, or FILE.safetensors")
    p.add_argument("--weights", choices=SETS, help="which ones, if the file has several (default: ema1)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written")
    block = "before which the tokens of the class join (default: that of the published size)"
    p.add_argument("--in-context-start", type=at_least(0), metavar="BLOCK", help=block)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    out = args.out
    new_folder(out)
    options = dict(weights=args.weights, in_context_start=args.in_context_start)
    place, dtype = hub.locate(args.file, CONFIG, WEIGHTS, what="a model", perhaps=[CLASSES]), getattr(torch, args.dtype)
    print(f"reading {args.file} ...", file=sys.stderr)
    if place.is_dir() and not args.file.exists():  # a repository of the Hub that has the layout of this library
        if given := [name for name, value in options.items() if value is not None]:
            raise InputError(
                f"--{given[0].replace('_', '-')} is for published files, but {args.file} is a model folder"
            )
        model = AsymFlow.from_pretrained(place, dtype=dtype)
    else:
        model = load_published(place, dtype=dtype, **options)
    if isinstance(model, Subspace):
        if out.suffix != ".safetensors":
            raise InputError(f"{args.file} is a subspace, which is written to one file: --out must end in .safetensors")
        model.save(out)
        print(f"a subspace of rank {model.rank} of {model.dim} dimensions, scale {model.scale:.6g}, is in {out}")
        print(f"try: asymflow subspace show {shlex.quote(str(out))}")
        return
    with replacing_folder(out) as beside:
        model.save_pretrained(beside)
        if (place / CLASSES).is_file():
            shutil.copyfile(place / CLASSES, beside / CLASSES)
    jit, side, many = model.backbone.config, model.backbone.config["image_size"], info_memory.many
    size = (out / WEIGHTS).stat().st_size
    print(
        f"JiT of width {jit['width']} and depth {jit['depth']}, {many(parameters(model)[0])} parameters, "
        f"rank {model.subspace.rank}, for {side} x {side} pixels"
    )
    print(f"is in {out}, in {args.dtype}, {size / 1e9:,.2f} GB")
    print(f"try: asymflow sample --model {shlex.quote(str(out))} --num 4 --out samples")
