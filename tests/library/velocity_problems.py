"""Random velocities to recover, and the bound on what finite precision can do."""

import torch
from hypothesis import strategies as st

from asymflow import Subspace, asymmetric_velocity

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(0.05, 20)
DOUBLE = {"dtype": torch.float64}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def planted(dim, rank, generator, dtype=torch.float64, scale=1.0):
    """A uniformly random subspace, its basis exact in `dtype`."""
    return Subspace(torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, :rank].to(dtype), scale)


@st.composite
def problems(draw, dtype=torch.float64, rank=None, scale=SCALES, smallest_sigma=1e-6):
    """(x0, eps, sigma, subspace): any leading axes, dimension, rank, scale, size of the numbers; one sigma a vector."""
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    dim = draw(st.integers(1, 12))
    rank = {"none": 0, "all": dim, "some": draw(st.integers(0, dim - 1)), None: draw(st.integers(0, dim))}[rank]
    generator = seeded(draw(SEEDS))
    x0, eps = 10 ** draw(st.floats(-2, 2)) * torch.randn(2, *leading, dim, generator=generator, **DOUBLE)
    sigma = draw(st.floats(smallest_sigma, 1)) ** torch.rand([*leading, 1], generator=generator, **DOUBLE)
    subspace = planted(dim, rank, generator, dtype, draw(scale))
    return *(v.to(dtype) for v in (x0, eps, sigma)), subspace


def rounding(subspace, sigma, *vectors, dtype=None):
    """A bound on the error of recovery from vectors of these norms.

    As in tests/nano/test_parameterization.py: with the machine epsilon e, thin products and a handful of sums cost
    less than 4 (dim + rank + 2) (rank + 1) e times the norms; the complement's share is divided by sigma, as is what
    a basis that is off by `skew` = |A^T A - 1| does. With a scale, norms are multiplied by s or 1 / s on the way, and
    s itself is rounded: a factor (s + 2 + 1 / s) >= (s + 1) max(1, 1 / s).
    """
    exact, s = subspace.basis.double(), subspace.scale
    skew = (exact.mT @ exact - torch.eye(subspace.rank, **DOUBLE)).norm()
    epsilon = torch.finfo(dtype or subspace.basis.dtype).eps
    relative = 4 * (subspace.dim + subspace.rank + 2) * (subspace.rank + 1) * epsilon + 2 * skew
    size = sum(v.detach().double().norm(dim=-1, keepdim=True) for v in vectors)
    return relative * size * (s + 2 + 1 / s) * (1 + 1 / torch.as_tensor(sigma).double())


def within(actual, expected, tolerance):
    return actual.shape == expected.shape and bool(((actual.double() - expected.double()).abs() <= tolerance).all())


def path_and_prediction(x0, eps, sigma, subspace):
    return (1 - sigma) * x0 + sigma * eps, asymmetric_velocity(x0, eps, subspace)


def textbook(u_a, x_sigma, sigma, subspace, sigma_min=0.0):
    """Sections 2 and 3 of the method as they are written, with D x D matrices."""
    s, inside = subspace.scale, subspace.basis @ subspace.basis.mT
    outside = torch.eye(subspace.dim, **DOUBLE) - inside
    k = 1 / (s + (1 - s) * sigma)
    u_par = k * (s * u_a + (1 - s) * x_sigma) @ inside
    return u_par + (x_sigma + s * u_a) @ outside / sigma.clamp(min=sigma_min)
