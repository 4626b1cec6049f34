"""Features of images, by torch-fidelity's extractors or by a small classifier."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from asymflow import opening
from asymflow.errors import InputError
from asymflow.evaluation.classifier import Classifier

CLASSIFIER = "classifier"


EXTRACTORS = ("inception-v3-compat", "vgg16", CLASSIFIER)  # torch-fidelity has others, which run downloaded code


Features = Callable[[Tensor], Tensor]


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """A function from images (B, 3, H, W), uint8, to their features (B, F), float32, both on `device`.

    name: one of `EXTRACTORS`; with the features of "inception-v3-compat" the distance is the FID.
    weights: a file with the weights of the extractor; by default torch-fidelity downloads them. For "classifier" the
        file that `Classifier.save` wrote.
    Raises InputError if torch-fidelity is not installed, the name is unknown, or the weights cannot be downloaded or
    used.
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
        opening.read_pickle(weights)  # refuses code, which torch-fidelity would run when it loads the file
    layer = resolve_feature_layer_for_metric("fid", feature_extractor=name)
    options = {"feature_extractor_weights_path": None if weights is None else str(weights), "verbose": False}
    try:
        extractor = create_feature_extractor(name, [layer], cuda=False, **options).to(device)
    except OSError as e:
        raise InputError(f"the weights of {name} cannot be downloaded ({e}): give a file of them") from None
    except (RuntimeError, TypeError, AttributeError) as e:  # torch raises these if a state dict does not fit
        raise InputError(f"{weights} does not hold the weights of {name}: {str(e).splitlines()[0]}") from None
    return torch.no_grad()(lambda images: extractor(images)[0])


def register_classifier() -> None:
    """Register "classifier" as a feature extractor of torch-fidelity, in this process.

    Other metrics of torch-fidelity can then use it too: `calculate_metrics(..., feature_extractor="classifier",
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
