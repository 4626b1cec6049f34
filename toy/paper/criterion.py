"""Where does the best rank come from? A prediction from the spectrum of the data, the noise levels and the network.

Take the data as Gaussian, with variance lambda_i along direction i of the basis (about its mean: a bias can draw that).
What a network should put out along i is the best estimate of its target, given the noisy data. Of x0, outside of the
subspace, the estimate has the first power below; of the velocity, inside, the second:

    lambda^2 (1-sigma)^2 / (lambda (1-sigma)^2 + sigma^2)            (sigma - lambda (1-sigma))^2 / (the same)

Suppose that a network misses the same fraction of the power of all that it puts out. Outside, that error is divided by
sigma. Each direction inside also takes a part of what the network can carry from its input to its output: `room`
directions in all. So the fraction grows as 1 / (1 - rank / room), and what is not best possible in the loss is

    burden(rank) = (sum over i <= rank of E[w inside_i] + sum over i > rank of E[w outside_i / sigma^2])
                   / (1 - rank / room)

times an unknown constant, where w = (sigma / max(sigma, 0.05))^2 is the weight of the loss. With a room without bounds
the best rank is that of `asymflow.fitting.auto_rank`, but for the mean of the data.
"""

import torch
from torch import Tensor

from asymflow.flow_matching import SIGMA_FLOOR
from asymflow.patches import patchify

RANKS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48)


def noise_levels() -> Tensor:
    """2,000 equally likely noise levels of the training, float64."""
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    return torch.sigmoid(0.8 + 0.8 * torch.special.ndtri(quantiles))


def spectrum(images: Tensor, patch_size: int) -> Tensor:
    """The variances of patches along the `directions` of these images, (D,), float64, about their mean."""
    patches = patchify(images.double() / 127.5 - 1, patch_size).flatten(0, 1)
    return ((patches - patches.mean(0)) @ directions(images, patch_size)).square().mean(0)


def directions(images: Tensor, patch_size: int) -> Tensor:
    """The principal directions of patches, (D, D), float64, the first first. images: (n, 3, H, W), uint8.

    As in training they are those of the uncentred energies.
    """
    patches = patchify(images.double() / 127.5 - 1, patch_size).flatten(0, 1)
    return torch.linalg.eigh(patches.mT @ patches).eigenvectors.flip(1)


def powers(variance: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Of the best estimates of x0 and of the velocity, from Gaussian data and its noise."""
    seen = variance * (1 - sigma) ** 2 + sigma**2
    return variance**2 * (1 - sigma) ** 2 / seen, (sigma - variance * (1 - sigma)) ** 2 / seen


def errors(variances: Tensor) -> tuple[Tensor, Tensor]:
    """What each direction adds to the burden inside of the subspace, and outside: both (D,), float64.

    variances: (D,), in the order of the basis.
    """
    sigma = noise_levels()
    x0, velocity = powers(variances.double()[:, None], sigma)
    weight = (sigma / sigma.clamp(min=SIGMA_FLOOR)) ** 2
    return (weight * velocity).mean(1), (weight * x0 / sigma**2).mean(1)


def burden(inside: Tensor, outside: Tensor, rank: int, room: float = float("inf")) -> float:
    """What a network misses at this rank, up to a constant that the ranks have in common. Infinite from `room` on.

    inside, outside: of `errors`.
    """
    return ((inside[:rank].sum() + outside[rank:].sum()) / (1 - rank / room)).item() if rank < room else float("inf")
