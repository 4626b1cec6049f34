"""The DeepSpeed engine of a training."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asymflow.backbones.jit import Block
from asymflow.errors import InputError
from asymflow.training import shards
from asymflow.training.config.derived import bf16_weights, deepspeed_config
from asymflow.training.config.reading import Config
from asymflow.training.ema import Averages, Profile
from asymflow.training.ranks import each, together

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

    # On CPUs it would compile an extension first: that needs a compiler, and a process killed meanwhile leaves a lock
    # behind that all later ones wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    options = deepspeed_config(config, dist.get_world_size())
    together(lambda: prepare_monitors(options, out))
    if config.train.compile:
        compile_blocks(flow)
    originals = float32_copies(flow) if bf16_weights(config) else {}
    o = config.optimizer
    groups = each(lambda: parameter_groups(flow, o.multipliers), "optimizer.multipliers")
    options_of_adam = dict(betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, **options_of_adam, fused=True)  # a kernel for all; also on CPUs
    engine, *_ = deepspeed.initialize(model=flow, optimizer=optimizer, config=options)
    # Some of DeepSpeed's optimizers take a step with zero gradients to allocate the moments, and count it.
    base_optimizer(engine).state.clear()
    if originals:  # DeepSpeed has made its own from weights that it had rounded before
        with torch.no_grad():
            for f in (f for f in shards.held_fragments(engine) if f.name in originals):
                f.weight.copy_(originals[f.name].view(-1)[f.start : f.start + len(f.weight)])
        shards.spread_weights(engine)
    if csv := engine.monitor.csv_monitor:  # of a run that is continued: no second headings
        csv.filenames = [path.stem for path in Path(csv.log_dir).glob("*.csv")]
    engine.monitor.enabled = False  # for the engine, which counts anew from every start; the loop writes to it
    return engine


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


def compile_blocks(flow: nn.Module) -> None:
    """torch.compile for each block: alike as they are, a few graphs do for all, however deep the network is.

    What is left outside is small. Under ZeRO-3 a block's weights are gathered at once, before it is entered: where that
    happens, inside, at every layer, a graph would be cut.
    """
    import deepspeed

    for block in (module for module in flow.modules() if isinstance(module, Block)):
        block.forward = torch.compile(block.forward, dynamic=False)
    deepspeed.utils.set_z3_leaf_modules(flow, [Block])


def float32_copies(flow: nn.Module) -> dict[str, Tensor]:
    trained = ((name, p) for name, p in flow.named_parameters() if p.requires_grad and p.dtype == torch.float32)
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained}


# ---- Steps -----------------------------------------------------------------------------------------------------------
def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's AdamW, inside of DeepSpeed's optimizer or alone."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine, lr: float) -> None:
    for optimizer in (engine.optimizer, base_optimizer(engine)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]


def gradient_norm(engine) -> float | None:
    """The norm of the gradient of the last step. DeepSpeed computes it in all stages but 0: see `norm_before_step`."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def norm_before_step(engine) -> float | None:
    """At stage 0, where every rank has the whole gradient until it steps."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # also of bfloat16
    return torch.stack(norms).norm().item() if norms else None


@contextmanager
def idle(engine) -> Iterator[None]:
    """Within it `engine.step()` discards the gradients and changes nothing else."""
    optimizer = base_optimizer(engine)
    optimizer.step = lambda *args, **options: None
    try:
        yield
    finally:
        del optimizer.step


# ---- Other weights ---------------------------------------------------------------------------------------------------
@contextmanager
def averaged(engine, averages: Averages, profile: Profile) -> Iterator[None]:
    """Within it the model has an average as its weights; afterwards the weights are back, bit for bit."""
    held = shards.held_fragments(engine)
    kept = [f.weight.clone() for f in held]
    load_weights(engine, averages.named_pieces(profile))
    try:
        yield
    finally:
        for f, weight in zip(held, kept, strict=True):
            f.weight.copy_(weight)
        shards.spread_weights(engine)


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
    shards.spread_weights(engine)
