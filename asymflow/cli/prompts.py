"""Prompts from files, and the folders in which public scorers look for the images of theirs."""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.PngImagePlugin import PngInfo

from asymflow import files, opening
from asymflow.data.captioned import IMAGE_KEYS, caption_in, find_captioned
from asymflow.entries import Entry, UnreadableError, is_no_data
from asymflow.errors import InputError
from asymflow.pictures import image_grid
from asymflow.pixels import decoded, read_image, to_tensor
from asymflow.progress import progress_bar
from asymflow.text import count, is_blank

MOST = 2**30  # bytes of a file of prompts
IDS = ("item_id", "id")  # keys of what a prompt is called
ALL = "all"  # the category of prompts without one
LINES = (".jsonl", ".ndjson")
KINDS = "a .txt file with one on each line, .jsonl, .json, or a folder of .txt, of .json or of captioned images"
MADE_OF = "asymflow made of"  # in the PNG files of grids
LONGEST = 200  # bytes of the name of a file, to which a kind is added


class Prompt(NamedTuple):
    """text: the prompt. name: what its images are called. category: of a benchmark. about: all of its JSON object."""

    text: str
    name: str
    category: str = ALL
    about: dict | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder: `KINDS`. Raises InputError if there is none, or one cannot be read."""
    kind = path.suffix.lower()
    if path.is_dir():
        found = list(of_folder(path))
    elif kind in LINES:
        found = [of_row(row, number, place) for number, (row, place) in enumerate(json_lines(path))]
    elif kind == ".json":
        found = list(of_json(path, ALL))
    elif kind in ("", ".txt"):
        found = [Prompt(checked(line, place), f"{number:05}") for number, (line, place) in enumerate(lines(path))]
    else:
        raise InputError(f"--prompts {path} is a {kind} file: expected {KINDS}")
    if not found:
        raise InputError(f"--prompts {path} has no prompt in it: expected {KINDS}")
    return found


def of_folder(path: Path) -> Iterator[Prompt]:
    """Of NAME.txt, one each; or of CATEGORY.json; or the captions of images. InputError if something is left over."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    inside = [file for file in found if not any(map(is_no_data, file.relative_to(path).parts))]
    kinds = {file: file.suffix.lower() for file in inside}
    if ".tar" in kinds.values() or any(Entry(str(file)).is_image for file in inside):
        photos = find_captioned([str(path)], 1)
        used = {photo.text.path for photo in photos if isinstance(photo.text, Entry)}
        texts = [file for file, kind in kinds.items() if kind in (".txt", ".json")]
        refuse_others(path, [file for file in texts if str(file) not in used], "captions of images")
        for photo in photos:
            try:
                yield Prompt(photo.caption(), Path(str(photo)).stem)
            except UnreadableError as e:
                raise InputError(f"--prompts {path}: {e}") from None
        return
    expected = ".txt" if ".txt" in kinds.values() else ".json"
    others = [file for file, kind in kinds.items() if kind != expected or file.parent != path]
    refuse_others(path, others, "NAME.txt" if expected == ".txt" else "CATEGORY.json")
    for file in inside:
        if expected == ".txt":
            yield Prompt(checked(opening.read_text(file), str(file)), file.stem)
        else:
            yield from of_json(file, file.stem)


def refuse_others(path: Path, others: list[Path], expected: str) -> None:
    if others:
        said = f"{count(len(others), 'file')} beside {expected}, such as {others[0].relative_to(path)}"
        raise InputError(f"--prompts {path} has {said}: expected {KINDS}, and nothing else")


def of_json(path: Path, category: str) -> Iterator[Prompt]:
    """Of a list of prompts, or of a list for each category. A prompt is text, or an object with it."""
    text = opening.read_text(path, MOST)
    with opening.reading(path, "JSON"):
        content = json.loads(text, object_pairs_hook=whole)
    lists = {category: content} if isinstance(content, list) else content
    if not isinstance(lists, dict) or not all(isinstance(rows, list) and rows for rows in lists.values()):
        raise InputError(f"{path} must be a list of prompts in JSON, or a list for each category")
    for name, rows in lists.items():
        for number, row in enumerate(rows):
            yield of_row(row, number, f"{path}, entry {number + 1} of {name!r:.60}", name)


def whole(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object in JSON. ValueError if a key comes twice: of its values only the last would be kept."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {twice!r:.60} comes twice in an object")
    return found


