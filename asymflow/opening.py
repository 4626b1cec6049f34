"""The one door to files that a user names, or that lie in a folder: see docs/reliability.md.

Only regular files are opened. How much of one is read is bounded, and so is the memory that its numbers take. Code in
a file is never run. Whatever goes wrong in a parser becomes one InputError that begins with the file's name.
"""

import errno
import json
import os
import stat
import threading
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from asymflow.errors import InputError, out_of_memory
from asymflow.text import decode

MOST_TEXT = 2**28
"""Bytes of a file of text: JSON, prompts. The record of a million samples has half as many."""
MOST_NUMBERS = 2**30
"""Bytes of an array in a file of numpy, whose archives may be compressed a thousandfold."""
MOST_SHARED = 2**28
"""Bytes that the tensors of a pickle may have beyond four times its size, because some share or repeat numbers."""


def existing_file(path: str | Path) -> Path:
    """The path of a regular file. InputError if there is none, or something else, such as a pipe: nothing waits.

    An OSError is the disk's, or of missing rights: what is damaged by it may be whole.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:  # a name with a zero byte is a ValueError
        if isinstance(e, OSError) and e.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise InputError(f"{path} cannot be opened: {getattr(e, 'strerror', None) or e}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder, where a file is expected")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a file, but a pipe or a device")
    return path


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. The check is repeated on what was opened, which may be another by then."""
    with open(existing_file(path), "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is not a file, but a pipe or a device")
        yield file


def without_waiting(path: str, flags: int) -> int:
    """An `opener` by which a pipe is opened without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no O_NONBLOCK


@contextmanager
def reading(what: object, expected: str) -> Iterator[None]:
    """A context in which any error becomes an InputError: `what` is not `expected`, and why.

    Not an error of the disk, or that the memory is full: then it may well be what is expected.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # a damaged or hostile file can raise many types of errors
        if out_of_memory(e) or (isinstance(e, OSError) and e.errno not in (None, errno.EINVAL)):
            raise  # EINVAL is of an offset in the file at which nothing can be
        why = " ".join(str(e).split())[:200]
        kind = type(e).__name__
        raise InputError(f"{what} is not {expected} ({f'{kind}: {why}' if why else kind})") from None


# ---- Text ------------------------------------------------------------------------------------------------------------
def read_bytes(path: str | Path, most: int = MOST_TEXT) -> bytes:
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise InputError(f"{path} has more than {most:,} bytes: it cannot be what is expected here")
        return file.read()


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    content = read_bytes(path, most)
    try:
        return decode(content)
    except ValueError as e:
        raise InputError(f"{path} {e}") from None


def read_json(path: str | Path, kind: type = dict, most: int = MOST_TEXT) -> dict | list:
    """The JSON of a file, which must be an object; or a list, if `kind` is list."""
    text = read_text(path, most)
    with reading(path, "JSON"):
        found = json.loads(text)
    if not isinstance(found, kind):
        raise InputError(f"{path} must be {'a list' if kind is list else 'an object'} of JSON")
    return found


# ---- Numbers ---------------------------------------------------------------------------------------------------------
def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. They are mapped: what is not used is not read."""
    path = existing_file(path)
    with (
        reading(path, "a whole safetensors file: if it was downloaded or copied, do that again"),
        safe_open(path, framework="pt") as file,
    ):
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_pickle(path: str | Path) -> object:
    """What `torch.save` wrote, if it is tensors in plain containers. Anything else is refused, and never run."""
    path, size = existing_file(path), Path(path).stat().st_size
    try:
        zipped = zipfile.is_zipfile(path)
        with zipfile.ZipFile(path) if zipped else nullcontext() as archive:
            if zipped and sum(member.file_size for member in archive.infolist()) > size:
                raise InputError(f"{path} is compressed, as torch.save never does: it is not read")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if sum(tensor.nbytes for tensor in tensors_in(content)) > 4 * size + MOST_SHARED:
            raise InputError(f"{path} has tensors of more numbers than are in the file: they are not read")
    except InputError:
        raise
    except Exception as e:  # a damaged or hostile file can raise many types of errors
        # Do not quote torch's message: it advises to load the file with weights_only=False.
        raise InputError(
            f"{path} cannot be read as plain tensors ({type(e).__name__}): it is damaged, or carries code, which is "
            "never run. Download or copy it again, or ask whoever made it for safetensors"
        ) from None
    return content


def tensors_in(content: object) -> Iterator[Tensor]:
    """All tensors in nested containers. One that is there more than once counts as often."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:  # a list can hold itself
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


def read_arrays(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays in an npz file of numpy; if `names` are given, those of them that it has."""
    path = existing_file(path)
    with reading(path, "a whole npz file of numpy"), np.load(path, allow_pickle=False) as arrays:
        wanted = [name for name in arrays.files if names is None or name in names]
        for name in wanted:
            check_array(path, arrays.zip, f"{name}.npy")
        return {name: arrays[name] for name in wanted}


def check_array(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """InputError if an array in an archive of numpy is too large, or larger than what the archive has of it."""
    array = array_header(archive, name)
    if not 0 <= array.size <= min(MOST_NUMBERS, array.there):
        said = f"{path} has an array {name} of {array.size:,} bytes"
        raise InputError(f"{said}: more than is in it, or than {MOST_NUMBERS:,}")


class ArrayHeader(NamedTuple):
    """What an array in an archive of numpy says of itself. size: its bytes, and there: those that follow `start`."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int
    size: int
    there: int


def array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        start = file.tell()
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    return ArrayHeader(shape, fortran_order, dtype, start, size, archive.getinfo(name).file_size - start)


def array_headers(path: str | Path) -> dict[str, ArrayHeader]:
    """What the arrays in an npz file of numpy say of themselves. None of them is read."""
    path = existing_file(path)
    with reading(path, "an npz file of numpy"), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): array_header(archive, name) for name in names}


# ---- Models ----------------------------------------------------------------------------------------------------------
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


def check_numbers(tensors: Mapping[str, Tensor], source: object, finite: bool = True) -> None:
    """InputError, naming the tensor, unless all are of floating-point numbers of at least 16 bits, all finite.

    finite: whether to check that, for which all numbers are read.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{source} does not fit: {name} is of {tensor.dtype}, not of floating point numbers")
        if tensor.dtype.itemsize < 2:
            raise InputError(
                f"{source} does not fit: {name} is of {tensor.dtype}, numbers of 8 bits, which are not read: take the "
                "model in bfloat16 from which it was made"
            )
        if finite and not tensor.isfinite().all():
            raise InputError(f"{source} does not fit: {name} has entries that are not finite (NaN or infinity)")


@contextmanager
def no_larger_than(tensors: int, source: object) -> Iterator[None]:
    """A context in which networks can be made, but none of far more tensors than these.

    A few bytes of a configuration can ask for a billion layers; the weights beside it say how many there are. More are
    let through, because some loaders register each of them several times, and some networks have others inside.
    """
    made, here = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += threading.get_ident() == here
        if made > 4 * tensors + 10_000:
            raise InputError(f"{source} describes a network of more tensors than its weights have, {tensors:,}")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def counted_tensors(folder: Path) -> int:
    """How many tensors the safetensors files in a folder, and in the folders in it, have; of those that can be read."""
    total = 0
    for path in [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]:
        with suppress(InputError, OSError), reading(path, "whole"), safe_open(existing_file(path), "pt") as file:
            total += len(file.keys())
    return total
