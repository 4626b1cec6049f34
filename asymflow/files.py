"""Writing files whole or not at all. Reading: see opening.py."""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from asymflow.errors import InputError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.asymflow(\.[^.]*)?")
"""The names that `replacing` and `replacing_folder` make, and nobody else."""
ABANDONED = 24 * 3600
"""Seconds after which what has such a name is removed."""


@contextmanager
def replacing(path: str | Path, new: bool = False) -> Iterator[Path]:
    """A context with a temporary path to write to. It is renamed to `path` at the end, or removed after an error.

    new: raise FileExistsError, instead of replacing, if `path` exists by then.

    The folder is made if needed. The content is flushed to the disk before the rename, so a reader sees either the old
    file or the whole new one, also after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.asymflow{path.suffix}")
    try:
        yield beside
        with beside.open("rb+") as file:  # not "rb": Windows can flush only what is open for writing
            os.fsync(file.fileno())
        if new:
            claim(beside, path)
        else:
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@cache
def remove_abandoned(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they wrote there, a day ago or earlier."""
    for path in folder.glob(".*"):
        with suppress(OSError):  # another process was faster, or the file is another user's
            if TEMPORARY.fullmatch(path.name):
                touched = max(file.stat().st_mtime for file in (path, *path.glob("*")))
                if time.time() - touched > ABANDONED:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def claim(beside: Path, path: Path) -> None:
    """Give a file the name `path`. FileExistsError if another has it: of several processes one wins."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # exFAT and many network drives have no hard links: there `path` is empty for a moment
        path.open("x").close()
        beside.replace(path)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file, whole or not at all. Returns its size and SHA-256, computed from memory.

    Tensors may be on any device, and may share memory. They are copied to the host one at a time.
    """
    with replacing(path) as beside:
        return stream(tensors, beside, {"format": "pt", **(metadata or {})})


def stream(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write the header, then one tensor after the other. The order of `tensors` makes no difference to the bytes.

    The format: https://huggingface.co/docs/safetensors#format. The library's own function is not used because it needs
    all tensors on the host at once.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # wide ones first: aligned
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data) -> None:
            digest.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for _, tensor in ordered:
            write(content(tensor))  # no variable keeps the copy alive while the next one is made
    return 8 + len(text) + end, digest.hexdigest()


def content(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, in the order of its elements. A view, if it is on the host and contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    # as_strided, because a tensor of one element counts as contiguous with any stride, and `view` would refuse it.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype."""
    return json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]


def hold(path: Path, use: str) -> TextIO:
    """Lock a file until it is closed or the process ends, however it ends. InputError if another process holds it.

    use: what the folder is used for, for the error message, such as "is being trained in". It is a POSIX lock, which
    works over NFS too, if the server keeps locks (version 4 does). Where locks do not work, it silently does nothing.
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
