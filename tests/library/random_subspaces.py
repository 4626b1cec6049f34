"""Random subspaces, and what a file of one holds."""

import torch
from hypothesis import strategies as st

from asymflow import Subspace

ONE_LINE = r"\A[^\n]+\Z"
SEEDS = st.integers(0, 2**32 - 1)
DOUBLE = {"dtype": torch.float64}


@st.composite
def subspaces(draw, dtype=None):
    """Any dimension, rank, scale and record."""
    dim = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, : draw(st.integers(0, dim))]
    words = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return Subspace(
        basis.to(dtype or draw(st.sampled_from([torch.float32, torch.float64]))),
        draw(st.floats(1e-300, 1e300)),
        patch_size=draw(st.sampled_from([None, *(p for p in range(1, 5) if dim % p**2 == 0)])),
        token_order=draw(st.sampled_from([None, "channel_last", "channel_first"])),
        color_space=draw(words),
        fitted_on=draw(words),
        spectrum=torch.rand(draw(st.integers(0, 5)), generator=generator, **DOUBLE) if draw(st.booleans()) else None,
    )


RECORD = ("dim", "rank", "scale", "patch_size", "token_order", "color_space", "fitted_on")


def same(a, b):
    """All of it, to the last bit."""
    tensors = [(getattr(a, name), getattr(b, name)) for name in ("basis", "spectrum")]
    return all(getattr(a, name) == getattr(b, name) for name in RECORD) and all(
        (x is y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in tensors
    )


EYE = torch.eye(4)
