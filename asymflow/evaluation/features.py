"""Features of images, by torch-fidelity's extractors, by DINOv2, or by a small classifier."""

from pathlib import Path

import torch
from torch import Tensor, nn

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.evaluation import assets
from asymflow.evaluation.classifier import Classifier

CLASSIFIER, DINOV2 = "classifier", "dinov2"
LAYERS = {  # of torch-fidelity's extractors: that of the features, then that of the logits if there is one
    "inception-v3-compat": ("2048", "logits_unbiased"),
    "vgg16": ("fc2_relu",),
    CLASSIFIER: ("pooled", "logits"),
}
EXTRACTORS = (*LAYERS, DINOV2)  # torch-fidelity has others, which run downloaded code


class Extractor:
    """A function from images (B, 3, H, W), uint8, to their features (B, F), float32, on the device of its weights.

    name: one of `EXTRACTORS`. weights: the SHA-256 checksum of its file. has_logits: whether `both` returns logits.
    """

    def __init__(self, name: str, weights: str, module: nn.Module, device: torch.device | str):
        self.name, self.weights, self.device = name, weights, torch.device(device)
        self.module = module.requires_grad_(False).eval().to(device)
        self.has_logits = len(LAYERS.get(name, ())) == 2

    def __call__(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    @torch.no_grad()
    def both(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features, and the logits (B, classes) of a network that classifies, else None."""
        features, *logits = self.module(images.to(self.device))
        return features.float(), logits[0].float() if logits else None

    def width(self, size: int = 32) -> int:
        """The number of features. size: of the image that it is tried with."""
        return self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]


def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name. With the features of "inception-v3-compat" the Fréchet distance is the FID.

    name: one of `EXTRACTORS`.
    weights: a file with the weights of the extractor. For "classifier" the file that `Classifier.save` wrote; for
        "dinov2" a folder of transformers' DINOv2. By default those of torch-fidelity are looked for, and downloaded.
    Raises InputError if torch-fidelity is not installed, the name is unknown, or the weights cannot be had or used.
    """
    if name not in EXTRACTORS:
        raise InputError(f"the extractor must be one of {', '.join(EXTRACTORS)}, but it is {name!r}")
    if name == DINOV2:
        from asymflow.evaluation.dinov2 import ClassToken

        if weights is None:
            raise InputError("the extractor dinov2 needs weights: the folder of a DINOv2 of transformers")
        return Extractor(name, digest(Path(weights)), ClassToken(Path(weights)), device)
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError:
        raise InputError("evaluation needs torch-fidelity, 0.4 or newer: pip install 'asymflow[train]'") from None
    if name == CLASSIFIER:
        if weights is None:
            raise InputError("the extractor classifier needs weights: the file that Classifier.save wrote")
        register_classifier()
    else:
        weights = weights or assets.find(name)
        opening.read_pickle(weights)  # refuses code, which torch-fidelity would run when it loads the file
    options = {"feature_extractor_weights_path": str(weights), "verbose": False}
    try:
        module = create_feature_extractor(name, list(LAYERS[name]), cuda=False, **options)
    except (RuntimeError, TypeError, AttributeError) as e:  # torch raises these if a state dict does not fit
        raise InputError(f"{weights} does not hold the weights of {name}: {str(e).splitlines()[0]}") from None
    return Extractor(name, files.sha256(weights), module, device)


def digest(folder: Path) -> str:
    """The checksum of the weights in a folder of transformers."""
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return files.sha256(found[0]) if len(found) == 1 else "+".join(files.sha256(file)[:8] for file in found)


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
            self.classifier = Classifier.load(feature_extractor_weights_path)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            pooled = self.classifier.features(images)
            found = {"pooled": pooled, "logits": self.classifier.head(pooled)}
            return tuple(found[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return LAYERS[CLASSIFIER]

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(CLASSIFIER, ClassifierFeatures)
