"""The Fréchet distance between samples and data, by torch-fidelity. With Inception's features it is the FID."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.evaluation.moments import Moments, Statistics


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of features (n, F), n >= 2, in float64."""
    moments = Moments()
    moments.add(features)
    return moments.statistics()


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """`|mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2))` (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


class Target:
    """A reference that many samples are held against: each distance then takes one decomposition of a matrix.

    device: where that is done.
    """

    def __init__(self, reference: Statistics, device: torch.device | str = "cpu"):
        self.mu, self.sigma = (torch.from_numpy(reference[name]).to(device) for name in ("mu", "sigma"))
        self.root = power(self.sigma, 0.5)

    def distance(self, samples: Statistics) -> tuple[float, Callable[[Tensor], Tensor]]:
        """The Fréchet distance of the samples, and their influence: how much each of them moves it, to first order.

        With the samples moved a little towards one feature x, the distance changes in proportion to

            2 (mu - mu') (x - mu)  +  (x - mu)^T (1 - T) (x - mu)  -  tr((1 - T) sigma),

        where T = sigma'^(1/2) (sigma'^(1/2) sigma sigma'^(1/2))^(-1/2) sigma'^(1/2) maps one normal distribution to the
        other. The standard deviation of these numbers, over the square root of their count, is the standard error that
        a bootstrap over the samples would find. Directions in which the samples do not vary have no influence.
        """
        mu, sigma = (torch.from_numpy(samples[name]).to(self.mu.device) for name in ("mu", "sigma"))
        values, vectors = eigen(self.root @ sigma @ self.root)
        moved = mu - self.mu
        distance = moved @ moved + sigma.trace() + self.sigma.trace() - 2 * values.sqrt().sum()
        inverse = torch.where(values > 0, values.clamp(min=1e-300) ** -0.5, 0)
        curve = torch.eye(len(mu), dtype=mu.dtype, device=mu.device)
        curve = curve - self.root @ (vectors * inverse) @ vectors.mT @ self.root
        mean = (curve * sigma).sum()

        def influence(features: Tensor) -> Tensor:
            """Of each of the features (n, F), (n,)."""
            centered = features.to(mu.device).double() - mu
            return (centered @ (2 * moved) + ((centered @ curve) * centered).sum(1) - mean).cpu()

        return distance.item(), influence


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix without negative ones; what is zero but for rounding is 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(kept, values, 0), vectors


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A positive power of such a matrix."""
    values, vectors = eigen(matrix)
    return (vectors * values**exponent) @ vectors.mT


def save_statistics(path: str | Path, of: Statistics, about: str) -> None:
    """Write an npz file with mu and sigma, as others do too, and `about`: a description of the data."""
    with files.replacing(path) as beside:
        np.savez(beside, **of, about=about)


def load_statistics(path: str | Path) -> tuple[Statistics, str]:
    """Read (statistics, about) from an npz file, such as those of ADM and JiT for ImageNet, where `about` is empty.

    Raises InputError if the file is damaged, or mu and sigma are not (F,) and (F, F) and finite.
    """
    arrays = opening.read_arrays(path, ("mu", "sigma", "about"))
    with opening.reading(path, "an npz file with mu and sigma"):
        mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        about = str(arrays.get("about", ""))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path} has mu {mu.shape} and sigma {sigma.shape}, expected (F,) and (F, F), all finite")
    return {"mu": mu, "sigma": sigma}, about
