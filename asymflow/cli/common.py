"""What the subcommands share: parsing that answers in one line, and refusing to overwrite."""

import argparse
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asymflow.errors import InputError

if TYPE_CHECKING:
    import torch


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, and no smaller than `lowest`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"it must be a whole number of at least {lowest}, but it is {text!r}")
        return int(text)

    return number


def image_size(text: str) -> tuple[int, int]:
    """The type of an option such as 256, or HEIGHTxWIDTH: (height, width)."""
    if not re.fullmatch("[0-9]+(x[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"it must be pixels, such as 256 or 256x384 (height x width), not {text!r}")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def new_file(path: Path) -> Path:
    """`path`, if nothing is there yet. Called before long work, so that it is not refused afterwards."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already, and is not overwritten: choose another name or remove it")
    return path


def new_folder(path: Path) -> Path:
    """`path`, if nothing is there yet, or an empty folder. InputError otherwise."""
    if path.resolve() == Path.cwd():
        raise InputError(f"{path} is the folder that you are in: choose a new one")
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise InputError(f"{path} exists already, and is not overwritten: choose another --out or remove it")
    return path


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write to. It becomes `path` if the block ends well, and is removed if it does not."""
    beside = path.absolute().with_name(f".{path.absolute().name}.{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rmdir()  # it is empty; not every system renames onto an empty folder
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def usable_device(name: str) -> "torch.device":
    """The device of that name, if tensors can be made on it. Raises InputError."""
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def default_device() -> str:
    import torch  # takes seconds, and is of no use to `asymflow --help`

    return "cuda" if torch.cuda.is_available() else "cpu"


def this_process() -> tuple[int, int]:
    """Its index, and how many there are, as torchrun says in the environment."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None and world == "1":
        return 0, 1
    if rank is None or not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"the environment says WORLD_SIZE {world} and RANK {rank}: unset both, or start with torchrun")
    return int(rank), int(world)
