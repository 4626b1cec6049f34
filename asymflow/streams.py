"""Everything random in training, as functions of (seed, index of the sample), so that nothing has to be replayed.

Sample g of a training is at position g % batch of step g // batch, however many ranks and accumulation steps share the
batch. What is drawn for it comes from counter-based generators whose key it is: a resumed training, or one on another
number of ranks, sees the same images in the same order, with the same flips, labels, noise levels and noise.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

ORDER, DRAWS, NOISE, DROPOUT, REPLACEMENT = range(5)  # the streams of a seed


@dataclass(frozen=True)
class Draws:
    """What is drawn for one sample besides its noise. normal: of the noise level; flip, drop: uniform in [0, 1)."""

    normal: float
    flip: float
    drop: float


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of one (seed, stream, index), all of them non-negative; no two share a number."""
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))


def image_index(seed: int, sample: int, images: int) -> int:
    """Which of the images sample g is: each epoch is a permutation of its own."""
    return int(permutation(seed, sample // images, images)[sample % images])


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(images)


def draws(seed: int, sample: int) -> Draws:
    g = generator(seed, DRAWS, sample)
    return Draws(float(g.standard_normal()), float(g.random()), float(g.random()))


def noise(seed: int, sample: int, out: Tensor) -> None:
    """Fill `out`, contiguous float32 on the CPU, with standard normal numbers."""
    generator(seed, NOISE, sample).standard_normal(out=out.numpy(), dtype=np.float32)


def share(step: int, global_batch: int, rank: int, world: int) -> range:
    """The samples of a step (0, 1, ...) that are a rank's: one contiguous block."""
    size = global_batch // world
    start = step * global_batch + rank * size
    return range(start, start + size)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """For torch's own generator, which dropout draws from: its masks depend on the rank, and how its share is cut."""
    return int(generator(seed, DROPOUT, (step << 20) + rank).integers(2**63))
