"""Text through every door: UTF-8 or what a byte order mark says, the same everywhere; anything else is named."""

import io
import json
import tarfile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asymflow import InputError
from asymflow.cli.prompts import read_prompts
from asymflow.data.captioned import find_captioned
from asymflow.data.folder import ImageFolder
from asymflow.data.shards import TarShards
from asymflow.text import MARKS, count, decode, is_blank
from asymflow.training.config.reading import load_config

CAPTION = "grüne Tür, 门"
MARKED = [mark + CAPTION.encode(encoding) for mark, encoding in MARKS.items()]
GOOD = {
    "utf-8": CAPTION.encode(),
    **{f"marked {encoding}": text for encoding, text in zip(MARKS.values(), MARKED, strict=True)},
}
BAD = {
    "cp1252": "grüne Tür".encode("cp1252"),
    "gbk": "门".encode("gbk"),
    "shift_jis": "ドア".encode("shift_jis"),
    "utf-16 without a mark": "a door".encode("utf-16-le"),
    "half of utf-16": MARKED[3][:-1],
}
BLANK = {"a mark": b"\xef\xbb\xbf", "zero-width": "\u200b\ufeff \u2060".encode(), "spaces": b" \n", "nothing": b""}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_a_text_comes_back_from_every_encoding_with_a_mark(text):
    assert all(decode(mark + text.encode(encoding)) == text for mark, encoding in MARKS.items())
    if not text.startswith("\ufeff"):
        assert decode(text.encode()) == text


@given(st.binary())
def test_what_is_decoded_has_all_its_bytes(content):
    try:
        text = decode(content)
    except ValueError:
        return
    assert content in (mark + text.encode(encoding) for mark, encoding in [*MARKS.items(), (b"", "utf-8")])


def test_a_number_of_things():
    assert [count(n, "image") for n in (0, 1, 2, 1281167)] == ["0 images", "1 image", "2 images", "1,281,167 images"]
    assert [count(n, "class") for n in (1, 16)] == ["1 class", "16 classes"]


def test_what_cannot_be_seen_is_blank():
    assert all(is_blank(decode(content)) for content in BLANK.values())
    assert not is_blank("\u200ba")


# ---- Doors -----------------------------------------------------------------------------------------------------------
def png():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "png")
    return out.getvalue()


def as_tar(folder, contents):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


def as_files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    return folder


def quoted(content):
    """The content of a JSON file in the same encoding, with the same text as a caption."""
    mark, encoding = next(((m, e) for m, e in MARKS.items() if content.startswith(m)), (b"", None))
    start, end = ('{"caption": "', '"}') if not encoding else (s.encode(encoding) for s in ('{"caption": "', '"}'))
    if not encoding:
        return start.encode() + content + end.encode()
    return mark + start + content[len(mark) :] + end


DOORS = {
    "folder": lambda f, text: find_captioned([as_files(f, {"a.png": png(), "a.txt": text})], 8)[0].caption(),
    "json": lambda f, text: find_captioned([as_files(f, {"a.png": png(), "a.json": quoted(text)})], 8)[0].caption(),
    "tar": lambda f, text: find_captioned([as_tar(f, {"a.png": png(), "a.txt": text})], 8)[0].caption(),
    "classes": lambda f, text: ImageFolder(as_files(f, {"c/a.png": png(), "c/a.txt": text}), 8)[0].caption,
    "shards": lambda f, text: TarShards(as_tar(f, {"a.png": png(), "a.cls": b"0", "a.txt": text}), 8)[0].caption,
    "prompts": lambda f, text: read_prompts(as_files(f, {"p.txt": text}) / "p.txt")[0].text,
    "prompt": lambda f, text: read_prompts(as_files(f, {"p.txt": text}))[0].text,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("encoding", GOOD)
def test_text_is_the_same_through_every_door(tmp_path, door, encoding):
    assert DOORS[door](tmp_path, GOOD[encoding]) == CAPTION


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("encoding", BAD)
def test_what_is_no_text_is_named_and_not_replaced(tmp_path, door, encoding):
    with pytest.raises(InputError, match=r"is not UTF-|has NUL") as error:
        DOORS[door](tmp_path, BAD[encoding])
    assert "\n" not in str(error.value)
    assert any(name in str(error.value) for name in ("a.txt", "a.json", "a.png", "p.txt"))
    assert str(error.value).count(str(tmp_path)) <= 2


@pytest.mark.parametrize("door", ["folder", "json", "tar", "prompts"])
@pytest.mark.parametrize("blank", BLANK)
def test_what_says_nothing_is_no_caption(tmp_path, door, blank):
    content = BLANK[blank].replace(b"\n", b"")  # no text of JSON may have a line end
    with pytest.raises(InputError, match=r"an empty caption|has no prompt"):
        DOORS[door](tmp_path, content)


@pytest.mark.parametrize(("mark", "encoding"), MARKS.items())
def test_json_lines_and_configurations_too(tmp_path, mark, encoding):
    lines = [json.dumps({"image": f"{i}.png", "caption": f"{CAPTION} {i}"}, ensure_ascii=False) for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(mark + "\r\n".join(lines).encode(encoding))
    assert [photo.caption() for photo in find_captioned([tmp_path / "a.jsonl"], 8)] == [
        f"{CAPTION} {i}" for i in range(3)
    ]
    text = yaml.safe_dump({"base": "shapes_tiny", "data": {"path": CAPTION}}, allow_unicode=True)
    (tmp_path / "a.yaml").write_bytes(mark + text.encode(encoding))
    assert load_config(tmp_path / "a.yaml").data.path == CAPTION


def test_of_json_lines_that_are_not_utf8_only_the_bad_ones_are_left_out(tmp_path):
    lines = [b'{"image": "1.png", "caption": "good"}', '{"image": "2.png", "caption": "Tür"}'.encode("cp1252")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    good, bad = find_captioned([tmp_path / "a.jsonl"], 8)
    assert good.caption() == "good"
    with pytest.raises(InputError, match=r"2\.png: its caption is not text in UTF-8"):
        bad.caption()


def test_an_empty_caption_does_not_hide_a_text_beside_it(tmp_path):
    as_files(tmp_path, {"a.png": png(), "a.json": b'{"caption": " ", "text": "a door"}'})
    assert find_captioned([tmp_path], 8)[0].caption() == "a door"
