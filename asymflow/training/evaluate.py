"""Samples of the model in training: drawn, and held against the data."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from asymflow import files
from asymflow.data.batches import read
from asymflow.evaluation import Statistics, frechet_distance, load_extractor, load_statistics, save_statistics
from asymflow.evaluation import statistics as statistics_of
from asymflow.model import AsymFlow
from asymflow.sampling import generate
from asymflow.training import streams
from asymflow.training.config.reading import Config
from asymflow.training.ranks import on_first, together

REFERENCE = "reference.npz"  # in the folder of the run
MOST = 50_000  # training images to compare with


def draw(flow: AsymFlow, config: Config, labels: list[int], indices: Sequence[int]) -> Tensor:
    """Images (n, C, H, W) of the classes, with the sampler of the configuration; the noise of each is its index's."""
    c = config.sample
    options = dict(steps=c.steps, guidance=c.guidance, interval=tuple(c.interval), method=c.method)
    return generate(flow, labels, indices, seed=config.train.seed, **options)


def gathered(values: Tensor) -> Tensor:
    """(world * n, ...), in the order of the ranks, from (n, ...) of each."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values.contiguous())
    return torch.cat(everyone)


class Evaluation:
    """The Fréchet distance between what a model draws and the data, by all ranks together, each with its share."""

    def __init__(self, config: Config, dataset, out: Path, device: torch.device):
        """Raises AgreedError if the extractor or the reference cannot be used."""
        self.config, self.dataset, self.path, self.device = config, dataset, out / REFERENCE, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        c, made = config.evaluate, []
        # One after another: of a download, the others find the file.
        on_first(lambda: load_extractor(c.extractor, c.weights) and None, "evaluate")
        together(lambda: made.append(load_extractor(c.extractor, c.weights, device)), "evaluate")
        if c.reference:
            together(lambda: made.append(load_statistics(c.reference)[0]), "evaluate.reference")
        self.features, self.reference = made[0], made[1] if c.reference else None
        weights = on_first(lambda: files.sha256(c.weights)[:16] if c.weights else "downloaded")
        self.about = (
            f"{min(len(dataset), MOST)} training images, {config.model.image_size} px, {c.extractor}, {weights}"
        )

    def distance(self, flow: AsymFlow) -> float:
        """Of `flow` in eval mode."""
        c = self.config
        if self.reference is None:
            self.reference = self.of_data()

        def samples(indices: list[int]) -> Tensor:
            labels = [self.label(i) for i in indices]
            return draw(flow, c, labels, indices).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

        return frechet_distance(self.measure(samples, c.evaluate.num, "evaluating"), self.reference)

    def label(self, index: int) -> int:
        """The class of a sample: in turn, or that of the image that the training has seen at this place."""
        if self.config.evaluate.labels == "balanced":
            return index % self.config.model.num_classes
        return self.dataset.label(streams.image_index(self.config.train.seed, index, len(self.dataset)))

    def of_data(self) -> Statistics:
        """From the training images, but at most `MOST`, chosen at random; kept in the folder of the run."""

        def kept() -> Statistics | None:
            if not self.path.exists():
                return None
            found, about = load_statistics(self.path)
            return found if about == self.about else None

        if (found := on_first(kept, "evaluate")) is not None:
            return found

        def images(indices: list[int]) -> Tensor:
            pictures = [read(self.dataset, self.config.train.seed, i, []).image for i in indices]
            return torch.stack(pictures).to(self.device)

        of = self.measure(images, min(len(self.dataset), MOST), "reading the images to compare with")
        on_first(lambda: save_statistics(self.path, of, self.about), "evaluate")
        return of

    def measure(self, images: Callable[[list[int]], Tensor], count: int, title: str) -> Statistics:
        """The statistics of images 0 to count - 1, which `images` makes from their numbers, (n, 3, H, W) uint8."""
        each = -(-count // self.world)  # as many on every rank: under ZeRO-3 all have to take part in every call
        mine = [i % count for i in range(self.rank * each, (self.rank + 1) * each)]
        size = self.config.evaluate.batch_size
        batches = [mine[i : i + size] for i in range(0, each, size)]
        bar = tqdm(batches, desc=title, unit="batch", leave=False, disable=self.rank > 0)
        features = gathered(torch.cat([self.features(images(batch)) for batch in bar]))[:count]
        return on_first(lambda: statistics_of(features))
