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
from asymflow.entries import NOT_DATA, Entry, UnreadableError, first, folder_entries, other_kinds
from asymflow.errors import InputError
from asymflow.pixels import adm_crop, read_image
from asymflow.text import count, decode

CAPTION = ".txt"


class ImageFolder:
    """Images by number, cropped to size x size by `adm_crop`. The files are PATH/CLASS/IMAGE or PATH/CLASS/.../IMAGE.

    The classes are numbered in the order of their names, and so are the images. `classes` are the names. A file
    IMAGE.txt beside IMAGE.jpg (or png, ...) is its caption. Raises InputError if there is no image, an image outside of
    a class folder, or a class without images.

    one_class: all images in the folder, and in those below, are of one class, called as the folder is.

    A million images on a local disk are listed in seconds, into a few arrays, which forked workers share.
    """

    def __init__(self, path: str | Path, size: int, one_class: bool = False):
        self.path, self.size = os.path.join(path, ""), size  # noqa: PTH118 (as strings throughout)
        self.one_class = one_class
        names, labels, captioned, others, tars = [], [], [], [], []
        self.classes = [Path(path).resolve().name] if one_class else class_names(path)
        for label, folder in enumerate([""] if one_class else self.classes):
            entries = list(folder_entries(self.path + folder))
            images = [entry.path for entry in entries if entry.is_image]
            if not images:
                raise InputError(f"{path}/{folder} has no images, but each folder in {path} is a class: remove it")
            others += [entry.path for entry in entries if entry.is_other_image]
            tars += [entry.path for entry in entries if entry.is_tar]
            captions = {entry.path for entry in entries if entry.path.endswith(CAPTION)}
            names += [os.fsencode(image.removeprefix(self.path)) for image in images]
            labels += [label] * len(images)
            captioned += [caption_path(image) in captions for image in images]
        # Arrays, not lists of a million objects: forked workers change the reference counts of objects that they use,
        # and every memory page that they write to is copied.
        self.remarks = [other_kinds(others)] if others else []
        if tars:
            what = f"{count(len(tars), 'tar file')} ({first(tars)})"
            self.remarks.append(f"passed over: {what}. Unpack what has images in it")
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
        return caption_of(Entry(caption_path(self.entry(index).path))) if self.captioned[index] else ""


def class_names(path: str | Path) -> list[str]:
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder: a folder is expected that has one folder of images for each class")
    with os.scandir(path) as items:
        items = [item for item in items if not item.name.startswith(".") and item.name not in NOT_DATA]
    classes = sorted(item.name for item in items if item.is_dir())
    entries = [Entry(item.name) for item in items if not item.is_dir()]
    if outside := sorted(entry.path for entry in entries if entry.is_image or entry.is_other_image):
        raise InputError(f"{path}/{outside[0]} is in no class: each image must be in a folder that is its class")
    if not classes:
        hint = (
            ": it has tar files, which are data.kind webdataset" if any(i.name.endswith(".tar") for i in items) else ""
        )
        raise InputError(f"{path} has no folders in it, one for each class{hint}")
    return classes


def caption_of(entry: Entry) -> str:
    try:
        return decode(entry.read()).strip()
    except UnreadableError:
        raise
    except ValueError as e:
        raise UnreadableError(f"the caption {entry} {e}") from None


def caption_path(image: str) -> str:
    return image.rpartition(".")[0] + CAPTION


def to_uint8(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
