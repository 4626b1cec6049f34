"""What a training minimizes: here for class-conditional models from scratch, and for latent models made pixel models.

An objective defines the terms of the loss, the batches that they need, and how to draw samples from its model. The loop
knows nothing of the model. One of your own is a class `(config, flow, **loss.options)`. A class in the table of
`training/config/objectives.py` has a class method `prepare(config, dataset, device)` instead: it reads what the loss
needs, such as networks, and returns a function of the flow that makes the objective.
"""

from typing import Protocol

from torch import Tensor, nn

from asymflow.model import AsymFlow
from asymflow.training.loader import Batch, Batches


class Objective(Protocol):
    terms: tuple[str, ...]
    """The names of the terms of the loss, as in metrics.jsonl."""
    weights: tuple[float, ...]
    """The weight of each term in the loss that is minimized."""

    def model(self, flow: AsymFlow) -> nn.Module:
        """The module that the engine trains: `flow` itself, or an AsymFlow that returns more in training mode."""

    def batches(self, dataset, rank: int, world: int) -> Batches: ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The terms of the loss for each image of a micro-batch, (B, terms), not yet weighted."""

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        """RGB images (n, 3, H, W) in [-1, 1], always the same for the same weights and indices."""
