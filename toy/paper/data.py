"""The two data sets: what is trained on, what is kept from the training, and what the classifier learns from."""

import hashlib
import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asymflow.data.shapes import Shapes
from asymflow.data.shards import TarShards
from asymflow.errors import InputError
from asymflow.files import replacing
from toy.emoji64 import load

SIZE, PATCH = 64, 16
HELD_OUT = 10**7  # shapes with numbers from here on are in no training
KEPT = 256  # emoji


@dataclass(frozen=True)
class ShapesData:
    """Generated shapes, of which an oracle knows what they should show."""

    name, folder = "shapes", ""
    oracle = True
    epochs = 6  # of the classifier
    settings = ()

    def judged_by(self, count: int) -> Shapes:
        """What the classifier learns from."""
        return Shapes(count, SIZE, seed=5)

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (count, 3, H, W), uint8, that no training sees, and their classes."""
        return self.numbered(HELD_OUT, count)

    def others(self, labels: Tensor) -> Tensor:
        """Further pictures of these classes, to be measured as if they were samples."""
        return of_classes(labels, *self.numbered(2 * HELD_OUT, 4 * len(labels) + 400))

    def numbered(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        samples = [Shapes(first + count, SIZE)[first + i] for i in range(count)]
        return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])


@dataclass(frozen=True)
class EmojiData:
    """emoji64.tar, in two parts: those of some code points, about `KEPT`, are kept from the training.

    The emoji that begin with one code point are alike, such as those of one person in several skin colours: one of them
    in the training would tell of the others.
    """

    tar: Path
    out: Path
    name = folder = "emoji"
    oracle = False
    epochs = 12

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"data.path={self.part('training')}",)

    def judged_by(self, count: int) -> TarShards:
        return TarShards(self.part("training"), SIZE)

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        images, labels = load(TarShards(self.part("held-out"), SIZE))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        return images[chosen], labels[chosen]

    def others(self, labels: Tensor) -> Tensor:
        images, theirs = load(TarShards(self.part("training"), SIZE))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        return of_classes(labels, images[order], theirs[order])

    def part(self, name: str) -> Path:
        """The shard with a part of the emoji. Both are made if they are not there."""
        shards = {part: self.out / self.folder / f"{part}.tar" for part in ("training", "held-out")}
        digest, source = hashlib.sha256(self.tar.read_bytes()).hexdigest(), self.out / self.folder / "source.sha256"
        if source.exists() and source.read_text() != digest:
            raise InputError(f"{source.parent} has the parts of another file than {self.tar}: choose another --out")
        if not all(made.exists() for made in (source, *shards.values())):
            try:
                with tarfile.open(self.tar) as tar:
                    members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
            except (tarfile.TarError, EOFError) as e:
                raise InputError(f"{self.tar} cannot be read as a tar file ({e})") from None
            kept = kept_from([code_point(file) for file in members if file.endswith(".cls")])
            (self.out / self.folder).mkdir(parents=True, exist_ok=True)
            source.write_text(digest)
            for part, shard in shards.items():
                with replacing(shard) as beside, tarfile.open(beside, "w") as tar:
                    for file, content in members.items():
                        if (code_point(file) in kept) == (part == "held-out"):
                            info = tarfile.TarInfo(file)
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
        return shards[name]


def code_point(file: str) -> str:
    """The first of an emoji, such as 1f9d1 of 1f9d1-1f3fb.png."""
    return file.partition(".")[0].partition("-")[0]


def kept_from(points: list[str]) -> set[str]:
    """Code points, drawn at random, that at least `KEPT` emoji have. points: those of all emoji."""
    sizes, kept = Counter(points), set()
    for point in np.random.default_rng(0).permutation(sorted(sizes)).tolist():
        if sum(sizes[each] for each in kept) >= KEPT:
            break
        kept.add(point)
    return kept


def of_classes(labels: Tensor, images: Tensor, theirs: Tensor) -> Tensor:
    """For each of `labels` the next image of that class that is not taken yet; after the last, the first again."""
    places = {label: (theirs == label).nonzero()[:, 0].tolist() for label in labels.unique().tolist()}
    taken = Counter()
    chosen = []
    for label in labels.tolist():
        chosen.append(places[label][taken[label] % len(places[label])])
        taken[label] += 1
    return images[chosen]
