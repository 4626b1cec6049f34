"""The precision in which a model computes when images are sampled: one setting, in training and on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from asymflow.errors import InputError
from asymflow.model import AsymFlow

Precision = Literal["bf16", "float32"]
"""bf16: autocast, but attention in float32, as for the results of arXiv 2605.12964."""


def usual_precision(device: torch.device) -> Precision:
    """The default: bf16 on a GPU that has it, float32 elsewhere."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextmanager
def computing(flow: AsymFlow, precision: Precision) -> Iterator[None]:
    """A context in which `flow` computes in this precision. Weights do not change; AsymFlow's formulas stay in float32.

    Attention is computed in float32 in layers with an attribute `float32_attention`, such as JiT's; in others it
    follows autocast. Weights in bfloat16 are used as they are, in both precisions. Raises InputError for another name.
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
