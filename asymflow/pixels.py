"""Reading images, and latents beside them: `read_square` reads one, `in_order` many in several threads.

`asymflow.entries` finds them.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asymflow.entries import Entry, UnreadableError
from asymflow.errors import InputError

STRIP = 256  # rows that are converted at a time, so that what is needed in between is small
LONGEST = 16  # times the shorter side
T, Result = TypeVar("T"), TypeVar("Result")


# ---- Reading -------------------------------------------------------------------------------------------------------


def read_square(entry: Entry, size: int, enlarged: list[Entry] | None = None) -> Tensor:
    """An image, cropped by `adm_crop`, as (3, size, size) float32 in [-1, 1]. UnreadableError if it is damaged.

    enlarged: the entry is added to this list if its image is smaller than the crop.
    """
    image = read_image(entry)
    if enlarged is not None and min(image.size) < size:
        enlarged.append(entry)
    return to_tensor(adm_crop(image, size))


def read_pair(pair: tuple[Entry, Entry], patch_size: int) -> tuple[Tensor, Tensor]:
    """(latents (h, w, r) float32, image (3, h patch_size, w patch_size) float32 in [-1, 1]) of one sample.

    The latents are tokens as the transformer sees them: token (i, j) covers patch (i, j) of the image. Raises
    UnreadableError if a file is damaged; InputError, naming the sample, if the latents have another shape or dtype, or
    the sizes do not fit.
    """
    latents = read_latents(pair[1])
    height, width = (n * patch_size for n in latents.shape[:2])

    def look(image: Image.Image) -> Image.Image:
        if image.size != (width, height):
            raise InputError(
                f"{pair[0]} has {image.width} x {image.height} pixels (width x height), but its {latents.shape[1]} x "
                f"{latents.shape[0]} latent tokens and patches of {patch_size} x {patch_size} make {width} x {height}: "
                "check the patch size, or prepare the images again"
            )
        return to_rgb(image)

    return latents, to_tensor(decoded(pair[0], look))


def read_image(entry: Entry) -> Image.Image:
    """The image in RGB, see `to_rgb`. Raises UnreadableError, naming the file, if it cannot be decoded."""
    return decoded(entry, to_rgb)


def decoded(entry: Entry, look: Callable[[Image.Image], Result]) -> Result:
    """Return `look(image)`. Raises UnreadableError, naming the file, if the image cannot be decoded."""
    content = entry.read()
    try:
        return look(opened(io.BytesIO(content)))
    except InputError:
        raise
    except Exception as e:  # a damaged image can raise many types of errors
        reason = "no image format that is known" if isinstance(e, Image.UnidentifiedImageError) else e
        raise UnreadableError(f"{entry} is not a whole image ({reason})") from None


def opened(file: str | Path | io.BytesIO) -> Image.Image:
    """`Image.open`, with the value that is transparent in 8 bits, like the pixels.

    Pillow leaves it as it is in the file: of 2 or 4 bits, or of 16 bits a colour.
    """
    image = Image.open(file)
    value = image.info.get("transparency")
    if image.format == "PNG" and value is not None and image.tile:
        decoder = str(image.tile[0][3])
        if decoder in ("L;2", "L;4"):
            image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[decoder]
        elif decoder.startswith("RGB;16"):
            image.info["transparency"] = tuple(number >> 8 for number in value)
    return image


def read_latents(entry: Entry) -> Tensor:
    """Latent tokens (h, w, r) in float32 from a .npy file. Pickled objects in it are refused."""
    content = entry.read()
    try:
        latents = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as e:
        raise UnreadableError(f"{entry} is not a whole .npy file of numbers ({e or type(e).__name__})") from None
    if not isinstance(latents, np.ndarray) or latents.ndim != 3 or latents.dtype.kind != "f":
        form = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else "an archive"
        raise InputError(f"{entry} must hold floating-point tokens of the shape (h, w, r), but it holds {form}")
    latents = torch.from_numpy(latents.astype(np.float32))
    if not latents.isfinite().all():
        raise InputError(f"{entry} has values that are not finite")
    return latents


def in_order(read: Callable[[T], Result], items: Iterable[T], threads: int) -> Iterator[Result | UnreadableError]:
    """Yield `read(item)` for each item, in order. Several threads read a little ahead.

    An UnreadableError is yielded in place of the result, for the caller to count; other errors are raised.
    """

    def attempt(item: T) -> Result | UnreadableError:
        try:
            return read(item)
        except UnreadableError as e:
            return e

    pool, running = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            running.append(pool.submit(attempt, item))
            if len(running) > 4 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Pixels --------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB.

    Grey, palette and CMYK images are converted by Pillow, without colour profiles, and the orientation of EXIF is not
    applied (see `upright`), all as ADM does it. Two kinds, which ADM would ruin, are treated differently: what is
    transparent is white, since colours below full transparency were never meant to be seen, and 16-bit grey is scaled
    to 8 bits instead of clipped at 255. Raises ValueError for floating point numbers, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers")
    transparent = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = np.empty(values.shape, np.uint8)
        for part in (slice(top, top + STRIP) for top in range(0, image.height, STRIP)):
            grey[part] = (values[part].clip(0, 65535) / 257).round()
            grey[part][values[part] == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or transparent is not None:
        return on_white(image)
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as EXIF says, as viewers show it and its caption describes it."""
    image.load()  # a PNG may have its EXIF behind the pixels
    return ImageOps.exif_transpose(image)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, size x size: the crop of ADM (Dhariwal and Nichol 2021), DiT and JiT.

    The reference images of ADM's evaluation are cropped like this, so its details matter to FID. The image is halved by
    averaging while its shorter side is at least 2 size, because one large bicubic step would alias. Then it is resized
    so that the shorter side is `size`, and the middle of the longer side is kept.

    Of an image that is longer than `LONGEST` times its shorter side the middle alone is resized, else 172 bytes of a
    PNG could take gigabytes.
    """
    short = min(image.size)
    if max(image.size) > LONGEST * short:
        left, top = ((side - min(side, LONGEST * short)) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]: 0 is -1 and 255 is 1."""
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1)  # in numpy: torch would start more threads in each reading thread


def tensor_to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as an RGB image, rounded to 256 values: the inverse of `to_tensor`.

    Values outside of [-1, 1] are clamped, and NaN becomes black.
    """
    values = ((image.detach().cpu().float() + 1) * 127.5).nan_to_num(nan=0).round().clamp(0, 255)
    return Image.fromarray(values.to(torch.uint8).permute(1, 2, 0).numpy())
