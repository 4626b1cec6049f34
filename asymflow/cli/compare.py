"""`asymflow compare`: asymmetric, x0- and u-prediction, trained on a user's own images, in one figure."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

from asymflow import files, opening, packages
from asymflow.cli.common import at_least, this_process
from asymflow.entries import NOT_DATA, Entry, choose
from asymflow.errors import InputError
from asymflow.text import count

ABOUT = """Train the three predictions on your own images, and draw one figure of what came out: samples, loss curves, a
table. Everything else is the same: images and their order, noise, seed, network, steps. Only subspace.rank differs:
RANK is asymmetric prediction, 0 is x0-prediction, full is u-prediction."""
EXAMPLES = """\
examples:
  asymflow compare --data photos --out runs/photos
  asymflow compare --data photos --out runs/photos128 --size 128 --model S/16 --steps 20000 --set train.precision=bf16
  asymflow sample --model runs/photos/asymmetric --out runs/photos_samples

--data has one folder of images for each class, or images without classes. They are cropped once, into DIR/images; one
in ten is held out of the training. DIR/asymmetric, DIR/x0 and DIR/u are ordinary runs of train_ddp.py; beside them are
compare.png and compare.json. Stop it when you like: the same command goes on. It uses one GPU, or the CPU."""

BASE = "shapes_tiny"
RECORD, PICTURE, IMAGES, TRAINED_ON, HELD_OUT = "compare.json", "compare.png", "images", "train", "held_out"
MOST_HELD_OUT = 1000
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # names of what is no class
SHOWN = 16  # samples of each
BATCH = 32
LEARNING_RATES = {"tiny": 1e-3, "S": 3e-4}  # of the larger ones: 2e-4, as published
DECIDED = {  # keys that the options decide, and so --set does not
    "subspace.rank": "--rank",
    "model.size": "--model",
    "model.image_size": "--size",
    "train.steps": "--steps",
    "train.seed": "--seed",
    "data.path": "--data",
}
FIXED = (
    "subspace.file",
    "model.backbone",
    "model.num_classes",
    "data.kind",
    "data.size",
    "data.options",
    "loss.objective",  # the held-out loss is that of class_conditional
    "finetune",
)
CHILD = """import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; its parent then asks it to save
from asymflow.training.start import main
sys.exit(main())"""


def add_command(commands) -> None:
    p = commands.add_parser("compare", description=ABOUT, epilog=EXAMPLES)
    folder = "folder with one folder of images for each class, or with images"
    p.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=folder)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the runs and the figure")
    p.add_argument("--size", type=at_least(1), default=64, metavar="N", help="side of the images, in pixels")
    p.add_argument("--steps", type=at_least(1), default=1000, metavar="N", help=f"of {BATCH} images, of each training")
    p.add_argument("--rank", type=at_least(1), default=8, metavar="N", help="of asymmetric prediction")
    p.add_argument("--model", default="tiny/8", metavar="SIZE/PATCH", help="the JiT: tiny, S, B, L or H")
    p.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of everything that is random")
    more = "override a key of the configuration, for all three: see `asymflow info config`"
    p.add_argument("--set", action="append", default=[], metavar="a.b=c", help=more)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    packages.need("deepspeed", "pydantic", "yaml")  # of the trainings
    from asymflow.training.config.reading import load_config

    if this_process()[1] > 1:
        raise InputError("compare trains in one process, which it starts itself: run it without torchrun")
    ranks = {"asymmetric": args.rank, "x0": 0, "u": "full"}
    check(args)
    folder = open_folder(args.data, args.size)
    overrides = {name: settings(args, rank, folder) for name, rank in ranks.items()}
    configs = {name: load_config(BASE, words) for name, words in overrides.items()}
    if configs["x0"].sample.every is None:
        raise InputError("--set sample.every=null: the figure shows what a training draws at its end: leave it out")
    if configs["x0"].evaluate.every:
        check_measures(configs["x0"])
    begin(args, folder)
    left_out = prepare(args, folder)
    for number, name in enumerate(ranks, 1):
        train(args.out / name, overrides[name], configs[name], f"{name} ({number} of {len(ranks)})")
    from asymflow.cli.compare_report import report

    report(args.out, configs, left_out)


# ---- What is wrong is said before anything is made -------------------------------------------------------------------
def check(args: argparse.Namespace) -> None:
    """InputError if the options do not fit together."""
    from asymflow.training.config.derived import network
    from asymflow.training.config.reading import read_override
    from asymflow.training.config.sections import Model

    try:
        patch = network(Model(size=args.model, image_size=args.size, num_classes=1))["patch_size"]
    except InputError as e:
        raise InputError(f"--model {e}") from None
    if args.size % patch:
        fits = max(patch, round(args.size / patch) * patch)
        what = f"the patch of --model {args.model}, {patch} pixels"
        raise InputError(f"--size {args.size} is not a multiple of {what}: take --size {fits}, or another patch")
    if args.rank >= (dim := 3 * patch**2):
        raise InputError(
            f"--rank must be below {dim}, all numbers of a patch of --model {args.model}, but it is {args.rank}: with "
            f"{dim} it would be u-prediction, which is compared anyway"
        )
    for path in (path for word in args.set for path in read_override(word).origins):  # also those within a section
        key = ".".join(map(str, path))
        if key in DECIDED:
            raise InputError(f"--set {key}: use {DECIDED[key]}")
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in FIXED):
            raise InputError(f"--set {key}: compare decides that itself; train with train_ddp.py to choose it")


def check_measures(config) -> None:
    """InputError if what the trainings measure is not what the figure shows."""
    from asymflow.training.evaluate import protocol_of

    measures = protocol_of(config).measures
    if "frechet_distance" not in measures:
        raise InputError(
            f"--set evaluate: {', '.join(measures)} would be measured, but the figure shows frechet_distance: add it "
            "to evaluate.measures, or leave out evaluate.every"
        )


def open_folder(data: Path, size: int):
    """The images, as an `ImageFolder`; without folders of classes, all are of one. InputError if there are none."""
    from asymflow.data.folder import ImageFolder

    one_class = False
    if data.is_dir():
        items = [item for item in data.iterdir() if not item.name.startswith(".") and item.name not in NOT_DATA]
        one_class = any(Entry(item.name).is_image for item in items) and not any(item.is_dir() for item in items)
        if not any(item.is_dir() or Entry(item.name).is_image or item.suffix == ".tar" for item in items):
            raise InputError(f"--data {data} has neither images nor folders of images in it")
    folder = ImageFolder(data, size, one_class)
    if {name.lower() for name in folder.classes} <= SPLITS and not one_class:
        names = " and ".join(folder.classes)
        raise InputError(
            f"--data {data} has the folders {names}, which would be the classes: give one of these as --data"
        )
    if len(folder) < 2:
        raise InputError(
            f"--data {data} has one image: give at least two, and some hundreds for a figure that says much"
        )
    return folder


def settings(args: argparse.Namespace, rank: int | str, folder) -> list[str]:
    """What differs from the base, as `train_ddp.py --set` takes it; the user's own come last."""
    size = args.model.partition("/")[0]
    given = {
        "model.size": args.model,
        "model.image_size": args.size,
        "model.num_classes": folder.num_classes,
        "subspace.rank": rank,
        "subspace.images": min(len(folder), 10_000),
        "data.kind": "webdataset",
        "data.path": str(args.out / IMAGES / TRAINED_ON),
        "data.size": None,
        "data.fewer_classes": True,  # all images of one may be damaged
        "train.steps": args.steps,
        "train.seed": args.seed,
        "train.global_batch_size": BATCH,
        "optimizer.lr": LEARNING_RATES.get(size, 2e-4),
        "ema.snapshot_every": None,
        "checkpoint.every": max(1, args.steps // 10),
        "sample.every": args.steps,
        "sample.num": SHOWN,
        "sample.steps": 25,
        "sample.guidance": 2.0 if folder.num_classes > 1 else 1.0,
    }
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()] + args.set


