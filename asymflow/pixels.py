"""Reading images, and latents beside them, from folders and tar shards.

Finding gives a list of `Entry`: a name, and where the bytes lie. Listing opens no image, so a folder of a million
images on a local disk is listed in seconds; of a shard only the headers are read. An image inside of a shard is read
from its place, as fast as a file. The rest are plain functions: `choose` chooses entries at random, `read_square` reads
one, and `in_order` reads many in several threads.
"""

import io
import os
import posixpath
import random
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asymflow import opening
from asymflow.errors import InputError

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "jfif", "gif", "tif", "tiff", "avif")
OTHERS = ("heic", "heif", "jxl", "jp2", "psd", "svg", "tga", "ico", "exr", "hdr", "dng", "cr2", "nef", "arw", "raw")
NOT_DATA = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # folders
LATENTS = "latent.npy"
MOST_BYTES = 2**29  # of one file
STRIP = 256  # rows that are converted at a time, so that what is needed in between is small
LONGEST = 16  # times the shorter side
MOST_LINKS = 40  # one after the other, as in Linux
T, Result = TypeVar("T"), TypeVar("Result")


class UnreadableError(InputError):
    """A file exists, but is damaged, or is not what its name says. Callers may skip a few of these."""


class Entry(NamedTuple):
    """A file, or a member of a tar file."""

    path: str
    member: str | None = None
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}: {self.member}"

    @property
    def parts(self) -> tuple[str, str]:
        """(name of the sample, kind of the file), split at the first dot of the base name, as WebDataset does.

        `shard.tar: a/b.latent.npy` is the "latent.npy" of the sample "shard.tar: a/b".
        """
        folder, slash, base = (self.member or self.path).rpartition("/")
        stem, _, kind = base.partition(".")
        return str(self._replace(**{"member" if self.member else "path": folder + slash + stem})), kind.lower()

    @property
    def is_image(self) -> bool:
        return (self.member or self.path).lower().endswith(tuple(f".{kind}" for kind in IMAGES))

    @property
    def is_other_image(self) -> bool:
        """Whether it is an image by its name, of a kind that is not read, or by some versions of Pillow only."""
        return (self.member or self.path).lower().endswith(tuple(f".{kind}" for kind in OTHERS))

    def read(self) -> bytes:
        try:
            with opening.opened(self.path) as file:
                size = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
                if size > MOST_BYTES:
                    raise UnreadableError(f"{self} has {size:,} bytes: more than {MOST_BYTES:,} are not read")
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as e:
            raise UnreadableError(f"{self} cannot be read: {e.strerror}") from None
        except InputError as e:
            raise UnreadableError(str(e)) from None


# ---- Finding -------------------------------------------------------------------------------------------------------


def find_images(paths: Iterable[str | Path]) -> list[Entry]:
    """Every image in folders (and the folders in them), tar files, and single files. None is opened.

    In the order of the paths; in a folder sorted by name, in a tar file in its own order. Hidden files are left out.
    Raises InputError if there is no image, or a path is something else.
    """
    paths = list(paths)
    images = [entry for entry in find_entries(paths) if entry.is_image]
    if not images:
        raise InputError(f"{listing(paths)} has no images: no file in it ends with {', '.join(IMAGES)}")
    return images


def find_pairs(paths: Iterable[str | Path]) -> list[tuple[Entry, Entry]]:
    """(image, latents) of every sample that has both: `KEY.png` (or jpg, ...) and `KEY.latent.npy`; KEY has no dot.

    Found and ordered as by `find_images`. Raises InputError if there is none, or a sample has two images.
    """
    paths = list(paths)
    pairs = []
    for key, files in samples(find_entries(paths)).items():
        images = [files[kind] for kind in IMAGES if kind in files]
        if LATENTS in files and len(images) > 1:
            raise InputError(f"{key} has more than one image: {images[0]} and {images[1]}")
        if LATENTS in files and images:
            pairs.append((images[0], files[LATENTS]))
    if not pairs:
        raise InputError(
            f"{listing(paths)} has no images with latents: each image, such as KEY.png, needs its latents beside it, "
            f"KEY.{LATENTS}, with the same KEY up to the first dot"
        )
    return pairs


