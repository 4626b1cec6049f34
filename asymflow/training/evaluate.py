"""Evaluation in training: the Fréchet distance between samples of the model and the data."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from asymflow import files, streams
from asymflow.errors import InputError
from asymflow.evaluation.features import load_extractor
from asymflow.evaluation.frechet import Statistics, frechet_distance, load_statistics, save_statistics
from asymflow.evaluation.frechet import statistics as statistics_of
from asymflow.model import AsymFlow
from asymflow.progress import progress_bar
from asymflow.training.config.reading import Config
from asymflow.training.loader import read_or_replace
from asymflow.training.objectives.class_conditional import drawn
from asymflow.training.run.ranks import all_or_raise, rank0_broadcast

REFERENCE = "reference.npz"  # in the folder of the run
MOST = 50_000  # at most so many training images are compared with

Stop = Callable[[], object]
"""Returns whether to stop. All ranks call it together, and it returns the same on all."""


def all_gather_rows(values: Tensor) -> Tensor:
    """Concatenate (n, ...) of every rank to (world * n, ...), in the order of the ranks, on all of them."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values.contiguous())
    return torch.cat(everyone)


class Evaluation:
    """The Fréchet distance between samples of a model and the data. Each rank draws, and reads, its share of them."""

    def __init__(self, config: Config, dataset, out: Path, device: torch.device):
        """Raises AgreedError if the extractor or the reference cannot be used."""
        self.config, self.dataset, self.path, self.device = config, dataset, out / REFERENCE, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.few = False  # whether there are fewer images than features, as far as is known
        c = config.evaluate
        load = lambda: load_extractor(c.extractor, c.weights, device)
        # Rank 0 loads first, and may download the weights; then the others find the file.
        all_or_raise(lambda: self.rank or load(), "evaluate")
        self.features = all_or_raise(load, "evaluate")
        self.reference = all_or_raise(self.given_reference, "evaluate.reference") if c.reference else None
        weights = rank0_broadcast(lambda: files.sha256(c.weights)[:16] if c.weights else "downloaded")
        self.about = (
            f"{min(len(dataset), MOST)} training images ({getattr(dataset, 'digest', 'unknown')[:16]}), "
            f"{config.model.image_size} px, {c.extractor}, {weights}"
        )

    def given_reference(self) -> Statistics:
        """Read evaluate.reference. Raises InputError if it has no statistics, or of another number of features."""
        c, size = self.config.evaluate, self.config.model.image_size
        reference, _ = load_statistics(c.reference)
        width = self.features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device)).shape[1]
        if len(reference["mu"]) != width:
            found = len(reference["mu"])
            raise InputError(f"{c.reference} has statistics of {found} features, but {c.extractor} has {width}")
        return reference

    def distance(self, flow: AsymFlow, stop: Stop) -> float | None:
        """The Fréchet distance of samples of `flow`, in eval mode, from the data; None if `stop` said so.

        NaN if any sample has numbers that are not finite.
        """
        c = self.config
        if self.reference is None:
            self.reference = self.of_data(stop)
        if self.reference is None:
            return None

        def samples(indices: list[int]) -> Tensor:
            images = drawn(flow, c, [self.label(i) for i in indices], indices)
            features = self.features(images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
            return features.masked_fill(~images.flatten(1).isfinite().all(1, keepdim=True), math.nan)

        features = self.measure(samples, c.evaluate.num, "evaluating", stop)
        if features is None:
            return None
        if features.isnan().any():
            return math.nan
        self.few = features.shape[1] > min(c.evaluate.num, MOST if c.evaluate.reference else len(self.dataset))
        return rank0_broadcast(lambda: frechet_distance(statistics_of(features), self.reference))

    def label(self, index: int) -> int:
        """The class of sample `index`: all classes in turn, or that of the training image of the same number."""
        if self.config.evaluate.labels == "balanced":
            return index % self.config.model.num_classes
        return self.dataset.label(streams.image_index(self.config.train.seed, index, len(self.dataset)))

    def of_data(self, stop: Stop) -> Statistics | None:
        """Statistics of the training images, of at most `MOST` of them, chosen at random. They are kept in a file."""

        def kept() -> Statistics | None:
            if not self.path.exists():
                return None
            found, about = load_statistics(self.path)
            return found if about == self.about else None

        if (found := rank0_broadcast(kept, "evaluate")) is not None:
            return found

        def features_of(indices: list[int]) -> Tensor:
            pictures = [read_or_replace(self.dataset, self.config.train.seed, i, []).image for i in indices]
            return self.features(torch.stack(pictures).to(self.device))

        title = "reading the images to compare with"
        features = self.measure(features_of, min(len(self.dataset), MOST), title, stop)
        if features is None:
            return None

        def measured() -> Statistics:
            of = statistics_of(features)
            save_statistics(self.path, of, self.about)
            return of

        return rank0_broadcast(measured, "evaluate")

    def measure(self, features_of: Callable[[list[int]], Tensor], count: int, title: str, stop: Stop) -> Tensor | None:
        """The features (count, F) of images 0 to count - 1, or None if `stop` said so.

        features_of: returns the features of the images of the given numbers, (n, F).
        """
        each_rank = -(-count // self.world)  # as many on every rank: under ZeRO-3 all must take part in each call
        mine = [i % count for i in range(self.rank * each_rank, (self.rank + 1) * each_rank)]
        size, features = self.config.evaluate.batch_size, []
        starts = range(0, each_rank, size)
        for start in progress_bar(starts, title, "batch", silent=self.rank > 0):
            if stop():
                return None
            features.append(features_of(mine[start : start + size]))
        return all_gather_rows(torch.cat(features))[:count]
