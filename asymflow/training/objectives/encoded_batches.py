"""Micro-batches from encoded shards: images of one size, with their latents and prompts."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from asymflow import streams
from asymflow.color import rgb_to_oklab
from asymflow.data.encoded import EncodedSample, EncodedShards
from asymflow.errors import InputError
from asymflow.training.config.reading import Config
from asymflow.training.loader import ATTEMPTS, Batch, Batches

BUCKETS = 5  # the random stream that chooses buckets; the other streams are in streams.py


@dataclass
class EncodedBatch(Batch):
    """A Batch without classes (labels are 0). latents: (B, r, h, w) float32. prompts: (B, L, C), after dropout."""

    latents: Tensor
    prompts: Tensor

    @property
    def x0(self) -> Tensor:
        """(B, 3, H, W) float32, normalized Oklab."""
        return rgb_to_oklab(super().x0)


class EncodedBatches(Batches):
    """As `Batches`, for `EncodedShards`. All images of a step, on all ranks, are from one bucket.

    So all ranks have the same work, and the images of a step do not depend on the number of ranks. Each step draws its
    bucket at random, in proportion to the numbers of images; each bucket has epochs of its own.
    """

    def __init__(self, dataset: EncodedShards, config: Config, rank: int, world: int):
        super().__init__(dataset, config, rank, world)
        order = np.argsort(dataset.bucket, kind="stable")
        self.members = np.split(order, np.cumsum(np.bincount(dataset.bucket, minlength=len(dataset.buckets)))[:-1])

    @cached_property
    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, before): for each step of the training, its bucket, and how many earlier steps had the same one."""
        shares = np.cumsum([len(members) for members in self.members]) / len(self.dataset)
        numbers = streams.generator(self.config.train.seed, BUCKETS, 0).random(self.config.train.steps)
        bucket = np.searchsorted(shares, numbers, side="right")
        before = np.zeros_like(bucket)
        for b in range(len(self.members)):
            before[bucket == b] = np.arange((bucket == b).sum())
        return bucket, before

    def __getitem__(self, k: int) -> EncodedBatch:
        c, (buckets, before) = self.config, self.plan
        step, part = divmod(k, self.accumulation)
        share = streams.share(step, c.train.global_batch_size, self.rank, self.world)
        samples = list(share[part * self.micro : (part + 1) * self.micro])
        # Number samples within the bucket, as if there were no other.
        moved = (int(before[step]) - step) * c.train.global_batch_size
        problems: list[str] = []
        picked = [self.read(int(buckets[step]), sample + moved, problems) for sample in samples]
        draws = [streams.draws(c.train.seed, sample) for sample in samples]
        empty = self.dataset.empty_prompt
        prompts = [empty if d.drop < c.loss.label_dropout else p.prompt for p, d in zip(picked, draws, strict=True)]
        pixels = torch.stack([sample.image for sample in picked])
        eps = torch.empty(pixels.shape)
        for sample, out in zip(samples, eps, strict=True):
            streams.noise(c.train.seed, sample, out)
        normal = torch.tensor([d.normal for d in draws])
        latents, labels = torch.stack([p.latent.float() for p in picked]), torch.zeros(len(samples), dtype=torch.int64)
        return EncodedBatch(pixels, eps, labels, normal, samples, problems, latents, torch.stack(prompts))

    def read(self, bucket: int, sample: int, problems: list[str]) -> EncodedSample:
        """Sample number `sample` of a bucket; if it cannot be read, another one. See `loader.read_or_replace`."""
        members, seed = self.members[bucket], self.config.train.seed + bucket
        index = streams.image_index(seed, sample, len(members))
        replacements = streams.generator(seed, streams.REPLACEMENT, sample)
        for _ in range(ATTEMPTS):
            try:
                return self.dataset[int(members[index])]
            except InputError as e:
                problems.append(str(e))
                index = int(replacements.integers(len(members)))
        raise InputError(f"{ATTEMPTS} images in a row could not be read; the last: {problems[-1]}")


def rare_buckets(dataset: EncodedShards, batch: int) -> list[str]:
    """A remark, if a bucket has fewer images than the global batch: a step of this bucket would repeat images."""
    counts = np.bincount(dataset.bucket, minlength=len(dataset.buckets))
    rare = [f"{h}x{w}: {n}" for (h, w), n in zip(dataset.buckets, counts, strict=True) if 0 < n < batch]
    if not rare:
        return []
    named = ", ".join(rare[:5]) + (f" and {len(rare) - 5} more" if len(rare) > 5 else "")
    return [
        f"of some sizes there are fewer images than train.global_batch_size {batch}, so a step repeats them ({named}): "
        "encode with a smaller --max-aspect, or more images, or lower train.global_batch_size"
    ]
