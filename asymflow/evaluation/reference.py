"""What samples are held against: images, or the mean and covariance of the features of images that others publish."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from asymflow import files, opening
from asymflow.data.shapes import Shapes
from asymflow.entries import Entry
from asymflow.errors import InputError
from asymflow.evaluation import assets
from asymflow.evaluation.blocks import TOLD, Blocks
from asymflow.evaluation.features import PATCH, Extractor, reader
from asymflow.evaluation.frechet import load_statistics
from asymflow.evaluation.images import BATCH, Folder, Source, open_source
from asymflow.evaluation.measures import Reference
from asymflow.text import count

PUBLISHED = ("adm-imagenet", "jit-imagenet")  # each for 256 and for 512 pixels
DATA, SHAPES = "data", "shapes"
PICTURES = 10_000  # generated ones, that "shapes" means


class Opened:
    """A reference before its features are computed.

    name: "data", "shapes", one of `PUBLISHED`, or a path, also if one of these words exists as a file ("./data").
    identity: what determines it, for records. source: its images. statistics: published ones; one of the two may be
    None. Raises InputError if it does not exist, or is of another size than `size`, or of other features.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        crop: int | None,
        width: int,
        data: Source | None = None,
        turn: bool = False,
    ):
        """width: of the features. data: the images that "data" means. crop, turn: see `images.Folder`."""
        self.name, self.source, self.statistics, self.replaced, self.enlarged = name, None, None, [], []
        if name == DATA:
            if data is None:
                raise InputError(
                    "--reference data means the images of a training: give --model RUN, or other images, "
                    "such as ./data for a folder of that name"
                )
            self.source, self.identity = data, {"images": data.identity}
        elif name == SHAPES:
            pictures = Shapes(PICTURES, size[0])
            read = lambda number, bad: pictures[number].image
            self.source = Images(read, PICTURES, (size[0], size[0]), pictures.digest)
            self.identity = {"images": self.source.identity}
        else:
            path = published(name, size) if name in PUBLISHED else Path(name)
            if path.is_dir() or Entry(str(path)).is_tar:
                self.source = Folder(path, crop, turn)
                self.identity = {"images": self.source.identity}
            else:
                self.read(path, width)
        if self.source and len(self.source) < 2:
            raise InputError(f"{name} has 1 image: a reference needs at least 2, and should have thousands")
        if self.source and tuple(self.source.size) != tuple(size):
            other, own = ("{1} x {0}".format(*sides) for sides in (self.source.size, size))
            hint = ", or --crop" if isinstance(self.source, Folder) else ""
            raise InputError(
                f"the images of {name} have {other} pixels (width x height), but those to be scored {own}: give a "
                f"reference of that size{hint}"
            )

    def read(self, path: Path, width: int) -> None:
        arrays = opening.array_headers(path)
        if "mu" in arrays and "sigma" in arrays:
            self.statistics, _ = load_statistics(path)
            if len(found := self.statistics["mu"]) != width:
                raise InputError(f"{path} has statistics of {len(found):,} features, but the extractor has {width:,}")
        if BATCH in arrays:
            self.source = open_source(path)
        if self.source is None and self.statistics is None:
            raise InputError(f"{path} has neither mu and sigma, nor images in {BATCH}: it has {', '.join(arrays)}")
        self.identity = {"file_sha256": files.sha256(path)}

    def fill(
        self, folder: Path, extractor: Extractor, batch: int, rank: int = 0, world: int = 1, patch: bool = False
    ) -> None:
        """Compute the features of its images in `folder`, or of several processes the share of this one.

        patch: also those of their middles.
        """
        if self.source:
            about = {"reference": self.identity, "extractor": extractor.name, "weights_sha256": extractor.weights}
            about |= {"patch": PATCH} if patch else {}
            self.blocks = Blocks(folder, len(self.source), about)
            self.blocks.fill(
                self.source, reader(extractor, self.source, patch), batch, "reading the reference", rank, world
            )

    def reference(self, device: torch.device) -> Reference:
        """The reference, when all processes have filled in their share. It waits for them."""
        if self.source is None:
            return Reference(self.statistics)
        self.blocks.wait()
        self.replaced, self.enlarged = (self.blocks.told(key) for key in TOLD)
        sample = self.blocks.sample(device)
        return Reference(self.statistics or sample.statistics(), sample.features, sample.middles)


def published(name: str, size: tuple[int, int]) -> Path:
    known = f"{name}{size[0]}"
    if known not in assets.ASSETS or size[0] != size[1]:
        sizes = " and ".join(k.removeprefix(name) for k in assets.ASSETS if k.startswith(name))
        raise InputError(
            f"{name} has references of {sizes} pixels, square, but the images have {size[1]} x {size[0]}: give "
            "--reference IMAGES"
        )
    return assets.find(known)


class Images:
    """A source of at most `most` images of a data set, in an order that depends on the seed alone.

    read_one: a function of the number of an image, which returns it as uint8 (3, H, W), and adds to a list what could
    not be read and was replaced by another.
    """

    def __init__(self, read_one, count: int, size: tuple[int, int], digest: str):
        self.read_one, self.count, self.size, self.replaced = read_one, count, size, []
        self.identity = f"{count:,} images ({digest[:16]})"

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, last: int) -> Tensor:
        before = len(self.replaced)
        images = torch.stack([self.read_one(i, self.replaced) for i in range(first, last)])
        for problem in self.replaced[before:]:
            print(f"replaced by another image of the data: {problem}", file=sys.stderr)
        return images


def remarks(reference: Reference, replaced: list[str], enlarged: list[str] = ()) -> list[str]:
    """What to know of a reference before its numbers are used. replaced, enlarged: see `blocks.TOLD`."""
    if reference.features is None:
        return ["the reference is mean and covariance alone"]
    few = len(reference.features) <= reference.features.width
    found = [f"the reference has {count(len(reference.features), 'image')}"] if few else []
    if replaced:
        said = f"{count(len(replaced), 'image')} of the reference could not be read, others took their place"
        found.append(f"{said}: {shortened(replaced)}")
    return found + enlarged_remark("of the reference", enlarged)


def enlarged_remark(of: str, enlarged: list[str]) -> list[str]:
    said = f"{count(len(enlarged), 'image')} {of} had fewer pixels than --crop asks for, and were enlarged"
    return [f"{said}: {shortened(enlarged)}"] if enlarged else []


def shortened(names: list[str]) -> str:
    return "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
