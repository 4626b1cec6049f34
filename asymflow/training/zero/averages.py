"""The moving averages of the weights, sharded like the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from asymflow.averages import Profile
from asymflow.training.zero.shards import Fragment


class Averages:
    """The averages of the fragments of one rank, in float32. Before the first step they are the initial weights.

    Earlier versions kept to 1 - b from the first step on. A checkpoint of theirs goes on with what its averages have of
    the initial weights, a share that falls in every step.
    """

    def __init__(self, fragments: Sequence[Fragment], profiles: Sequence[Profile]):
        self.fragments = list(fragments)
        self.values = {profile: [f.weight.clone() for f in self.fragments] for profile in profiles}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step 1, 2, ... into every average."""
        weights = [f.weight for f in self.fragments]
        for profile, values in self.values.items():
            torch._foreach_lerp_(values, weights, profile.share_at(step))

    def named_pieces(self, profile: Profile) -> dict[str, tuple[int, Tensor]]:
        """What this rank has of an average: by parameter, where it starts and its values."""
        return {f.name: (f.start, value) for f, value in zip(self.fragments, self.values[profile], strict=True)}
