"""Aspect-ratio buckets: a short list of image sizes with about the same area.

All images of a bucket have one size, so they can form a batch, and little of a photograph has to be cropped away; a
square crop would cut away a third of a 3:2 photograph.
"""

import math

import numpy as np
from PIL import Image

from asymflow.errors import InputError

ENLARGED = 2  # the largest factor by which a side is enlarged: beyond it, most detail would be the resize filter's


def buckets(area: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """All (height, width) of about `area` pixels, from the widest to the tallest.

    For each shorter side that is a multiple of `multiple` and at most sqrt(area), the longer side is the multiple that
    brings the area closest to `area` (the smaller of two equally close ones). Sizes with longer / shorter above
    `max_aspect` are left out; the others come both upright and lying. So areas differ from `area` by at most the
    fraction multiple / (2 longer). Example: 1024^2 pixels, multiples of 16 and aspect ratios up to 2 make 37 buckets,
    from 736 x 1424 over 1024 x 1024 to 1424 x 736, all within 0.7 % of the area. Raises InputError if there is none.
    """
    upright = set()
    for short in range(multiple, math.isqrt(area) + 1, multiple):
        step = short * multiple
        below = area // step
        long = multiple * (below if 2 * (area - below * step) <= step else below + 1)
        if long <= max_aspect * short:
            upright |= {(long, short), (short, long)}
    if not upright:
        raise InputError(
            f"there is no size of about {area} pixels with sides that are multiples of {multiple} and an aspect ratio "
            f"of at most {max_aspect:g}: take a larger one"
        )
    return sorted(upright, key=lambda size: size[0] / size[1])


def nearest_bucket(sizes: list[tuple[int, int]], width: int, height: int) -> int:
    """The index of the bucket whose aspect ratio is nearest to that of an image, compared by logarithms."""
    aspects = np.array([w / h for h, w in sizes])
    return int(abs(np.log(aspects * height / width)).argmin())


def enlargement(bucket: tuple[int, int], width: int, height: int) -> float:
    """The factor by which an image of this size is enlarged to fill the bucket; below 1 it is reduced."""
    return max(bucket[0] / height, bucket[1] / width)


def share_kept(bucket: tuple[int, int], width: int, height: int) -> float:
    """The part of an image of this size that fills the bucket; the rest is cropped away."""
    return bucket[0] * bucket[1] / (width * height * enlargement(bucket, width, height) ** 2)


def fill(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """Crop the centre of an RGB image to the bucket's aspect ratio, and resize it by an antialiased Lanczos filter.

    Crop and resize are one step, so the centre is exact to a fraction of a pixel. An image of the bucket's size is not
    changed.
    """
    height, width = bucket
    scale = enlargement(bucket, *image.size)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (max(left, 0), max(top, 0), min(image.width - left, image.width), min(image.height - top, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
