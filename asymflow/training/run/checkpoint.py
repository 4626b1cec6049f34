"""Checkpoints: written whole or not at all, and readable at any ZeRO stage by any number of ranks.

    RUN/checkpoints/00001000/rank_00000.safetensors     the fragments of one rank: weights/NAME, exp_avg/NAME, ...
                             state.json                 the step, the full shapes, what it was trained with
                             manifest.json              size and SHA-256 of every file

A checkpoint is written under a name that starts with a dot, flushed to the disk, and only then renamed. A crash before
the rename leaves the previous checkpoint untouched, and no half-written one that could be found. The checksums are
computed from memory, before the bytes reach the disk. Before training resumes from a checkpoint, all its files are
checked against them; if one is damaged, the checkpoint before is used. Nothing in it is a pickle.

Each rank writes its pieces one after the other, and copies no more than one of them to the host at a time.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.subspace import Subspace
from asymflow.training.run.ranks import gather, rank0_broadcast

STATE, MANIFEST = "state.json", "manifest.json"
STARTS = "starts"  # key of a file's metadata: for each parameter, where in it (flattened) this rank's fragment begins


@dataclass(frozen=True)
class Piece:
    """A contiguous part of the parameter `name`, flattened: its weights, or another `kind` such as "exp_avg"."""

    kind: str
    name: str
    start: int
    values: Tensor


def average_kind(name: str) -> str:
    """The `Piece.kind` of a moving average. name: of its profile."""
    return f"ema-{name}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def fingerprint(subspace: Subspace) -> str:
    """SHA-256 of basis and scale. Weights trained with one subspace are useless with another of the same shape."""
    content = (tensor.cpu().numpy().tobytes() for tensor in (subspace.basis, subspace.state_dict()["scale"]))
    return hashlib.sha256(b"".join(content)).hexdigest()


def ingredients(model: AsymFlow, dataset) -> dict:
    """What a model needs besides its weights, for state.json; None where it needs none."""
    return {
        "subspace": fingerprint(model.subspace),
        "base": getattr(model, "base", None),  # see `finetuning.Finetuned`
        "prompt_length": getattr(dataset, "prompt_length", None),
    }


# ---- Writing ---------------------------------------------------------------------------------------------------------
def save(folder: Path, pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]], state: Mapping) -> None:
    """Write the checkpoint `folder`. Called by all ranks: each passes its own pieces, and the same shapes and state.

    If any rank fails to write, all raise AgreedError, and the folder is removed. Earlier checkpoints stay.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    try:
        rank0_broadcast(lambda: prepare(beside), f"{folder} could not be begun")
        mine = beside / rank_file(dist.get_rank())
        entries = gather(lambda: write_rank(mine, pieces), f"{folder} could not be written")
        content = {**state, "shapes": shapes, "ranks": dist.get_world_size()}
        rank0_broadcast(lambda: finish(beside, folder, dict(entries), content), f"{folder} could not be finished")
    except InputError:
        rank0_broadcast(lambda: shutil.rmtree(beside, ignore_errors=True), f"{beside} stays")
        raise


def prepare(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)  # left by a run that died while it wrote
    beside.mkdir(parents=True)


def finish(beside: Path, folder: Path, entries: dict, content: dict) -> None:
    if unseen := [name for name in entries if not (beside / name).exists()]:
        raise InputError(f"{unseen[0]} was written, but is not there: is the folder on a file system that all share?")
    (beside / STATE).write_text(json.dumps(content, indent=1))
    manifest = entries | {STATE: describe(beside / STATE)}
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (beside / STATE, beside / MANIFEST, beside):
        sync(path)
    if folder.exists():  # a snapshot of this step, taken before training went back to an earlier checkpoint
        rename_for_removal(folder)
    beside.rename(folder)
    sync(folder.parent)
    clear_leftovers(folder.parent)


def rename_for_removal(folder: Path) -> Path:
    """Rename to an unused name that `clear_leftovers` removes."""
    return folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removed"))


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never found under its own name.

    Files that another process still has open on NFS cannot be removed; `clear_leftovers` removes them later.
    """
    shutil.rmtree(rename_for_removal(folder), ignore_errors=True)


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what an earlier process was writing or removing when it died. Nobody else uses these names with a dot."""
    for path in checkpoints.glob(".*.*"):
        if path.suffix in (".writing", ".removed"):
            shutil.rmtree(path, ignore_errors=True)


def write_rank(path: Path, pieces: Iterable[Piece]) -> tuple[str, dict]:
    pieces = list(pieces)  # all at once, because the file's header lists them; they are views, so this copies nothing
    starts = {piece.name: piece.start for piece in pieces}
    tensors = {f"{piece.kind}/{piece.name}": piece.values for piece in pieces}
    size, checksum = files.write_tensors(path, tensors, {STARTS: json.dumps(starts)})
    if (found := path.stat().st_size) != size:
        raise OSError(f"{path} has {found} of the {size} bytes that were written")
    return path.name, {"size": size, "sha256": checksum}


