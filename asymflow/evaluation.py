"""The Fréchet distance between samples and data (FID, if the features are Inception's), with torch-fidelity's parts.

features = load_extractor("inception-v3-compat")
distance = frechet_distance(statistics(features(samples)), load_statistics("reference.npz"))
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asymflow import files
from asymflow.classifier import Classifier
from asymflow.errors import InputError

CLASSIFIER = "classifier"

Features = Callable[[Tensor], Tensor]
Statistics = dict[str, np.ndarray]
"""mu (F,) and sigma (F, F) of features, float64."""


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """A function from images (B, 3, H, W), uint8, to their features (B, F), float32, both on `device`.

    name: one that torch-fidelity knows, such as "inception-v3-compat", whose features make the distance the FID; or
        "classifier", for a `Classifier` in the file `weights`.
    weights: a file with the weights of the extractor; without, torch-fidelity downloads them.
    Raises InputError if torch-fidelity is not installed, does not know the name, or cannot use or find the weights.
    """
    if name == CLASSIFIER:
        return Classifier.load(weights).to(device).features
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as KNOWN
        from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric
    except ImportError:
        raise InputError("evaluation needs torch-fidelity 0.4: pip install 'asymflow[train]'") from None
    if name not in KNOWN:
        raise InputError(f"the extractor must be one of {', '.join([*KNOWN, CLASSIFIER])}, but it is {name!r}")
    if weights is not None:
        files.read_pickle(weights)  # torch-fidelity would run what is in it: it may hold nothing but tensors
    options = {"feature_extractor_weights_path": weights and str(weights), "verbose": False}
    layer = resolve_feature_layer_for_metric("fid", feature_extractor=name)
    try:
        extractor = create_feature_extractor(name, [layer], cuda=False, **options).to(device)
    except OSError as e:
        raise InputError(f"the weights of {name} cannot be downloaded ({e}): give a file of them") from None
    except (RuntimeError, TypeError, AttributeError) as e:
        raise InputError(f"{weights} does not hold the weights of {name}: {str(e).splitlines()[0]}") from None
    return torch.no_grad()(lambda images: extractor(images)[0])


def statistics(features: Tensor) -> Statistics:
    """Of features (n, F), n >= 2: their mean and covariance, in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double().cpu())


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """`|mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2))` (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def save_statistics(path: str | Path, of: Statistics, about: str) -> None:
    """As an npz file with mu and sigma, which others write too, and `about`: what they are statistics of."""
    with files.replacing(path) as beside:
        np.savez(beside, **of, about=about)


def load_statistics(path: str | Path) -> tuple[Statistics, str]:
    """mu and sigma from an npz file, such as those that ADM and JiT published for ImageNet, and what they are about."""
    try:
        with np.load(files.existing_file(path), allow_pickle=False) as arrays:
            mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            about = str(arrays["about"]) if "about" in arrays else ""
    except InputError:
        raise
    except Exception as e:  # of many types, for damage and for other content
        raise InputError(f"{path} is no npz file with mu and sigma ({type(e).__name__}: {e})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path} has mu {mu.shape} and sigma {sigma.shape}, expected (F,) and (F, F), all finite")
    return {"mu": mu, "sigma": sigma}, about