def begin(args: argparse.Namespace, folder) -> None:
    """Make the folder, and note the settings in it. InputError if it is another's, or was begun with other settings."""
    from asymflow.data.writing import check_outside

    check_outside(args.out, [str(args.data.resolve())])
    now = {name: getattr(args, name) for name in ("size", "steps", "rank", "model", "seed", "set")}
    now |= {"data": str(args.data.resolve()), "images": len(folder), "listing": folder.digest}
    path = args.out / RECORD
    if not path.exists():
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise InputError(
                f"{args.out} exists already, and `asymflow compare` did not begin it: choose another --out"
            )
        with files.replacing(path) as beside:
            beside.write_text(json.dumps({"settings": now}, indent=1) + "\n", errors="backslashreplace")
        return
    known = opening.read_json(path).get("settings")
    if not isinstance(known, dict):
        raise InputError(f"{path} does not say with what settings it was begun: choose another --out")
    if now["data"] == known.get("data") and now["listing"] != known.get("listing"):
        raise InputError(
            f"{args.out} was begun when {args.data} had other images: restore them, or choose another --out"
        )
    options = [name for name in now if name not in ("images", "listing") and now[name] != known.get(name)]
    differing = [f"--{name} was {said(known.get(name))}, and is {said(now[name])}" for name in options]
    if differing:
        raise InputError(f"{args.out} was begun with other settings ({'; '.join(differing)}): choose another --out")


