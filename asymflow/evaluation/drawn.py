"""Images of a model, drawn by a protocol: the same for any batch and any number of processes, beyond rounding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asymflow.color import oklab_to_rgb
from asymflow.errors import InputError
from asymflow.evaluation.protocol import Protocol
from asymflow.model import AsymFlow
from asymflow.precision import Precision, computing
from asymflow.sampling import generate


class Drawn:
    """A source of images, see images.py, that are drawn of a class-conditional model when they are read.

    guidance: options of `generate`: guidance, interval, orthogonal. method: the sampler, if the protocol names one of
    the user's own. size: (height, width), and num_classes: by default those of the backbone. label: the class of an
    image, from its number; by default the protocol's.
    """

    def __init__(
        self,
        flow: AsymFlow,
        protocol: Protocol,
        precision: Precision,
        guidance: dict[str, object],
        method: str | Callable | None = None,
        size: tuple[int, int] | None = None,
        num_classes: int | None = None,
        label: Callable[[int], int] | None = None,
    ):
        self.flow, self.protocol, self.precision = flow, protocol, precision
        self.size = size or tuple(n * flow.patch_size for n in flow.backbone.grid)
        self.num_classes = num_classes or flow.backbone.num_classes
        self.class_of = label or (lambda number: protocol.label(number, self.num_classes))
        self.options = guidance | dict(method=method or protocol.method, steps=protocol.steps, shift=protocol.shift)
        self.options |= dict(seed=protocol.seed, size=self.size, null_label=self.num_classes)

    def __len__(self) -> int:
        return self.protocol.num

    def label(self, number: int) -> int:
        """The class of an image, counted from the protocol's first."""
        return self.class_of(self.protocol.first + number)

    def draw(self, numbers: Sequence[int]) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of these numbers, counted from the protocol's first."""
        numbers = [self.protocol.first + number for number in numbers]
        with computing(self.flow, self.precision):
            images = generate(self.flow, list(map(self.class_of, numbers)), numbers, **self.options)
        return oklab_to_rgb(images) if self.flow.subspace.color_space == "oklab" else images

    def read(self, first: int, last: int) -> Tensor:
        images = self.draw(range(first, last))
        wrong = ~images.flatten(1).isfinite().all(1)
        if wrong.any():
            number = self.protocol.first + first + int(wrong.nonzero()[0])
            raise InputError(f"image {number}, of class {self.class_of(number)}, has numbers that are NaN or infinite")
        return quantized(images, self.protocol.quantize)


def quantized(images: Tensor, how: str) -> Tensor:
    """Images in [-1, 1] as uint8. how: "round" to the nearest value, or "floor" as ADM's script does."""
    values = (images.float() + 1) * 127.5
    return (values.round() if how == "round" else values.floor()).clamp(0, 255).to(torch.uint8)
