"""Flow matching: the noise levels, the noisy image and the loss of the velocity, the same whatever a model predicts.

The loss of one step, as train_ddp.py computes it, for images x0 (B, C, H, W) in [-1, 1] and labels (B,):

    sigma, eps = noise_level(torch.randn(len(x0))), flow.noise_scale * torch.randn_like(x0)
    velocity = flow(noisy(x0, eps, sigma), sigma, labels=without_some(labels, num_classes, 0.1))
    loss = flow_matching_loss(velocity, x0, eps, sigma).mean()
"""

import torch
from torch import Tensor

from asymflow.errors import InputError
from asymflow.numerics import at_least_float32
from asymflow.sampling import time_shift

SIGMA_FLOOR = 0.05


def noise_level(normal: Tensor, mean: float = 0.8, std: float = 0.8, shift: float = 1.0) -> Tensor:
    """Logit-normal noise levels, `sigmoid(mean + std n)`, then shifted (arXiv 2605.12964).

    normal: standard normal numbers n, of any shape, such as (B,). The defaults are the paper's for ImageNet.
    """
    sigma = torch.sigmoid(mean + std * normal)
    return sigma if shift == 1 else time_shift(sigma, shift)


def noisy(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """`x_sigma = (1 - sigma) x0 + sigma eps` for x0, eps (B, ...) and sigma (B,)."""
    return torch.lerp(x0, eps, sigma.view(-1, *(1,) * (x0.ndim - 1)))


def without_some(labels: Tensor, null_label: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Labels (B,) of which a random `share` is replaced by `null_label`: "no class".

    Guidance needs it: it compares the velocity of a class with that of none, which is learned from these.
    """
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < share
    return labels.masked_fill(dropped, null_label)


def flow_matching_loss(velocity: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, floor: float = SIGMA_FLOOR) -> Tensor:
    """`((velocity - (eps - x0)) sigma / max(sigma, floor))^2`, the mean over each image (B,), in float32 or better.

    velocity, x0, eps: (B, ...); sigma: (B,). The error of an x0-prediction is divided by sigma in its velocity, and
    would dominate the loss near sigma = 0. Below `floor` the weight cancels this division (arXiv 2605.12964).
    Raises InputError unless there is one sigma for each image.
    """
    if sigma.shape != x0.shape[:1]:
        raise InputError(
            f"sigma must be one noise level for each of the {len(x0)} images, but its shape is {tuple(sigma.shape)}"
        )
    dtype = at_least_float32(velocity, x0, eps)
    error = (velocity.to(dtype) - (eps.to(dtype) - x0.to(dtype))).flatten(1).square().mean(1)
    sigma = sigma.to(at_least_float32(sigma))
    return error * (sigma / sigma.clamp(min=floor)).square()
