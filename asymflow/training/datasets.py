"""Making the data set that a configuration names."""

import inspect
from collections.abc import Callable

import torch

from asymflow import data
from asymflow.data.described import class_names, described, listed
from asymflow.data.sample import Sample
from asymflow.errors import InputError
from asymflow.extensions import accepted, called, find, is_own
from asymflow.text import count
from asymflow.training.config.reading import Config
from asymflow.training.config.sections import Data


def make_dataset(config: Config):
    """The data set that section `data` names: one of `asymflow.data`, or a class of the user's own.

    Listing files takes time, so only rank 0 calls this; the other ranks get the object by pickle. Raises InputError if
    there are no images, or more classes than the model has.
    """
    c = config.data
    kind = find(c.kind, data.TABLE, "data.kind")
    known = {"path": c.path, "count": c.size, "seed": config.train.seed}
    known |= {"size": config.model.image_size} if config.model else {}
    given = {name: value for name, value in known.items() if value is not None}
    if is_own(c.kind):
        check_arguments(kind, c)
    elif c.kind == "shapes" and c.path is not None:
        raise InputError(f"data.path is {c.path}, but data.kind is shapes, which reads nothing: set data.kind as well")
    dataset = called(kind, "data.options", c.options, **accepted(kind, given))
    if is_own(c.kind):
        check_own(dataset, c.kind, config.model.image_size)
    if config.model and dataset.num_classes != config.model.num_classes:
        check_classes(dataset, config)
    return dataset


def check_classes(dataset, config: Config) -> None:
    """InputError, unless there are fewer classes than the model has, and data.fewer_classes allows it."""
    found, expected = dataset.num_classes, config.model.num_classes
    names = class_names(dataset)
    some = f" ({listed(names)})" if names else ""
    has = f"{config.data.path or config.data.kind} has {count(found, 'class')}{some}"
    where = f"{has}, but model.num_classes is {expected}"
    if found > expected:
        raise InputError(f"{where}: add --set model.num_classes={found}")
    if not config.data.fewer_classes:
        raise InputError(
            f"{where}: give the right folder, or add --set model.num_classes={found}; or --set data.fewer_classes=true "
            "if the others are to stay untrained"
        )


def said(dataset, config: Config) -> list[str]:
    """What there is to say of a data set at the start of a training."""
    c = config.data
    unused = c.size is not None and not accepted(find(c.kind, data.TABLE, "data.kind"), {"count": c.size})
    lines = [f"data.size {c.size:,} is not used: {c.kind} takes all images"] if unused else []
    return lines + (described(dataset) if config.model else [])


def check_arguments(kind: Callable, c: Data) -> None:
    """InputError if `data.path` or `data.size` is given and a class of the user's own takes none, or the reverse."""
    parameters = inspect.signature(kind).parameters
    for key, argument, value in (("path", "path", c.path), ("size", "count", c.size)):
        if value is not None and argument not in parameters:
            raise InputError(f"data.{key} is given, but {c.kind} has no argument {argument}: leave it out, or set null")
        needed = argument in parameters and parameters[argument].default is inspect.Parameter.empty
        if value is None and needed and argument not in c.options:
            raise InputError(f"data.{key} is needed: it is the argument {argument} of {c.kind}")


def check_own(dataset, kind: str, size: int) -> None:
    """InputError unless a data set of the user's own is what `asymflow.data` asks for, by its first image."""
    missing = [name for name in ("__len__", "__getitem__", "label", "num_classes") if not hasattr(dataset, name)]
    if missing:
        raise InputError(f"data.kind {kind} has no {missing[0]}: see the text of asymflow/data/__init__.py")
    if not len(dataset):
        raise InputError(f"data.kind {kind} has no images")
    sample = dataset[0]
    if not isinstance(sample, Sample):
        raise InputError(
            f"data.kind {kind} must give asymflow.data.sample.Sample, but [0] is a {type(sample).__name__}"
        )
    image = sample.image
    if image.dtype != torch.uint8 or tuple(image.shape) != (3, size, size):
        found = f"{image.dtype} of shape {tuple(image.shape)}"
        raise InputError(f"data.kind {kind} must give images of torch.uint8, (3, {size}, {size}), but [0] is {found}")
