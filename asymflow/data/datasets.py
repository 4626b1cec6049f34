"""The data set of a configuration."""

from asymflow.data.encoded import EncodedShards
from asymflow.data.folder import ImageFolder
from asymflow.data.shapes import Shapes
from asymflow.data.shards import TarShards
from asymflow.errors import InputError
from asymflow.training.config.reading import Config


def make_dataset(config: Config) -> Shapes | ImageFolder | TarShards | EncodedShards:
    """Random access by index: `len(dataset)`, `dataset.num_classes`, `dataset.label(i)` and `dataset[i]`, a `Sample`.

    For finetuning, `EncodedShards`. To list files takes its time, so one process does it and sends the others what it
    made, by pickle; there, `dataset.check()` raises InputError if these files are not the same.

    `dataset[i]` raises UnreadableError, an InputError, if that image is damaged. Raises InputError if there are no
    images, or more classes than the model has.
    """
    data = config.data
    if data.kind == "encoded":
        return EncodedShards(data.path)
    size = config.model.image_size
    if data.kind == "shapes":
        dataset = Shapes(data.size, size, seed=config.train.seed)
    else:
        dataset = {"image_folder": ImageFolder, "webdataset": TarShards}[data.kind](data.path, size)
    if dataset.num_classes > config.model.num_classes:
        raise InputError(
            f"{data.path or data.kind} has {dataset.num_classes} classes, but model.num_classes is "
            f"{config.model.num_classes}: add --set model.num_classes={dataset.num_classes}"
        )
    return dataset
