"""The part of the model that ZeRO keeps on this rank: named pieces of the float32 weights and of Adam's moments.

DeepSpeed flattens, concatenates, pads and cuts up the parameters, in another way at each stage. A `Fragment` hides
these differences: it is a contiguous piece of one flattened parameter, as views into DeepSpeed's memory. Moving
averages and checkpoints work on fragments alone. So they are sharded like the weights, and a checkpoint can be read at
any stage by any number of ranks.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asymflow.training.zero import internals


@dataclass(frozen=True)
class Fragment:
    """Elements start, ..., start + len(weight) - 1 of the flattened parameter `name`, whose full shape is `shape`.

    weight, moments: (n,) float32 views of the tensors that the optimizer works on. state: the optimizer's state of the
    tensor that `weight` is a part of; other fragments of this tensor share it, and its "step".
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: dict[str, Tensor]
    state: dict

    def part(self, index: int, parts: int) -> "Fragment | None":
        """The `index`-th of `parts` nearly equal pieces; None if it would be empty."""
        size = -(-len(self.weight) // parts)
        begin, end = min(index * size, len(self.weight)), min((index + 1) * size, len(self.weight))
        if begin == end:
            return None
        cut = slice(begin, end)
        moments = {name: m[cut] for name, m in self.moments.items()}
        return replace(self, start=self.start + begin, weight=self.weight[cut], moments=moments)


def held_fragments(engine) -> list[Fragment]:
    """All fragments that this rank holds. At stage 0 every rank holds every parameter whole."""
    base = internals.base_optimizer(engine)
    example = state_of_two_numbers(base)
    return [fragment(place, base, example) for place in internals.places(engine)]


def owned_fragments(engine) -> list[Fragment]:
    """The fragments that this rank saves and averages. Every element of a trained parameter is in just one rank's."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    parts = (fragment.part(engine.global_rank, engine.world_size) for fragment in held)
    return [part for part in parts if part is not None]


def fragment(place: internals.Place, base: torch.optim.Optimizer, example: dict[str, Tensor | float]) -> Fragment:
    """The fragment at a place. Makes its optimizer state, of zeros, if there is none yet.

    example: see `state_of_two_numbers`. Of its entries, those with one number for each weight are moments.
    """
    name, shape, start, flat, cut = place
    state = base.state[flat]
    moments = [kind for kind, value in example.items() if isinstance(value, Tensor) and value.shape == (2,)]
    for kind, value in example.items():
        if kind not in state:  # in a new training, whose state `make_engine` cleared
            numbers = torch.zeros_like(flat if kind in moments else torch.as_tensor(value)).to(flat.device)
            state[kind] = numbers if isinstance(value, Tensor) else type(value)(0)
    cuts = {moment: state[moment].detach().view(-1)[cut] for moment in moments}
    return Fragment(name, shape, start, flat.detach().view(-1)[cut], cuts, state)


def state_of_two_numbers(base: torch.optim.Optimizer) -> dict[str, Tensor | float]:
    """The state that this kind of optimizer keeps for a tensor (2,), found by a step of a copy of `base`."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    trial = copy.copy(base)
    trial.state, trial.param_groups = defaultdict(dict), [{**base.param_groups[0], "params": [p]}]
    trial.step()
    return dict(trial.state[p])
