"""The DeepSpeed engine of a training."""

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asymflow.averages import Profile
from asymflow.errors import InputError
from asymflow.extensions import accepted, called, find, is_own
from asymflow.training.config.derived import bf16_weights, repeated_blocks
from asymflow.training.config.optimizers import TABLE as OPTIMIZERS
from asymflow.training.config.reading import Config
from asymflow.training.config.sections import Optimizer
from asymflow.training.run.ranks import all_or_raise, gather
from asymflow.training.zero import internals, shards
from asymflow.training.zero.averages import Averages
from asymflow.training.zero.settings import deepspeed_config

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": "csv"}  # and packages


# ---- Making it -------------------------------------------------------------------------------------------------------
def make_engine(flow: nn.Module, config: Config, out: Path):
    """The engine that trains `flow`: AdamW under the ZeRO stage of the configuration.

    flow: in float32; the engine takes it over. out: the folder of the run, where monitors write if nothing else is
    said. Called by all ranks; raises AgreedError if a monitor's package is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer versions of torch warn of, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed  # takes seconds: not before it is needed

    internals.compile_no_communication()
    deepspeed.init_distributed()
    options = deepspeed_config(config, dist.get_world_size())
    gather(lambda: prepare_monitors(options, out))
    if config.train.compile:
        all_or_raise(lambda: prepare_compiling(flow, options))
    originals = float32_copies(flow) if bf16_weights(config) else {}
    o = config.optimizer
    groups = all_or_raise(lambda: parameter_groups(flow, o.multipliers), "optimizer.multipliers")
    optimizer = all_or_raise(lambda: make_optimizer(groups, o))
    engine, *_ = deepspeed.initialize(model=flow, optimizer=optimizer, config=options)
    # Some of DeepSpeed's optimizers take a step with zero gradients to allocate the moments, and count it.
    internals.base_optimizer(engine).state.clear()
    if originals:  # DeepSpeed has made its own from weights that it had rounded before
        with torch.no_grad():
            for f in (f for f in shards.held_fragments(engine) if f.name in originals):
                f.weight.copy_(originals[f.name].view(-1)[f.start : f.start + len(f.weight)])
        internals.refresh_model_weights(engine)
    internals.detach_monitor(engine)
    if config.train.compile:
        compile_blocks(engine.module)
    return engine


def make_optimizer(groups: list[dict], o: Optimizer) -> torch.optim.Optimizer:
    """That of optimizer.kind: see config/optimizers.py. InputError if it does not take the options."""
    make = find(o.kind, OPTIMIZERS, "optimizer.kind")
    given = accepted(make, {"betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay})
    fused = {} if is_own(o.kind) else {"fused": True}  # a kernel for all; also on CPUs
    return called(make, "optimizer.options", o.options, params=groups, lr=o.lr, **given, **fused)


def parameter_groups(flow: nn.Module, multipliers: dict[str, float]) -> list[dict]:
    """For an optimizer: the trained parameters, in groups that share a multiplier of the learning rate.

    multipliers: by names of layers, such as proj_out; those below them have it too. InputError if one trains nothing.
    """
    groups, unused = {}, dict(multipliers)
    for name, p in flow.named_parameters():
        if p.requires_grad:
            path = f".{name}."
            layers = [layer for layer in multipliers if f".{layer}." in path]
            factor = max(layers, key=len, default=None)
            groups.setdefault(multipliers.get(factor, 1.0), []).append(p)
            unused = {layer: m for layer, m in unused.items() if layer not in layers}
    if unused:
        raise InputError(f"no trained parameter is in a layer called {' or '.join(unused)}")
    return [{"params": params, "multiplier": multiplier} for multiplier, params in groups.items()]


def prepare_monitors(options: dict, out: Path) -> None:
    """Let DeepSpeed's monitors write below the folder of the run, unless the options say where.

    Raises InputError if the package of one that is enabled is not installed.
    """
    for name, package in MONITORS.items():
        section = options.get(name)
        if not isinstance(section, dict) or not section.get("enabled"):
            continue
        if importlib.util.find_spec(package) is None:
            raise InputError(f"deepspeed.{name}.enabled is true, but {package} is not installed: pip install {package}")
        if name in ("tensorboard", "csv_monitor"):  # they write to output_path/job_name
            section.setdefault("job_name", out.name if section.get("output_path") else name)
            section["output_path"] = section.get("output_path") or str(out)
        elif name == "wandb":
            os.environ.setdefault("WANDB_DIR", str(out))


def prepare_compiling(flow: nn.Module, options: dict) -> None:
    """What DeepSpeed has to know of it beforehand.

    Under ZeRO-3 a block's weights are gathered at once, before it is entered: where that happens, inside, at every
    layer, a graph would be cut. At stages 1 and 2, where weights lie one after the other, each begins at a multiple of
    16 bytes: see `compile_blocks`.
    """
    import deepspeed

    blocks = repeated_blocks(flow, "train.compile")
    deepspeed.utils.set_z3_leaf_modules(flow, list({type(block) for block in blocks}))
    zero = options.get("zero_optimization", {})
    if zero.get("stage") in (1, 2):
        zero.setdefault("parameter_alignment", True)


def compile_blocks(flow: nn.Module) -> None:
    """torch.compile for each block: alike as they are, a few graphs do for all, however deep the network is.

    What is left outside is small. Where the weights of the first block begin at multiples of 16 bytes, torch reads 16
    bytes at a time, from the weights of the other blocks as well, and does not look where those begin
    (pytorch/pytorch#193054). So unless all begin so, it must not.
    """
    in_between = any(internals.held_part(p).data_ptr() % 16 for p in flow.parameters())
    options = {"triton.divisible_by_16": False} if in_between else None
    for block in repeated_blocks(flow, "train.compile"):
        block.forward = torch.compile(block.forward, dynamic=False, options=options)


def float32_copies(flow: nn.Module) -> dict[str, Tensor]:
    trained = ((name, p) for name, p in flow.named_parameters() if p.requires_grad and p.dtype == torch.float32)
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained}


# ---- Steps -----------------------------------------------------------------------------------------------------------
def set_learning_rate(engine, lr: float) -> None:
    for group in internals.param_groups(engine):
        group["lr"] = lr * group["multiplier"]


def step_if_finite(engine, sums: Tensor) -> tuple[list[float], float]:
    """Take the accumulated step, unless a number in `sums` or in its gradient is not finite: then nothing changes.

    sums: (n,) on the device, the same on all ranks. Returns them and the norm of the gradient, infinite if it is not
    finite. Both are read at once, just before Adam: but for DeepSpeed, and batches that may not run further ahead
    (training/loader.py), a step waits for the GPU only here.
    """
    optimizer, norm, seen = internals.base_optimizer(engine), norm_at_stage_0(engine), []
    adam = optimizer.step

    def guarded(*args, **options) -> None:  # called once for each group that DeepSpeed has
        if not seen:
            known = internals.last_norm(engine) if norm is None else norm
            seen.extend(torch.cat([sums, known.to(sums).view(1)]).tolist())
        if all(map(math.isfinite, seen)) and seen[-1] >= 0:
            adam(*args, **options)

    optimizer.step = guarded
    try:
        engine.step()
    finally:
        del optimizer.step
    *values, found = seen or [*sums.tolist(), math.inf]  # a gradient that is not finite DeepSpeed may discard itself
    return values, found if found >= 0 else math.inf


def norm_at_stage_0(engine) -> Tensor | None:
    """The norm of the gradient before the step: there every rank has all of it, and DeepSpeed does not compute it."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # also of bfloat16
    return torch.stack(norms).norm()


# ---- Other weights ---------------------------------------------------------------------------------------------------
@contextmanager
def averaged(engine, averages: Averages, profile: Profile) -> Iterator[None]:
    """Within it the model has an average as its weights; afterwards the weights are back, bit for bit.

    But not after an error: to bring them back takes all ranks, and the others, who know nothing of it, would wait.
    """
    held = shards.held_fragments(engine)
    kept = [f.weight.clone() for f in held]
    load_weights(engine, averages.named_pieces(profile))
    yield
    for f, weight in zip(held, kept, strict=True):
        f.weight.copy_(weight)
    internals.refresh_model_weights(engine)


@torch.no_grad()
def load_weights(engine, owned: dict[str, tuple[int, Tensor]]) -> None:
    """Set the weights from what each rank owns of them, name: (start, values)."""
    for f in shards.held_fragments(engine):
        start, values = owned.get(f.name, (f.start, f.weight[:0]))
        if engine.zero_optimization_stage() > 0:
            f.weight.copy_(values)
        else:  # every rank holds all, and owns a part
            f.weight.zero_()
            f.weight[start : start + len(values)] = values
            dist.all_reduce(f.weight)
    internals.refresh_model_weights(engine)
