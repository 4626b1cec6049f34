"""A folder of images becomes tar shards of square images, which are read several times as fast as photographs."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from asymflow import files
from asymflow.data.folder import ImageFolder
from asymflow.data.shards import FORMAT, META, Index, fingerprint, load_index, make_index, read_meta, save_index
from asymflow.errors import InputError
from asymflow.pixels import UnreadableError, in_order

COLUMNS = {"label", "problems"}  # of the index of a shard that was made here
PROBLEMS = "problems.log"  # "name: reason" of each image that could not be read
FORMATS = {  # of the images, with the options of Pillow. On 256 x 256 photographs, WebP is read faster than PNG
    "png": {},
    "webp": {"lossless": True, "quality": 0, "method": 0},  # the quality is that of the search for the smallest file
    "jpg": {"format": "jpeg", "quality": 95, "subsampling": 0},
}
OPTIONS = {"per_shard": "--per-shard", "images_as": "--format", "size": "--size", "data": "--data"}


def pack(data: Path, out: Path, size: int, per_shard: int, image_format: str, threads: int) -> dict:
    """Write the images of an `ImageFolder` as `out`/00000.tar, ...; returns what meta.json holds.

    In a shuffled order that is always the same, so that each shard is a fair sample. KEY is the number of the image in
    the folder. A shard is there when it is whole, and is not made again. What could not be read is left out, and listed
    in problems.log. Raises InputError if that is more than 1 % of the images, or `out` belongs to another call.
    """
    if data.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"--out {out} is inside of --data {data}, where it would be one of the classes")
    folder = ImageFolder(data, size)
    settings = {
        "format": FORMAT,
        "data": str(data.resolve()),
        "files": len(folder),
        "listing": listing_digest(folder),
        "size": size,
        "per_shard": per_shard,
        "images_as": image_format,
        "shards": -(-len(folder) // per_shard),
    }
    begin(out, settings)
    order, images, problems = shuffled(len(folder)), 0, []
    try:
        with tqdm(total=len(folder), desc="packing", unit="image", leave=False) as bar:
            for number in range(settings["shards"]):
                members, shard = order[number * per_shard : (number + 1) * per_shard], out / f"{number:05d}.tar"
                index = load_index(shard, COLUMNS)
                if index is None:
                    encoded = in_order(partial(encode, folder, image_format), members, threads)
                    index = write_shard(shard, encoded, problems, allowed=len(folder) // 100, bar=bar)
                else:
                    problems += index["problems"].tolist()
                    bar.initial += len(members)  # what was done before does not count for the speed
                    bar.update(len(members))
                images += len(index["label"])
    finally:
        if problems:
            write_text(out / PROBLEMS, "".join(f"{problem}\n" for problem in problems))
        else:
            (out / PROBLEMS).unlink(missing_ok=True)
    meta = {**settings, "images": images, "unreadable": len(problems), "classes": folder.classes}
    write_text(out / META, json.dumps(meta, indent=2) + "\n")
    return meta


def begin(out: Path, settings: dict, names: dict[str, str] = OPTIONS, command: str = "data pack") -> None:
    """Write the settings to a new folder, or check that the one that is there was begun with the same.

    names: those that must be the same, besides the listing of the data, with what a user knows them as.
    """
    refuse_foreign(out, settings["format"], command)
    known = read_meta(out, settings["format"])
    if not known:
        write_text(out / META, json.dumps(settings, indent=2) + "\n")
        return
    differing = [f"{option} was {known[n]}" for n, option in names.items() if known[n] != settings[n]]
    if not differing and known["listing"] != settings["listing"]:
        now = "others" if known["files"] == settings["files"] else settings["files"]
        differing = [f"--data had {known['files']} images, and now has {now}"]
    if differing:
        raise InputError(f"{out} was begun with other settings ({'; '.join(differing)}): use those or another --out")
    for left in out.glob(".[0-9]*"):  # by a process that was killed
        left.unlink()


def refuse_foreign(out: Path, form: str, command: str) -> None:
    """InputError if there is something in `out`, and `command`, whose format it is, did not begin it."""
    if read_meta(out, form) or not out.exists():
        return
    if not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir()):
        raise InputError(f"{out} exists already, and no `{command}` began it: choose another --out")


def listing_digest(folder: ImageFolder) -> str:
    digest = hashlib.sha256()
    for name, captioned in zip(folder.names, folder.captioned, strict=True):
        digest.update(name + (b"\0+" if captioned else b"\0-"))
    return digest.hexdigest()


def shuffled(count: int) -> list[int]:
    lots = random.Random(0)
    keys = [lots.random() for _ in range(count)]  # the one method whose numbers Python promises never to change
    return sorted(range(count), key=keys.__getitem__)


def encode(folder: ImageFolder, image_format: str, index: int) -> tuple[str, int, dict[str, bytes]]:
    """(KEY, class, the files of the sample by their kind)."""
    image, label = io.BytesIO(), int(folder.labels[index])
    folder.square(index).save(image, **{"format": image_format, **FORMATS[image_format]})
    contents = {image_format: image.getvalue(), "cls": str(label).encode(), "txt": folder.caption(index)}
    return f"{index:08d}", label, {kind: content for kind, content in contents.items() if content}


def write_shard(shard: Path, encoded: Iterator, problems: list[str], allowed: int, bar: tqdm) -> Index:
    """Write a shard and its index. What could not be read is added to `problems`; InputError if they get too many."""
    rows, before = [], len(problems)
    with files.replacing(shard) as beside:
        with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for item in encoded:
                bar.update()
                if isinstance(item, UnreadableError):
                    problems.append(str(item))
                    if len(problems) > allowed:
                        raise InputError(
                            f"more than 1 % of the images cannot be read (they are in {shard.parent / PROBLEMS}), "
                            f"the first: {problems[0]}"
                        )
                    continue
                key, label, contents = item
                image, _, caption, *_ = [*(add(tar, f"{key}.{k}", content) for k, content in contents.items()), (0, -1)]
                rows.append((f"{key}.{next(iter(contents))}", label, *image, *caption))
        index = {**make_index(rows), "problems": np.array(problems[before:], np.str_)}
        save_index(shard, index, fingerprint(beside))
    return index


def add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Append a file; at any time the same bytes for the same content. Returns offset and size of the content."""
    member = tarfile.TarInfo(name)  # of the year 1970, and nobody's
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - tarfile.BLOCKSIZE * -(-len(content) // tarfile.BLOCKSIZE), len(content)


def write_text(path: Path, text: str) -> None:
    with files.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
