"""The moving averages of the weights, sharded like the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from asymflow.averages import Profile
from asymflow.training.zero.shards import Fragment


class Averages:
    """The averages of this rank's fragments, in float32. Before the first step they are the initial weights.

    In earlier versions of this library an average of constant decay b used the share 1 - b from the first step on. In a
    training resumed from such a checkpoint, its averages still contain initial weights, fewer with every step.
    """

    def __init__(self, fragments: Sequence[Fragment], profiles: Sequence[Profile]):
        self.fragments = list(fragments)
        self.values = {profile: [f.weight.clone() for f in self.fragments] for profile in profiles}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards the weights after step 1, 2, ..."""
        weights = [f.weight for f in self.fragments]
        for profile, values in self.values.items():
            torch._foreach_lerp_(values, weights, profile.share_at(step))

    def named_pieces(self, profile: Profile) -> dict[str, tuple[int, Tensor]]:
        """This rank's part of an average: for each parameter, where it starts in it (flattened), and its values."""
        return {f.name: (f.start, value) for f, value in zip(self.fragments, self.values[profile], strict=True)}