def json_lines(path: Path) -> Iterator[tuple[object, str]]:
    for text, place in lines(path):
        with opening.reading(place, "JSON"):
            row = json.loads(text, object_pairs_hook=whole)
        yield row, place


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, and where each is. `str.splitlines` would end them within some prompts, too."""
    for number, line in enumerate(io.StringIO(opening.read_text(path, MOST), newline=None), 1):
        if not is_blank(line):
            yield line.strip(), f"{path}, line {number}"


def of_row(row: object, number: int, place: str, category: str = ALL) -> Prompt:
    about = row if isinstance(row, dict) else {"prompt": row}
    ids = [str(about[key]) for key in IDS if about.get(key) is not None]
    images = [Path(str(about[key])).stem for key in ("image_path", *IMAGE_KEYS) if about.get(key)]
    name, text = next(iter(ids + images), f"{number:05}"), about.get("prompt")
    text = checked(caption_in(about) if text is None else text, place)
    if about.get("category") is not None:
        category = str(about["category"])
    return Prompt(text, checked(name, place), checked(category, place), row if isinstance(row, dict) else None)


def checked(text: object, place: str) -> str:
    """The text without white space around it. InputError if there is none, or it is not text in UTF-8."""
    if text is None:
        raise InputError(f"{place} has no prompt under the key prompt, caption or text")
    if not isinstance(text, str) or is_blank(text):
        raise InputError(f"{place}: expected a prompt, but it is {str(text)[:60]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        raise InputError(f"{place}: {text[:60]!a} is not text in UTF-8") from None
    return text.strip()


# ---- Folders for scorers ---------------------------------------------------------------------------------------------
Picture = Callable[[int, int], Path]
"""The file of an image, from the number of its prompt and that of the image among those of the prompt."""


class Scorer(NamedTuple):
    """images: of each prompt. needs: what its prompts must be. arrange: makes the files of a prompt, and lists them."""

    title: str
    images: int
    needs: str
    fits: Callable[[Sequence[Prompt]], bool]
    arrange: Callable[[Path, int, Prompt, list[Path]], list[Path]]


def geneval(folder: Path, number: int, prompt: Prompt, images: list[Path]) -> list[Path]:
    """00000/metadata.jsonl, the object of the prompt, and 00000/samples/0000.png, ..., 0003.png."""
    own = folder / f"{number:05}"
    with files.replacing(own / "metadata.jsonl") as beside:
        beside.write_text(json.dumps(prompt.about) + "\n", encoding="utf-8")
    samples = [own / "samples" / f"{place:04}.png" for place in range(len(images))]
    for pair in zip(images, samples, strict=True):
        same_file(*pair)
    return [own / "metadata.jsonl", *samples]


def dpg(folder: Path, number: int, prompt: Prompt, images: list[Path]) -> list[Path]:
    """NAME.png: the four images, two beside and two below each other, without a gap."""
    made, sources = folder / f"{prompt.name}.png", " ".join(map(files.sha256, images))
    if not made.exists() or made_of(made) != sources:
        pictures, about = torch.stack([to_tensor(read_image(Entry(str(image)))) for image in images]), PngInfo()
        about.add_text(MADE_OF, sources)
        with files.replacing(made) as beside:
            image_grid(pictures, columns=2, gap=0).save(beside, pnginfo=about)
    return [made]


def made_of(grid: Path) -> str | None:
    """The checksums of the images that a grid was made of, which it says itself."""
    try:
        return decoded(Entry(str(grid)), lambda image: image.info.get(MADE_OF))
    except UnreadableError:
        return None


def hpsv3(folder: Path, number: int, prompt: Prompt, images: list[Path]) -> list[Path]:
    """CATEGORY/NAME.png, and its prompt in CATEGORY/NAME.txt."""
    image, text = (folder / prompt.category / f"{prompt.name}.{kind}" for kind in ("png", "txt"))
    same_file(images[0], image)
    with files.replacing(text) as beside:
        beside.write_text(prompt.text, encoding="utf-8")
    return [image, text]


def named_apart(prompts: Sequence[Prompt]) -> bool:
    """Whether each prompt has a name of its own, within its category, that can be that of a file."""
    most = max(Counter((prompt.category.casefold(), prompt.name.casefold()) for prompt in prompts).values())
    parts = [part for prompt in prompts for part in (prompt.category, prompt.name)]
    return most == 1 and all(map(usable, parts))


def usable(part: str) -> bool:
    """Whether it can be the name of a file, with a kind after it."""
    return part == Path(part).name and not set(part) & {"\\", "\0"} and part[0] != "." and len(part.encode()) <= LONGEST


def for_geneval(prompts: Sequence[Prompt]) -> bool:
    return all({"tag", "include", "prompt"} <= {*(prompt.about or {})} for prompt in prompts)


def for_dpg(prompts: Sequence[Prompt]) -> bool:
    numbered = all(prompt.name == f"{number:05}" for number, prompt in enumerate(prompts))
    return named_apart(prompts) and not numbered


SCORERS = {
    "geneval": Scorer("GenEval", 4, "its evaluation_metadata.jsonl, with tag, include, prompt", for_geneval, geneval),
    "dpg": Scorer("DPG-Bench", 4, "its folder of prompts, ID.txt, or lines with item_id", for_dpg, dpg),
    "hpsv3": Scorer("HPSv3", 1, "prompts with names of their own within a category", named_apart, hpsv3),
}


def check_fit(name: str, prompts: Sequence[Prompt]) -> None:
    """InputError unless the prompts are what the scorer of that name expects."""
    scorer = SCORERS[name]
    if not scorer.fits(prompts):
        raise InputError(f"--for {name}: these are not the prompts of {scorer.title}, which needs {scorer.needs}")


def arrange(name: str, folder: Path, prompts: Sequence[Prompt], picture: Picture) -> str:
    """Make the folder that a scorer reads, of images that exist, and return a line that says what is in it.

    Raises InputError if the folder also has something else, which the scorer would count.
    """
    scorer, made = SCORERS[name], set()
    for number, prompt in enumerate(progress_bar(prompts, f"arranging for {scorer.title}", "prompt")):
        try:
            made.update(scorer.arrange(folder, number, prompt, [picture(number, n) for n in range(scorer.images)]))
        except UnreadableError as e:
            raise InputError(f"{e}: remove it, and the same command draws it again") from None
    others = [file for file in folder.rglob("*") if file.is_file() and file not in made and file.name[0] != "."]
    if others:
        said = f"{count(len(others), 'file')} of other prompts, such as {min(others).relative_to(folder)}"
        raise InputError(f"{folder} also has {said}: remove them, or choose another --out")
    return f"{folder} has the {count(len(prompts), 'prompt')} for {scorer.title}, {count(scorer.images, 'image')} each"


def same_file(image: Path, path: Path) -> None:
    """A second name for a file, or a copy where the disk cannot do that."""
    if path.exists() and path.samefile(image):
        return
    with files.replacing(path) as beside:
        try:
            os.link(image, beside)
        except OSError:
            shutil.copyfile(image, beside)
