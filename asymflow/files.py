"""Writing so that nothing half-written is ever left, and reading tensors without ever running what is in the file."""

import hashlib
import json
import os
import secrets
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
    try:
        yield beside
        with beside.open("rb+") as file:  # Windows wants to write what it is to flush
            os.fsync(file.fileno())
        if new:
            os.link(beside, path)
        else:
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file, whole or not at all. Returns its size and its SHA-256, from what was to be written.

    Tensors may be on any device, and may share memory: one of them at a time is copied to the host, if it is elsewhere.
    """
    with replacing(path) as beside:
        return stream(tensors, beside, {"format": "pt", **(metadata or {})})


def stream(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write the header, then one tensor after the other. Equal content gives equal bytes, in whatever order it comes.

    The format: https://huggingface.co/docs/safetensors#format. The library would want all tensors on the host at once.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # wide first: all aligned
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
            write(content(tensor))  # which nobody holds when the next one is copied
    return 8 + len(text) + end, digest.hexdigest()


def content(tensor: Tensor) -> np.ndarray:
    """Its bytes, in the order of its elements: a view, if the tensor is on the host and contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()  # one element may have any stride


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    return json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]


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
