"""Text in YAML 1.2 (core schema), without what a configuration has no use for: aliases, tags, NaN and infinity.

Every value comes with its origin, for messages that name the file and the line; whatever is wrong is one line.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

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
WORDS = [  # what a word without quotes is, if not text: no NaN, no infinity
    (re.compile("~|null|Null|NULL|"), lambda word: None),
    (re.compile("true|True|TRUE|false|False|FALSE"), lambda word: word.lower() == "true"),
    (re.compile("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), lambda word: int(word, {"0o": 8, "0x": 16}.get(word[:2], 10))),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
]


def meaning(word: str) -> object:
    try:
        return next((mean(word) for pattern, mean in WORDS if pattern.fullmatch(word)), word)
    except ValueError:  # more digits than Python reads
        return math.inf


class Loader(yaml.BaseLoader):
    """PyYAML reads the text; what it means in YAML 1.2 is decided here."""

    # PyYAML's own less U+0085, U+2028 and U+2029, which are no ends of lines in YAML 1.2, and cannot be seen.
    NON_PRINTABLE = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

    def __init__(self, text: str):
        super().__init__(text)
        self.origins = {}  # lines, counted from 0, and texts

    def refuse(self):
        what = f"what begins with {self.peek()} must be in quotes: there are no aliases, tags or directives"
        fault(what, self.get_mark())

    fetch_anchor = fetch_alias = fetch_tag = fetch_directive = refuse

    def value(self, node: yaml.Node, path: Keys, start: yaml.Mark) -> object:
        """What is given for the keys of `path` at `start`."""
        if path in self.origins:
            fault(f"{dotted(path)} is given twice, the first time at line {self.origins[path][0] + 1}", start)
        if len(path) > DEEPEST:
            fault("nested too deeply", start)
        self.origins[path] = start.line, node.value if isinstance(node, yaml.ScalarNode) else None
        if isinstance(node, yaml.MappingNode):
            pairs = ((text_of(key), key, value) for key, value in node.value)
            return {name: self.value(value, (*path, name), key.start_mark) for name, key, value in pairs}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(value, (*path, i), value.start_mark) for i, value in enumerate(node.value)]
        value = text_of(node) if node.style else meaning(text_of(node))
        if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
            fault(f"{dotted(path)} is no number that can be used: {short(node.value)}", start)
        return value


def text_of(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        fault("a key must be a word, but this is a list or a section", node.start_mark)
    for character in node.value:
        if not character.isprintable():  # in a key or a path it is a slip, and messages are to stay one line
            fault(f"the character {character!a} is not allowed", node.start_mark)
    return node.value


def fault(what: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def parse(text: str, place: Callable[[int], str], path: Keys = ()) -> Layer:
    """What a text in YAML says. `place`: what to call a line of it, counted from 0; `path`: of its values.

    Raises InputError.
    """
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        values = loader.value(root, path, root.start_mark) if root else None
    except yaml.MarkedYAMLError as e:
        line = (e.problem_mark or e.context_mark).line
        reason = one_line(", ".join(filter(None, (e.context, e.problem))))
        reason += " (indent with spaces)" if "'\\t'" in reason else ""
    except yaml.reader.ReaderError as e:
        line, reason = text.count("\n", 0, e.position), f"the character {chr(e.character)!a} is not allowed"
    except (ValueError, OverflowError) as e:  # numbers in escapes
        line, reason = loader.line, f"this is not YAML ({one_line(e)})"
    except RecursionError:
        line, reason = loader.line, "nested too deeply"
    else:
        origins = {path: Origin(place(line), text) for path, (line, text) in loader.origins.items()}
        return Layer(values, {path: Origin(place(0))} | origins)
    raise InputError(f"{place(line)}: {reason}")


# ---- Writing ---------------------------------------------------------------------------------------------------------
class Dumper(yaml.SafeDumper):
    """Writes what `parse` reads: one key a line, lists within the line, no aliases."""

    def ignore_aliases(self, data):
        return True

    def represent_list(self, data):
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def represent_text(self, data):
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if meaning(data) is data else "'")


Dumper.add_representer(list, Dumper.represent_list)
Dumper.add_representer(tuple, Dumper.represent_list)
Dumper.add_representer(str, Dumper.represent_text)


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