def samples(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    """Entries by sample and kind of file, such as `samples(...)["shard.tar: 0001"]["png"]`.

    Raises InputError if a sample has two files of a kind: `1.png` and `1.PNG`, or one name twice in a tar file.
    """
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        key, kind = entry.parts
        if (other := found.setdefault(key, {}).setdefault(kind, entry)) is not entry:
            raise InputError(f"{other} and {entry} are of the same sample and kind: remove one of them")
    return found


def find_entries(paths: Iterable[str | Path]) -> Iterator[Entry]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from folder_entries(str(path))
        elif not path.exists():
            raise InputError(f"{path} does not exist")
        elif path.suffix.lower() == ".tar":
            yield from tar_entries(str(path))
        elif (entry := Entry(str(path))).is_image or entry.parts[1] == LATENTS:
            yield entry
        else:
            raise InputError(f"{path} is neither a folder, nor a .tar file, nor an image ({', '.join(IMAGES)})")


def folder_entries(folder: str) -> Iterator[Entry]:
    """The files in a folder and in all folders below. Links are followed, but each folder is read only once.

    Hidden files are left out, and what systems put beside: see `NOT_DATA`. Prints one line if links were not followed.
    """
    again: list[str] = []
    yield from entries_below(folder, set(), again)
    if again:
        print(
            f"{len(again)} links lead to folders that have been read already, and are not followed, such as {again[0]}",
            file=sys.stderr,
        )


def entries_below(folder: str, seen: set[str], again: list[str]) -> Iterator[Entry]:
    here = os.path.realpath(folder)
    if here in seen:
        again.append(folder)
        return
    seen.add(here)
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if item.name.startswith(".") or item.name in NOT_DATA:
                continue
            if item.is_dir():
                yield from entries_below(item.path, seen, again)
            else:
                yield Entry(item.path)


def tar_entries(path: str) -> Iterator[Entry]:
    """The files in a tar file; a link to another file in it is that file. InputError unless it is whole, one archive,
    and not compressed.

    What cannot be read, such as a link to nothing, is an entry without content, so that it is named where it is used.
    """
    opening.existing_file(path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
            # If a file is cut off between two members, or has garbage there, tarfile takes that for its end.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("there is no end-of-archive mark")
            while rest := tar.fileobj.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("it goes on behind its end, as archives put together by cat do")
    except Exception as e:  # a damaged or hostile file can raise many types of errors
        raise InputError(
            f"{path} is not a whole, uncompressed tar file ({e}). If it was downloaded or copied, do that again; if it "
            "is compressed, decompress it"
        ) from None
    named = {posixpath.normpath(member.name): member for member in members}
    for member in members:
        if not member.isdir() and not posixpath.basename(member.name).startswith("."):
            target = followed(member, named)
            place = (target.offset_data, target.size) if target else (0, 0)
            yield Entry(path, member.name, *place)


def followed(member: tarfile.TarInfo, named: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a member is, or to which it is a link within the archive. None if there is none."""
    for _ in range(MOST_LINKS):
        if member.islnk():
            name = member.linkname
        elif member.issym():
            name = posixpath.join(posixpath.dirname(member.name), member.linkname)
        else:
            return member if member.isreg() and member.sparse is None else None
        member = named.get(posixpath.normpath(name))
        if member is None:
            break
    return None


def listing(paths: list[str | Path], shown: int = 2) -> str:
    names = ", ".join(str(path) for path in paths[:shown])
    return names if len(paths) <= shown else f"{names} and {len(paths) - shown} more"


def choose(items: list[T], count: int, seed: int) -> list[T]:
    """`count` of the items, chosen at random, in their order; all of them if there are no more.

    Not simply the first ones, which may well be of one class. The seed fixes the choice, on every machine, and a choice
    of fewer is a part of a choice of more.
    """
    draw = random.Random(seed)
    lots = [draw.random() for _ in items]  # Python promises that the numbers of this method never change
    return [items[i] for i in sorted(sorted(range(len(items)), key=lots.__getitem__)[:count])]


# ---- Reading -------------------------------------------------------------------------------------------------------


def read_square(entry: Entry, size: int) -> Tensor:
    """An image, cropped by `adm_crop`, as (3, size, size) float32 in [-1, 1]. UnreadableError if it is damaged."""
    return to_tensor(adm_crop(read_image(entry), size))


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
