"""What `asymflow sample` does for both classes and prompts: draw missing images, and record how to make each again."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from asymflow import files, opening
from asymflow.cli.common import this_process
from asymflow.entries import Entry, UnreadableError
from asymflow.errors import InputError, out_of_memory
from asymflow.pictures import GRID_WIDTH, image_grid
from asymflow.pixels import read_image, tensor_to_pil, to_tensor
from asymflow.progress import progress_bar

RECORD, GRID, IMAGES = "samples.json", "grid.png", "images"  # two files and a folder, in that of --out
MOST_RECORD = 2**32  # bytes of the first: there may be millions of images, with long prompts

GRID_AT_MOST = 64


def draw_missing(
    args: argparse.Namespace, plan: list[tuple[int, object]], draw: Callable[[list, list, bool], Iterable[Tensor]]
) -> bool:
    """Draw and save those images of the plan that do not exist yet, then the grid. After `open_record`.

    Returns whether all of the plan exist now: of several processes, the last one to finish knows it.

    plan: (index, class or prompt) of each image. draw: a function of indices, classes or prompts, and whether to show
    progress; it returns images (3, H, W) in [-1, 1].
    """
    # Each process takes its share of the plan, and not of what is missing, which changes while the others work.
    rank, world = this_process()
    share = plan[rank::world]
    todo = [(i, what) for i, what in share if not (args.images / name(i)).exists()]
    if rank == 0 and len(todo) < len(share):
        print(f"{len(share) - len(todo)} of {len(share)} images are in {args.out} already")
    with progress_bar(desc="sampling", unit="image", total=len(todo), silent=rank > 0) as bar:
        for start in range(0, len(todo), args.batch):
            indices, what = map(list, zip(*todo[start : start + args.batch], strict=True))
            with enough_memory(args):
                images = draw(indices, what, rank == 0 and (start == 0 or sys.stderr.isatty()))
            for i, asked, image in zip(indices, what, images, strict=True):
                if not image.isfinite().all():
                    raise InputError(f"image {i}, of {asked!r:.80}, has numbers that are NaN or infinite")
                with files.replacing(args.images / name(i)) as beside:
                    tensor_to_pil(image).save(beside)
            bar.update(len(indices))
    return finish(args, plan)


@contextmanager
def enough_memory(args: argparse.Namespace) -> Iterator[None]:
    """A context that raises InputError if the device runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        less = f"{'--offload, ' if args.base else ''}a smaller --batch or smaller images"
        raise InputError(f"{args.device} has too little memory for this: try {less}") from None


def check_numbers(args: argparse.Namespace) -> None:
    for option, lowest in (("num", 1), ("first", 0), ("batch", 1), ("seed", 0)):
        if not lowest <= getattr(args, option) < 2**62:
            raise InputError(f"--{option} must be at least {lowest} and below 2^62, but it is {getattr(args, option)}")
    if not math.isfinite(args.guidance):
        raise InputError(f"--guidance must be finite, but it is {args.guidance}")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file, where a folder is expected")


def open_record(
    args: argparse.Namespace, now: dict, plan: list[tuple[int, object]], again: dict[str, str], kind: str = "class"
) -> None:
    """Write samples.json, or add the plan to an existing one. InputError if that has other settings than `now`.

    Sets args.images, the folder of the images: nothing else is in it, so that it can be given to what scores images.
    (Earlier versions had them beside samples.json, and such a folder stays as it is.)

    plan: (index, class) of each image, or (index, prompt); `kind` says which. again: how to make an image again.

    Every process calls this before its first image. All write the same content, so it does not matter who is first.
    """
    path, images, args.images = args.out / RECORD, {}, args.out / IMAGES
    if existed := path.exists():
        try:
            record = opening.read_json(path, most=MOST_RECORD)
            before = with_later(record["settings"], now)
            images = {int(entry["index"]): entry[kind] for entry in record["images"]}
            if any("/" not in entry["file"] for entry in record["images"]):
                args.images = args.out
            differing = [
                "other prompts" if key == "prompts_sha256" else f"{key} {before.get(key)} there, {value} here"
                for key, value in now.items()
                if before.get(key) != value
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise InputError(f"{path} is not a record of samples ({e!r}): choose another --out") from None
        if "step" in before and "step" in now and before["step"] != now["step"]:
            raise InputError(
                f"{args.out} holds images of step {before['step']} of a run, but this is step {now['step']}: go on "
                f"with --step {before['step']}, or choose another --out"
            )
        if differing:
            raise InputError(f"{args.out} holds images made otherwise ({'; '.join(differing)}): choose another --out")
    else:
        drawn = [args.out / GRID, *(args.out / name(i) for i, _ in plan), *sorted(args.images.glob("[!.]*"))]
        if taken := [path.name for path in drawn if path.exists()]:
            raise InputError(f"{args.out} holds {taken[0]}, but no {RECORD} that says what it is: choose another --out")
    images |= dict(plan)
    place = lambda i: str((args.images / name(i)).relative_to(args.out))
    entries = [{"file": place(i), "index": i, kind: images[i]} for i in sorted(images)]
    record = {**again, "settings": now, "images": entries}
    try:
        with files.replacing(path, new=not existed) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n")
    except FileExistsError:
        if not path.exists():  # the error is about the folder: --out is something else, such as a broken link
            raise
        # Another process, of this run or of another, wrote it first: compare with that one.
        open_record(args, now, plan, again, kind)


def with_later(settings: dict, now: dict) -> dict:
    """Settings with what earlier versions did not record, as far as it may be the same as now.

    They had --dtype instead of --precision, whose float32 means the same, and no checksum of a model's config.json.
    """
    earlier = {"precision": "float32"} if settings.get("dtype") == "float32" else {}
    return earlier | {key: now[key] for key in ("config_sha256",) if key in now} | settings


def finish(args: argparse.Namespace, plan: list[tuple[int, object]]) -> bool:
    """Draw the grid, if no image of the plan is missing. Of several processes, the last one to finish does it."""
    if whole := all((args.images / name(i)).exists() for i, _ in plan):
        entries = opening.read_json(args.out / RECORD, most=MOST_RECORD)["images"]
        shown = [path for entry in entries if (path := args.out / entry["file"]).exists()]
        with files.replacing(args.out / GRID) as beside:
            images = torch.stack([read_png(path) for path in shown[:GRID_AT_MOST]])
            image_grid(images, width=GRID_WIDTH).save(beside)
        drawn = "1 image is" if len(plan) == 1 else f"{len(plan)} images are"
        print(f"{drawn} in {args.images}, {GRID} and {RECORD} in {args.out}")
    return whole


def read_png(path: Path) -> Tensor:
    try:
        return to_tensor(read_image(Entry(str(path))))
    except UnreadableError as e:
        raise InputError(f"{e}: remove it, and the same command draws it again") from None


def name(index: int) -> str:
    return f"{index:06d}.png"
