"""The DeepSpeed engine of a training."""

import importlib.util
import math
import os
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
from asymflow.training.run.progress import say
from asymflow.training.run.ranks import all_or_raise
from asymflow.training.zero import internals, shards
from asymflow.training.zero.averages import Averages
from asymflow.training.zero.settings import deepspeed_config

# DeepSpeed's monitors, and the Python package that each needs.
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": "csv"}


# ---- Making it -------------------------------------------------------------------------------------------------------
def make_engine(flow: nn.Module, config: Config, out: Path):
    """The engine that trains `flow`: AdamW under the ZeRO stage of the configuration.

    flow: in float32; do not use it afterwards. out: the folder of the run, where monitors write by default. Called by
    all ranks; raises AgreedError if a monitor's package is not installed, or a section cannot be used.
    """
    deepspeed = internals.imported()
    internals.compile_no_communication()
    deepspeed.init_distributed()
    options = deepspeed_config(config, dist.get_world_size())
    all_or_raise(lambda: prepare_monitors(options, out))
    if config.train.compile:
        all_or_raise(lambda: prepare_compiling(flow, options))
    originals = float32_copies(flow) if bf16_weights(config) else {}
    o = config.optimizer
    groups = all_or_raise(lambda: parameter_groups(flow, o.multipliers), "optimizer.multipliers")
    optimizer = all_or_raise(lambda: make_optimizer(groups, o))
    engine, *_ = deepspeed.initialize(model=flow, optimizer=optimizer, config=options)
    # Forget a step with zero gradients, by which some of DeepSpeed's optimizers allocate the moments: they count it.
    internals.base_optimizer(engine).state.clear()
    if originals:  # DeepSpeed made its float32 masters from weights that it had already rounded to bfloat16
        with torch.no_grad():
            for f in (f for f in shards.held_fragments(engine) if f.name in originals):
                f.weight.copy_(originals[f.name].view(-1)[f.start : f.start + len(f.weight)])
        internals.refresh_model_weights(engine)
    internals.detach_monitor(engine)
    if config.train.compile:
        compile_blocks(engine.module)
    return engine


