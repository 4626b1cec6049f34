"""The data set of a configuration."""

from asymflow import data
from asymflow.errors import InputError
from asymflow.extensions import accepted, called, find
from asymflow.training.config.reading import Config


def make_dataset(config: Config):
    """One of the kinds of `asymflow.data`, or of the user's own.

    To list files takes its time, so one process does it, and sends the others what it made, by pickle. Raises
    InputError if there are no images, or more classes than the model has.
    """
    c = config.data
    kind = find(c.kind, data.TABLE, "data.kind")
    known = {"path": c.path, "count": c.size, "seed": config.train.seed}
    known |= {"size": config.model.image_size} if config.model else {}
    given = {name: value for name, value in known.items() if value is not None}
    dataset = called(kind, "data.options", c.options, **accepted(kind, given))
    if config.model and dataset.num_classes > config.model.num_classes:
        raise InputError(
            f"{c.path or c.kind} has {dataset.num_classes} classes, but model.num_classes is "
            f"{config.model.num_classes}: add --set model.num_classes={dataset.num_classes}"
        )
    return dataset
