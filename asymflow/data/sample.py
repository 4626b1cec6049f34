"""One image of a data set, with its label, name and caption."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """image: (3, H, W) uint8. label: its class. name: where it came from, for messages. caption: what it shows."""

    image: Tensor
    label: int
    name: str
    caption: str = ""