def describe(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def is_as_described(folder: Path, name: str, expected: object) -> bool:
    """Whether a file of a checkpoint has the size and the checksum of the manifest.

    Kind and size are compared first, because a link to something endless may be in its place.
    """
    if Path(name).name != name or not isinstance(expected, dict):
        raise ValueError(f"it lists {name!r}")
    path = folder / name
    try:
        found = path.stat()
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # a link to itself, a name that cannot be
            return False
        raise
    return stat.S_ISREG(found.st_mode) and found.st_size == expected.get("size") and describe(path) == expected


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Finding ---------------------------------------------------------------------------------------------------------
def steps(folder: Path) -> list[int]:
    """The steps of all finished checkpoints in RUN/checkpoints, in order.

    Raises OSError if the folder cannot be read. A failing disk must not look like an empty folder.
    """
    found = folder.iterdir() if is_there(folder) else ()  # not Path.glob: it skips what it cannot read
    return sorted(int(path.name) for path in found if path.name.isdecimal() and is_there(path / MANIFEST))


def is_there(path: Path) -> bool:
    """Like Path.exists, but raises OSError if the disk fails. Path.exists returns False for some such errors."""
    try:
        path.stat()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{step:08d}"


def prune(checkpoints: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the last `keep_last`, and those of every `keep_every`-th step.

    A checkpoint that cannot be removed now is tried again the next time.
    """
    for step in steps(checkpoints)[:-keep_last]:
        if not keep_every or step % keep_every:
            with suppress(OSError):
                remove(folder_of(checkpoints, step))


def fault(folder: Path, part: int = 0, parts: int = 1, progress: Callable[[list], Iterable] = iter) -> str | None:
    """What is wrong with a checkpoint, according to its manifest; None if every byte is as it was written.

    Checks every `parts`-th file, starting with file `part`, so that ranks can share the reading. progress: such as
    tqdm. Raises OSError if a file exists but cannot be read: the disk may be at fault, and the checkpoint whole.
    """
    try:
        if not is_there(folder / MANIFEST):
            return f"{MANIFEST} is missing"
        manifest = opening.read_json(folder / MANIFEST)
        for name, expected in progress(sorted(manifest.items())[part::parts]):
            if not is_as_described(folder, name, expected):
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
    """Read state.json, without the tensors. Raises InputError if it is damaged."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        if is_as_described(folder, STATE, opening.read_json(folder / MANIFEST)[STATE]):
            return opening.read_json(folder / STATE)
    raise InputError(f"{folder} is damaged ({STATE} is not as it was written): move it away, to do without it")


class Reader:
    """Reads pieces of parameters from a checkpoint, whichever ranks wrote them, and no more than is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = opening.read_json(folder / STATE)
        self.where: dict[str, list[tuple[int, int, Path]]] = {}  # kind/NAME: the (start, end, file) of each fragment
        with opening.reading(folder, "a checkpoint that makes sense"):
            self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
            for rank in range(self.state["ranks"]):
                self.note_fragments(opening.existing_file(folder / rank_file(rank)))

    def note_fragments(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            starts = json.loads(file.metadata()[STARTS])
            for key in file.keys():  # noqa: SIM118
                begin = starts[key.split("/", 1)[1]]
                end = begin + file.get_slice(key).get_shape()[0]
                self.where.setdefault(key, []).append((begin, end, path))

    def kinds(self) -> list[str]:
        return sorted({key.split("/", 1)[0] for key in self.where})

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements start to start + count - 1 of a flattened parameter. Raises InputError if one is missing."""
        places = self.where.get(f"{kind}/{name}", ())
        parts = [(max(begin, start), min(end, start + count), begin, path) for begin, end, path in places]
        covered = sum(max(high - low, 0) for low, high, *_ in parts)
        if covered != count:
            raise InputError(f"{self.folder} has {covered} of {count} elements of {kind}/{name}")
        out = torch.empty(count)
        for low, high, begin, path in parts:
            if low < high:
                with safe_open(path, framework="pt") as file:
                    out[low - start : high - start] = file.get_slice(f"{kind}/{name}")[low - begin : high - begin]
        return out

    def full(self, kind: str) -> dict[str, Tensor]:
        """All parameters of one kind, each whole and in its own shape."""
        with opening.reading(self.folder, "a checkpoint that makes sense"):
            sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
            return {name: self.read(kind, name, 0, size).reshape(self.shapes[name]) for name, size in sizes.items()}
