"""What a training minimizes: a class-conditional model from scratch, or a pixel model that goes on from a latent one.

An objective knows the terms of the loss, the batches that they need, and how its model is drawn from. The loop knows
nothing of the model.
"""

from typing import Protocol

from torch import Tensor, nn

from asymflow.model import AsymFlow
from asymflow.training.loader import Batch, Batches


class Objective(Protocol):
    terms: tuple[str, ...]
    """Of the loss, as they are called in the metrics."""
    weights: tuple[float, ...]
    """Of the terms, in what is minimized."""

    def flops(self) -> int | None:
        """Of a training step on one image, without what is computed twice to save memory; None: not counted."""

    def model(self, flow: AsymFlow) -> nn.Module:
        """What the engine trains: an AsymFlow, perhaps with more to say while it is trained."""

    def batches(self, dataset, rank: int, world: int) -> Batches: ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The terms of the loss of each image of a micro-batch, not yet weighted: (B, terms)."""

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        """RGB images (n, 3, H, W) in [-1, 1], always the same for the same weights and indices."""
