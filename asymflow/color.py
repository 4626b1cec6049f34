"""Oklab (Ottosson 2020), the colour space in which pixels continue FLUX.2's latents (arXiv 2605.12964).

Equal distances in Oklab look about equally large, and lightness is an axis of its own: squared errors there count what
the eye sees. Everything is computed in float32, or float64 if given, whatever autocast and TF32 settings say.
"""

import torch
from torch import Tensor

from asymflow.numerics import at_least_float32, no_autocast

# https://bottosson.github.io/posts/oklab: linear sRGB to the responses of the eye's cones (LMS), and their cube roots
# to lightness L, green-red a and blue-yellow b. The inverses are computed here, so that they are inverses to the last
# digit; the published ones are rounded.
RGB_TO_LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
LMS_TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]
LMS_TO_RGB = torch.tensor(RGB_TO_LMS, dtype=torch.float64).inverse().tolist()
LAB_TO_LMS = torch.tensor(LMS_TO_LAB, dtype=torch.float64).inverse().tolist()
MEAN, STD = (0.56, 0.0, 0.01), 0.16  # as the published models were trained
TINY = 1e-9  # see `cube_root`


def rgb_to_oklab(images: Tensor) -> Tensor:
    """Pixels (..., 3, H, W), sRGB in [-1, 1], to normalized Oklab, `(oklab - (0.56, 0, 0.01)) / 0.16`.

    Returns the same shape in float32, or float64 if given. Values outside of [-1, 1] are converted as well, by the odd
    extension of the curves; `oklab_to_rgb` is the inverse everywhere. Differentiable, with finite gradients.
    """
    with no_autocast(images):
        images = images.to(at_least_float32(images))
        lab = mix(cube_root(mix(linear_from_srgb((images + 1) / 2), RGB_TO_LMS)), LMS_TO_LAB)
        return torch.stack([(c - mean) / STD for c, mean in zip(lab.unbind(-3), MEAN, strict=True)], dim=-3)


def oklab_to_rgb(images: Tensor) -> Tensor:
    """Normalized Oklab (..., 3, H, W) to sRGB: the inverse of `rgb_to_oklab`; every 8-bit colour comes back exactly.

    Returns the same shape in float32, or float64 if given. Colours that no screen can show come out beyond [-1, 1], and
    are not clamped. Differentiable, with finite gradients.
    """
    with no_autocast(images):
        images = images.to(at_least_float32(images))
        lab = torch.stack([c * STD + mean for c, mean in zip(images.unbind(-3), MEAN, strict=True)], dim=-3)
        return 2 * srgb_from_linear(mix(mix(lab, LAB_TO_LMS) ** 3, LMS_TO_RGB)) - 1


def clamp_to_gamut(images: Tensor) -> Tensor:
    """Normalized Oklab (..., 3, H, W) to the colours nearest in sRGB, channel by channel, that a screen can show."""
    return rgb_to_oklab(oklab_to_rgb(images).clamp(-1, 1))


def mix(images: Tensor, matrix: list[list[float]]) -> Tensor:
    """A 3 x 3 matrix times every pixel. By sums, since matrix products may be allowed to round to TF32."""
    x, y, z = images.unbind(-3)
    return torch.stack([a * x + b * y + c * z for a, b, c in matrix], dim=-3)


def cube_root(x: Tensor) -> Tensor:
    """The cube root, of negative numbers too, with a finite slope at 0.

    The slope of the true one is infinite there, and black pixels would make every gradient NaN. This one follows it
    down to |x| of 1e-9 or so and then goes straight through 0, with the slope 1e6. The smallest x of an 8-bit colour
    that is not black is 1.5e-5, where the two differ by a part in 10^9; nowhere do their cubes differ by more than
    5e-10, which moves a channel of the image in [-1, 1] by 1e-7 at most, as much as the rounding of float32.
    """
    return x * (x * x + TINY**2) ** (-1 / 3)


# The curves of sRGB, odd around 0. Both are written as x times a factor: that has the right slope at 0, where |x| or
# sign(x) have none. The clamps keep the power, which is not used there, from an infinite slope that would become NaN.
def linear_from_srgb(x: Tensor) -> Tensor:
    size = x.abs().clamp(min=0.04045)
    return x * torch.where(x.abs() <= 0.04045, 1 / 12.92, ((size + 0.055) / 1.055) ** 2.4 / size)


def srgb_from_linear(x: Tensor) -> Tensor:
    size = x.abs().clamp(min=0.0031308)
    return x * torch.where(x.abs() <= 0.0031308, 12.92, (1.055 * size ** (1 / 2.4) - 0.055) / size)
