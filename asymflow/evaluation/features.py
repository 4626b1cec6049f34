"""Features of images, by torch-fidelity's extractors, by DINOv2, or by a small classifier."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from asymflow import files, opening
from asymflow.data.shapes import COLORS, COUNTS
from asymflow.errors import InputError
from asymflow.evaluation import assets, measures, oracle
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.images import Source

CLASSIFIER, DINOV2, ORACLE = "classifier", "dinov2", "oracle"
LAYERS = {  # of torch-fidelity's extractors: that of the features, then that of the logits if there is one
    "inception-v3-compat": ("2048", "logits_unbiased"),
    "vgg16": ("fc2_relu",),
    CLASSIFIER: ("pooled", "logits"),
}
EXTRACTORS = (*LAYERS, DINOV2, ORACLE)  # torch-fidelity has others, which run downloaded code


class Extractor:
    """A function from images (B, 3, H, W), uint8, to their features (B, F), float32, on the device of its weights.

    name: one of `EXTRACTORS`. weights: the SHA-256 checksum of its file. has_logits: whether `both` returns logits.
    """

    def __init__(self, name: str, weights: str, module: nn.Module, device: torch.device | str):
        self.name, self.weights, self.device = name, weights, torch.device(device)
        self.module = module.requires_grad_(False).eval().to(device)
        self.has_logits = len(LAYERS.get(name, ())) == 2
        self.columns: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    @torch.no_grad()
    def both(self, images: Tensor, labels: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """The features, and the logits (B, classes) of a network that classifies, else None."""
        features, *logits = self.module(images.to(self.device))
        return features.float(), logits[0].float() if logits else None

    def width(self, size: int = 32) -> int:
        """The number of features. size: of the image that it is tried with."""
        return self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]


class Oracle:
    """In place of an extractor: what the oracle of `asymflow.data.shapes` finds in pictures, and whether it is right.

    columns: what it finds of a picture. count: whether there are one to three things. color, shape: whether all have
    those of the class. right: the three together. sharpness, residual: see `oracle.Fit`; -1 if no shape is recognized.
    """

    name, weights, has_logits, columns = ORACLE, "none", False, tuple(measures.ORACLE)

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def both(self, images: Tensor, labels: Sequence[int] | None = None) -> tuple[Tensor, None]:
        """What it finds (B, 6), float32. images: (B, 3, size, size), uint8, of the classes `labels`. InputError."""
        if labels is None:
            raise InputError("the oracle needs the class of each image: give a model, or OUT/images of asymflow sample")
        return torch.tensor([self.one(*pair) for pair in zip(images.cpu(), labels, strict=True)]), None

    def one(self, image: Tensor, label: int) -> list[float]:
        fit = oracle.fit_scene(image)
        reading = fit.reading
        shape, color = divmod(label, len(COLORS))
        right = [1 <= reading.count <= len(COUNTS), reading.color == color, reading.shape == shape]
        detail = [-1.0, -1.0] if math.isnan(fit.blur) else [fit.sharpness, fit.residual]
        return [*map(float, right), float(all(right)), *detail]

    def width(self, size: int = 32) -> int:
        return len(self.columns)


PATCH = 299  # pixels: the side of the middle of an image, for a Fréchet distance that sees its details


def reader(extractor: Extractor | Oracle, source: Source, patch: bool = False, clip: Callable | None = None):
    """A function from images of `source` (n, 3, H, W), uint8, and their numbers to what is kept of them, by name.

    features, and logits if the extractor has some. patch: also middles, the features of the middle of each image, at
    its full resolution (Lin et al. 2024, arXiv 2402.13929). clip: also fit, what `clip.Clip` finds.
    Raises InputError if images are smaller than that middle.
    """
    height, width = source.size
    if patch and min(height, width) < PATCH:
        raise InputError(f"a patch FID is of {PATCH} x {PATCH} pixels, but the images have {width} x {height}")

    def read(images: Tensor, numbers: range) -> dict[str, Tensor]:
        labels = [source.label(number) for number in numbers] if getattr(source, "label", None) else None
        features, logits = extractor.both(images, labels)
        found = {"features": features} | ({} if logits is None else {"logits": logits})
        if patch:
            top, left = (height - PATCH) // 2, (width - PATCH) // 2
            found["middles"] = extractor(images[:, :, top : top + PATCH, left : left + PATCH])
        if clip:
            found["fit"] = clip(images, [source.caption(number) for number in numbers])
        return found

    return read


def load_extractor(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor | Oracle:
    """The extractor of a name. With the features of "inception-v3-compat" the Fréchet distance is the FID.

    name: one of `EXTRACTORS`.
    weights: a file with the weights of the extractor. For "classifier" the file that `Classifier.save` wrote; for
        "dinov2" a folder of transformers' DINOv2. By default those of torch-fidelity are looked for, and downloaded.
    Raises InputError if torch-fidelity is not installed, the name is unknown, or the weights cannot be had or used.
    """
    if name not in EXTRACTORS:
        raise InputError(f"the extractor must be one of {', '.join(EXTRACTORS)}, but it is {name!r}")
    if name == ORACLE:
        return Oracle(device)
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
    """A checksum of the files in a folder of transformers that its model, processor and tokenizer are made of."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [file for file in inside if file.suffix in (".safetensors", ".json", ".txt") and file.is_file()]
    return hashlib.sha256("".join(f"{file.name} {files.sha256(file)}\n" for file in kept).encode()).hexdigest()


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
