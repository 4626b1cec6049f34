"""Finding a backbone inside of wrappers, which conditions it takes, by name, and checking that labels are classes."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from asymflow.errors import InputError


def unwrapped(backbone: nn.Module) -> nn.Module:
    """The backbone inside of torch.compile, DistributedDataParallel or DataParallel, in any order."""
    while True:
        if isinstance(backbone, nn.DataParallel | nn.parallel.DistributedDataParallel):
            backbone = backbone.module
        elif "_orig_mod" in backbone._modules:  # of torch.compile, whose class takes seconds to import
            backbone = backbone._orig_mod
        else:
            return backbone


def forward_parameters(backbone: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a backbone's forward, also inside of a wrapper (torch.compile, DistributedDataParallel)."""
    for module in backbone.modules():
        parameters = inspect.signature(module.forward).parameters
        if not all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):  # else it is a wrapper
            return parameters
    return {}


def conditions_needed(backbone: nn.Module) -> list[str]:
    """The names of the conditions that the backbone's forward requires."""
    named = [p for p in forward_parameters(backbone).values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named[2:] if p.default is p.empty and p.name != "grid"]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """InputError, naming the first, unless all labels are classes or `num_classes`, which means "no class"."""
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise InputError(
            f"label {wrong[0].item()} is not a class: they run from 0 to {num_classes - 1}, and {num_classes} means no "
            "class"
        )
