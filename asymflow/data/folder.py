"""A folder with one folder of images for each class, such as ImageNet as it is downloaded."""

import hashlib
import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asymflow.data.sample import Sample
from asymflow.entries import Entry, UnreadableError, folder_entries, is_gone, is_no_data
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver
from asymflow.pixels import adm_crop, read_image
from asymflow.text import decode

CAPTION = ".txt"


class ImageFolder:
    """Images by number, cropped to size x size by `adm_crop`. The files are PATH/CLASS/IMAGE or PATH/CLASS/.../IMAGE.

    The classes are numbered in the order of their names, and so are the images. `classes` are the names. A file
    IMAGE.txt beside IMAGE.jpg (or png, ...) is its caption; `captioned` is its kind, such as ".TXT", or empty.
    Raises InputError if there is no image, an image outside of a class folder, or a class without images.

    one_class: all images in the folder, and in those below, are of one class, called as the folder is.

    A million images on a local disk are listed in seconds, into a few arrays, which forked workers share.
    """

    def __init__(self, path: str | Path, size: int, one_class: bool = False):
        self.path, self.size = os.path.join(path, ""), size  # noqa: PTH118 (as strings throughout)
        self.one_class = one_class
        names, labels, captioned, passed = [], [], [], PassedOver()
        self.classes = [Path(path).resolve().name] if one_class else class_names(path, passed)
        for label, folder in enumerate([""] if one_class else self.classes):
            here = PassedOver()
            entries = list(folder_entries(self.path + folder, here))
            images = [entry.path for entry in entries if entry.is_image]
            here.others += [entry.path for entry in entries if entry.is_other_image]
            here.packed += [entry.path for entry in entries if entry.is_archive or entry.is_tar]
            if not images:
                why = "; ".join(here.remarks) or "remove it"
                raise InputError(f"{path}/{folder} has no images, but each folder in {path} is a class: {why}")
            passed.add(here)
            captions = dict(cut(entry.path) for entry in entries if entry.path.lower().endswith(CAPTION))
            names += [os.fsencode(image.removeprefix(self.path)) for image in images]
            labels += [label] * len(images)
            captioned += [captions.get(cut(image)[0], "") for image in images]
        # Arrays, not lists of a million objects: forked workers change the reference counts of objects that they use,
        # and every memory page that they write to is copied.
        self.remarks = passed.remarks
        self.names, self.labels, self.captioned = np.array(names), np.array(labels), np.array(captioned)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, indices: Sequence[int]) -> "ImageFolder":
        """The same with these images only, in this order, and with the same classes."""
        part, rows = copy(self), list(indices)
        part.names, part.labels, part.captioned = self.names[rows], self.labels[rows], self.captioned[rows]
        return part

    @property
    def digest(self) -> str:
        """Of the names of the classes and images, relative to the folder, in which order is their number."""
        return hashlib.sha256(b"\0".join(self.names)).hexdigest()

    def check(self) -> None:
        """Raises InputError if this machine has not the same names as the one where this object was made."""
        if ImageFolder(self.path, self.size, self.one_class).digest != self.digest:
            raise InputError(
                f"{self.path} has other images here than where the data was listed: give all machines the same images"
            )

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def __getitem__(self, index: int) -> Sample:
        image = to_uint8(self.square(index))
        return Sample(image, self.label(index), str(self.entry(index)), self.caption(index))

    def entry(self, index: int) -> Entry:
        return Entry(self.path + os.fsdecode(self.names[index]))

    def square(self, index: int) -> Image.Image:
        """The image, cropped to a square. Raises UnreadableError, naming the file, if it is damaged."""
        return adm_crop(read_image(self.entry(index)), self.size)

    def caption(self, index: int) -> str:
        """The caption, or an empty text. Raises UnreadableError if its file is damaged, or not text."""
        kind = str(self.captioned[index])
        return caption_of(Entry(cut(self.entry(index).path)[0] + kind)) if kind else ""


def class_names(path: str | Path, passed: PassedOver) -> list[str]:
    if not Path(path).exists():
        raise InputError(f"{path} does not exist")
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder: a folder is expected that has one folder of images for each class")
    with os.scandir(path) as items:
        items = [item for item in items if not is_no_data(item.name)]
    classes = sorted(item.name for item in items if item.is_dir())
    entries = [Entry(item.name) for item in items if not item.is_dir()]
    if outside := sorted(entry.path for entry in entries if entry.is_image or entry.is_other_image):
        raise InputError(f"{path}/{outside[0]} is in no class: each image must be in a folder that is its class")
    if gone := sorted(item.path for item in items if is_gone(item)):
        raise InputError(
            f"{gone[0]} is a link to nothing, where the folder of a class may have been: mend or remove it"
        )
    passed.packed += sorted(f"{path}/{entry.path}" for entry in entries if entry.is_archive or entry.is_tar)
    if not classes:
        tars = " (a training also reads tar files themselves: data.kind webdataset)" if passed.packed else ""
        raise InputError("; ".join([f"{path} has no folders in it, one for each class", *passed.remarks]) + tars)
    return classes


def caption_of(entry: Entry) -> str:
    try:
        return decode(entry.read()).strip()
    except UnreadableError:
        raise
    except ValueError as e:
        raise UnreadableError(f"the caption {entry} {e}") from None


def cut(path: str) -> tuple[str, str]:
    """The path of a file without its kind, and the kind, such as ".txt"."""
    stem, dot, kind = path.rpartition(".")
    return stem, dot + kind


def to_uint8(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
