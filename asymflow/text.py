"""Text in files that a user gives: UTF-8, or what a byte order mark says. Nothing is guessed, nothing replaced.

And text that is shown.
"""

import codecs
import unicodedata

MARKS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def encoding_of(start: bytes) -> tuple[str, int]:
    """The encoding of a file that begins with these bytes, of which four are enough, and the length of its mark."""
    return next(((name, len(mark)) for mark, name in MARKS.items() if start.startswith(mark)), ("utf-8", 0))


def decode(content: bytes) -> str:
    """The text, without a byte order mark. Raises ValueError: "is not UTF-8 (byte 3)", to put behind a file's name."""
    encoding, mark = encoding_of(content)
    try:
        text = content[mark:].decode(encoding)
    except UnicodeDecodeError as e:
        hint = "" if mark else ": save it as UTF-8"
        raise ValueError(f"is not {encoding.upper()} (byte {mark + e.start}){hint}") from None
    if "\0" in text:
        raise ValueError("has NUL characters: is it UTF-16 without a byte order mark? Save it as UTF-8")
    return text


def is_blank(text: str) -> bool:
    """Whether nothing in a text can be seen: white space, byte order marks, zero-width characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def count(number: int, what: str) -> str:
    """A number of things, such as "1 image", "2 classes" or "1,000 files"."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"