def said(value: object) -> str:
    return (" ".join(map(str, value)) or "not given") if isinstance(value, list) else str(value)


# ---- Images ----------------------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace, folder) -> list[str]:
    """Crop the images, into shards to train on and shards that are held out. Returns those that could not be read."""
    from asymflow.data.pack import pack_folder
    from asymflow.data.writing import PROBLEMS

    held_out = hold_out(folder.labels.tolist(), args.seed)
    rest = sorted({*range(len(folder))} - {*held_out})
    classes = ", ".join([*folder.classes[:8], *(["..."] if folder.num_classes > 8 else [])])
    what = f"{count(len(folder), 'image')} of {count(folder.num_classes, 'class')}"
    told = f"{what} ({len(held_out):,} held out): {classes}"
    print(told.encode(errors="backslashreplace").decode(), flush=True)  # a name may be no text
    for remark in folder.remarks:
        print(remark, file=sys.stderr)
    left_out = []
    for name, indices in ((TRAINED_ON, rest), (HELD_OUT, held_out)):
        out = args.out / IMAGES / name
        if indices:
            pack_folder(folder.part(indices), out, 10_000, "png", os.cpu_count() or 1, allow_bad=100)
        if (out / PROBLEMS).exists():
            problems = (out / PROBLEMS).read_text(errors="backslashreplace").splitlines()
            what = f"{count(len(problems), 'image')}, see {out / PROBLEMS}"
            print(f"left out, because unreadable: {what}", file=sys.stderr)
            left_out += problems
    return left_out


def hold_out(labels: list[int], seed: int) -> list[int]:
    """The numbers of the images to hold out: one in ten, at most `MOST_HELD_OUT`, but never the last of a class."""
    left, held_out = Counter(labels), []
    for i in choose(list(range(len(labels))), min(len(labels) // 10, MOST_HELD_OUT), seed):
        if left[labels[i]] > 1:
            left[labels[i]] -= 1
            held_out.append(i)
    return held_out


# ---- Trainings -------------------------------------------------------------------------------------------------------
def train(out: Path, words: list[str], config, title: str) -> None:
    """Run train_ddp.py in a process of its own, unless it is at its end. InputError if it does not get there."""
    if is_done(out, config.train.steps):
        print(f"{title}: {out} is at its end")
        return
    print(f"\ntraining {title}", flush=True)
    options = ["--config", BASE, "--out", str(out), *(f"--set={word}" for word in words)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *options])
    try:
        code = child.wait()
    finally:
        if child.poll() is None:  # Ctrl-C or SIGTERM: it finishes its step and saves
            child.terminate()
            child.wait()
    if code:
        raise InputError(f"the training in {shlex.quote(str(out))} failed: its error is above")
    if not is_done(out, config.train.steps):
        raise InputError(f"the training in {out} was stopped: the same command goes on")


def is_done(out: Path, steps: int) -> bool:
    from asymflow.training.run import checkpoint
    from asymflow.training.run import folder as run

    saved = checkpoint.steps(out / run.CHECKPOINTS)
    return bool(saved) and saved[-1] == steps and (out / run.SAMPLES / f"{steps:08d}.png").exists()
