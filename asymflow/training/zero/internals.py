"""What is used of DeepSpeed beyond its documented interface: all of it is here, and may change with any release."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

OLDEST, NEWEST = "0.19.8", "0.19.8"  # that the tests were run with
# Older ones have the same names, but take a gradient that is NaN for one of norm 1, and the step with it.


def remarks() -> list[str]:
    """One, if the installed release is none of those that the tests were run with."""
    import deepspeed

    release = lambda version: [int(number) for number in re.findall(r"\d+", version)[:3]]
    if release(OLDEST) <= release(deepspeed.__version__) <= release(NEWEST):
        return []
    return [f"DeepSpeed {deepspeed.__version__} is untested here: tested are {OLDEST} to {NEWEST}"]


def compile_no_communication() -> None:
    """On CPUs DeepSpeed would compile an extension first.

    That needs a compiler, and a process killed meanwhile leaves a lock behind that all later ones wait for.
    """
    if torch.cuda.is_available():  # where to look at the table would be to try a compiler for each of its entries
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def detach_monitor(engine) -> None:
    """The loop writes to it, not the engine, which counts anew from every start."""
    if csv := engine.monitor.csv_monitor:  # of a run that is continued: no second headings
        csv.filenames = [path.stem for path in Path(csv.log_dir).glob("*.csv")]
    engine.monitor.enabled = False


# ---- The configuration -----------------------------------------------------------------------------------------------
def config_class() -> type:
    """Made of a dictionary, it raises what DeepSpeed has to say against that."""
    from deepspeed.runtime.config import DeepSpeedConfig  # takes seconds: not before it is needed

    return DeepSpeedConfig


def config_models() -> list[type]:
    """The pydantic models of the sections of DeepSpeed's configuration."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    return DeepSpeedConfigModel.__subclasses__()


# ---- The optimizer ---------------------------------------------------------------------------------------------------
def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's AdamW, inside of DeepSpeed's optimizer or alone."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def param_groups(engine) -> Iterator[dict]:
    for optimizer in (engine.optimizer, base_optimizer(engine)):
        yield from optimizer.param_groups


def last_norm(engine) -> Tensor:
    """() of the gradient of the step that is being taken, at stages 1 to 3."""
    return torch.as_tensor(engine.optimizer._global_grad_norm)


# ---- The weights -----------------------------------------------------------------------------------------------------
class Place(NamedTuple):
    """Where a piece of a parameter is: from `start` in the parameter, flattened; at `cut` in `flat`, flattened.

    flat: what the optimizer works on, with its state in `base_optimizer(engine).state[flat]`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    cut: slice


def places(engine) -> Iterator[Place]:
    """Of all trained float32 weights that this rank holds: pieces at stages 1 to 3, whole parameters at stage 0."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
    if stage == 3:
        for p, name in named.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = p.ds_tensor.numel() * dist.get_rank(p.ds_process_group)
            size = min(size, p.ds_numel - start)  # without the padding of the last rank
            if size > 0:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Place(name, tuple(p.ds_shape), start, flat, slice(offset, offset + size))
    elif stage > 0:
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
        flats = optimizer.fp32_groups_flat_partition if flats is None else flats
        for p, name in named.items():
            if (mapping := p._hp_mapping) is not None:
                here, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                cut = slice(here.start, here.start + here.numel)
                yield Place(name, tuple(p.shape), start, flats[mapping.param_group_index], cut)
    else:
        originals = dict(bf16_and_float32_pairs(engine))
        for p, name in named.items():
            yield Place(name, tuple(p.shape), 0, originals.get(p, p), slice(None))


def held_part(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter between the steps: at stage 3 a part of it."""
    return getattr(parameter, "ds_tensor", parameter)


def bf16_and_float32_pairs(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """At stage 0: bfloat16 weights and their float32 originals, if DeepSpeed keeps such."""
    groups = (getattr(engine.optimizer, name, ()) for name in ("fp16_groups", "fp32_groups"))
    for low, high in zip(*groups, strict=True):
        yield from zip(low, high, strict=True)


def refresh_model_weights(engine) -> None:
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
        for low, high in bf16_and_float32_pairs(engine):
            low.data.copy_(high.data)
