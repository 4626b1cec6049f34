"""Oklab (Ottosson 2020), the colour space in which pixels continue FLUX.2's latents (arXiv 2605.12964).

Equal distances in Oklab look about equally large, and lightness is an axis of its own, so squared errors in Oklab
measure what the eye sees. Everything is computed in float32, or float64 if given, whatever autocast and TF32 settings
say.
"""

import torch
from torch import Tensor

from asymflow.numerics import at_least_float32, no_autocast

# From https://bottosson.github.io/posts/oklab. The first matrix maps linear sRGB to the responses of the eye's cones
# (LMS), the second maps their cube roots to lightness L, green-red a and blue-yellow b. The inverses are computed,
# because the published ones are rounded.
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
MEAN, STD = (0.56, 0.0, 0.01), 0.16  # the normalization that the published models were trained with
TINY = 1e-9  # see `cube_root`


def rgb_to_oklab(images: Tensor) -> Tensor:
    """Pixels (..., 3, H, W), sRGB in [-1, 1], to normalized Oklab, `(oklab - (0.56, 0, 0.01)) / 0.16`.

    Returns the same shape in float32, or float64 if given. Values outside of [-1, 1] are converted too: the curves are
    extended as odd functions, so that `oklab_to_rgb` is the inverse everywhere. Differentiable, with finite gradients.
    """
    with no_autocast(images):
        images = images.to(at_least_float32(images))
        lab = mix(cube_root(mix(linear_from_srgb((images + 1) / 2), RGB_TO_LMS)), LMS_TO_LAB)
        return torch.stack([(c - mean) / STD for c, mean in zip(lab.unbind(-3), MEAN, strict=True)], dim=-3)


def oklab_to_rgb(images: Tensor) -> Tensor:
    """Normalized Oklab (..., 3, H, W) to sRGB: the inverse of `rgb_to_oklab`; every 8-bit colour comes back exactly.

    Returns the same shape in float32, or float64 if given. Colours that no screen can show are outside of [-1, 1], and
    not clamped. Differentiable, with finite gradients.
    """
    with no_autocast(images):
        images = images.to(at_least_float32(images))
        lab = torch.stack([c * STD + mean for c, mean in zip(images.unbind(-3), MEAN, strict=True)], dim=-3)
        return 2 * srgb_from_linear(mix(mix(lab, LAB_TO_LMS) ** 3, LMS_TO_RGB)) - 1


def clamp_to_gamut(images: Tensor) -> Tensor:
    """Normalized Oklab (..., 3, H, W), with its sRGB values clamped to what a screen can show."""
    return rgb_to_oklab(oklab_to_rgb(images).clamp(-1, 1))


def mix(images: Tensor, matrix: list[list[float]]) -> Tensor:
    """Multiply every pixel by a 3 x 3 matrix. By sums, because matrix products may be rounded to TF32."""
    x, y, z = images.unbind(-3)
    return torch.stack([a * x + b * y + c * z for a, b, c in matrix], dim=-3)


def cube_root(x: Tensor) -> Tensor:
    """The cube root, of negative numbers too, with a finite slope at 0.

    The true cube root has an infinite slope at 0, and black pixels would make every gradient NaN. This function follows
    it down to |x| of about 1e-9, and goes straight through 0 with slope 1e6. The smallest x of an 8-bit colour other
    than black is 1.5e-5, where the two differ by a part in 10^9. Their cubes differ by at most 5e-10 anywhere, which
    changes a channel of the image by at most 1e-7, as much as the rounding of float32.
    """
    return x * (x * x + TINY**2) ** (-1 / 3)


# The curves of sRGB, extended as odd functions. Both are written as x times a factor, which has the right slope at 0,
# where |x| and sign(x) have none. Near 0 the power is not used, but its gradient is still computed: the clamps keep it
# finite, because 0 times infinity would be NaN.
def linear_from_srgb(x: Tensor) -> Tensor:
    size = x.abs().clamp(min=0.04045)
    return x * torch.where(x.abs() <= 0.04045, 1 / 12.92, ((size + 0.055) / 1.055) ** 2.4 / size)


def srgb_from_linear(x: Tensor) -> Tensor:
    size = x.abs().clamp(min=0.0031308)
    return x * torch.where(x.abs() <= 0.0031308, 12.92, (1.055 * size ** (1 / 2.4) - 0.055) / size)
