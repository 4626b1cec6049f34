"""Tar shards are written: whole or not at all, the same bytes at any time, by one process or several.

What was done before a stop is what is there: a shard, which has its index before it has its name, is not made again.
"""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from PIL import Image

from asymflow import files
from asymflow.data.shards import META, Index, Kind, fingerprint, load_index, read_meta, save_index, shard_path
from asymflow.entries import UnreadableError
from asymflow.errors import InputError
from asymflow.progress import progress_bar
from asymflow.text import count

PROBLEMS = "problems.log"  # "name: reason" of each image that is left out, sorted
LOCK, AT_WORK = ".lock", "is being written to"  # .lock0, .lock1, ...: one for each process
SAME = {"data": "--data", "size": "--size", "per_shard": "--per-shard", "images_as": "--format"}
FORMATS = {  # of the images, with the options of Pillow. On 256 x 256 photographs, WebP is read faster than PNG
    "png": {},
    "webp": {"lossless": True, "quality": 0, "method": 0},  # the quality is that of the search for the smallest file
    "jpg": {"format": "jpeg", "quality": 95, "subsampling": 0},
}
Sample = tuple[int, dict[str, bytes]]
"""The number of an image, which in 8 digits is its KEY, and the contents of its files KEY.KIND, by kind."""
Spans = list[tuple[int, int]]
"""Offset and size of each file of a sample."""
T = TypeVar("T")


class TooManyError(Exception):
    """More images are left out than may be, so a shard is not kept."""


