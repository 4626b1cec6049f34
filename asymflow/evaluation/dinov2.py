"""DINOv2 from a folder of the package `transformers`: as REPA and the Fréchet distance of EDM2 use it."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asymflow import opening
from asymflow.errors import InputError

CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}  # in the package transformers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; DINOv2 expects pixels normalized by them
SIDE = 224  # pixels, to which images are resized


class ClassToken(nn.Module):
    """The class token after the last norm, (B, width), of images (B, 3, H, W), uint8: the features of FD-DINOv2.

    Images are resized to 224 pixels as in EDM2 (Karras et al. 2024, arXiv 2312.02696): bicubic, with antialiasing, and
    not rounded. There the network is ViT-L/14 without registers, facebook/dinov2-large.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.model = load(folder)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        pixels = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True) / 255
        return (self.model((pixels - self.mean) / self.std).last_hidden_state[:, 0],)


def load(folder: Path, classes: Mapping[str, str] = CLASSES, title: str = "DINOv2") -> nn.Module:
    """The DINOv2 in a folder, in eval mode and without gradients. Raises InputError.

    classes: for another model, its class in transformers by its model_type. title: what it is called.
    """
    name = class_name(folder, classes, title)
    try:
        import transformers
    except ImportError:
        raise InputError(f'{title} needs the package transformers: pip install -e ".[repa]"') from None
    # No progress bars, and no table of missing weights: these raise an error below.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        model, report = getattr(transformers, name).from_pretrained(folder, **options)
    except Exception as e:  # a damaged file can raise many types of errors
        reason = " ".join(str(e).split())
        raise InputError(f"{folder} cannot be loaded as a {name} ({type(e).__name__}: {reason[:200]})") from None
    misfits = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if misfits:  # transformers has initialized them at random
        raise InputError(f"{folder} lacks weights of a {name}, or has them in another shape: {', '.join(misfits[:5])}")
    return model.eval().requires_grad_(False)


def class_name(folder: Path, classes: Mapping[str, str] = CLASSES, title: str = "DINOv2") -> str:
    """The name of the class in `transformers` for a folder. InputError if it has no such model in safetensors."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give that of a {title}, downloaded as from Hugging Face")
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json: give the folder of a {title} of transformers")
    try:
        kind = opening.read_json(folder / "config.json")["model_type"]
    except (ValueError, KeyError):
        raise InputError(f"{folder / 'config.json'} is not the configuration of a model of transformers") from None
    if not isinstance(kind, str) or kind not in classes:
        raise InputError(f"{folder} is no {title}: its model_type is {kind!r}, expected {' or '.join(classes)}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no weights in safetensors, and pickles are not read: convert it with "
            f'transformers.{classes[kind]}.from_pretrained("{folder}").save_pretrained("NEW FOLDER")'
        )
    return classes[kind]
