"""Checkpoints that are complete or not there, of any ZeRO stage and number of ranks, readable by any other.

    RUN/checkpoints/00001000/rank_00000.safetensors     the fragments of one rank: weights/NAME, exp_avg/NAME, ...
                             state.json                 the step, the full shapes, what it was trained with
                             manifest.json              size and SHA-256 of every file

A checkpoint is written under a name that starts with a dot, flushed to the disk, and only then renamed. Whatever
happens before the rename, the previous one is untouched, and nothing is found that is not whole. The checksums are of
what was to be written: before a training goes on from a checkpoint, every byte is held against them, and if the disk
kept something else, the checkpoint before is used. Nothing in it is a pickle.

Each rank writes its pieces one after the other, and copies no more than one of them to the host at a time.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from asymflow import files
from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.run.ranks import on_first, together

STATE, MANIFEST = "state.json", "manifest.json"
STARTS = "starts"  # in the metadata of a rank's file: where in the flattened parameter its fragments begin


@dataclass(frozen=True)
class Piece:
    """One fragment of one quantity, such as "exp_avg", of the parameter `name`."""

    kind: str
    name: str
    start: int
    values: Tensor


def average_kind(name: str) -> str:
    """The kind of the pieces of an average, by the name of its profile."""
    return f"ema-{name}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def fingerprint(subspace: Subspace) -> str:
    """The SHA-256 of its basis and scale: weights fit no other subspace, though the shapes of all parameters do."""
    content = (tensor.cpu().numpy().tobytes() for tensor in (subspace.basis, subspace.state_dict()["scale"]))
    return hashlib.sha256(b"".join(content)).hexdigest()


# ---- Writing ---------------------------------------------------------------------------------------------------------
def save(folder: Path, pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]], state: Mapping) -> None:
    """Write the checkpoint `folder`, all ranks together; each gives its own pieces, and the same shapes and state.

    Raises AgreedError if one of them could not write: then nothing is left of it, and what was saved before stays.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    try:
        on_first(lambda: prepare(beside), f"{folder} could not be begun")
        mine = beside / rank_file(dist.get_rank())
        entries = together(lambda: write_rank(mine, pieces), f"{folder} could not be written")
        content = {**state, "shapes": shapes, "ranks": dist.get_world_size()}
        on_first(lambda: finish(beside, folder, dict(entries), content), f"{folder} could not be finished")
    except InputError:
        on_first(lambda: shutil.rmtree(beside, ignore_errors=True), f"{beside} stays")
        raise


def prepare(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)  # of a run that died while it wrote
    beside.mkdir(parents=True)


def finish(beside: Path, folder: Path, entries: dict, content: dict) -> None:
    if unseen := [name for name in entries if not (beside / name).exists()]:
        raise InputError(f"{unseen[0]} was written, but is not there: is the folder on a file system that all share?")
    (beside / STATE).write_text(json.dumps(content, indent=1))
    manifest = entries | {STATE: describe(beside / STATE)}
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (beside / STATE, beside / MANIFEST, beside):
        sync(path)
    if folder.exists():  # a snapshot after the checkpoint that was continued from
        out_of_sight(folder)
    beside.rename(folder)
    sync(folder.parent)
    clear_leftovers(folder.parent)


def out_of_sight(folder: Path) -> Path:
    """Rename to a name that nobody has, and that `clear_leftovers` removes."""
    return folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removed"))


