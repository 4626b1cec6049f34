"""What ZeRO keeps of the model on this rank: pieces of the float32 weights and of Adam's moments, by name.

DeepSpeed flattens, concatenates, pads and cuts up the parameters, each stage in its own way. Seen from here they are
all the same: a `Fragment` is a contiguous piece of one flattened parameter, as views into DeepSpeed's own memory. The
moving averages and the checkpoints know nothing else, so they are sharded like the weights, and a checkpoint of any
stage and number of ranks can be read by any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    return list(iterate(engine))


def owned_fragments(engine) -> list[Fragment]:
    """What this rank answers for: over all ranks, every element of every trained parameter exactly once."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    parts = (fragment.part(engine.global_rank, engine.world_size) for fragment in held)
    return [part for part in parts if part is not None]


def iterate(engine) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)  # torch's AdamW, inside of DeepSpeed's or alone
    named = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for p, name in named.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = p.ds_tensor.numel() * torch.distributed.get_rank(p.ds_process_group)
            size = min(size, p.ds_numel - start)  # without the padding of the last rank
            if size > 0:
                yield fragment(name, p.ds_shape, start, flat, slice(offset, offset + size), base)
    elif stage > 0:
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
        flats = optimizer.fp32_groups_flat_partition if flats is None else flats
        for p, name in named.items():
            if (mapping := p._hp_mapping) is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                flat = flats[mapping.param_group_index]
                yield fragment(name, p.shape, there.start, flat, slice(here.start, here.start + here.numel), base)
    else:
        master = {}  # from bfloat16 weights to their float32 originals, if DeepSpeed keeps such
        for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
            master |= dict(zip(low, high, strict=True))
        for p, name in named.items():
            yield fragment(name, p.shape, 0, master.get(p, p), slice(None), base)


def fragment(name: str, shape: torch.Size, start: int, tensor: Tensor, cut: slice, base) -> Fragment:
    state = base.state[tensor]
    if not state:  # as AdamW makes it in its first step
        state["step"] = torch.zeros((), device=tensor.device)
        state |= {moment: torch.zeros_like(tensor) for moment in MOMENTS}
    moments = {moment: state[moment].detach().view(-1)[cut] for moment in MOMENTS}
    return Fragment(name, tuple(shape), start, tensor.detach().view(-1)[cut], moments, state)


def spread_weights(engine) -> None:
    """After the float32 weights were changed: bring the weights that the model computes with into line."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # What the optimizer does after each step: every group of partitions anew from its float32 originals.
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
            for p, original in zip(low, high, strict=True):
                p.data.copy_(original.data)
