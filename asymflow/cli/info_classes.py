"""The classes of a model in `asymflow info`, by number and name."""

import json
import shlex
import textwrap
from pathlib import Path

from asymflow.cli.models import CLASSES, class_names, find_model, is_run
from asymflow.errors import InputError

MOST = 32  # of more, only the first ones are shown


def every(model: str, as_json: bool = False) -> str:
    """All classes of a model, each on a line, or a list in JSON. InputError if their names are not known."""
    path = Path(model)
    if not (names := class_names(path if is_run(path) else find_model(path, None, None))):
        raise InputError(f"the names of the classes of {model} are not known: there is no {CLASSES} in it")
    if as_json:
        return json.dumps(names, indent=2)
    return "\n".join(f"{i} {name}" for i, name in enumerate(printable(names)))


def shown(names: list[str], model: str, indent: int) -> str:
    """The first classes, some on each line. All lines but the first are indented."""
    words = [f"{i} {name}" for i, name in enumerate(printable(names[:MOST]))]
    if len(names) > MOST:
        words.append(f"... (all {len(names):,}: asymflow info {shlex.quote(model)} --classes)")
    together = ", ".join(word.replace(" ", "\0") for word in words)  # lines are broken between the words
    lines = textwrap.wrap(together, 120 - indent, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines).replace("\0", " ")


def printable(names: list[str]) -> list[str]:
    return ["".join(filter(str.isprintable, name)) for name in names]  # a stranger may have written them
