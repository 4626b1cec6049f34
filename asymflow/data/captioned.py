"""Images with captions, from folders, JSON lines and WebDataset shards, and generated shapes.

Each is an object with `size()`, `caption()` and `pixels()`. Nothing is read before one of these is called.
"""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from asymflow.data.shapes import make_scene, render
from asymflow.entries import Entry, UnreadableError, find_entries, listing
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver
from asymflow.pixels import decoded, to_rgb, upright
from asymflow.text import decode, encoding_of, is_blank

IMAGE_KEYS, CAPTION_KEYS = ("image", "file_name", "path"), ("caption", "text", "prompt")
TEXTS = ("txt", "caption", "json")  # kinds of files that hold the caption of an image; of several the first counts
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions*.json", "annotations/captions*.json")
LINE = '{"file_name": "a.jpg", "text": "a cat"}'  # as an example
HEAD = 1 << 16  # bytes: nearly every image file has its header in them
TURNED = (5, 6, 7, 8)  # orientations of EXIF in which a photograph lies on its side
ORIENTATION, SIDES = 0x0112, (0x0100, 0x0101)  # tags of EXIF, and of TIFF: width and height as stored
NOTES = (b"exif\0", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts in a PNG with an orientation in them
MOST_NOTE = 1 << 24  # bytes; longer ones are not looked at
PNG_HEADER = 33  # bytes: signature and IHDR


class Photo(NamedTuple):
    """An image file and its caption. text: the caption itself, or the .txt or .json file that holds it, or None."""

    file: Entry
    text: Entry | str | None

    def __str__(self) -> str:
        return str(self.file)

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image, from the header alone. UnreadableError if it is no image."""
        look = lambda image: (upright_size(image), image.format == "PNG")
        try:
            short = self.file.size if 0 <= self.file.size < HEAD else HEAD
            size, png = decoded(self.file._replace(size=short), look)
        except UnreadableError:  # some headers are longer, and Pillow opens a WebP only if all of it is there
            size, png = decoded(self.file, look)
        try:
            return size[::-1] if png and png_orientation(self.file) in TURNED else size
        except Exception as e:  # what is in its EXIF may be anything
            raise UnreadableError(f"{self.file} is not a whole image (its EXIF: {e})") from None

    def caption(self) -> str:
        """The caption, without white space around it. UnreadableError if there is none, or it is empty."""
        text = self.text
        if isinstance(text, Entry):
            content = text.read()
            try:
                text = decode(content)
            except ValueError as e:
                raise UnreadableError(f"{self}: its caption, {self.text}, {e}") from None
            if is_json(self.text):
                try:
                    found = json.loads(text)
                except (ValueError, RecursionError):
                    raise UnreadableError(f"{self}: its caption, {self.text}, is not JSON") from None
                text = caption_in(found) if isinstance(found, dict) else None
        if not isinstance(text, str) or is_blank(text):
            raise UnreadableError(f"{self} has {'an empty' if isinstance(text, str) else 'no'} caption")
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold, or a byte that is not UTF-8
            raise UnreadableError(f"{self}: its caption is not text in UTF-8") from None
        return text.strip()

    def pixels(self) -> Image.Image:
        """The image in RGB, upright. UnreadableError if it is damaged."""
        return decoded(self.file, lambda image: to_rgb(upright(image)))


class Drawing(NamedTuple):
    """A picture of `Shapes`."""

    index: int
    side: int

    def __str__(self) -> str:
        return f"shapes/{self.index}"

    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def caption(self) -> str:
        return make_scene(0, self.index).caption

    def pixels(self) -> Image.Image:
        return Image.fromarray(render(make_scene(0, self.index), self.side).permute(1, 2, 0).contiguous().numpy())


def find_captioned(data: Iterable[str], side: int, passed: PassedOver | None = None) -> list[Photo | Drawing]:
    """All images in `data`, in an order that is always the same. No image is opened.

    Each entry of `data` is one of these. A folder, with the folders and .tar files in it, or a .tar file: the caption
    of IMAGE.jpg (png, webp, ...) is IMAGE.txt or IMAGE.caption beside it, or "caption", "text" or "prompt" in
    IMAGE.json. A .jsonl file: each line is an object with the path of an image, relative to the file, as "image",
    "file_name" or "path", and its caption as "caption", "text" or "prompt". "shapes:COUNT": that many generated
    pictures of side x side pixels. What else is not used is printed, or noted in `passed`.
    Raises InputError if there is no image, or an entry is something else.
    """
    data, found, noted = [str(path) for path in data], [], PassedOver() if passed is None else passed
    for path in data:
        if drawn := re.fullmatch("shapes:([0-9]+)", path):
            found += (Drawing(index, side) for index in range(int(drawn[1])))
        elif Path(path).is_dir():
            photos = list(with_captions(find_entries([path], noted)))
            check_tables(path, photos)
            found += photos
        elif not Path(path).exists():
            raise InputError(f"{path} does not exist")
        elif path.lower().endswith(".tar"):
            found += with_captions(find_entries([path], noted))
        elif path.lower().endswith(".jsonl"):
            found += json_lines(Path(path))
        else:
            raise InputError(
                f"{path} is neither a folder, nor a .tar or .jsonl file, nor shapes:COUNT; captions in any other table "
                f"can be written to a .jsonl file, with lines such as {LINE}"
            )
    if not found:
        raise InputError("; ".join([f"{listing(data)} has no images", *noted.remarks]))
    if passed is None:
        noted.say()
    return found


def with_captions(entries: Iterable[Entry]) -> Iterator[Photo]:
    """The images, each with its caption. Names are compared up to the last dot: `1.v2.txt` belongs to `1.v2.jpg`.

    Images of kinds that are not read are among them, so that they are counted and listed.
    """
    entries, texts = list(entries), {}
    for entry in entries:
        stem, dot, kind = (entry.member or entry.path).rpartition(".")
        if dot and kind.lower() in TEXTS:
            texts.setdefault((entry.path if entry.member else None, stem), {})[kind.lower()] = entry
    for entry in entries:
        if entry.is_image or entry.is_other_image:
            stem = (entry.member or entry.path).rpartition(".")[0]
            beside = texts.get((entry.path if entry.member else None, stem), {})
            yield Photo(entry, next((beside[kind] for kind in TEXTS if kind in beside), None))


def each_once(items: Iterable[Photo | Drawing], passed: PassedOver) -> list[Photo | Drawing]:
    """The items without those whose image file and caption, in a file or in a line, came before together.

    What is left out is noted in `passed`, that of `find_captioned`. Links to folders are followed, and links to files
    that lie in a folder which was looked through: they are known without another look at each of millions of files.
    """
    real_folder, seen, kept = cache(os.path.realpath), set(), []

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        place = path if folder == real_folder(folder) else os.path.join(real_folder(folder), name)  # noqa: PTH118
        return os.path.realpath(place) if place in passed.links else place

    for item in items:
        if isinstance(item, Photo) and item.file.member is None and isinstance(item.text, Entry | str):
            text = item.text if isinstance(item.text, str) else real(item.text.path)
            if (key := (real(item.file.path), text)) in seen:
                passed.again.append(item.file)
                continue
            seen.add(key)
        kept.append(item)
    return kept


def check_tables(folder: str, photos: list[Photo]) -> None:
    """InputError if no image of a folder has a caption, but a table has them, as for Hugging Face and of COCO."""
    tables = [] if any(photo.text for photo in photos) else [t for name in TABLES for t in Path(folder).glob(name)]
    for table in tables:
        write = f"write them to a .jsonl file, with lines such as {LINE}, and give that"
        what = "give that file instead of the folder" if table.suffix == ".jsonl" else write
        raise InputError(f"{folder} has its captions in {table.relative_to(folder)}: {what}")


def json_lines(path: Path) -> Iterator[Photo]:
    if not path.is_file():  # opening a pipe would wait for a writer
        raise InputError(f"{path} is not a file")
    with path.open("rb") as file:
        encoding, mark = encoding_of(file.read(4))
        file.seek(mark)
        # Of a byte that is not UTF-8 half a surrogate pair is made, which `caption` refuses: one line, not all.
        errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        lines = io.TextIOWrapper(file, encoding, errors, newline="\n")
        for number, line in enumerate(lines_of(lines, path, encoding), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            image = first(row, IMAGE_KEYS) if isinstance(row, dict) else None
            if not is_path(image):
                raise InputError(
                    f"{path}, line {number}: expected a JSON object with an image's path as {' or '.join(IMAGE_KEYS)}, "
                    f"but it is {line.strip()[:60]!r}"
                )
            yield Photo(Entry(str(path.parent / image)), caption_in(row))


def lines_of(lines: Iterable[str], path: Path, encoding: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as e:
        raise InputError(f"{path} begins as {encoding.upper()}, and goes on as something else ({e.reason})") from None


def is_path(value: object) -> bool:
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def first(row: dict, names: Iterable[str]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)


def caption_in(row: dict) -> object:
    """The first caption of a row that says something; if none does, the first."""
    texts = [row[name] for name in CAPTION_KEYS if row.get(name) is not None]
    return next((text for text in texts if isinstance(text, str) and not is_blank(text)), next(iter(texts), None))


def is_json(entry: Entry) -> bool:
    return (entry.member or entry.path).lower().endswith(".json")


def upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "PNG":  # see `png_orientation`
        return image.size
    # As stored: some versions of Pillow open a TIFF with its sides exchanged already.
    width, height = (image.tag_v2[tag] for tag in SIDES) if image.format == "TIFF" else image.size
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def png_orientation(entry: Entry) -> int | None:
    """The orientation that a PNG notes, before its pixels or behind them. These are not read.

    There are several forms of it, of which Pillow knows more or fewer: it reads a PNG of one pixel with the same notes.
    """
    notes = []
    with open(entry.path, "rb") as file:  # noqa: PTH123
        end = entry.offset + entry.size if entry.size >= 0 else file.seek(0, os.SEEK_END)
        place = entry.offset + 8
        while place + 8 <= end:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length < MOST_NOTE:
                note = file.read(length)
                if kind == b"eXIf" or note.startswith(NOTES):
                    notes.append(struct.pack(f">I4s{length}sI", length, kind, note, zlib.crc32(kind + note)))
            place += 12 + length
    if not notes:
        return None
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "png")
    start, rest = pixel.getvalue()[:PNG_HEADER], pixel.getvalue()[PNG_HEADER:]
    return Image.open(io.BytesIO(b"".join([start, *notes, rest]))).getexif().get(ORIENTATION)
