"""Flow matching: the loss of the velocity, the same whatever a model predicts."""

import torch
from torch import Tensor

from asymflow.sampling import time_shift

SIGMA_FLOOR = 0.05


def noise_level(normal: Tensor, mean: float = 0.8, std: float = 0.8, shift: float = 1.0) -> Tensor:
    """Logit-normal noise levels, `sigmoid(mean + std n)`, then shifted by `time_shift` (arXiv 2605.12964).

    normal: n, standard normal numbers of any shape, which the result has too.
    """
    sigma = torch.sigmoid(mean + std * normal)
    return sigma if shift == 1 else time_shift(sigma, shift)


def noisy(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """`x_sigma = (1 - sigma) x0 + sigma eps` for x0, eps (B, ...) and sigma (B,)."""
    return torch.lerp(x0, eps, sigma.view(-1, *(1,) * (x0.ndim - 1)))


def flow_matching_loss(velocity: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, floor: float = SIGMA_FLOOR) -> Tensor:
    """`((velocity - (eps - x0)) sigma / max(sigma, floor))^2`, the mean over each image (B,), in float32 or better.

    velocity, x0, eps: (B, ...); sigma: (B,). The error of an x0-prediction is divided by sigma in its velocity, and
    would dominate the loss near sigma = 0. Below `floor` the weight cancels this division (arXiv 2605.12964).
    """
    error = (velocity - (eps - x0)).flatten(1).square().mean(1)
    return error * (sigma / sigma.clamp(min=floor)).square()
