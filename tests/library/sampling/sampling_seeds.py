"""Random numbers for tests of samplers."""

import torch
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
