"""Features of many images, kept in a folder: a file for each block of images, so that work is shared and goes on.

Which images are in a block depends on its number alone: not on the batch, nor on how many processes there are. A block
is written whole or not at all. So no image is left out and none counted twice, whatever stops when.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.evaluation.images import Source
from asymflow.evaluation.measures import Samples
from asymflow.evaluation.rows import Rows
from asymflow.progress import progress_bar

SIZE = 256  # images of a block
SHOWN = 64  # images whose pixels are kept in any case, for a picture
TOLD = ("replaced", "enlarged")  # lists of a source: of what could not be read, and what was smaller than the crop
ABOUT = "about.json"  # what the features are of


class Blocks:
    """A folder with the features of the images of a source.

    about: what they are of, which must be the same when they are gone on with. keep_images: whether the pixels are kept
    as well. size: images of a block. Raises InputError if the folder holds features of something else.
    """

    def __init__(self, folder: Path, count: int, about: dict, keep_images: bool = False, size: int = SIZE):
        self.folder, self.count, self.keep_images, self.size = folder, count, keep_images, size
        file = folder / ABOUT
        about = json.loads(json.dumps(about))  # as it is read again: tuples are lists
        if file.exists() and (before := opening.read_json(file)) != about:
            names = sorted({*before, *about})
            differing = [
                f"{k} {before.get(k)} there, {about.get(k)} here" for k in names if before.get(k) != about.get(k)
            ]
            raise InputError(
                f"{folder} holds features of something else ({'; '.join(differing)}): choose another --out"
            )
        with files.replacing(file) as beside:
            beside.write_text(json.dumps(about, indent=1) + "\n")

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def span(self, number: int) -> tuple[int, int]:
        """The numbers of the first image of a block, and of that after the last."""
        return number * self.size, min((number + 1) * self.size, self.count)

    def missing(self) -> list[int]:
        there = {file.name for file in self.folder.glob("*.safetensors")}
        return [number for number in range(len(self)) if self.file(number).name not in there]

    def fill(self, source: Source, read: Callable, batch: int, title: str, rank: int = 0, world: int = 1) -> None:
        """Compute the blocks that are missing, or of several processes the share of this one.

        read: a function from images and their numbers to what is kept of them, see `features.reader`.
        """
        todo = [number for number in self.missing() if number % world == rank]
        images = sum(last - first for first, last in map(self.span, todo))
        with progress_bar(desc=title, unit="image", total=images, silent=rank > 0) as bar:
            for number in todo:
                first, last = self.span(number)
                started, parts, before = time.monotonic(), [], {key: len(told(source, key)) for key in TOLD}
                for start in range(first, last, batch):
                    pixels = source.read(start, min(start + batch, last))
                    found = read(pixels, range(start, start + len(pixels)))
                    parts.append(found | {"images": pixels})
                    bar.update(len(pixels))
                tensors = {name: together(parts, name) for name in parts[0]}
                if not self.keep_images:
                    tensors["images"] = tensors["images"][: SHOWN if number == 0 else 0]
                metadata = {"seconds": f"{time.monotonic() - started:.3f}"}
                metadata |= {key: json.dumps(told(source, key)[before[key] :]) for key in TOLD}
                files.write_tensors(self.file(number), tensors, metadata)

    def wait(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until other processes have written what they have to."""
        with progress_bar(desc="waiting for other processes", unit="block", total=len(self), delay=5) as bar:
            while missing := self.missing():
                bar.update(len(self) - len(missing) - bar.n)
                sleep(1)

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a block, mapped, and what it says of them. InputError if it is damaged."""
        again = f"{self.file(number)} is not what was written there: remove it, and run the command again"
        try:
            tensors, metadata = opening.read_tensors(self.file(number))
        except InputError:
            raise InputError(again) from None
        first, last = self.span(number)
        rows = {len(values) for name, values in tensors.items() if name != "images"}
        if rows != {last - first} or "images" not in tensors:
            raise InputError(again)
        return tensors, metadata

    def sample(self, device: torch.device, columns: tuple[str, ...] = ()) -> Samples:
        """All features. InputError if one is not finite. columns: their names, if they are of the oracle."""
        parts = [self.read(number)[0] for number in range(len(self))]
        for number, tensors in enumerate(parts):
            opening.check_numbers({k: t for k, t in tensors.items() if k != "images"}, self.file(number))
        rows = {name: Rows([tensors[name] for tensors in parts]) for name in parts[0] if name != "images"}
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        return Samples(**rows, device=device, columns=columns)

    def seconds(self) -> float:
        """What all blocks took together, however often the work was stopped."""
        return sum(float(self.read(number)[1]["seconds"]) for number in range(len(self)))

    def told(self, key: str) -> list[str]:
        """What a source said of its images, by one of `TOLD`."""
        return [said for number in range(len(self)) for said in json.loads(self.read(number)[1].get(key, "[]"))]

    def first_images(self) -> Tensor:
        """The pixels of the first images, for a picture: at most `SHOWN`."""
        return self.read(0)[0]["images"][:SHOWN]

    def images(self) -> Iterator[Tensor]:
        """The pixels of each block in turn. InputError if they were not kept."""
        for number in range(len(self)):
            images, (first, last) = self.read(number)[0]["images"], self.span(number)
            if len(images) < last - first:
                raise InputError(f"{self.folder} was begun without --save-npz, and has no images: choose another --out")
            yield images


def told(source: Source, key: str) -> list[str]:
    return list(getattr(source, key, ()))


def together(parts: list[dict], name: str) -> Tensor:
    return torch.cat([part[name] for part in parts]).cpu()
