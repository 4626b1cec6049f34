"""The configuration of a training, and where it comes from.

    load_config("emoji64", ["data.path=emoji64.tar", "train.steps=1000"])

sections.py has all keys, with what they mean; `asymflow info config` prints them. The YAML files follow YAML 1.2: 1e-4
is a number, and only true and false are booleans. A file may begin with `base: NAME_OR_PATH` and hold only what differs
from that. Whatever is wrong ends in one line with the file, the line and the key.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError, model_validator

from asymflow.errors import InputError
from asymflow.text import decode
from asymflow.training.config.contradictions import contradictions, deepspeed_contradictions
from asymflow.training.config.faults import first_fault
from asymflow.training.config.sections import Sections
from asymflow.yaml12 import Layer, Origin, in_yaml, one_line, parse, short, shown

CONFIGS = files("asymflow") / "configs"
MOST_BASES = 20
LARGEST_FILE = 50_000  # bytes


class Config(Sections):
    """A training whose keys fit together. Raises pydantic's ValidationError; `load_config` makes one line of it."""

    @model_validator(mode="after")
    def check(self):
        if faults := [*contradictions(self), *deepspeed_contradictions(self)]:
            raise ValueError(faults)
        return self


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A shipped configuration by its name (see `shipped`), or a YAML file; then `overrides`, such as "train.steps=10".

    The value of an override is YAML too: a number, a word, a list as in "ema.decays=[0.999, 0.9999]".
    Raises InputError, one line with file, line and key, and the nearest right key if that one does not exist.
    """
    layer = read_file(str(name_or_path))
    for override in overrides:
        layer = read_override(override).over(layer)
    try:
        return Config.model_validate(layer.values)
    except ValidationError as e:
        raise InputError(first_fault(e, layer)) from None


def shipped() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in CONFIGS.iterdir() if file.name.endswith(".yaml"))


def read_file(name: str, folder: Path = Path(), above: tuple[str, ...] = (), asked: str = "") -> Layer:
    """A file and, below it, its base. `above`: the files that are based on it; `asked`: where the last of them says so.

    A relative path starts from `folder`.
    """
    if name in shipped():
        file, label, folder = CONFIGS / f"{name}.yaml", f"asymflow/configs/{name}.yaml", Path()
    else:
        file = folder / name
        label, folder = one_line(file), file.parent
        if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for what cannot be a name)
            near = get_close_matches(name, shipped(), 1)
            hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
            raise InputError(f"{asked}{short(label)} is neither a file nor a shipped configuration: {hint}")
    identity = os.path.realpath(file) if isinstance(file, Path) else label
    if identity in above:
        raise InputError(f"{asked}{label} is based on itself, directly or through its base")
    if len(above) > MOST_BASES:
        raise InputError(f"{asked}{label} is the base of a base, {len(above)} times: {MOST_BASES} are read")
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        text = decode(content)
    except OSError as e:
        raise InputError(f"{label} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise InputError(f"{label} {e}: is it a YAML file?") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"{label} has more than {LARGEST_FILE} bytes: that is no configuration")
    layer = parse(text, lambda line: f"{label}, line {line + 1}")
    if not isinstance(layer.values, dict):
        found = "it is empty" if layer.values is None else f"it is {shown(layer.values)}"
        raise InputError(f"{label} must have sections of keys, such as train: {{steps: 1000}}, but {found}")
    layer.origins[()] = Origin(label)
    base = layer.values.pop("base", None)
    if base is None:
        return layer
    place = layer.origins["base",].place
    if not isinstance(base, str) or not base:
        raise InputError(f"{place}: base must be a name or a path, but it is {shown(base)}")
    return layer.over(read_file(base, folder, (*above, identity), f"{place}: base "))


def read_override(text: str) -> Layer:
    place = short(one_line(f"--set {text}"))
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path) or not key.isprintable():
        raise InputError(f"{place}: expected KEY=VALUE, such as train.steps=1000")
    values, origins = parse(value, lambda line: place, path)
    for name in reversed(path):
        values = {name: values}
    return Layer(values, origins)


def dump(config: Config) -> str:
    """All keys, in the order of the classes, in ASCII. From a file with this text `load_config` makes it again."""
    return in_yaml(config.model_dump(), default_flow_style=False, allow_unicode=False) + "\n"
