"""A small convolutional classifier, whose features replace Inception's in a Fréchet distance.

It is for images unlike any that Inception was trained on (icons, sprites, generated shapes), and for places where its
weights cannot be downloaded. Distances in its features compare models trained on the same data; they are not FIDs.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asymflow import files, opening
from asymflow.errors import InputError

FORMAT = "asymflow classifier 1"


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a 1 x 1 shortcut, at half the resolution."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.shortcut = nn.Conv2d(inside, outside, 1)
        self.first = nn.Sequential(nn.GroupNorm(8, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(8, outside), nn.SiLU(), nn.Conv2d(outside, outside, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2)
        return self.shortcut(x) + self.second(self.first(x))


class Classifier(nn.Module):
    """Logits of `num_classes` for images (B, 3, H, W), uint8, of any size that 16 divides."""

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        self.num_classes, self.width = num_classes, width
        widths = [width, 2 * width, 3 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip([width, *widths], widths, strict=False)))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def pooled(self, images: Tensor) -> Tensor:
        x = self.stem(images.float() / 127.5 - 1)
        return F.silu(self.norm(self.blocks(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pooled(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The input of the last layer, (B, 4 width), float32."""
        return self.pooled(images)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        about = {"format_of": FORMAT, "num_classes": str(self.num_classes), "width": str(self.width)}
        files.write_tensors(path, self.state_dict(), about)

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """Read what `save` wrote. Returns it in eval mode. Raises InputError if the file is damaged or another."""
        tensors, about = opening.read_tensors(path)
        if about.get("format_of") != FORMAT:
            raise InputError(f"{path} is not a classifier of this package: make one with Classifier.save")
        with opening.reading(path, "a whole classifier"), torch.device("meta"):
            classifier = cls(int(about["num_classes"]), int(about["width"]))
        opening.check_tensors(tensors, {k: v.shape for k, v in classifier.state_dict().items()}, str(path))
        opening.check_numbers(tensors, path)
        classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return classifier.requires_grad_(False).eval()
