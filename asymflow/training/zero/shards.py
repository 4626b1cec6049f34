"""What ZeRO keeps of the model on this rank: pieces of the float32 weights and of Adam's moments, by name.

DeepSpeed flattens, concatenates, pads and cuts up the parameters, each stage in its own way. Seen from here they are
all the same: a `Fragment` is a contiguous piece of one flattened parameter, as views into DeepSpeed's own memory. The
moving averages and the checkpoints know nothing else, so they are sharded like the weights, and a checkpoint of any
stage and number of ranks can be read by any other.
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

    weight, moments: (n,) float32 views that the optimizer works on. `state` is the optimizer's entry for the tensor
    that they are part of (its "step" is shared by all fragments of that tensor).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: dict[str, Tensor]
    state: dict

    def part(self, index: int, parts: int) -> "Fragment | None":
        """The `index`-th of `parts` nearly equal pieces; None if nothing is left for it."""
        size = -(-len(self.weight) // parts)
        begin, end = min(index * size, len(self.weight)), min((index + 1) * size, len(self.weight))
        if begin == end:
            return None
        cut = slice(begin, end)
        moments = {name: m[cut] for name, m in self.moments.items()}
        return replace(self, start=self.start + begin, weight=self.weight[cut], moments=moments)


def held_fragments(engine) -> list[Fragment]:
    """All that this rank holds. At stage 0 that is everything, on every rank."""
    base = internals.base_optimizer(engine)
    known = state_of_two_numbers(base)
    return [fragment(place, base, known) for place in internals.places(engine)]


def owned_fragments(engine) -> list[Fragment]:
    """What this rank answers for: over all ranks, every element of every trained parameter exactly once."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    parts = (fragment.part(engine.global_rank, engine.world_size) for fragment in held)
    return [part for part in parts if part is not None]


def fragment(place: internals.Place, base: torch.optim.Optimizer, known: dict[str, Tensor | float]) -> Fragment:
    """known: see `state_of_two_numbers`."""
    name, shape, start, flat, cut = place
    state = base.state[flat]
    moments = [kind for kind, value in known.items() if isinstance(value, Tensor) and value.shape == (2,)]
    for kind, value in known.items():
        if kind not in state:  # nothing of a new training, as DeepSpeed's first step is forgotten
            numbers = torch.zeros_like(flat if kind in moments else torch.as_tensor(value)).to(flat.device)
            state[kind] = numbers if isinstance(value, Tensor) else type(value)(0)
    cuts = {moment: state[moment].detach().view(-1)[cut] for moment in moments}
    return Fragment(name, shape, start, flat.detach().view(-1)[cut], cuts, state)


def state_of_two_numbers(base: torch.optim.Optimizer) -> dict[str, Tensor | float]:
    """What an optimizer keeps of a tensor (2,), found by a step of a copy of it."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    trial = copy.copy(base)
    trial.state, trial.param_groups = defaultdict(dict), [{**base.param_groups[0], "params": [p]}]
    trial.step()
    return dict(trial.state[p])
