"""All uses of DeepSpeed beyond its documented interface. Any release may break them."""

import importlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

OLDEST, NEWEST = "0.19.8", "0.19.8"  # releases that the tests were run with
# Older releases have the same names, but treat a NaN gradient as one of norm 1, and take the step.


def imported():
    """DeepSpeed, whose import takes seconds. What it says for its developers is not shown."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no accelerator
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").addFilter(is_worth_reading)
    # In every step it uses old names of collectives, of which newer versions of torch warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    return deepspeed


def is_worth_reading(record: logging.LogRecord) -> bool:
    """A filter: not that torch's builder of extensions found CUDA's files, but no GPU."""
    return not str(record.msg).startswith("No CUDA runtime is found")


def remarks() -> list[str]:
    """A list with one remark if the tests were not run with the installed release; else empty."""
    deepspeed = imported()
    release = lambda version: [int(number) for number in re.findall(r"\d+", version)[:3]]
    if release(OLDEST) <= release(deepspeed.__version__) <= release(NEWEST):
        return []
    return [f"DeepSpeed {deepspeed.__version__} is untested here: tested are {OLDEST} to {NEWEST}"]


def compile_no_communication() -> None:
    """Keep DeepSpeed from compiling its extension for communication on CPUs.

    Compiling needs a compiler, and a process killed during it leaves a lock that all later processes wait for.
    """
    if torch.cuda.is_available():  # on GPUs, only accessing the table below tries a compiler for each of its entries
        return
    imported().ops.__compatible_ops__["deepspeed_shm_comm"] = False


def detach_monitor(engine) -> None:
    """Keep the engine from writing to its monitors: it counts steps anew after every start. The loop writes to them."""
    if csv := engine.monitor.csv_monitor:  # a continued run has files with headings already: do not write them again
        csv.filenames = [path.stem for path in Path(csv.log_dir).glob("*.csv")]
    engine.monitor.enabled = False


def show_picture(engine, name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to those monitors that show some, TensorBoard and W&B, if they are enabled. Rank 0 calls it."""
    if tensorboard := engine.monitor.tb_monitor:
        tensorboard.summary_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    if wandb := engine.monitor.wandb_monitor:
        wandb.log({name: importlib.import_module("wandb").Image(picture)}, step=step)


# ---- The configuration -----------------------------------------------------------------------------------------------
def config_class() -> type:
    """A class whose constructor, given DeepSpeed's configuration as a dictionary, raises an error if it is invalid."""
    imported()
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig


class Watched(dict):
    """A dictionary that adds each key that somebody looks for to the set `looked_for`, also in shallow copies."""

    def __init__(self, values: dict, looked_for: set):
        super().__init__(values)
        self.looked_for = looked_for

    def __getitem__(self, key):
        self.looked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self.looked_for.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.looked_for.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView:
        return KeysView(self)


def config_models() -> list[type]:
    """The pydantic models of the sections of DeepSpeed's configuration."""
    imported()
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    return DeepSpeedConfigModel.__subclasses__()


# ---- The optimizer ---------------------------------------------------------------------------------------------------
def base_optimizer(engine) -> torch.optim.Optimizer:
    """The optimizer of torch, such as AdamW, which DeepSpeed's own optimizer wraps at most stages."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def param_groups(engine) -> Iterator[dict]:
    for optimizer in (engine.optimizer, base_optimizer(engine)):
        yield from optimizer.param_groups


def last_norm(engine) -> Tensor:
    """The norm () of the gradient of the step that is being taken. At stages 1 to 3 only."""
    return torch.as_tensor(engine.optimizer._global_grad_norm)


# ---- The weights -----------------------------------------------------------------------------------------------------
class Place(NamedTuple):
    """Where a piece of a parameter lies: it begins at `start` in the flattened parameter, and is `flat.view(-1)[cut]`.

    flat: the tensor that the optimizer works on; its state is `base_optimizer(engine).state[flat]`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    cut: slice


def places(engine) -> Iterator[Place]:
    """The places of all trained float32 weights that this rank holds: whole parameters at stage 0, else pieces."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
    if stage == 3:
        for p, name in named.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = p.ds_tensor.numel() * dist.get_rank(p.ds_process_group)
            size = min(size, p.ds_numel - start)  # the last rank's piece may end with padding
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
    """The part of a parameter that this rank stores between steps: at stage 3 its shard, else all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def bf16_and_float32_pairs(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """At stage 0: pairs of a bfloat16 weight and its float32 master; none if the weights are float32 themselves."""
    groups = (getattr(engine.optimizer, name, ()) for name in ("fp16_groups", "fp32_groups"))
    for low, high in zip(*groups, strict=True):
        yield from zip(low, high, strict=True)


def refresh_model_weights(engine) -> None:
    """Copy changed float32 masters into the weights that the model computes with. Called by all ranks."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # As the optimizer does after each step: fill every group of partitions from its float32 masters.
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
