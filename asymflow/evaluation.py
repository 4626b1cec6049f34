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
EXTRACTORS = ("inception-v3-compat", "vgg16", CLASSIFIER)  # torch-fidelity's others run code that they download

Features = Callable[[Tensor], Tensor]
Statistics = dict[str, np.ndarray]
"""mu (F,) and sigma (F, F) of features, float64."""


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """A function from images (B, 3, H, W), uint8, to their features (B, F), float32, both on `device`.

    name: one of `EXTRACTORS`; with the features of "inception-v3-compat" the distance is the FID.
    weights: a file with the weights of the extractor; without, torch-fidelity downloads them. For "classifier" it is
        what `Classifier.save` wrote.
    Raises InputError if torch-fidelity is not installed, the name is another, or the weights cannot be had or used.
    """
    if name not in EXTRACTORS:
        raise InputError(f"the extractor must be one of {', '.join(EXTRACTORS)}, but it is {name!r}")
    try:
        from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric
    except ImportError:
        raise InputError("evaluation needs torch-fidelity, 0.4 or newer: pip install 'asymflow[train]'") from None
    if name == CLASSIFIER:
        register_classifier()
    elif weights is not None:
        files.read_pickle(weights)  # torch-fidelity would run what is in it: it may hold nothing but tensors
    layer = resolve_feature_layer_for_metric("fid", feature_extractor=name)
    options = {"feature_extractor_weights_path": None if weights is None else str(weights), "verbose": False}
    try:
        extractor = create_feature_extractor(name, [layer], cuda=False, **options).to(device)
    except OSError as e:
        raise InputError(f"the weights of {name} cannot be downloaded ({e}): give a file of them") from None
    except (RuntimeError, TypeError, AttributeError) as e:  # by which torch says that a state dict does not fit
        raise InputError(f"{weights} does not hold the weights of {name}: {str(e).splitlines()[0]}") from None
    return torch.no_grad()(lambda images: extractor(images)[0])


def register_classifier() -> None:
    """Make "classifier" a feature extractor of torch-fidelity, in this process.

    Then its other metrics can use it too: `calculate_metrics(..., feature_extractor="classifier",
    feature_extractor_weights_path=FILE)`.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class ClassifierFeatures(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path=None, **options):
            super().__init__(name, features_list)
            if feature_extractor_weights_path is None:
                raise InputError("the extractor classifier needs weights: the file that Classifier.save wrote")
            self.classifier = Classifier.load(feature_extractor_weights_path)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.classifier.features(images),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(CLASSIFIER, ClassifierFeatures)


def statistics(features: Tensor) -> Statistics:
    """Of features (n, F), n >= 2: their mean and covariance, in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.cpu().double())


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
