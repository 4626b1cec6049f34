"""A folder of images becomes tar shards of square images, which are read several times as fast as photographs."""

from functools import partial
from pathlib import Path

from asymflow.data import writing
from asymflow.data.folder import ImageFolder
from asymflow.data.shards import PACKED, Index, make_index
from asymflow.pixels import in_order


def pack_folder(
    folder: ImageFolder, out: Path, per_shard: int, image_format: str, threads: int, allow_bad: float = 1.0
) -> dict:
    """Write the images of a folder as `out`/00000.tar, ...; returns what meta.json holds.

    In a shuffled order that is always the same, so that each shard is a fair sample. KEY is the number of the image in
    the folder. What could not be read is left out, and listed in problems.log. Raises InputError if that is more than
    allow_bad percent of the images, or all (after all were looked at, so that all are listed), or `out` belongs to
    another call, or one that is not at its end.
    """
    listed = (name + (b"\0+" if text else b"\0-") for name, text in zip(folder.names, folder.captioned, strict=True))
    settings = {
        "format": PACKED.format,
        "data": str(Path(folder.path).resolve()),
        "files": len(folder),
        "listing": writing.digest(listed),
        "size": folder.size,
        "per_shard": per_shard,
        "images_as": image_format,
    }
    plan = writing.plan_shards([0] * len(folder), per_shard)
    with writing.Writer(out, PACKED, len(folder), allow_bad) as shards:
        shards.begin(settings)
        for number in shards.todo(plan, "packing"):
            samples = in_order(partial(encode, folder, image_format), plan[number], threads)
            shards.write(number, shards.readable(samples), partial(index, folder, image_format))
        return shards.finish(len(plan), partial(summary, folder, shards))


def encode(folder: ImageFolder, image_format: str, number: int) -> writing.Sample:
    image = writing.image_bytes(folder.square(number), image_format)
    contents = {image_format: image, "cls": str(folder.label(number)).encode(), "txt": folder.caption(number).encode()}
    return number, {kind: content for kind, content in contents.items() if content}


def index(folder: ImageFolder, image_format: str, numbers: list[int], spans: list[writing.Spans]) -> Index:
    rows = []
    for number, (image, _, *caption) in zip(numbers, spans, strict=True):
        name = f"{number:08d}.{image_format}"
        rows.append((name, folder.label(number), *image, *(caption[0] if caption else (0, -1))))
    return make_index(rows)


def summary(folder: ImageFolder, shards: writing.Writer, indices: list[Index]) -> dict:
    images = sum(len(index["label"]) for index in indices)
    return {"images": images, "unreadable": len(shards.problems), "classes": folder.classes}
