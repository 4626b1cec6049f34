"""Writing so that nothing half-written is ever left, and reading tensors without ever running what is in the file."""

import hashlib
import json
import os
import secrets
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asymflow.errors import InputError


@contextmanager
def replacing(path: str | Path, new: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to. It becomes `path` when the block ends well, and is removed when it does not.

    new: what is there already is not replaced, whoever made it and when: then it raises FileExistsError.

    The folder is made if it is not there. The content is on the disk before the name is: a reader sees the old file or
    the whole new one, also after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    beside.touch()
    mode = beside.stat().st_mode  # that of any new file: safetensors makes files that nobody else may read
    beside.unlink()
    try:
        yield beside
        beside.chmod(mode)
        with beside.open("rb+") as file:  # Windows wants to write what it is to flush
            os.fsync(file.fileno())
        if new:
            os.link(beside, path)
        else:
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Tensors may be on any device, and may share memory."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(own, beside, metadata={"format": "pt", **(metadata or {})})
        sort_metadata(beside)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, whose order varies, in order: equal content, equal bytes."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # it always is, unless safetensors begins to write more tersely
            file.seek(8)
            file.write(text.ljust(size))  # spaces are allowed at the end


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. InputError if it is cut off or something else."""
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise InputError(
            f"{path} is not a whole safetensors file ({e}). If it was downloaded or copied, do that again"
        ) from None


def read_pickle(path: str | Path) -> object:
    """What `torch.save` wrote, if it is tensors in plain containers; anything else in it is refused, and never run."""
    path = existing_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # torch reports a damaged or hostile file by exceptions of many types
        # Not torch's own words: they advise to load the file with weights_only=False.
        raise InputError(
            f"{path} cannot be read as plain tensors ({type(e).__name__}): it is damaged, or carries code, which is "
            "never run. Download or copy it again, or ask whoever made it for safetensors"
        ) from None


def existing_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, where a file is expected")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return path


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """InputError, naming the tensors, unless `found` has exactly the `expected` names, each with its shape."""
    missing = [f"{name} {tuple(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"{name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected]
    misshaped = [
        f"{name} has {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    faults = [
        f"{title}: {'; '.join(names[:5])}{f'; and {len(names) - 5} more' if len(names) > 5 else ''}"
        for title, names in [("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", misshaped)]
        if names
    ]
    if faults:
        raise InputError(f"{source} does not fit: {'. '.join(faults)}")


def hold(path: Path, use: str) -> TextIO:
    """Lock a file until it is closed, or the process ends, however it ends. InputError if another process holds it.

    use: of the folder, in the error: such as "is being trained in". A POSIX lock: also over NFS, if the server keeps
    locks (version 4 does). Where no locks are to be had, it is not held, and nothing is said.
    """
    lock = path.open("a+")
    try:
        import fcntl  # not on Windows

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise InputError(f"{path.parent} {use} by {lock.read().strip() or 'another process'}") from None
    except (OSError, ImportError):
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