def make_optimizer(groups: list[dict], o: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that optimizer.kind names: see config/optimizers.py. InputError if it does not take the options."""
    make = find(o.kind, OPTIMIZERS, "optimizer.kind")
    keys = {"betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    given = accepted(make, keys)
    if lost := [key for key in keys if key not in given and key in o.model_fields_set]:
        names = " and ".join(f"optimizer.{key}" for key in lost)
        say(f"not used, since {o.kind} has no such arguments (see optimizer.options): {names}")
    fused = {} if is_own(o.kind) else {"fused": True}  # one kernel for all parameters, on CPUs too
    optimizer = called(make, "optimizer.options", o.options, params=groups, lr=o.lr, **given, **fused)
    if is_own(o.kind):
        check_optimizer(optimizer, o.kind)
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, kind: str) -> None:
    """InputError unless ZeRO can cut up what the optimizer keeps, and checkpoints can restore it.

    So it must keep nothing but moments, one number for each weight, zero at first, and perhaps a count called `step`.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer.kind {kind} must make a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    try:
        state = shards.state_of_two_numbers(optimizer)
    except Exception as e:  # anything: it is not our code
        why = " ".join(str(e).split())[:200]
        raise InputError(f"optimizer.kind {kind} must treat each number by itself, but fails on two ({why})") from e
    moment = lambda value: isinstance(value, Tensor) and value.shape == (2,) and not value.any()
    other = [name for name, value in state.items() if name != "step" and not moment(value)]
    if other or optimizer.state:
        what = ", ".join(other) or "a state before its first step"
        raise InputError(
            f"optimizer.kind {kind} keeps {what}, but ZeRO and checkpoints know only moments, one number for each "
            "weight and zero at first, and a count called step"
        )


def parameter_groups(flow: nn.Module, multipliers: dict[str, float]) -> list[dict]:
    """The trained parameters in groups for an optimizer, one for each multiplier of the learning rate.

    multipliers: by names of layers, such as proj_out; they hold for all layers inside of these, too. Where several
    apply, the longest name counts. InputError if a name matches no trained parameter.
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
        if name in ("tensorboard", "csv_monitor"):  # DeepSpeed writes to output_path/job_name
            section.setdefault("job_name", out.name if section.get("output_path") else name)
            section["output_path"] = section.get("output_path") or str(out)
        elif name == "wandb":
            os.environ.setdefault("WANDB_DIR", str(out))


def prepare_compiling(flow: nn.Module, options: dict) -> None:
    """Set what DeepSpeed must know before it starts, if blocks are to be compiled.

    At stage 3 all weights of a block are gathered before it runs, because gathering inside, layer by layer, would break
    its graph. DeepSpeed must then leave linear layers as they are: its own are for gathering layer by layer, and torch
    2.11 compiles them to wrong gradients. At stages 1 and 2, where weights lie one after the other in memory, DeepSpeed
    is asked to let each begin at a multiple of 16 bytes: see `compile_blocks`.
    """
    import deepspeed

    blocks = repeated_blocks(flow, "train.compile")
    deepspeed.utils.set_z3_leaf_modules(flow, list({type(block) for block in blocks}))
    zero = options.get("zero_optimization", {})
    if zero.get("stage") in (1, 2):
        zero.setdefault("parameter_alignment", True)
    elif zero.get("stage") == 3 and zero.setdefault("memory_efficient_linear", False):
        raise InputError(
            "deepspeed.zero_optimization.memory_efficient_linear cannot be true with train.compile, because torch 2.11 "
            "compiles these layers to wrong gradients: leave it out"
        )


def compile_blocks(flow: nn.Module) -> None:
    """Compile each block. All blocks have the same code, so they share a few graphs, however deep the network is.

    The rest of the network is small and stays eager. If the first block's weights begin at multiples of 16 bytes, torch
    makes kernels that read 16 bytes at a time, and uses them for all blocks without checking where their weights begin
    (pytorch/pytorch#193054), which fails with a misaligned address. So it may do so only if all weights are aligned.
    """
    misaligned = any(internals.held_part(p).data_ptr() % 16 for p in flow.parameters())
    options = {"triton.divisible_by_16": False} if misaligned else None
    for block in repeated_blocks(flow, "train.compile"):
        block.forward = torch.compile(block.forward, dynamic=False, options=options)


def float32_copies(flow: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of the trained float32 weights, which DeepSpeed is about to round to bfloat16."""
    trained = ((name, p) for name, p in flow.named_parameters() if p.requires_grad and p.dtype == torch.float32)
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained}


# ---- Steps -----------------------------------------------------------------------------------------------------------
def set_learning_rate(engine, lr: float) -> None:
    for group in internals.param_groups(engine):
        group["lr"] = lr * group["multiplier"]


def step_if_finite(engine, sums: Tensor) -> tuple[list[float], float]:
    """Take the accumulated step, unless a number in `sums` or in the gradient is not finite: then no weight changes.

    sums: (n,) on the device, the same on all ranks. Returns these numbers and the norm of the gradient; the norm is
    infinite if the gradient is not finite. Both are copied to the CPU in one go, just before the optimizer's step. That
    is the only place where our code makes a step wait for the GPU, besides the limit on batches in training/loader.py.
    """
    optimizer, norm, seen = internals.base_optimizer(engine), norm_at_stage_0(engine), []
    adam = optimizer.step

    def guarded(*args, **options) -> None:  # DeepSpeed calls it once for each of its groups
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
    *values, found = seen or [*sums.tolist(), math.inf]  # not called: DeepSpeed found a gradient that is not finite
    return values, found if found >= 0 else math.inf


def norm_at_stage_0(engine) -> Tensor | None:
    """The norm of the gradient, which at stage 0 DeepSpeed does not compute; every rank has all of the gradient there.

    None at other stages.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # in float32 even if gradients are bfloat16
    return torch.stack(norms).norm()


# ---- Other weights ---------------------------------------------------------------------------------------------------
@contextmanager
def averaged(engine, averages: Averages, profile: Profile) -> Iterator[None]:
    """A context in which the model has an average as its weights. Afterwards it has its own again, bit for bit.

    After an error it does not: to restore the weights takes all ranks, and those without an error would not take part.
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
    """Set the weights of the model. owned: {name: (start, values)}, this rank's part of each, as `owned_fragments`."""
    for f in shards.held_fragments(engine):
        start, values = owned.get(f.name, (f.start, f.weight[:0]))
        if engine.zero_optimization_stage() > 0:
            f.weight.copy_(values)
        else:  # at stage 0 every rank holds all of a parameter, but owns only a part: add up the parts
            f.weight.zero_()
            f.weight[start : start + len(values)] = values
            dist.all_reduce(f.weight)
    internals.refresh_model_weights(engine)