class Writer(ExitStack):
    """A folder of shards, in process `rank` of the `world` that share the work, under torch.distributed.

    count: of all images. No shard is written any more after more than allow_bad percent are left out: the rest is only
    looked through, so that all problems are listed, and `finish` raises InputError. So does `todo`, if that many were
    left out before. meta: what meta.json holds; problems: "name: reason" of what is left out, as far as this process
    knows.
    """

    def __init__(self, out: Path, kind: Kind, count: int, allow_bad=1.0, rank=0, world=1):
        super().__init__()
        self.out, self.kind, self.rank, self.world = out, kind, rank, world
        self.count, self.allow_bad, self.meta, self.problems = count, allow_bad, {}, []

    def begin(self, settings: dict, same: dict[str, str] = SAME, beside: Iterable[str] = ()) -> None:
        """Take the folder for this call until the end of the `with`.

        settings: for meta.json, if no shard was made yet; "unfit" says what is wrong with the images that are to be in
        none. same: those that must be the same if shards were made, besides the listing of the data, and what a user
        knows them as. beside: other files that depend on the settings. InputError if the folder is of another command,
        was begun with other settings, or another call is at work in it.
        """
        self.meta = gathered(lambda: None if self.rank else self.take(settings, same, beside), self.world)[0]
        if self.rank > 0:
            self.enter_context(files.hold(self.out / f"{LOCK}{self.rank}", AT_WORK))

    def take(self, settings: dict, same: dict[str, str], beside: Iterable[str]) -> dict:
        out, own = self.out, self.out / f"{LOCK}0"
        new = not out.exists() or (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()))
        if not new and not read_meta(out, self.kind):
            raise InputError(f"{out} exists already, and no `{self.kind.command}` began it: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.enter_context(files.hold(own, AT_WORK))
        for other in {*out.glob(f"{LOCK}*")} - {own}:  # of a call whose first process has ended, but not all
            files.hold(other, AT_WORK).close()
        # By a process that was killed: parts of shards, and other files.
        left = [*out.glob(".[0-9]*"), *(path for path in out.glob(".*") if files.TEMPORARY.fullmatch(path.name))]
        if any(out.glob("[0-9]*.tar")):
            self.check_same(read_meta(out, self.kind), settings, same)
        else:  # nothing was made, so the settings may change
            write_text(out / META, json.dumps(settings, indent=2) + "\n")
            left += [*out.glob("[0-9]*.index.npz"), *(out / name for name in beside)]
        for path in left:
            path.unlink(missing_ok=True)
        return read_meta(out, self.kind)

    def check_same(self, known: dict, settings: dict, same: dict[str, str]) -> None:
        known = {name: known.get(name) for name in settings}
        differing = [f"{option} was {known[name]}" for name, option in same.items() if known[name] != settings[name]]
        if not differing and known["listing"] != settings["listing"]:
            now = "others" if known["files"] == settings["files"] else settings["files"]
            differing = [f"--data had {known['files']} images, and now has {now}"]
        if differing:
            what = "; ".join(differing)
            raise InputError(f"{self.out} was begun with other settings ({what}): use those or another --out")

    def todo(self, plan: list[list[int]], doing: str) -> list[int]:
        """The shards that are not there, for this process to make. plan: the images of each. doing: for the bar."""
        self.push(lambda error, *_: self.list_problems() if error else None)  # also of what was stopped
        indices = self.look(len(plan))
        todo = [number for number in range(self.rank, len(plan), self.world) if indices[number] is None]
        total = sum(len(plan[number]) for number in todo)
        bar = progress_bar(desc=doing, unit="image", total=total, silent=self.rank > 0)
        self.bar = self.enter_context(bar)
        return todo

    def readable(self, results: Iterable[T | UnreadableError]) -> Iterator[T]:
        """Those that could be read. The others are left out, and all of them once too many were."""
        for result in results:
            self.bar.update()
            if isinstance(result, UnreadableError):
                self.problems.append(str(result))
            elif not self.too_many():
                yield result

    def write(self, number: int, samples: Iterable[Sample], index: Callable[[list[int], list[Spans]], Index]) -> None:
        """Write a shard, and its index of the samples, with the problems that came up meanwhile."""
        numbers, spans, before, shard = [], [], len(self.problems), shard_path(self.out, number)
        with suppress(TooManyError), files.replacing(shard) as beside:
            with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for key, contents in samples:
                    numbers.append(key)
                    spans.append([add(tar, f"{key:08d}.{kind}", content) for kind, content in contents.items()])
            if self.too_many():
                raise TooManyError
            problems = np.array(self.problems[before:], np.str_)
            save_index(shard, {**index(numbers, spans), "problems": problems}, fingerprint(beside))

    def finish(self, count: int, summary: Callable[[list[Index]], dict]) -> dict | None:
        """If all shards are there, write meta.json with a summary of their indices; None if others are to finish.

        Whichever process is the last finds them all. It is also the last to list problems: others do before they look.
        """
        self.list_problems()
        self.check_problems()
        indices = self.look(count)
        if any(index is None for index in indices):
            return None
        self.list_problems()
        meta = {**read_meta(self.out, self.kind), "shards": count, **summary(indices)}
        write_text(self.out / META, json.dumps(meta, indent=2) + "\n")
        return meta

    def look(self, count: int) -> list[Index | None]:
        """The indices of the shards that are there; the problems are what they tell of."""
        indices = [load_index(shard_path(self.out, number), self.kind.columns) for number in range(count)]
        told = (index["problems"].tolist() for index in indices if index is not None)
        self.problems = [*self.meta.get("unfit", {}).values(), *chain.from_iterable(told)]
        self.check_problems()
        return indices

    def check_problems(self) -> None:
        if self.too_many():
            first = min(self.problems)
            raise InputError(
                f"{len(self.problems)} of {count(self.count, 'image')} would be left out, and --allow-bad is "
                f"{self.allow_bad:g} %: mend them (they are listed in {self.out / PROBLEMS}), the first: {first}"
            )

    def too_many(self) -> bool:
        return 100 * len(self.problems) > self.allow_bad * self.count or len(self.problems) == self.count

    def list_problems(self) -> None:
        if self.problems:
            write_text(self.out / PROBLEMS, "".join(f"{problem}\n" for problem in sorted(self.problems)))
        else:
            (self.out / PROBLEMS).unlink(missing_ok=True)


def check_outside(out: Path, data: Iterable[str]) -> None:
    if inside := {str(path) for path in (out.resolve(), *out.resolve().parents)} & {*data}:
        raise InputError(f"--out {out} is inside of --data {min(inside)}, where the shards would be taken for data")


def plan_shards(groups: Sequence[int | None], per_shard: int) -> list[list[int]]:
    """The images of each shard, all of one group: group after group, in a shuffled order that is always the same.

    groups: of each image; what has None is in no shard.
    """
    lots, plan = random.Random(0), []
    keys = [lots.random() for _ in groups]  # the one method whose numbers Python promises never to change
    order = sorted((n for n, group in enumerate(groups) if group is not None), key=lambda n: (groups[n], keys[n]))
    for _, members in groupby(order, groups.__getitem__):
        members = [*members]
        plan += (members[first : first + per_shard] for first in range(0, len(members), per_shard))
    return plan


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Append a file; at any time the same bytes for the same content. Returns offset and size of the content."""
    member = tarfile.TarInfo(name)  # of the year 1970, and nobody's
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - tarfile.BLOCKSIZE * -(-len(content) // tarfile.BLOCKSIZE), len(content)


def image_bytes(image: Image.Image, image_format: str) -> bytes:
    content = io.BytesIO()
    image.save(content, **{"format": image_format, **FORMATS[image_format]})
    return content.getvalue()


def write_text(path: Path, text: str) -> None:
    with files.replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def gathered(work: Callable[[], T], world: int) -> list[T]:
    """What it returns in each of the processes. If it raises InputError or OSError in one, it is raised in all."""
    try:
        values = [work()]
    except (InputError, OSError) as e:
        values = [e]
    if world > 1:
        values = values * world
        dist.all_gather_object(values, values[0])
    for value in values:
        if isinstance(value, (InputError, OSError)):
            raise value
    return values
