"""Finding images, and latents beside them, in folders and tar shards.

What is found is a list of `Entry`: a name, and where the bytes lie. No image is opened, so a folder of a million images
on a local disk is listed in seconds; of a shard only the headers are read. An image inside of a shard is then read from
its place, as fast as a file.
"""

import os
import posixpath
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from asymflow import opening
from asymflow.errors import InputError
from asymflow.text import count

T = TypeVar("T")
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "jfif", "gif", "tif", "tiff", "avif")
OTHERS = ("heic", "heif", "jxl", "jp2", "psd", "svg", "tga", "ico", "exr", "hdr", "dng", "cr2", "nef", "arw", "raw")
NOT_DATA = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # folders
LATENTS = "latent.npy"
TAR = ".tar"
ARCHIVE = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|zip|7z|rar)$", re.IGNORECASE)
MOST_BYTES = 2**29  # of one file
MOST_LINKS = 40  # one after the other, as in Linux


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
    def is_tar(self) -> bool:
        return self.member is None and self.path.lower().endswith(TAR)

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


def find_images(paths: Iterable[str | Path]) -> list[Entry]:
    """Every image in folders (with the folders and tar files in them), tar files, and single files. None is opened.

    In the order of the paths; in a folder sorted by name, in a tar file in its own order. Hidden files are left out.
    Prints one line if there are images of other kinds. Raises InputError if there is no image, or a path is something
    else.
    """
    paths = list(paths)
    images, others = [], []
    for entry in find_entries(paths):
        if entry.is_image or entry.is_other_image:
            (images if entry.is_image else others).append(entry)
    if not images:
        raise InputError(f"{listing(paths)} has no images: no file in it ends with {', '.join(IMAGES)}")
    if others:
        print(other_kinds(others), file=sys.stderr)
    return images


def find_pairs(paths: Iterable[str | Path]) -> list[tuple[Entry, Entry]]:
    """(image, latents) of every sample that has both: `KEY.png` (or jpg, ...) and `KEY.latent.npy`; KEY has no dot.

    Found and ordered as by `find_images`. Prints one line if there are images without latents. Raises InputError if
    there is no pair, or a sample has two images.
    """
    paths = list(paths)
    pairs, alone = [], []
    for key, files in samples(find_entries(paths)).items():
        images = [files[kind] for kind in IMAGES if kind in files]
        if LATENTS in files and len(images) > 1:
            raise InputError(f"{key} has more than one image: {images[0]} and {images[1]}")
        if LATENTS in files and images:
            pairs.append((images[0], files[LATENTS]))
        else:
            alone += [entry for entry in files.values() if entry.is_image or entry.is_other_image]
    if not pairs:
        raise InputError(
            f"{listing(paths)} has no images with latents: each image, such as KEY.png, needs its latents beside it, "
            f"KEY.{LATENTS}, with the same KEY up to the first dot"
        )
    if alone:
        what = f"{count(len(alone), 'image')} ({first(alone)})"
        print(f"passed over, without latents beside (or of a kind that is not read): {what}", file=sys.stderr)
    return pairs


def other_kinds(found: Sequence[object]) -> str:
    """What to say of images, at least one, of kinds that are not read."""
    what = f"{count(len(found), 'image')} ({first(found)})"
    return f"passed over, of a kind that is not read: {what}. Convert such files to png or jpg"


def first(found: Sequence[object]) -> str:
    return f"{found[0]}" if len(found) == 1 else f"the first: {found[0]}"


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
            yield from tars_opened(folder_entries(str(path)))
        elif not path.exists():
            raise InputError(f"{path} does not exist")
        elif (entry := Entry(str(path))).is_tar:
            yield from tar_entries(str(path))
        elif entry.is_image or entry.parts[1] == LATENTS:
            yield entry
        else:
            raise InputError(f"{path} is neither a folder, nor a .tar file, nor an image ({', '.join(IMAGES)})")


def folder_entries(folder: str) -> Iterator[Entry]:
    """The files in a folder and in all folders below. Links are followed, but each folder is read only once.

    Hidden files are left out, and what systems put beside: see `NOT_DATA`. Prints one line if links were not followed,
    and one if there are archives, which nothing here opens.
    """
    again: list[str] = []
    packed = []
    for entry in entries_below(folder, set(), again):
        packed += [entry] if ARCHIVE.search(entry.path) else []
        yield entry
    if packed:
        what = f"{count(len(packed), 'archive')} ({first(packed)})"
        print(f"not opened: {what}. Unpack what has images in it", file=sys.stderr)
    if again:
        what = f"{count(len(again), 'link')} ({first(again)})"
        print(f"not followed, because the folder has been read already: {what}", file=sys.stderr)


def tars_opened(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, with each .tar file replaced by the files in it."""
    for entry in entries:
        if entry.is_tar:
            yield from tar_entries(entry.path)
        else:
            yield entry


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
