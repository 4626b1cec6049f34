"""What is wrong with a configuration, in one line: the place, the key, what was expected and what was given."""

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import ValidationError

from asymflow.training.config.sections import Sections, known_keys
from asymflow.yaml12 import Keys, Layer, Origin, dotted, short, shown

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text, not empty",
    "tuple_type": "a list",
    "too_long": "a list of {max_length}",
    "too_short": "a list of more than {length}",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def first_fault(error: ValidationError, layer: Layer) -> str:
    """The first thing that is wrong: wrong keys and values before missing ones, which may be the same."""
    faults: dict[Keys, list[str]] = {}
    for e in sorted(error.errors(include_url=False), key=lambda e: e["type"] == "missing"):
        type_, loc = e["type"], e["loc"]
        if type_ == "missing" and isinstance(loc[-1], int):  # an element of a list
            type_, loc, e["ctx"] = "too_short", loc[:-1], {"length": loc[-1]}
        if type_ == "too_short":  # pydantic's own has the least length
            e["ctx"].setdefault("length", e["ctx"].get("min_length", 1) - 1)
        if type_ == "value_error":  # of `contradictions`
            for key, reason in e["ctx"]["error"].args[0]:
                faults[tuple(key.split("."))] = [f"{key} {reason}"] if reason else []
        elif type_ == "extra_forbidden":
            faults[loc] = []
        elif type_ == "missing":
            faults[loc] = [f"{dotted(loc)} is missing: give it in the file or by --set"]
        else:
            path, value = locate(loc, layer.values)
            expected = EXPECTED.get(type_, e["msg"]).format(**e.get("ctx", {}))
            if path in faults:  # the other branch of "a number or one of these words"
                expected = f"{faults[path][0]} or {expected}"
            plain = not isinstance(value, str | list | dict)  # a number is shown as it was written
            faults[path] = [expected, short((plain and origin(path, layer).text) or shown(value))]
    path, words = next(iter(faults.items()))
    if not words:
        message = f"unknown key {dotted(path)}: {suggestion(path)}"
    else:
        message = words[0] if len(words) == 1 else f"{dotted(path)} must be {words[0]}, but it is {words[1]}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{origin(path, layer).place}: {message}{more}"


def faults_of(error: ValidationError, values: object, section: str) -> Iterator[tuple[str, str]]:
    """The keys of a `section` that has these values, and what is wrong with each; "" for one that does not exist."""
    for e in error.errors(include_url=False):
        path, value = locate(e["loc"], values)
        expected = EXPECTED.get(e["type"], e["msg"]).format(**e.get("ctx", {}))
        unknown = e["type"] == "extra_forbidden"
        yield f"{section}.{dotted(path)}", "" if unknown else f"must be {expected}, but it is {shown(value)}"


def locate(loc: Keys, values: object) -> tuple[Keys, object]:
    """The part of pydantic's `loc` that is a path into the values (the rest names branches of a union), and its end."""
    for i, part in enumerate(loc):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return loc[:i], values
    return loc, values


def origin(path: Keys, layer: Layer) -> Origin:
    """Where the value was given, or else the section that should have it, or else something in that section."""
    found, _ = locate(path, layer.values)
    inside = (place for below, place in layer.origins.items() if below[: len(found)] == found)
    return layer.origins.get(found) or next(inside)


def suggestion(path: Keys) -> str:
    """The nearest key: in the same section, or else anywhere."""
    *above, name = map(str, path)
    section, known = ".".join(above), list(known_keys(Sections))
    if dotted(path) in known:
        return f"within a file, sections are nested, as in {name.replace('.', ': {', 1)}: ...}}"
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known)}
    for choice, cutoff in ((siblings, 0.5), (anywhere, 0.75)):
        if near := get_close_matches(name, choice, 1, cutoff):
            return f"did you mean {choice[near[0]]}?"
    return f"the keys of {section or 'a configuration'} are {', '.join(siblings)}"
