"""In which numbers to compute: what devices have, what autocast and TF32 settings would do to a formula."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def float32_products_are_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # somebody used the newer setting, fp32_precision, to which this older one has no answer
        return False


# What torch.compiler.assume_constant_result does: under torch.compile the answer is a constant, and what is compiled is
# compiled anew when the setting changes. As a decorator it would import the compiler, for seconds, at every start.
float32_products_are_exact._dynamo_marked_constant = True


def no_autocast(like: Tensor) -> AbstractContextManager:
    device = like.device.type  # torch.amp.is_autocast_available would ask in general, but breaks the graph in torch 2.6
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if one of the tensors has it, and float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
