"""Everything random in training, as functions of (seed, number of the sample): a resumed training replays nothing.

Sample g of a training is at position g % batch of step g // batch, however many ranks and accumulation steps share the
batch. Its random numbers come from counter-based generators with the key (seed, g). So a resumed training, or one on
another number of ranks, sees the same images in the same order, with the same flips, labels, noise levels and noise.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

ORDER, DRAWS, NOISE, DROPOUT, REPLACEMENT = range(5)  # the independent random streams of a seed


@dataclass(frozen=True)
class Draws:
    """A sample's random numbers besides its noise. normal: for its noise level. flip, drop: uniform in [0, 1)."""

    normal: float
    flip: float
    drop: float


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A generator for (seed, stream, index), all non-negative. Different arguments give independent numbers."""
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))


def image_index(seed: int, sample: int, images: int) -> int:
    """The index of the image that is sample number `sample`. Each epoch is a permutation of all images."""
    return int(permutation(seed, sample // images, images)[sample % images])


@lru_cache(maxsize=2)  # a batch may contain samples of two epochs
def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(images)


def draws(seed: int, sample: int) -> Draws:
    g = generator(seed, DRAWS, sample)
    return Draws(float(g.standard_normal()), float(g.random()), float(g.random()))


def noise(seed: int, sample: int, out: Tensor) -> None:
    """Fill `out`, contiguous float32 on the CPU, with standard normal numbers."""
    generator(seed, NOISE, sample).standard_normal(out=out.numpy(), dtype=np.float32)


def share(step: int, global_batch: int, rank: int, world: int) -> range:
    """The numbers of the samples that a rank has in step 0, 1, ...: one contiguous block."""
    size = global_batch // world
    start = step * global_batch + rank * size
    return range(start, start + size)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A step's seed for torch's global generator, from which dropout draws: masks depend on rank and micro-batches."""
    return int(generator(seed, DROPOUT, (step << 20) + rank).integers(2**63))
