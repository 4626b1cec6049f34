"""`asymflow data`: prepare images for training."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from asymflow.cli.common import at_least, default_device, own_device
from asymflow.cli.subspace import processes
from asymflow.data.described import described
from asymflow.data.encode import CUT, LOSSLESS, encode
from asymflow.data.folder import ImageFolder
from asymflow.data.pack import pack_folder
from asymflow.data.writing import FORMATS, PROBLEMS, check_outside
from asymflow.errors import InputError
from asymflow.text import count
from asymflow.training.run.ranks import WORLD_SIZE_VARIABLES

GROUP = """Prepare images for training.

To crop a folder of photographs once, and not in every epoch:
  asymflow data pack --data imagenet/train --out imagenet256 --size 256

To encode images and captions once, for turning a latent text-to-image model into a pixel model:
  asymflow data encode --base FLUX.2-klein-base-9B --data photographs --out shards"""

PACK = """Make tar shards of square images (00000.tar, ..., in WebDataset's convention: KEY.png, KEY.cls, KEY.txt) of a
folder with one folder of images for each class, such as ImageNet as downloaded. Images are cropped as by ADM, DiT and
JiT. IMAGE.txt beside IMAGE.jpg is its caption. Images that cannot be read are left out, and listed in problems.log.
Where it was interrupted, the same command goes on. The same images make the same bytes. Train on them with
--set data.kind=webdataset."""

ENCODE = """Make tar shards of images with captions, each with its latent and the embedding of its caption as the
transformer of the base model sees them, for training and for `asymflow subspace procrustes --shards`. The base is a
folder of FLUX.2 klein in the layout of diffusers; its transformer is not loaded.

Images go to the bucket of the nearest aspect ratio: its sizes (see asymflow/data/buckets.py) have about the area of
--size squared. They are turned upright as EXIF says, resized and cropped at the centre. Left out, and listed with the
reason in problems.log, are images that are damaged, have no caption, or are so small that they would have to be
enlarged more than twice along each side.

Where it was interrupted, the same command goes on. Several GPUs make whole shards each, and the same shards together:
  torchrun --nproc-per-node 8 -m -- asymflow data encode ...

Disk: the embedding of a caption, all --max-length positions of it, since the transformer attends to all, takes 12.6 MB
with the 9B model; a million captions, 12.6 TB. A smaller --max-length is the one way to make it less."""

CAPTIONED = """folders of images (and of the folders and .tar files in them) or .tar files, with IMAGE.txt beside
IMAGE.jpg, or "caption" in IMAGE.json; .jsonl files with lines such as {"image": "a/1.jpg", "caption": "a cat"}; or
shapes:COUNT, so many generated pictures"""
ALLOW_BAD = "how many images may be left out, in percent; more are an error, after all were looked at"
IMAGE_FORMAT = "png and webp keep the pixels, and webp is read faster; jpg, at quality 95, is smaller but not the same"


def add_command(commands) -> None:
    group = commands.add_parser("data", description=GROUP)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    p = actions.add_parser("pack", help="make shards of cropped images", description=PACK)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with one folder for each class")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the shards to")
    p.add_argument("--size", type=at_least(1), default=256, metavar="N", help="side of the images, in pixels")
    p.add_argument("--per-shard", type=at_least(1), default=10_000, metavar="N", help="images in a shard")
    p.add_argument("--format", choices=FORMATS, default="png", help=IMAGE_FORMAT)
    p.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="threads that crop")
    p.add_argument("--allow-bad", type=number(0), default=1.0, metavar="PERCENT", help=ALLOW_BAD)
    p.set_defaults(run=run_pack)

    p = actions.add_parser("encode", help="make shards of images, latents and prompt embeddings", description=ENCODE)
    p.add_argument("--base", type=Path, required=True, metavar="DIR", help="folder of the base model")
    paths = dict(type=os.path.expanduser, nargs="+", action="extend")
    p.add_argument("--data", **paths, required=True, metavar="PATH", help=CAPTIONED)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the shards to")
    p.add_argument("--size", type=at_least(1), default=1024, metavar="N", help="side of the square images, in pixels")
    p.add_argument("--max-aspect", type=number(1), default=2.0, metavar="X", help="of buckets: longer / shorter side")
    p.add_argument("--per-shard", type=at_least(1), default=256, metavar="N", help="images in a shard, at most")
    p.add_argument("--format", choices=LOSSLESS, default="png", help="both keep the pixels; webp is read faster")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the models and prompts")
    p.add_argument("--max-length", type=at_least(1), default=512, metavar="N", help="tokens of a prompt, padding too")
    p.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="images in the models at a time")
    p.add_argument("--allow-bad", type=number(0), default=1.0, metavar="PERCENT", help=ALLOW_BAD)
    p.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="threads that read")
    p.add_argument("--device", default=default_device(), help="where to compute, such as cpu, cuda or cuda:1")
    p.set_defaults(run=run_encode)


def run_pack(args: argparse.Namespace) -> None:
    check_outside(args.out, [str(args.data.resolve())])  # before all images are listed
    folder = ImageFolder(args.data, args.size)
    for line in described(folder):
        print(line, file=sys.stderr)
    meta = pack_folder(folder, args.out, args.per_shard, args.format, args.workers, args.allow_bad)
    if bad := meta["unreadable"]:
        print(f"left out, because unreadable: {count(bad, 'image')}, see {args.out / PROBLEMS}", file=sys.stderr)
    classes = len(meta["classes"])
    what = f"{count(meta['images'], 'image')} of {count(classes, 'class')}"
    print(f"written to {args.out}: {what}, in {count(meta['shards'], 'shard')}")
    options = f"data.kind=webdataset --set data.path={shlex.quote(str(args.out))} --set model.num_classes={classes}"
    print(f"to train on them: --set {options}")


def number(lowest: float) -> Callable[[str], float]:
    """The type of an option: a number of at least `lowest`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"it must be a number of at least {lowest:g}, but it is {text!r}")
        return value

    return parse


