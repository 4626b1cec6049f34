"""Tar shards in the convention of WebDataset: KEY.png (or jpg, ...), its class KEY.cls and its caption KEY.txt."""

import glob
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asymflow import files, opening
from asymflow.data.folder import caption_of, to_uint8
from asymflow.data.sample import Sample
from asymflow.entries import IMAGES, Entry, is_no_data, samples, tar_entries
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver, some
from asymflow.pixels import adm_crop, in_order, read_image
from asymflow.progress import progress_bar
from asymflow.text import count

INDEX = ".index.npz"  # replaces .tar in the name of the file that says where the samples of a shard lie
COLUMNS = {"name", "label", "image", "caption"}
THREADS = 8  # threads that read headers, because a network file system is slow to give each of them
META = "meta.json"  # in a folder of shards that a command of this library made

Index = dict[str, np.ndarray]
"""Columns with one row for each sample. name: of the image in the shard. label: its class. image, caption: (offset,
size) of the bytes; a size of -1 means that there is none. Also `fingerprint`, of the shard, and `modified`, the time of
its last change, which is left out if the index was written together with the shard."""


class Kind(NamedTuple):
    """Of folders of shards: the command that makes them, its format, columns of the index of each shard, and keys of
    meta.json."""

    command: str
    format: str
    columns: Collection[str]
    required: Collection[str]


PACKED = Kind("data pack", "asymflow shards 1", COLUMNS | {"problems"}, ("size",))
INDEX_FORMS = {  # the kinds of numpy's dtypes, and the axes behind that of the samples; None: one value
    **dict.fromkeys(("fingerprint",), ("U", None)),
    **dict.fromkeys(("bucket", "modified"), ("iu", None)),
    **dict.fromkeys(("name", "passed", "problems", "cut"), ("SU", ())),
    **dict.fromkeys(("label", "number"), ("iu", ())),
    **dict.fromkeys(("image", "caption"), ("iu", (2,))),
    "span": ("iu", (3, 2)),
}
IN_META = ("rank", "patch_size", "prompt_shape", "buckets")
ENCODED = Kind("data encode", "asymflow encoded shards 1", {"number", "span", "bucket", "problems"}, IN_META)