def remove(folder: Path) -> None:
    """Renamed first: what is half gone is gone. What somebody still reads, on NFS, stays for `clear_leftovers`."""
    shutil.rmtree(out_of_sight(folder), ignore_errors=True)


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what an earlier process was writing or removing when it died. Names with a dot are ours alone."""
    for path in checkpoints.glob(".*.*"):
        if path.suffix in (".writing", ".removed"):
            shutil.rmtree(path, ignore_errors=True)


def write_rank(path: Path, pieces: Iterable[Piece]) -> tuple[str, dict]:
    pieces = list(pieces)  # views of what is there: the file begins with the names and sizes of all
    starts = {piece.name: piece.start for piece in pieces}
    tensors = {f"{piece.kind}/{piece.name}": piece.values for piece in pieces}
    size, checksum = files.write_tensors(path, tensors, {STARTS: json.dumps(starts)})
    if (found := path.stat().st_size) != size:
        raise OSError(f"{path} has {found} of the {size} bytes that were written")
    return path.name, {"size": size, "sha256": checksum}


def describe(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Finding ---------------------------------------------------------------------------------------------------------
def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in RUN/checkpoints, in order; those that are still being written do not count.

    Raises OSError where that cannot be known: a disk that does not answer is no empty folder.
    """
    found = folder.iterdir() if is_there(folder) else ()  # Path.glob would leave out what it cannot read
    return sorted(int(path.name) for path in found if path.name.isdecimal() and is_there(path / MANIFEST))


def is_there(path: Path) -> bool:
    """Path.exists, which says False of some errors, and of all of them since Python 3.14."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{step:08d}"


def prune(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the last few checkpoints and every n-th step. What cannot be removed stays for the next time."""
    for step in steps(checkpoints)[:-keep_last]:
        if not keep_every or step % keep_every:
            with suppress(OSError):
                remove(folder_of(checkpoints, step))


def fault(folder: Path, part: int = 0, parts: int = 1, progress: Callable[[list], Iterable] = iter) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if every byte is as it was written.

    Looks at every `parts`-th file, from `part` on, so that ranks can share the reading. `progress`: such as tqdm.
    Raises OSError if a file is there and cannot be read: of that the checkpoint may be innocent.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in progress(sorted(manifest.items())[part::parts]):
            if describe(folder / name) != expected:
                return f"{name} is not as it was written"
        if STATE not in manifest:
            return f"{MANIFEST} lists no {STATE}"
    except (FileNotFoundError, NotADirectoryError) as e:
        return f"{Path(e.filename).name} is missing"
    except (ValueError, AttributeError) as e:
        return f"{MANIFEST} is not as it was written ({e})"
    return None


# ---- Reading ---------------------------------------------------------------------------------------------------------
def read_state(folder: Path) -> dict:
    """What was saved besides the tensors, without reading those. Raises InputError if that is damaged."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        if describe(folder / STATE) == json.loads((folder / MANIFEST).read_text())[STATE]:
            return json.loads((folder / STATE).read_text())
    raise InputError(f"{folder} is damaged ({STATE} is not as it was written): move it away, to do without it")


class Reader:
    """Reads pieces of a checkpoint, wherever in its files they are, and no more than is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = json.loads((folder / STATE).read_text())
        self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        self.where: dict[str, list[tuple[int, int, Path]]] = {}  # of each kind/NAME: start, end, file
        for rank in range(self.state["ranks"]):
            path = folder / rank_file(rank)
            with safe_open(path, framework="pt") as file:
                starts = json.loads(file.metadata()[STARTS])
                for key in file.keys():  # noqa: SIM118
                    begin = starts[key.split("/", 1)[1]]
                    end = begin + file.get_slice(key).get_shape()[0]
                    self.where.setdefault(key, []).append((begin, end, path))

    def kinds(self) -> list[str]:
        return sorted({key.split("/", 1)[0] for key in self.where})

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """`count` elements from `start` of the flattened parameter; InputError if not all of them are there."""
        out, covered = torch.empty(count), 0
        for begin, end, path in self.where.get(f"{kind}/{name}", ()):
            low, high = max(begin, start), min(end, start + count)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    out[low - start : high - start] = file.get_slice(f"{kind}/{name}")[low - begin : high - begin]
                covered += high - low
        if covered != count:
            raise InputError(f"{self.folder} has {covered} of {count} elements of {kind}/{name}")
        return out

    def full(self, kind: str) -> dict[str, Tensor]:
        """Every parameter of that kind, whole and in its shape."""
        return {n: self.read(kind, n, 0, torch.Size(shape).numel()).reshape(shape) for n, shape in self.shapes.items()}
