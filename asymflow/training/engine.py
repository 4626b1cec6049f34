"""The DeepSpeed engine of a training."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asymflow.training import shards
from asymflow.training.config import Config, deepspeed_config
from asymflow.training.ema import Averages, Profile


def make_engine(flow: nn.Module, config: Config):
    """The engine that trains `flow`: AdamW under the ZeRO stage of the configuration."""
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
    o = config.optimizer
    weights = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay)
    options = deepspeed_config(config, dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=flow, optimizer=optimizer, config=options)
    # Some of DeepSpeed's optimizers take a step with zero gradients to allocate the moments, and count it.
    base_optimizer(engine).state.clear()
    if config.train.compile:
        engine.compile()
    return engine


def base_optimizer(engine) -> torch.optim.Optimizer:
    """torch's AdamW, inside of DeepSpeed's optimizer or alone."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine, lr: float) -> None:
    for optimizer in (engine.optimizer, base_optimizer(engine)):
        for group in optimizer.param_groups:
            group["lr"] = lr


def gradient_norm(engine) -> float | None:
    """The norm of the gradient of the last step. DeepSpeed computes it in all stages but 0: see `norm_before_step`."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def norm_before_step(engine) -> float | None:
    """At stage 0, where every rank has the whole gradient until it steps."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else None


@contextmanager
def idle(engine) -> Iterator[None]:
    """Within it `engine.step()` discards the gradients and changes nothing else."""
    optimizer = base_optimizer(engine)
    optimizer.step = lambda *args, **options: None
    try:
        yield
    finally:
        del optimizer.step


@contextmanager
def averaged(engine, averages: Averages, profile: Profile) -> Iterator[nn.Module]:
    """The module with an average as its weights, in eval mode; afterwards the weights are back, bit for bit."""
    held = shards.held_fragments(engine)
    kept = [f.weight.clone() for f in held]
    load_weights(engine, averages.named_pieces(profile))
    engine.module.eval()
    try:
        yield engine.module
    finally:
        for f, weight in zip(held, kept, strict=True):
            f.weight.copy_(weight)
        shards.spread_weights(engine)
        engine.module.train()


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
