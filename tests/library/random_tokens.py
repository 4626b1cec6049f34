"""Tokens to fit subspaces to."""

import torch


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(x, sizes):
    """x (n, D) in batches of these sizes, over and over."""
    start, batches = 0, []
    while start < len(x):
        batches.append(x[start : start + sizes[len(batches) % len(sizes)]])
        start += len(batches[-1])
    return batches
