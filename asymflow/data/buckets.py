"""Aspect-ratio buckets: a short list of image sizes of about one area, so that every photograph keeps most of itself.

Images of one bucket have one size, and make a batch; a square crop of all would cut away a third of a 3:2 photograph.
"""

import math

import numpy as np
from PIL import Image

from asymflow.errors import InputError

ENLARGED = 2  # at most, along each side: below a quarter of the area, most of what is seen would be the filter


def buckets(area: int, multiple: int, max_aspect: float) -> list[tuple[int, int]]:
    """All (height, width) of about `area` pixels, from the widest to the tallest.

    Every shorter side that is a multiple of `multiple` and at most sqrt(area) is there, with the longer side, a
    multiple too, that brings the area closest to `area` (of two as close, the smaller), if longer / shorter is at most
    `max_aspect`; and each also lying on its other side. So areas differ from `area` by no more than
    multiple / (2 longer) of it. 1024^2 pixels, multiples of 16 and aspect ratios up to 2 make 37 buckets, from
    736 x 1424 over 1024 x 1024 to 1424 x 736, all within 0.7 % of the area.
    Raises InputError if there is none.
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
    """The index of the bucket whose aspect ratio is nearest to that of an image, in its logarithm."""
    aspects = np.array([w / h for h, w in sizes])
    return int(abs(np.log(aspects * height / width)).argmin())


def enlargement(bucket: tuple[int, int], width: int, height: int) -> float:
    """By how much an image of that size is enlarged along each side to fill the bucket; below 1, it is reduced."""
    return max(bucket[0] / height, bucket[1] / width)


def fill(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The centre of an RGB image with the bucket's aspect ratio, resized to it by an antialiased Lanczos filter.

    Crop and resize are one step, so the centre is exact to a fraction of a pixel. An image of that size is not changed.
    """
    height, width = bucket
    scale = enlargement(bucket, *image.size)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (max(left, 0), max(top, 0), min(image.width - left, image.width), min(image.height - top, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
