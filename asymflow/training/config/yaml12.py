"""Text in YAML 1.2 (core schema), without what a configuration has no use for: aliases, tags, NaN and infinity.

Every value comes with its origin, for messages that name the file and the line; whatever is wrong is one line.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import yaml

from asymflow.errors import InputError

DEEPEST, LARGEST_NUMBER = 20, 2**63  # levels; what 64 bits hold
Keys = tuple[str | int, ...]


class Origin(NamedTuple):
    """Where a value was given, and how it was written there."""

    place: str
    text: str | None = None


class Layer(NamedTuple):
    """Values, and where each of them came from."""

    values: Any
    origins: dict[Keys, Origin]

    def over(self, below: "Layer") -> "Layer":
        return Layer(merged(below.values, self.values), below.origins | self.origins)


def merged(below: object, above: object) -> object:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: merged(below[name], value) if name in below else value for name, value in above.items()}


# ---- Reading ---------------------------------------------------------------------------------------------------------
TAG = "tag:yaml.org,2002:"
SCALARS = [
    (f"{TAG}null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (f"{TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (f"{TAG}int", re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    (f"{TAG}float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")),  # no NaN, no infinity
]
CONVERTERS = {
    f"{TAG}null": lambda text: None,
    f"{TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{TAG}int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    f"{TAG}float": float,
    f"{TAG}str": str,
}


class Loader(yaml.SafeLoader):
    """Reads nodes only: what they mean is decided by `construct`."""

    yaml_implicit_resolvers = {None: SCALARS}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"write out what *{event.anchor} is", problem_mark=event.start_mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse(text: str, place: Callable[[int], str], path: Keys = ()) -> Layer:
    """What a text in YAML says. `place`: what to call a line of it, counted from 0; `path`: of its values.

    Raises InputError.
    """
    origins: dict[Keys, Origin] = {}
    try:
        loader = Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        reason = one_line(", ".join(filter(None, (e.context, e.problem))))
        tab = " (indent with spaces)" if "'\\t'" in reason else ""
        raise InputError(f"{place(mark.line if mark else 0)}: {reason}{tab}") from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position)
        raise InputError(f"{place(line)}: the character {chr(e.character)!a} is not allowed") from None
    except (ValueError, OverflowError) as e:  # numbers in escapes and directives
        raise InputError(f"{place(loader.line)}: this is not YAML ({one_line(e)})") from None
    values = None if root is None else construct(root, path, place, origins)
    origins.setdefault(path, Origin(place(0), ""))
    return Layer(values, origins)


def construct(node: yaml.Node, path: Keys, place: Callable[[int], str], origins: dict[Keys, Origin]) -> object:
    here = place(node.start_mark.line)
    origins.setdefault(path, Origin(here, node.value if isinstance(node, yaml.ScalarNode) else None))
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        values = {}
        for key, value in node.value:
            at = place(key.start_mark.line)
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{at}: a key must be a word, but this is a list or a section")
            below = (*path, checked_text(key.value, at))
            if key.value in values:
                first = origins[below].place.rpartition(", ")[2]
                raise InputError(f"{at}: {dotted(below)} is given twice, the first time at {first}")
            origins[below] = Origin(at, value.value if isinstance(value, yaml.ScalarNode) else None)
            values[key.value] = construct(value, below, place, origins)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        return [construct(value, (*path, i), place, origins) for i, value in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in CONVERTERS:
        raise InputError(f"{here}: the tag {shown(node.tag)} is not allowed")
    text = checked_text(node.value, here)
    try:
        value = CONVERTERS[node.tag](text)
    except (ValueError, KeyError):  # too many digits, or an explicit tag such as !!int on something else
        value = math.inf
    if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
        raise InputError(f"{here}: {dotted(path)} is no number that can be used: {short(text)}")
    return value


def checked_text(text: str, place: str) -> str:
    for character in text:
        if not character.isprintable():  # in a key or a path it is a slip, and messages are to stay one line
            raise InputError(f"{place}: the character {character!a} is not allowed")
    return text


# ---- Writing ---------------------------------------------------------------------------------------------------------
class Dumper(yaml.SafeDumper):
    """Writes what `parse` reads: one key a line, lists within the line, no aliases."""

    yaml_implicit_resolvers = {None: SCALARS}  # noqa: RUF012

    def ignore_aliases(self, data):
        return True

    def represent_list(self, data):
        return self.represent_sequence(f"{TAG}seq", data, flow_style=True)


Dumper.add_representer(list, Dumper.represent_list)
Dumper.add_representer(tuple, Dumper.represent_list)


def in_yaml(value: object, **options) -> str:
    """A value as it would be written, by default within a line."""
    options = dict(default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf) | options
    return yaml.dump(value, Dumper=Dumper, **options).removesuffix("...\n").rstrip("\n")


# ---- In messages -----------------------------------------------------------------------------------------------------
def dotted(path: Iterable[str | int]) -> str:
    return short("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix("."))


def shown(value: object) -> str:
    """A value as a user would recognize it."""
    if isinstance(value, dict):
        return "a section"
    return short(repr(value) if isinstance(value, str) else in_yaml(value))


def short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: object) -> str:
    return " ".join(str(text).split())
