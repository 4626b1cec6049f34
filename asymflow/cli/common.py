"""What the subcommands share: types of options, refusing to overwrite, devices and processes."""

import argparse
import math
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
    """The type of an option: a whole number of at least `lowest`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"it must be a whole number of at least {lowest}, but it is {text!r}")
        return int(text)

    return number


def image_size(text: str) -> tuple[int, int]:
    """The type of an option such as 256 or HEIGHTxWIDTH. Its value is (height, width)."""
    if not re.fullmatch("[0-9]+(x[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"it must be pixels, such as 256 or 256x384 (height x width), not {text!r}")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def interval(text: str) -> tuple[float, float]:
    """The type of an option LOW,HIGH: noise levels within [0, 1]."""
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"it must be LOW,HIGH within 0 and 1, such as 0,0.88, but it is {text!r}")
    return low, high


def new_file(path: Path) -> Path:
    """Return `path`, or raise InputError if it exists. Called before long work, not only when its result is saved."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already, and is not overwritten: choose another name or remove it")
    return path


def begun_folder(path: Path, begun: str, *written: str) -> Path:
    """Return `path`, a folder that a command goes on with if it has `begun`.

    InputError if it is a file, or has something of the names in `written` without that: it would be overwritten.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file, where a folder is expected")
    if not (path / begun).exists() and (taken := [name for name in written if (path / name).exists()]):
        raise InputError(f"--out {path} has {taken[0]}, but no {begun} that says what it is of: choose another --out")
    return path


def new_folder(path: Path) -> Path:
    """Return `path`, or raise InputError unless it does not exist or is an empty folder."""
    if path.resolve() == Path.cwd():
        raise InputError(f"{path} is the folder that you are in: choose a new one")
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise InputError(f"{path} exists already, and is not overwritten: choose another --out or remove it")
    return path


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A context with a temporary folder to write to. It is renamed to `path` at the end, or removed after an error."""
    from asymflow.files import remove_abandoned

    beside = path.absolute().with_name(f".{path.absolute().name}.{secrets.token_hex(4)}.asymflow")
    try:
        beside.mkdir(parents=True)
        remove_abandoned(beside.parent)
        yield beside
        if path.exists():
            path.rmdir()  # it is empty, but not every system can rename onto an empty folder
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def usable_device(name: str) -> "torch.device":
    """The device of that name. Raises InputError if no tensor can be made on it."""
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def default_device() -> str:
    import torch  # here, because it takes seconds, and `asymflow --help` does not need it

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device(name: str) -> "torch.device":
    """As `usable_device`, but "cuda" is for each of several processes a GPU of its own, which torchrun gave it."""
    _, world = this_process()
    return usable_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and world > 1 else name)


def this_process() -> tuple[int, int]:
    """(index of this process, number of processes), as torchrun sets them in the environment."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None and world == "1":
        return 0, 1
    if rank is None or not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"the environment says WORLD_SIZE {world} and RANK {rank}: unset both, or start with torchrun")
    return int(rank), int(world)
