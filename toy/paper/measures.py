"""What samples are judged by, chosen before the runs: each looks at another thing that could be wrong.

All take images (n, 3, H, W), uint8; those of held-out losses take a model.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from asymflow.evaluation.measures import Reference, Samples, frechet, precision, recall
from asymflow.evaluation.rows import Rows
from asymflow.flow_matching import flow_matching_loss, noisy
from asymflow.model import AsymFlow
from asymflow.patches import patchify

LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DIRECTIONS = 512  # of the sliced distance
BATCH = 64


@torch.no_grad()
def predictions(flow: AsymFlow, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[tuple[float, list[Tensor]]]:
    """At each of `LEVELS`, of images that the training has not seen, and the same noise: velocity, x0, eps, sigma."""
    x0 = images.float() / 127.5 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    for level in LEVELS:
        sigma = torch.full((len(x0),), level)
        parts = torch.arange(len(x0)).split(BATCH)
        velocity = [flow(noisy(x0[p], eps[p], sigma[p]), sigma[p], labels=labels[p]) for p in parts]
        yield level, [torch.cat(velocity), x0, eps, sigma]


def held_out_losses(flow: AsymFlow, images: Tensor, labels: Tensor) -> dict[float, float]:
    """The flow-matching loss at each noise level."""
    return {level: flow_matching_loss(*found).mean().item() for level, found in predictions(flow, images, labels)}


def losses_by_direction(flow: AsymFlow, images: Tensor, labels: Tensor, basis: Tensor, patch_size: int) -> list[dict]:
    """The same in two parts, whose sum it is: along `basis`, (D, r), of the patches, and along all other directions."""
    inside, outside = {}, {}
    for level, (velocity, x0, eps, _) in predictions(flow, images, labels):
        error = patchify(velocity - (eps - x0), patch_size).to(basis.dtype)
        inside[level] = (error @ basis).square().mean().item() * basis.shape[1] / basis.shape[0]
        outside[level] = error.square().mean().item() - inside[level]
    return [inside, outside]


Features = Callable[[Tensor], Tensor]  # of images, by a classifier


def read(features: Features, images: Tensor) -> Samples:
    return Samples(Rows([torch.cat([features(part) for part in images.split(BATCH)])]))


def reference_of(features: Features, images: Tensor) -> Reference:
    found = read(features, images)
    return Reference(found.statistics(), found.features)


def compared(samples: Tensor, images: Tensor, features: Features, reference: Reference, patch_size: int) -> dict:
    """All measures of samples but the oracle's. images: as many. reference: the features of those, or of more."""
    found = read(features, samples)
    return {
        "frechet_distance": frechet(found, reference).value,
        "precision": precision(found, reference).value,
        "recall": recall(found, reference).value,
        "patches": patch_distance(samples, images, patch_size),
        "spectrum": spectrum_error(samples, images),
        "seams": seams(samples, patch_size) / seams(images, patch_size),
    }


def patch_distance(samples: Tensor, images: Tensor, patch_size: int, seed: int = 0) -> float:
    """The sliced Wasserstein distance between the patches of samples and of images, which must be as many.

    The root mean square of the distances of sorted projections, over random directions: what moving every patch by one
    vector gives is the root mean square of its numbers, where a pixel is from 0 to 1.
    """
    first, other = (patchify(part.float() / 255, patch_size).flatten(0, 1).double() for part in (samples, images))
    directions = torch.randn(first.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(seed)).double()
    directions /= directions.norm(dim=0)
    gaps = (first @ directions).sort(0).values - (other @ directions).sort(0).values
    return gaps.square().mean().sqrt().item()


def octaves(images: Tensor) -> Tensor:
    """The power of images in each octave of spatial frequency, the lowest first; the mean of a picture is in none."""
    grey = images.double().mean(1) / 255
    power = torch.fft.fft2(grey).abs().square().mean(0) / grey[0].numel()
    axes = [torch.fft.fftfreq(side, dtype=torch.float64) * side for side in grey.shape[1:]]
    radius = torch.hypot(axes[0][:, None], axes[1][None])
    octave = radius.clamp(min=0.5).log2().floor().long().clamp(min=-1)  # -1: the mean
    count = int(torch.tensor(min(grey.shape[1:]) / 2).log2().floor()) + 1
    return torch.stack([power[octave == number].sum() for number in range(count)])


def spectrum_error(samples: Tensor, images: Tensor) -> float:
    """How far the power in octaves is from that of the images: the root mean square of the logarithm, in decibels."""
    return (10 * (octaves(samples) / octaves(images)).log10()).square().mean().sqrt().item()


def seams(images: Tensor, patch_size: int) -> float:
    """How much larger jumps between neighbouring pixels are at the borders of patches than within: 1 is no seam."""
    values, at, within = images.double(), [], []
    for axis in (2, 3):
        jumps = values.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        border = torch.arange(1, len(jumps) + 1) % patch_size == 0
        at.append(jumps[border].mean())
        within.append(jumps[~border].mean())
    return (sum(at) / sum(within)).item()
