"""The images of a search, drawn when they are asked for, and the scores of settings, kept in a folder."""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from asymflow import files, opening
from asymflow.cli.common import this_process
from asymflow.cli.evaluate import REFERENCE, Scored, evaluate
from asymflow.errors import InputError
from asymflow.evaluation import reference, result
from asymflow.evaluation.blocks import Blocks
from asymflow.evaluation.branches import Branches, Guidance
from asymflow.evaluation.drawn import quantized
from asymflow.evaluation.features import load_extractor
from asymflow.evaluation.frechet import Target
from asymflow.evaluation.measures import Samples
from asymflow.evaluation.protocol import Protocol, renamed
from asymflow.evaluation.rows import Rows
from asymflow.evaluation.search import Point, Score
from asymflow.progress import progress_bar

VARIED = ("average", "guidance", "interval")
UNIT = 64  # images: a setting gets so many, or a multiple


class Store:
    """Scores of settings of a model, and what they are made of, in the folder of a search."""

    def __init__(self, args: argparse.Namespace, protocol: Protocol, axes, device: torch.device):
        self.args, self.axes, self.device, self.protocol = args, axes, device, protocol
        self.tries = renamed(protocol, order="shuffled")  # whose first images are a fair choice of the classes
        self.rank, self.world = this_process()
        self.open: tuple[str | None, Scored] | None = None  # the model that is loaded, by its average
        first = self.tried(axes.averages[0])
        self.about = first.about
        self.extractor = load_extractor(protocol.extractor, protocol.weights, device)
        self.title = result.title("frechet_distance", protocol.extractor)
        size = tuple(first.source.size)
        width = self.extractor.width(max(size))
        self.against = reference.Opened(protocol.reference, size, protocol.crop, width, first.data, protocol.turn)
        self.against.fill(args.out / REFERENCE, self.extractor, args.batch, self.rank, self.world)
        self.target: Target | None = None

    def tried(self, average: str | None) -> Scored:
        """What the search draws of the model with an average. Only one is held at a time."""
        if self.open is None or self.open[0] != average:
            self.open = (average, self.scored(average, self.tries))
        return self.open[1]

    def scored(
        self,
        average: str | None,
        protocol: Protocol,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Scored:
        args = copy.copy(self.args)
        args.images, args.ema, args.guidance, args.interval = None, average, guidance, interval
        self.open = None  # before the next one is loaded
        return Scored(args, protocol, self.device)

    def classes(self, images: int) -> tuple[int, int]:
        """How many classes the first images of a setting have, and how many there are."""
        source = self.tried(self.axes.averages[0]).source
        return len(set(map(source.label, range(images)))), source.num_classes

    def folder(self, average: str | None, guidance: Guidance) -> Path:
        return self.args.out / "features" / (average or "as-it-is") / self.name(guidance)

    @staticmethod
    def name(guidance: Guidance) -> str:
        return f"{guidance.scale!r}-{guidance.low!r}-{guidance.high!r}"

    def blocks(self, average: str | None, guidance: Guidance, images: int) -> Blocks:
        return Blocks(self.folder(average, guidance), images, self.identity(average), size=UNIT)

    def guidance(self, point: Point) -> Guidance:
        _, scale, (low, high) = self.axes.at(point)
        return Guidance(scale, low, high)

    def score(self, points: Sequence[Point], images: int) -> dict[Point, Score]:
        """The scores of the points by their first images. All processes call this; all get the same."""
        todo = [point for point in points if not self.file(point, images).exists()]
        for average in dict.fromkeys(self.axes.at(point)[0] for point in todo):
            self.draw(average, [point for point in todo if self.axes.at(point)[0] == average], images)
        if self.rank == 0:
            for point in progress_bar(todo, "scoring", "setting"):
                self.measure(point, images)
        for point in todo:
            while not self.file(point, images).exists():
                time.sleep(0.2)
        return {point: self.read(point, images) for point in points}

    def draw(self, average: str | None, points: Sequence[Point], images: int) -> None:
        """Draw the blocks that are missing of these settings, all of a block at once."""
        stores = {}
        for point in points:
            guidance = self.guidance(point)
            stores[guidance] = self.blocks(average, guidance, images)
        missing = {guidance: set(blocks.missing()) for guidance, blocks in stores.items()}
        numbers = sorted(set().union(*missing.values()))
        mine = [number for number in numbers if number % self.world == self.rank]
        branches = Branches(self.tried(average).source, self.args.orthogonal) if mine else None
        title = f"drawing {len(points)} settings" + (f" of average {average}" if average else "")
        wanted = {number: [g for g in stores if number in missing[g]] for number in mine}
        total = UNIT * sum(map(len, wanted.values()))
        with progress_bar(desc=title, unit="image", total=total, silent=self.rank > 0) as bar:
            for number, settings in wanted.items():
                self.draw_block(branches, number, {guidance: stores[guidance] for guidance in settings}, bar)

    def draw_block(self, branches: Branches, number: int, stores: dict[Guidance, Blocks], bar) -> None:
        first, parts = number * UNIT, {guidance: [] for guidance in stores}
        for start in range(first, first + UNIT, self.args.batch):
            numbers = range(start, min(start + self.args.batch, first + UNIT))
            for guidance, images in branches.draw(numbers, list(stores)).items():
                broken = ~images.flatten(1).isfinite().all(1, keepdim=True)
                features = self.extractor(quantized(images, self.protocol.quantize))
                parts[guidance].append(features.masked_fill(broken.to(features.device), torch.nan).cpu())
            bar.update(len(numbers) * len(stores))
        for guidance, blocks in stores.items():
            empty = torch.empty(0, 3, *branches.drawn.size, dtype=torch.uint8)
            tensors = {"features": torch.cat(parts[guidance]), "images": empty}
            passes = {"spent": branches.spent.pop(guidance), "alone": branches.alone.pop(guidance)}
            files.write_tensors(blocks.file(number), tensors, {name: str(value) for name, value in passes.items()})

    def identity(self, average: str | None) -> dict:
        """What the features of a setting depend on, besides the setting."""
        exclude = {"name", "about", "weights", "reference", "measures", "clip", "num"}
        return {
            "average": average,
            "model": {key: value for key, value in self.about.items() if key not in VARIED},
            "orthogonal": self.args.orthogonal,
            "protocol": self.tries.model_dump(mode="json", exclude=exclude),
            "weights_sha256": self.extractor.weights,
        }

    # ---- Scores ------------------------------------------------------------------------------------------------------
    def file(self, point: Point, images: int) -> Path:
        average, *_ = self.axes.at(point)
        return self.folder(average, self.guidance(point)) / f"score-{images}-{self.held()}.npz"

    def held(self) -> str:
        """Eight digits of what the samples are held against."""
        return hashlib.sha256(json.dumps(self.against.identity, sort_keys=True).encode()).hexdigest()[:8]

    def measure(self, point: Point, images: int) -> None:
        """Write the score of a setting by its first images. One with a sample that is not finite is infinitely bad."""
        average, *_ = self.axes.at(point)
        blocks = self.blocks(average, self.guidance(point), images)
        blocks.wait(lambda _: time.sleep(0.2))
        rows = Rows([blocks.read(number)[0]["features"] for number in range(len(blocks))])
        features = rows.take(range(images))
        value, influence = np.inf, np.zeros(images)
        if features.isfinite().all():
            if self.target is None:
                self.target = Target(self.against.reference(self.device).statistics, self.extractor.device)
            value, effect = self.target.distance(Samples(Rows([features])).statistics())
            influence = effect(features).numpy()
        with files.replacing(self.file(point, images)) as beside:
            np.savez(beside, value=value, influence=influence)

    def passes(self, given: Mapping[Point, int]) -> tuple[int, int]:
        """Forward passes of an image that settings took, and that they would have taken if each was drawn alone.

        given: the number of images of each.
        """
        metadata = []
        for point, images in given.items():
            blocks = self.blocks(self.axes.at(point)[0], self.guidance(point), images)
            metadata += [blocks.read(number)[1] for number in range(len(blocks))]
        return tuple(sum(int(one[name]) for one in metadata) for name in ("spent", "alone"))

    def read(self, point: Point, images: int) -> Score:
        try:
            arrays = opening.read_arrays(self.file(point, images), ("value", "influence"))
        except InputError:
            said = "is not what was written there: remove it, and run the command again"
            raise InputError(f"{self.file(point, images)} {said}") from None
        return Score(float(arrays["value"]), arrays["influence"])

    def final_folder(self, point: Point, number: int) -> Path:
        average, images = self.axes.at(point)[0] or "as-it-is", self.args.final or self.protocol.num
        return self.args.out / "final" / f"{average}-{self.name(self.guidance(point))}-{images}" / str(number)

    def final(self, point: Point, number: int) -> dict | None:
        """The result of asymflow evaluate with a setting, of images that no other repeat and no search has drawn."""
        average, scale, interval = self.axes.at(point)
        images = self.args.final or self.protocol.num
        protocol = renamed(self.protocol, num=images, first=2**40 + number * images)
        scored = self.scored(average, protocol, scale, interval)
        shared = self.args.out / REFERENCE
        return evaluate(scored, self.final_folder(point, number), self.device, self.args.batch, reference_folder=shared)