def check_place() -> None:
    """InputError if srun or mpirun started several processes: none knows its rank, so each would do all the work."""
    started = [f"{name} {os.environ[name]}" for name in WORLD_SIZE_VARIABLES if os.environ.get(name, "1") != "1"]
    if started and "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"the environment says {', '.join(started)}, so there are others, but not which one this is: start with "
            "torchrun (or set WORLD_SIZE to 1 to encode alone)"
        )


def run_encode(args: argparse.Namespace) -> None:
    check_place()
    device = own_device(args.device)
    with processes("cpu") as (rank, world, _):  # gloo, because with nccl a process that is done waits for the others
        meta = encode(
            args.data,
            args.base,
            args.out,
            size=args.size,
            max_aspect=args.max_aspect,
            per_shard=args.per_shard,
            image_format=args.format,
            dtype=getattr(torch, args.dtype),
            max_length=args.max_length,
            batch=args.batch,
            allow_bad=args.allow_bad,
            threads=args.workers,
            device=device,
            rank=rank,
            world=world,
        )
    if meta is None:  # another process is still working; the last one to finish gets the result
        print(f"process {rank} of {world} is done; if none says where all images are, run the same command again")
        return
    if meta["left_out"]:
        print(f"left out: {count(meta['left_out'], 'image')}, see {args.out / PROBLEMS}", file=sys.stderr)
    if cut := meta.get("cut_captions"):
        print(f"cut, because longer than --max-length: {count(cut, 'caption')}, see {args.out / CUT}", file=sys.stderr)
    filled = sum(count > 0 for count in meta["images_in_bucket"])
    sizes = "one size" if filled == 1 else f"{filled} sizes"
    what = f"{count(meta['images'], 'image')} of {sizes}, in {count(meta['shards'], 'shard')}"
    print(f"written to {args.out}: {what}")
    print(f"next: asymflow subspace procrustes --shards {shlex.quote(str(args.out))} --out FILE.safetensors")
