"""Pictures with one fault each, which show what each measure sees."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from asymflow.evaluation.oracle import blurred
from toy.paper.data import PATCH


def blur(images: Tensor, radius: float) -> Tensor:
    """images (n, 3, H, W), uint8, as all here. radius: the standard deviation, in pixels."""
    return rounded(torch.stack([blurred(image.float(), radius) for image in images]))


def noise(images: Tensor, levels: float) -> Tensor:
    return rounded(images + levels * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


def patches(images: Tensor, levels: float) -> Tensor:
    """Each patch is too dark or too bright by a number of its own, of this standard deviation."""
    n, _, height, width = images.shape
    shift = levels * torch.randn(n, 1, height // PATCH, width // PATCH, generator=torch.Generator().manual_seed(0))
    return rounded(images + shift.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3))


def strangers(images: Tensor, share: float) -> Tensor:
    """Some pictures are replaced by the next one, which mostly is of another class."""
    replaced = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < share
    return torch.where(replaced[:, None, None, None], images.roll(1, 0), images)


def rounded(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # in words, and what does it
    "whole": ("other pictures", lambda images: images),
    "blur-0.5": ("blurred by 0.5 pixels", partial(blur, radius=0.5)),
    "blur-1": ("blurred by 1 pixel", partial(blur, radius=1.0)),
    "noise-5": ("noise of 5 grey levels", partial(noise, levels=5.0)),
    "noise-15": ("noise of 15 grey levels", partial(noise, levels=15.0)),
    "patches-3": ("patches too dark or bright by 3 grey levels", partial(patches, levels=3.0)),
    "patches-10": ("patches too dark or bright by 10 grey levels", partial(patches, levels=10.0)),
    "strangers-10": ("a tenth of other classes", partial(strangers, share=0.1)),
}
