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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from asymflow import opening
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver, some

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
    def is_archive(self) -> bool:
        """Whether it is one that is not opened, by its name: compressed, or within a tar file."""
        name = self.member or self.path
        return bool(ARCHIVE.search(name)) or (self.member is not None and name.lower().endswith(TAR))

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


def find_images(paths: Iterable[str | Path], passed: PassedOver | None = None) -> list[Entry]:
    """Every image in folders (with the folders and tar files in them), tar files, and single files. None is opened.

    In the order of the paths; in a folder sorted by name, in a tar file in its own order. Hidden files are left out.
    What else is not used is printed, or noted in `passed`. Raises InputError if there is no image, or a path is
    something else.
    """
    paths, images, noted = list(paths), [], PassedOver() if passed is None else passed
    for entry in find_entries(paths, noted):
        images += [entry] if entry.is_image else []
        noted.others += [entry] if entry.is_other_image else []
    if not images:
        why = noted.remarks or [f"no file in it ends with {', '.join(IMAGES)}"]
        raise InputError(f"{listing(paths)} has no images: {'; '.join(why)}")
    if passed is None:
        noted.say()
    return images


def find_pairs(paths: Iterable[str | Path]) -> list[tuple[Entry, Entry]]:
    """(image, latents) of every sample that has both: `KEY.png` (or jpg, ...) and `KEY.latent.npy`; KEY has no dot.

    Found and ordered as by `find_images`. Prints a line if there are images without latents, and one if there are
    latents without an image. Raises InputError if there is no pair, or a sample has two images.
    """
    paths, pairs, alone, orphans, passed = list(paths), [], [], [], PassedOver()
    for key, files in samples(find_entries(paths, passed)).items():
        images = [files[kind] for kind in IMAGES if kind in files]
        if LATENTS in files and len(images) > 1:
            raise InputError(f"{key} has more than one image: {images[0]} and {images[1]}")
        if LATENTS in files and images:
            pairs.append((images[0], files[LATENTS]))
        elif found := [entry for entry in files.values() if entry.is_image or entry.is_other_image]:
            alone += found
        elif LATENTS in files:
            orphans.append(files[LATENTS])
    if not pairs:
        needs = f"each image, such as KEY.png, needs its latents beside it, KEY.{LATENTS}, with the same KEY up to the"
        why = f"{listing(paths)} has no images with latents: {needs} first dot"
        raise InputError("; ".join([why, *passed.remarks]))
    passed.say()
    if alone:
        what = some(alone, "image")
        print(f"passed over, without latents beside (or of a kind that is not read): {what}", file=sys.stderr)
    if orphans:
        what = some(orphans, "latent file")
        print(f"passed over, without an image beside: {what}", file=sys.stderr)
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


def find_entries(paths: Iterable[str | Path], passed: PassedOver) -> Iterator[Entry]:
    """The files in folders, in tar files and in those of folders, and single files: each once, and no archives."""
    paths = [Path(path) for path in paths]
    single = {os.path.realpath(path) for path in paths if path.is_file() and not Entry(str(path)).is_tar}
    for path in paths:
        entry = Entry(str(path))
        if path.is_dir():
            found = tars_opened(folder_entries(str(path), passed), passed)
        elif not path.exists():
            raise InputError(f"{path} does not exist")
        elif entry.is_tar:
            found = tar_entries(entry.path) if passed.is_new(entry.path) else ()
        elif entry.is_image or entry.parts[1] == LATENTS:
            found = [entry] if passed.is_new(entry.path) else ()
        else:
            raise InputError(f"{path} is neither a folder, nor a .tar file, nor an image ({', '.join(IMAGES)})")
        for one in found:
            if single and path.is_dir() and os.path.realpath(one.path) in single:
                passed.again.append(one)
            elif one.is_archive:
                passed.packed.append(one)
            else:
                yield one


def folder_entries(folder: str, passed: PassedOver) -> Iterator[Entry]:
    """The files in a folder and in all folders below. Links are followed, but each folder is read only once.

    Hidden files are left out, and what systems put beside: see `NOT_DATA`.
    """
    if not passed.is_new(folder):
        return
    real = os.path.realpath(folder)
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if is_no_data(item.name):
                continue
            if item.is_symlink():  # known without another look at the disk
                passed.links.add(os.path.join(real, item.name))  # noqa: PTH118
            if item.is_dir():
                yield from folder_entries(item.path, passed)
            elif (entry := Entry(item.path)).is_image or not is_gone(item):
                yield entry
            else:
                passed.gone.append(item.path)


def is_no_data(name: str) -> bool:
    return name.startswith(".") or name in NOT_DATA


def is_gone(item: os.DirEntry) -> bool:
    """Whether it is a link to nothing, such as to a disk that is not mounted."""
    return item.is_symlink() and not os.path.exists(item.path)  # noqa: PTH110


def tars_opened(entries: Iterable[Entry], passed: PassedOver) -> Iterator[Entry]:
    """The entries, with each .tar file replaced by the files in it."""
    for entry in entries:
        if not entry.is_tar:
            yield entry
        elif passed.is_new(entry.path):
            passed.tars.append(entry)
            yield from tar_entries(entry.path)


def tar_entries(path: str) -> Iterator[Entry]:
    """The files in a tar file; a link to another file in it is that file. InputError unless it is whole, one archive,
    not compressed, and without a name that comes twice.

    What is no data in a folder is none here. What cannot be read, such as a link to nothing, is an entry without
    content, so that it is named where it is used.
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
    files = [member for member in members if not member.isdir() and not has_no_data(member.name)]
    names = Counter(posixpath.normpath(member.name) for member in files)
    if len(names) < len(files):
        raise InputError(f"{path} has {names.most_common(1)[0][0]} twice, as `tar --append` leaves it: pack it anew")
    for member in files:
        target = followed(member, named)
        place = (target.offset_data, target.size) if target else (0, 0)
        yield Entry(path, member.name, *place)


def has_no_data(member: str) -> bool:
    return any(part != ".." and is_no_data(part) for part in posixpath.normpath(member).split("/"))


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
