"""Images to be scored: a folder of them, or a batch of samples in an .npz file, as ADM's evaluator reads it.

A source has `len`, a `size` (height, width), an `identity` for records, and `read(first, last)`: the images of these
numbers, (n, 3, H, W), uint8.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, FiniteFloat
from torch import Tensor

from asymflow import files, opening
from asymflow.data.captioned import find_captioned
from asymflow.entries import Entry, UnreadableError, find_images
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver
from asymflow.pixels import adm_crop, decoded, in_order, to_rgb, upright
from asymflow.precision import Precision
from asymflow.text import count

BATCH = "arr_0"  # the array of samples in a batch of ADM
THREADS = 4
RECORD = "samples.json"  # of asymflow sample
MOST_RECORD = 2**32  # bytes of it: there may be millions of images


class Source(Protocol):
    """What can be scored."""

    size: tuple[int, int]
    identity: str

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> Tensor: ...


class Settings(BaseModel):
    """What `asymflow sample` records of how it drew images, as far as a protocol says it too, or a table shows it."""

    model_config = ConfigDict(extra="allow", strict=True)

    seed: int = 0
    steps: int = 0
    method: str = ""
    shift: FiniteFloat = 0
    precision: Precision = "float32"
    classes: Literal["all"] | list[int] = "all"
    step: int = 0
    average: str = ""
    guidance: FiniteFloat = 0
    interval: list[FiniteFloat] = []
    orthogonal: FiniteFloat = 0
    clamp: bool = False


class Folder:
    """All images of a folder, with the folders and .tar files in it, or of a .tar file, of one size, or with `crop`.

    crop: None, or the side of the square that ADM's centre crop makes of each. Whatever is grey, transparent or a
    palette becomes RGB (see `pixels.to_rgb`). turn: whether photographs are turned as their EXIF says. enlarged: the
    names of images that were read, and were smaller than `crop`.
    Raises InputError if there is no image, or not all that `asymflow sample` was to draw; `read` does if one is
    damaged, of another size, or the folder has changed.
    """

    def __init__(self, path: str | Path, crop: int | None = None, turn: bool = False):
        self.path, self.crop, self.turn = Path(path), crop, turn
        if not self.path.exists():
            raise InputError(f"{path} does not exist")
        if not self.path.is_dir() and not Entry(str(path)).is_tar:
            raise InputError(f"{path} is not a folder of images, nor a .tar or .npz file of them")
        self.entries, self.enlarged = find_images([self.path]), []
        self.listed = listing(self.entries)
        first = self.entries[0]
        self.size = (crop, crop) if crop else decoded(first, self.upright).size[::-1]
        self.identity = f"{count(len(self.entries), 'image')} ({self.listed[:16]})"
        self.settings, drawn = self.record()
        classes = [one.get("class") for one in drawn]
        known = drawn and all(isinstance(label, int) for label in classes)
        self.label: Callable[[int], int] | None = classes.__getitem__ if known else None
        prompts = [one.get("prompt") for one in drawn]
        known = drawn and all(isinstance(prompt, str) for prompt in prompts)
        self.captions: list[str] | None = prompts if known else None  # else found when they are asked for

    def record(self) -> tuple[dict | None, list[dict]]:
        """What `asymflow sample` drew these images with, and what it says of each; (None, []) if it did not draw them.

        Its record is in the folder, or in the one around it. InputError if it lists images that are not there.
        """
        if not self.path.is_dir():
            return None, []
        inside = [Path(entry.path).relative_to(self.path).as_posix() for entry in self.entries]
        for folder, prefix in ((self.path, ""), (self.path.resolve().parent, f"{self.path.resolve().name}/")):
            if not (folder / RECORD).is_file():
                continue
            named = [prefix + name for name in inside]
            try:
                record = opening.read_json(folder / RECORD, most=MOST_RECORD)
                found = {one["file"]: one for one in record["images"]}
                settings = record.get("settings") or None
                Settings.model_validate(settings or {})
            except (KeyError, TypeError, ValueError):  # another kind of file
                continue
            drawn = [found[name] for name in named if name in found]
            if not drawn:  # of other images
                continue
            if others := [name for name in named if name not in found]:
                raise InputError(
                    f"{self.path} has images that asymflow sample did not draw, such as {others[0]}: give the folder "
                    f"with its samples alone, {folder / Path(next(iter(found))).parent}"
                )
            if len(found) > len(drawn):
                raise InputError(
                    f"{folder / RECORD} lists {count(len(found), 'image')}, of which {len(drawn):,} are there: run its "
                    "asymflow sample again, which draws the others"
                )
            return settings, drawn
        return None, []

    def caption(self, number: int) -> str:
        """The prompt of an image that `asymflow sample` drew, or the caption beside it. InputError if there is none."""
        if self.captions is None:
            self.captions = self.written()
        return self.captions[number]

    def written(self) -> list[str]:
        beside = {photo.file[:2]: photo for photo in find_captioned([str(self.path)], 1, PassedOver())}
        try:
            return [beside[entry[:2]].caption() for entry in self.entries]
        except UnreadableError as e:
            raise InputError(f"{e}: a CLIP score needs the caption of each image") from None

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, first: int, last: int) -> Tensor:
        if first == 0 or last == len(self):
            self.check_unchanged()
        found = []
        for image in in_order(self.one, self.entries[first:last], THREADS):
            if isinstance(image, InputError):
                raise InputError(f"{image}: remove it, or wait if the folder is still being written") from None
            found.append(image[0])
            self.enlarged += image[1]
        return torch.stack(found)

    def one(self, entry: Entry) -> tuple[Tensor, list[str]]:
        """The image, and its name if it had to be enlarged."""
        image = decoded(entry, lambda image: to_rgb(self.upright(image)))
        small = [str(entry)] if min(image.size) < (self.crop or 0) else []
        image = adm_crop(image, self.crop) if self.crop else image
        if (image.height, image.width) != self.size:
            raise InputError(
                f"{entry} has {image.width} x {image.height} pixels (width x height), but {self.entries[0]} has "
                f"{self.size[1]} x {self.size[0]}: remove what is no sample, or crop all of them with --crop"
            )
        return torch.from_numpy(np.array(image).transpose(2, 0, 1)), small

    def upright(self, image: Image.Image) -> Image.Image:
        return upright(image) if self.turn else image

    def check_unchanged(self) -> None:
        """InputError if images have come, gone or changed since the folder was listed."""
        now = find_images([self.path], PassedOver())
        if listing(now) != self.listed:
            raise InputError(
                f"{self.path} is still being written: it had {count(len(self), 'image')}, and has {len(now):,} now, or "
                "others: wait until it is whole"
            )


def listing(entries: list[Entry]) -> str:
    """A checksum of the names, sizes and times of change of files."""
    digest = hashlib.sha256()
    for entry in entries:
        about = Path(entry.path).stat()
        digest.update(f"{entry} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Batch:
    """The samples of an .npz file: `arr_0`, (n, H, W, 3), uint8. They are read in parts, whatever their number.

    Raises InputError if the file is damaged, or has another array.
    """

    def __init__(self, path: str | Path):
        self.path, arrays = Path(path), opening.array_headers(path)
        if BATCH not in arrays:
            has = ", ".join(list(arrays)[:5]) or "nothing"
            raise InputError(f"{path} has no array {BATCH}, as a batch of samples has: it has {has}")
        shape, fortran_order, dtype, self.start, size, there = arrays[BATCH]
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran_order:
            form = f"{dtype} {shape}{' in the order of Fortran' * fortran_order}"
            raise InputError(f"{path}: {BATCH} must be uint8 (n, height, width, 3), but it is {form}")
        if min(shape) < 1 or size > there:
            raise InputError(f"{path}: {BATCH} says that it is {shape}, and has {there:,} bytes: it is not whole")
        self.count, self.size = shape[0], (shape[1], shape[2])
        self.identity = f"{self.count:,} images ({files.sha256(path)[:16]})"

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, last: int) -> Tensor:
        height, width = self.size
        row = height * width * 3
        with (
            opening.reading(self.path, "a whole npz file of numpy"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{BATCH}.npy") as file,
        ):
            file.seek(self.start + first * row)
            content = file.read((last - first) * row)
            if len(content) < (last - first) * row:
                raise InputError(f"{self.path} is not whole: it ends within {BATCH}")
        images = np.frombuffer(bytearray(content), np.uint8).reshape(-1, height, width, 3)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def open_source(path: str | Path, crop: int | None = None, turn: bool = False) -> Source:
    """The images of a folder, or of a .tar or .npz file. Raises InputError. crop, turn: see `Folder`."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".npz":
        return Folder(path, crop, turn)
    if crop:
        raise InputError(f"{path}: --crop is for folders of images")
    return Batch(path)


def write_batch(path: Path, parts: Iterable[Tensor], count: int, size: tuple[int, int]) -> None:
    """Write such an .npz file, whole or not at all. parts: uint8 (n, 3, H, W), together `count` images, in order."""
    with files.replacing(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        info = zipfile.ZipInfo(f"{BATCH}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # so that the bytes are the same
        with archive.open(info, "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for images in parts:
                file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
