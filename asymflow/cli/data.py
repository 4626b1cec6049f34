"""`asymflow data`: prepare images for training."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from asymflow.cli.common import at_least
from asymflow.data.pack import FORMATS, PROBLEMS, pack

GROUP = """Prepare images for training.

To crop a folder of photographs once, and not in every epoch:
  asymflow data pack --data imagenet/train --out imagenet256 --size 256"""

PACK = """Make tar shards of square images (00000.tar, ..., in WebDataset's convention: KEY.png, KEY.cls, KEY.txt) of a
folder with one folder of images for each class, such as ImageNet as downloaded. Images are cropped as by ADM, DiT and
JiT. IMAGE.txt beside IMAGE.jpg is its caption. Where it was interrupted, the same command goes on. The same images make
the same bytes. Train on them with --set data.kind=webdataset."""

IMAGE_FORMAT = "png and webp keep the pixels, and webp is read faster; jpg, at quality 95, is smaller but not the same"


def add_command(commands) -> None:
    group = commands.add_parser("data", help="prepare images for training", description=GROUP)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    p = actions.add_parser("pack", help="make shards of cropped images", description=PACK)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with one folder for each class")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the shards to")
    p.add_argument("--size", type=at_least(1), default=256, metavar="N", help="side of the images, in pixels")
    p.add_argument("--per-shard", type=at_least(1), default=10_000, metavar="N", help="images in a shard")
    p.add_argument("--format", choices=FORMATS, default="png", help=IMAGE_FORMAT)
    p.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="threads that crop")
    p.set_defaults(run=run_pack)


def run_pack(args: argparse.Namespace) -> None:
    meta = pack(args.data, args.out, args.size, args.per_shard, args.format, args.workers)
    if meta["unreadable"]:
        print(f"{meta['unreadable']} could not be read and are left out: see {args.out / PROBLEMS}", file=sys.stderr)
    classes = len(meta["classes"])
    print(f"{meta['images']:,} images of {classes:,} classes are in {args.out}, in shards: {meta['shards']:,}")
    options = f"data.kind=webdataset --set data.path={shlex.quote(str(args.out))} --set model.num_classes={classes}"
    print(f"to train on them: --set {options}")
