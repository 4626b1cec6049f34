"""The Fréchet distance between samples and data, by torch-fidelity. With Inception's features it is the FID."""

from pathlib import Path

import numpy as np
from torch import Tensor

from asymflow import files, opening
from asymflow.errors import InputError

Statistics = dict[str, np.ndarray]


"""mu (F,) and sigma (F, F) of features, float64."""


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance of features (n, F), n >= 2, in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.cpu().double())


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """`|mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2))` (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


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
