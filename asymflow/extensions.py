"""Finding a class or function by its name: a name in a table of this library, or the user's own "package.module:Name".

A dotted name is taken only from a configuration or a command line that the user gives, never from a file that somebody
else may have written, because importing a module runs its code.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from asymflow.errors import InputError

OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_own(name: str) -> bool:
    """Whether a name is dotted, and so means code outside of this library."""
    return ":" in name


def check_name(name: str, table: Mapping[str, Any]) -> str | None:
    """What is wrong with a name, as the end of a sentence such as "model.backbone must be ..."; None if nothing is.

    Imports nothing.
    """
    if name in table or OWN.fullmatch(name):
        return None
    near = get_close_matches(name, table, 1)
    hint = f": did you mean {near[0]}?" if near else ""
    own = "package.module:Name of your own"
    return f"must be {', '.join([*table, f'or {own}']) if table else own}, but it is {name!r}{hint}"


def find(name: str, table: Mapping[str, str], key: str) -> Any:
    """Import and return what a name means: "module:Name", or a short name for which `table` has one.

    key: what the name was given for, for error messages, such as model.backbone. Raises InputError if it is not found.
    """
    if wrong := check_name(name, table):
        raise InputError(f"{key} {wrong}")
    module, _, attribute = table.get(name, name).partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if not is_own(name) or not f"{module}.".startswith(f"{e.name}."):
            raise  # a package that this library needs, or that the user's own module needs, is not installed
        raise InputError(
            f"{key} is {name}, but there is no module {e.name}: install it, or set PYTHONPATH to the folder it is in"
        ) from None
    if not hasattr(found, attribute):
        near = get_close_matches(attribute, vars(found), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise InputError(f"{key} is {name}, but {module} has no {attribute}{hint}")
    return getattr(found, attribute)


def accepted(function: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """The subset of `values` for which the function has arguments of these names."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in parameters}


def called(function: Callable, key: str, options: Mapping[str, Any], **arguments: Any) -> Any:
    """Call `function(**arguments, **options)`, where `options` are what a user gave under `key`.

    Raises InputError, naming the key, if an option is unknown to the function, one is missing, or the call fails.
    """
    parameters = inspect.signature(function).parameters
    name = getattr(function, "__name__", str(function))
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option in arguments:
            raise InputError(f"{key}.{option} is what other keys of the configuration say: leave it out")
        if option not in named and not anything:
            near = get_close_matches(option, named, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(named) or 'none'}"
            raise InputError(f"{key}.{option} is no argument of {name}: {hint}")
    given = {**arguments, **options}
    missing = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in given]
    if missing:
        raise InputError(f"{key} lacks {', '.join(missing)}, which {name} needs")
    try:
        return function(**given)
    except InputError as e:
        raise InputError(f"{key}: {e}") from None
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        what = f"{key}: {name} refuses them" if options else f"{name} cannot be made"
        raise InputError(f"{what}: {' '.join(str(e).split())[:300]}") from e