def is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_list_of(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


FORMS = {  # of what meta.json may have
    "shards": is_whole,
    "size": is_whole,
    "rank": is_whole,
    "patch_size": lambda value: is_whole(value) and value > 0,
    "prompt_shape": is_list_of(is_whole),
    "buckets": is_list_of(lambda bucket: is_list_of(is_whole)(bucket) and len(bucket) == 2),
    "classes": is_list_of(lambda name: isinstance(name, str)),
    "unfit": lambda value: isinstance(value, dict) and all(map(str.isdecimal, value)),
}


class TarShards:
    """Images by number, from one tar file, or from all tar files of a folder in the order of their names.

    Each image is read from its place in the tar file. It is cropped to size x size by `adm_crop`, which does not change
    an image of this size. Raises InputError if there is no image, or a sample has no class or two images, or if shards
    of `asymflow data pack` are missing, or were packed at less than `size`.

    The headers of a tar file are read once. They are kept in an index beside it, or in the user's cache if its folder
    is read-only.
    """

    def __init__(self, path: str | Path, size: int):
        self.path, self.size = str(path), size
        self.shards = shard_paths(Path(path), size)
        indices = find_indices(self.shards)
        self.fingerprints = np.array([index["fingerprint"] for index in indices])
        counts = [len(index["label"]) for index in indices]
        self.passed_over = [os.fsdecode(name) for index in indices for name in index.get("passed", [])]
        if not sum(counts):
            why = passed_over(self.passed_over) or [f"no file in it ends with {', '.join(IMAGES)}"]
            raise InputError(f"{path} has no images: {'; '.join(why)}")
        self.shard = np.repeat(np.arange(len(counts)), counts)
        # Arrays, not lists of a million objects: forked workers change the reference counts of objects that they use,
        # and every memory page that they write to is copied.
        self.name, self.labels, self.image, self.caption = (
            np.concatenate([index[column] for index in indices]) for column in ("name", "label", "image", "caption")
        )
        self.num_classes = int(self.labels.max()) + 1
        self.classes = read_meta(Path(path), PACKED).get("classes") or []

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def remarks(self) -> list[str]:
        """What a user should know: what is passed over, and that the shards are of several sets."""
        found = passed_over(self.passed_over) + beside(Path(self.path))
        sets = Counter(re.sub(r"[0-9]+", "#", os.path.basename(shard)) for shard in self.shards)  # noqa: PTH119
        if len(sets) > 1 and len(sets) < len(self.shards):
            names = ", ".join(f"{count} of {name}" for name, count in sorted(sets.items()))
            found.append(f"all shards are used: {names}. To use some, give a pattern, such as {self.path}/train-*.tar")
        return found

    @property
    def digest(self) -> str:
        return shards_digest(self.shards, self.fingerprints, self.name, self.labels)

    def check(self) -> None:
        """Raises InputError if this machine has not the same shards as the one where this object was made."""
        check_shards(self.shards, self.fingerprints)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def __getitem__(self, index: int) -> Sample:
        shard, name = self.shards[self.shard[index]], os.fsdecode(self.name[index])
        entry = Entry(shard, name, *self.image[index].tolist())
        caption = Entry(shard, f"{name}, its caption", *self.caption[index].tolist())
        text = caption_of(caption) if caption.size >= 0 else ""
        image = adm_crop(read_image(entry), self.size)
        return Sample(to_uint8(image), self.label(index), str(entry), text)


def passed_over(names: Sequence[str]) -> list[str]:
    """What to say of images of a tar file that are not used."""
    others = [name for name in names if Entry("", name).is_other_image]
    packed = [name for name in names if Entry("", name).is_archive]
    said = PassedOver(others=others, packed=packed).remarks
    if dotted := [name for name in names if name not in {*others, *packed}]:
        said.append(
            f"passed over, because of a dot in the name: {some(dotted, 'image')}. WebDataset takes a name up to its "
            "first dot for the key of the sample, so what follows is no kind of image: rename such files"
        )
    return said


def beside(path: Path) -> list[str]:
    """What to say of a folder of tar files in which there are folders of tar files, or archives of other kinds."""
    inside = sorted(item for item in path.iterdir() if not is_no_data(item.name)) if path.is_dir() else []
    said = PassedOver(packed=[str(item) for item in inside if Entry(str(item)).is_archive]).remarks
    if folders := [str(item) for item in inside if any(item.glob("*.tar"))]:
        said.append(f"not read: {some(folders, 'folder')} with tar files. A pattern reads them, as {path}/*/*.tar")
    return said


def shard_paths(path: Path, size: int) -> list[str]:
    """The tar files that `data.path` means: one, all of a folder, or those of a pattern as {0000..0099} or *."""
    if not path.is_dir():
        return expanded(str(path)) if re.search(r"[*?\[{]", str(path)) and not path.exists() else [existing_tar(path)]
    files_in = sorted(str(file) for file in path.iterdir() if not file.name.startswith("."))
    shards = [file for file in files_in if file.lower().endswith(".tar")]
    if packed := [file for file in files_in if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", file.lower())]:
        raise InputError(f"{packed[0]} is compressed, and shards are read at any place: decompress it, or move it away")
    if meta := read_meta(path, PACKED):
        check_finished(path, PACKED, meta, shards)
        if meta["size"] < size:
            raise InputError(f"{path} has images packed at {meta['size']} pixels, which is too small for {size}")
    elif read_meta(path, ENCODED):
        raise InputError(f"{path} is of `asymflow data encode`: these images have captions, for finetuning, no classes")
    if not shards:
        raise InputError(f"{path} has no tar files (a folder with one folder for each class is data.kind image_folder)")
    return shards


def existing_tar(path: Path) -> str:
    return str(opening.existing_file(path))


def expanded(pattern: str) -> list[str]:
    """The files of a pattern: "train-{0000..0099}.tar" means all of these, "train-*.tar" those that are there."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        if not 0 <= int(last) - int(first) < 10**6:
            raise InputError(f"{pattern}: {numbers[0]} must go up, by less than a million")
        start, end = pattern[: numbers.start()], pattern[numbers.end() :]
        names = (f"{start}{n:0{len(first)}}{end}" for n in range(int(first), int(last) + 1))
    elif words := re.search(r"\{([^{}]*,[^{}]*)\}", pattern):
        names = (f"{pattern[: words.start()]}{word}{pattern[words.end() :]}" for word in words[1].split(","))
    else:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [existing_tar(Path(pattern))]  # noqa: PTH207
        if not found:
            raise InputError(f"{pattern}: there is no such file")
        return found
    return [file for name in names for file in expanded(name)]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def read_meta(folder: Path, kind: Kind) -> dict:
    """The meta.json that the command wrote to a folder of shards; empty if there is none in this format."""
    try:
        meta = opening.read_json(folder / META)
    except InputError:
        return {}
    if meta.get("format") != kind.format:
        return {}
    if missing := [key for key in kind.required if key not in meta]:
        raise InputError(f"{folder / META} is not as it was written: it has no {missing[0]}")
    if other := [key for key, is_right in FORMS.items() if key in meta and not is_right(meta[key])]:
        raise InputError(f"{folder / META} is not as it was written: its {other[0]} is {str(meta[other[0]])[:60]!r}")
    return meta


def check_finished(folder: Path, kind: Kind, meta: dict, whole: Collection[str]) -> None:
    """InputError unless all shards of a folder were made, and are among those that are `whole`."""
    count, again = meta.get("shards"), f"run its `asymflow {kind.command}` again, it goes on where it was"
    if count is None:
        raise InputError(f"{folder} is not finished: {again}")
    if len(whole) != count:
        every = (str(shard_path(folder, number)) for number in range(count))  # the count may be anything: no list
        gone = next((shard for shard in every if shard not in whole), "none")
        what = f"{len(whole)} of {count} shards (damaged or gone, or its index is: {gone})"
        raise InputError(f"{folder} has {what}: {again}, or copy it again")


def read_index(shard: str) -> Index:
    """Make the index of a tar file from its headers. InputError if the file is damaged, or a sample incomplete."""
    rows, passed, found = [], [], samples(tar_entries(shard))
    with open(shard, "rb") as file:  # noqa: PTH123
        for key, kinds in found.items():
            images = [kinds[kind] for kind in IMAGES if kind in kinds]
            if not images:
                others = (e for e in kinds.values() if e.is_image or e.is_other_image or e.is_archive)
                passed += [os.fsencode(entry.member) for entry in others]
                continue
            if len(images) > 1:
                raise InputError(f"{key} has more than one image: {images[0].member} and {images[1].member}")
            if "cls" not in kinds:
                raise InputError(f"{key} has an image ({images[0].parts[1]}) but no class (cls)")
            file.seek(kinds["cls"].offset)
            label = file.read(kinds["cls"].size).strip()
            if not label.isdigit() or len(label) > 9:
                raise InputError(f"{kinds['cls']} must be a class, a whole number from 0, but it is {label[:20]!r}")
            caption = kinds.get("txt", Entry(shard, size=-1))
            rows.append((images[0].member, int(label), images[0].offset, images[0].size, caption.offset, caption.size))
    return {**make_index(rows), "passed": np.array(passed, np.bytes_)}


def make_index(rows: list[tuple[str, int, int, int, int, int]]) -> Index:
    """An index made of rows (name, label, offset and size of the image, offset and size of the caption)."""
    numbers = np.array([row[1:] for row in rows], np.int64).reshape(-1, 5)
    name = np.array([os.fsencode(row[0]) for row in rows], np.bytes_)
    return {"name": name, "label": numbers[:, 0], "image": numbers[:, 1:3], "caption": numbers[:, 3:5]}


# ---- Indices that are kept: reading all headers of a million images takes minutes -----------------------------------
def find_indices(shards: Sequence[str]) -> list[Index]:
    """The index of each shard: the one on the disk, or a new one, which is then saved for the next time.

    Prints one line to stderr if some cannot be saved. Raises InputError as `read_index`.
    """
    kept = lambda shard: (load_index(shard, COLUMNS, path) for path in places(shard))
    # Earlier versions did not note, in an index that was made by reading a shard, what they passed over.
    usable = lambda index: index is not None and ("modified" not in index or "passed" in index)
    indices = [next(filter(usable, kept(shard)), None) for shard in shards]
    missing, unkept = [number for number, index in enumerate(indices) if index is None], []
    made = in_order(index_anew, [shards[number] for number in missing], THREADS)
    bar = progress_bar(made, "reading the headers of shards", "shard", len(missing), delay=2)
    for number, index in zip(missing, bar, strict=True):
        indices[number] = index
        if reason := keep_index(shards[number], index):
            unkept.append(f"{shards[number]} ({reason})")
    if unkept:
        print(
            f"the index of {count(len(unkept), 'shard')} could not be kept, so the next start reads the headers again; "
            f"the first: {unkept[0]}",
            file=sys.stderr,
        )
    return indices


def index_anew(shard: str) -> Index:
    modified = os.stat(shard).st_mtime_ns  # noqa: PTH116 (before it is read: what changes meanwhile is seen next time)
    return {**read_index(shard), "modified": np.array(modified), "fingerprint": np.array(fingerprint(shard))}


def keep_index(shard: str, index: Index) -> str | None:
    """Save an index in the first of its `places` that can be written to. If none can, return the last error."""
    for path in places(shard):
        try:
            save_index(shard, index, str(index["fingerprint"]), path)
            return None
        except OSError as e:
            reason = str(e)
    return reason


def index_path(shard: str | Path) -> Path:
    return Path(re.sub(r"\.tar$", "", str(shard), flags=re.IGNORECASE) + INDEX)


def places(shard: str) -> list[Path]:
    """Where the index of a shard may be kept: beside it, or in the user's cache, if the user has a home folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (may stay "~")
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()[:32] + INDEX
    return [index_path(shard)] + ([cache / "asymflow" / "indices" / name] if cache.is_absolute() else [])


def save_index(shard: str | Path, index: Index, fingerprint: str, path: Path | None = None) -> None:
    """Save an index beside its shard, or at `path`."""
    with files.replacing(path or index_path(shard)) as beside:
        np.savez(beside, **{**index, "fingerprint": fingerprint})


def load_index(shard: str | Path, columns: Collection[str], path: Path | None = None) -> Index | None:
    """The index beside a shard, or at `path`. None if a column is missing, or the shard has changed since."""
    try:
        index = opening.read_arrays(path or index_path(shard))
        now = os.stat(shard)  # noqa: PTH116
        same = index["fingerprint"] == fingerprint(shard) and index.get("modified", now.st_mtime_ns) == now.st_mtime_ns
        return index if same and index.keys() >= set(columns) and index_fits_shard(index, now.st_size) else None
    except Exception:  # a damaged index can raise many types of errors; the caller then makes a new one
        return None


def index_fits_shard(index: Index, size: int) -> bool:
    """Whether all columns of an index have their forms and one length, and all offsets lie in a shard of `size` bytes.

    Of columns without rows the dtype does not matter: numpy makes it up.
    """
    for name, array in index.items():
        kinds, axes = INDEX_FORMS[name]
        if (array.size and array.dtype.kind not in kinds) or (
            array.shape != () if axes is None else array.shape[1:] != axes
        ):
            return False
    rows = {len(index[column]) for column in (*COLUMNS, "number", "span") if column in index}
    spans = np.concatenate([index[column].reshape(-1, 2) for column in ("image", "caption", "span") if column in index])
    spans = spans[spans[:, 1] != -1]
    return bool(len(rows) == 1 and (spans >= 0).all() and (spans[:, 0] <= size - spans[:, 1]).all())


def fingerprint(shard: str | Path, end: int = 1 << 16) -> str:
    """The size of a file and the checksum of its end, which is fast for a file of any size."""
    with Path(shard).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - end))
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


def shards_digest(shards: Sequence[str], *columns: np.ndarray) -> str:
    """Of the names of shards, without their folder, and of arrays that say what is in them."""
    found = hashlib.sha256("\0".join(os.path.basename(shard) for shard in shards).encode())  # noqa: PTH119
    for column in columns:
        found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def check_shards(shards: Sequence[str], fingerprints: Iterable[str]) -> None:
    """InputError, naming the first such shard, if one is missing or has another fingerprint."""
    for shard, known in zip(shards, fingerprints, strict=True):
        if not os.path.isfile(shard) or fingerprint(shard) != known:  # noqa: PTH113
            here = "another file here than" if os.path.exists(shard) else "missing here, but not"  # noqa: PTH110
            raise InputError(f"{shard} is {here} where the data was listed: give all machines the same shards")
