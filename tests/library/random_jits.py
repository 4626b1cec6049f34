"""Tiny JiTs with random weights, and inputs for them."""

import torch

from asymflow.backbones.jit import JiT

TINY = dict(patch_size=2, width=16, depth=4, heads=2, bottleneck=6, in_context_start=1, in_context_tokens=3)
TINY |= dict(image_size=6, num_classes=4)


def random_jit(seed=0, dtype=torch.float64, **options) -> JiT:
    """A JiT whose every weight is random: at initialization the head and the modulations are zero."""
    torch.manual_seed(seed)
    jit = JiT(**TINY | options).to(dtype)
    with torch.no_grad():
        for name, weight in jit.named_parameters():
            weight.normal_(std=0.2).add_(1 if "norm" in name else 0)
    return jit


def random_inputs(jit, batch=2, grid=None, dtype=torch.float64):
    h, w = grid or jit.grid
    return (
        torch.randn(batch, h * w, jit.dim, dtype=dtype),
        torch.rand(batch, dtype=dtype),
        torch.randint(jit.num_classes + 1, (batch,)),
    )
