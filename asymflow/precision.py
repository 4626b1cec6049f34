"""In which precision a model computes when images are drawn from it: one setting, for trainings and for `asymflow`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from asymflow.errors import InputError
from asymflow.model import AsymFlow

Precision = Literal["bf16", "float32"]
"""bf16: autocast, with attention in float32, as the figures of arXiv 2605.12964 were made."""


def usual_precision(device: torch.device) -> Precision:
    """bf16 on a GPU that has it, float32 elsewhere."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextmanager
def computing(flow: AsymFlow, precision: Precision) -> Iterator[None]:
    """Within it, `flow` computes in this precision. Its weights stay as they are, and its own formulas in float32.

    Attention is in float32 in layers with an attribute `float32_attention`, as JiT's; in others it follows autocast.
    Where the weights are in bfloat16, there is nothing to cast: they are used as they are in both precisions.
    Raises InputError for another precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, but it is {precision!r}")
    layers = [module for module in flow.modules() if hasattr(module, "float32_attention")]
    before = [layer.float32_attention for layer in layers]
    for layer in layers:
        layer.float32_attention = True
    cast = precision == "bf16" and flow.backbone_dtype != torch.bfloat16
    try:
        with torch.autocast(flow.subspace.basis.device.type, torch.bfloat16, enabled=cast):
            yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.float32_attention = was
