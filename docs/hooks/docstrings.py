"""An extension of griffe: the docstrings of this repository, which are plain text, become Markdown.

Arguments ("x0, eps: (..., D).") become lists, "Returns" and "Raises" begin paragraphs, and indented lines become code.
"""

import re
from collections.abc import Iterator
from itertools import chain, groupby

import griffe

BEGINNINGS = r"(?:Returns|Raises|Yields)\b"
ERROR = "[`InputError`][asymflow.errors.InputError]"


class PlainText(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for thing in documented(pkg):
            thing.docstring.value = to_markdown(thing.docstring.value, names_of(thing))


def documented(module: griffe.Object) -> Iterator[griffe.Object]:
    """`module` and what is in it, all that have a docstring."""
    if module.docstring:
        yield module
    for member in module.members.values():
        if not member.is_alias:
            yield from documented(member)


def names_of(thing: griffe.Object) -> set[str]:
    """The names of the arguments, and of a class's attributes too."""
    if thing.is_function:
        return {p.name.lstrip("*") for p in thing.parameters} - {"self", "cls"}
    if thing.is_class:
        made = thing.members.get("__init__")
        return names_of(made) | set(thing.members) if made else set(thing.members)
    return set()


def to_markdown(text: str, names: set[str]) -> str:
    blocks = []
    for empty, group in groupby(text.splitlines(), lambda line: not line.strip()):
        lines = list(group)
        if not empty:
            blocks.append(code(lines) if lines[0].startswith("    ") else prose(lines, names))
    return "\n\n".join(blocks)


def code(lines: list[str]) -> str:
    return "\n".join(["```text", *(line[4:] for line in lines), "```"])


def prose(lines: list[str], names: set[str]) -> str:
    """A paragraph: its arguments as a list, the other sentences as they are."""
    listed = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    argument = rf"(?:{listed})(?:, (?:{listed}))*: "
    pieces = []
    for line in lines:
        new = not line.startswith("  ") and re.match(rf"{argument}|{BEGINNINGS}|[*-] ", line)
        after = pieces and pieces[-1].endswith(".") and re.match(argument, pieces[-1]) and re.match(r"[A-Z]", line)
        if new or after or not pieces:
            pieces.append(line.strip())
        else:
            pieces[-1] += " " + line.strip()
    inside = rf"(?<=[.;]) (?={argument}|{BEGINNINGS})"
    pieces = list(chain.from_iterable(re.split(inside, piece) for piece in pieces))
    rendered = ""
    for piece, before in zip(pieces, ["", *pieces], strict=False):
        item, after_item = (bool(re.match(rf"{argument}|[*-] ", p)) for p in (piece, before))
        rendered += ("\n" if item and after_item else "\n\n") + (as_item(piece) if item else escaped(piece))
    return rendered.strip()


def as_item(piece: str) -> str:
    if piece[:2] in ("* ", "- "):
        return f"- {escaped(piece[2:])}"
    names, _, rest = piece.removesuffix(";").partition(": ")
    return f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {escaped(rest)}"


def escaped(text: str) -> str:
    """Prose between the code spans: no HTML, no emphasis, and errors lead to their description."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        plain = parts[i].replace("&", "&amp;").replace("<", "&lt;").replace("*", r"\*")
        parts[i] = re.sub(r"\bInputError\b", ERROR, re.sub(r"(?<=\w)\[", r"\[", plain))
    return "`".join(parts)
