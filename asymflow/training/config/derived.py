"""What follows from a configuration: the network, batches, precisions."""

import inspect
import re
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from asymflow import backbones
from asymflow.backbones.jit import SIZES, JiT
from asymflow.conditions import forward_parameters
from asymflow.errors import InputError
from asymflow.extensions import accepted, called, find, is_own
from asymflow.precision import Precision, usual_precision
from asymflow.sampling import METHODS
from asymflow.training.config.sections import Model, Sections
from asymflow.yaml12 import shown


def network(model: Model) -> dict:
    """All arguments of `JiT`: the published ones of the size, and what is set instead. InputError for no such size."""
    if model.size is None:
        raise InputError("is missing: give it in the file or by --set")
    size, _, patch = model.size.partition("/")
    if size not in SIZES or not re.fullmatch("[1-9][0-9]{0,3}", patch):
        names = ", ".join(SIZES)
        raise InputError(f"must be SIZE/PATCH, such as B/16, with SIZE in {names}, but it is {shown(model.size)}")
    defaults = {name: p.default for name, p in inspect.signature(JiT).parameters.items() if p.default is not p.empty}
    given = {"dropout": model.dropout, **dict(model.options)}
    return {
        **defaults,
        **SIZES[size],
        "patch_size": int(patch),
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "checkpoint_every": model.checkpoint_every,
        **{name: value for name, value in given.items() if value is not None},
    }


def make_backbone(model: Model) -> nn.Module:
    """The network, with its initial weights. Imports what the configuration names: see `asymflow.extensions`.

    Raises InputError if there is no such class, it does not take the arguments, or is not what trainings need.
    """
    make = find(model.backbone, backbones.TABLE, "model.backbone")
    if model.backbone == "JiT":
        return make(**network(model))
    sizes = {
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "checkpoint_every": model.checkpoint_every,
    }
    given = accepted(make, sizes | ({} if model.dropout is None else {"dropout": model.dropout}))
    if model.dropout is not None and "dropout" not in given:
        raise InputError(f"model.dropout is given, but {model.backbone} has no such argument")
    backbone = called(make, "model.options", model.options, **given)
    if not isinstance(backbone, nn.Module):
        raise InputError(f"model.backbone must make a torch.nn.Module, but {model.backbone} makes {backbone!r:.80}")
    if not isinstance(getattr(backbone, "patch_size", None), int):
        raise InputError(f"{model.backbone} needs an attribute patch_size, the pixels along the side of a token")
    names = forward_parameters(backbone)
    if "labels" not in names and not any(p.kind == p.VAR_KEYWORD for p in names.values()):
        raise InputError(f"{model.backbone} needs an argument labels of its forward: (B,), {model.num_classes} is none")
    check_agreement(backbone, model)
    if not hasattr(backbone, "config"):
        backbone.config = given | model.options
    if model.checkpoint_every and "checkpoint_every" not in given:
        for block in repeated_blocks(backbone, "model.checkpoint_every")[:: model.checkpoint_every]:
            block.forward = partial(recomputed, block.forward)
            block.recomputed = True
    return backbone


def check_agreement(backbone: nn.Module, model: Model) -> None:
    """InputError if a backbone says something else of itself than the configuration does, by which it is trained."""
    grid = (model.image_size // backbone.patch_size,) * 2
    expected = [("num_classes", model.num_classes, "num_classes"), ("grid", grid, "image_size")]
    if "noise_scale" not in model.model_fields_set:
        expected.append(("noise_scale", model.noise_scale, "noise_scale"))
    for name, ours, key in expected:
        theirs = getattr(backbone, name, None)
        if theirs not in (None, ours, list(grid)):
            raise InputError(
                f"{model.backbone} has {name} {theirs}, but training uses {ours}: set model.{key} to fit, or change "
                "the class"
            )


def repeated_blocks(model: nn.Module, key: str) -> list[nn.Module]:
    """The `blocks` of a backbone, or of a model that has one. InputError, naming the key that needs them."""
    for module in model.modules():
        if isinstance(blocks := getattr(module, "blocks", None), nn.ModuleList):
            return list(blocks)
    raise InputError(f"{key} needs a backbone with an attribute `blocks`, a torch.nn.ModuleList: see docs/backbones.md")


def recomputed(forward: Callable, *args: object, **options: object) -> object:
    """`forward`, of which nothing but the inputs is kept for the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)


def patch_size(model: Model) -> int:
    """Pixels along the side of a token of the network."""
    if model.backbone == "JiT":
        return network(model)["patch_size"]
    return own_patch_size(model.model_dump_json(exclude_unset=True))


@cache
def own_patch_size(model: str) -> int:
    with torch.random.fork_rng(devices=[]):
        return make_backbone(Model.model_validate_json(model)).patch_size


def sampler(name: str) -> Callable:
    return find(name, METHODS, "sample.method") if is_own(name) else METHODS[name]


def bf16_weights(config: Sections) -> bool:
    """Whether DeepSpeed keeps the weights in bfloat16, beside float32 originals. Then autocast has nothing to do."""
    return bool((config.deepspeed.get("bf16") or {}).get("enabled", False))


def frozen_dtype(config: Sections) -> torch.dtype:
    """Of networks that the loss needs, and that are not trained: DINOv2, LPIPS."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def sampling_precision(config: Sections, device: torch.device) -> Precision:
    return config.sample.precision or ("bf16" if bf16_weights(config) else usual_precision(device))


def batch_sizes(config: Sections, world: int) -> tuple[int, int]:
    """(images at a time on a rank, how often before a step). InputError if `world` ranks cannot share the batch."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % (world * (micro or 1)):
        by = f"{world} ranks" + (f" x train.micro_batch_size {micro}" if micro else "")
        raise InputError(f"train.global_batch_size {total} is not divisible by {by}")
    micro = micro or total // world
    return micro, total // (world * micro)


def same(given: object, expected: int) -> bool:
    return given == expected and not isinstance(given, bool)


def disagreement(given: object, expected: int) -> str:
    return f"is {shown(given)}, but by the section train it is {expected}: leave it out, it is derived"
