"""What a user should know of a data set before it is used: its remarks, how much there is, and its classes."""

from collections.abc import Sequence

from asymflow.text import count


def described(dataset) -> list[str]:
    """Lines to print of any data set of `asymflow.data`."""
    names = class_names(dataset)
    lines = list(getattr(dataset, "remarks", []))
    what = f"{count(len(dataset), 'image')} of {count(dataset.num_classes, 'class')}"
    lines.append(f"{what}: {listed(names)}" if names else what)
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        lines.append(
            f"the classes are numbered in the order of their names as text, not as numbers: {names[1]} is class 1, and "
            f"{names[-1]} class {len(names) - 1}"
        )
    return lines


def class_names(dataset) -> list[str]:
    """The names of the classes, by number; empty if the data set has none."""
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "...", names[-1]] if len(names) > 4 else names)
