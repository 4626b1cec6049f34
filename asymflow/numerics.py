"""Choosing the dtype to compute in: which dtypes a device has, and how to escape autocast and TF32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def float32_products_are_exact() -> bool:
    """Whether matrix products of float32 are computed in float32, and not rounded to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the user has set the newer fp32_precision, which this older function cannot report
        return False


# The same as the decorator torch.compiler.assume_constant_result: torch.compile takes the result for a constant, and
# compiles anew when the setting changes. The decorator would import the compiler, which takes seconds, at every start.
float32_products_are_exact._dynamo_marked_constant = True


def no_autocast(like: Tensor) -> AbstractContextManager:
    # "meta" has no autocast. torch.amp.is_autocast_available would tell, but breaks the graph in torch 2.6.
    device = like.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if one of the tensors has it, and float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
