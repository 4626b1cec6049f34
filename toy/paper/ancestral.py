"""Ancestral sampling: Euler's method, where a part of the noise is new in each step, so that errors are forgotten."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from asymflow.sampling import image_noise


def ancestral(
    numbers: Sequence[int], velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]
) -> Tensor:
    """A sampler as those of `asymflow.sampling`, once `numbers` are given: those of the pictures, which fix the noise.

    If noise is added little by little, as in DDPM (arXiv 2006.11239), the noise of a level is in part that of a lower
    level; `kept` is their correlation. So much is kept of it on the way down.
    """
    for step, (sigma, target) in enumerate(pairwise(sigmas), 1):
        u = velocity(x, sigma)
        x0, eps = x - sigma * u, x + (1 - sigma) * u
        kept = target * (1 - sigma) / (sigma * (1 - target))
        new = image_noise(step, numbers, x.shape[1:], x.device)  # 0 is the seed of the noise at the start
        x = (1 - target) * x0 + target * (kept * eps + (1 - kept**2) ** 0.5 * new)
    return x
