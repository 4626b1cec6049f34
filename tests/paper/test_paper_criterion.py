"""toy.paper's criterion for the rank: its powers are those of Gaussian data, and its limits are as they should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.fitting import auto_rank, energy_threshold
from toy.paper import criterion

variances = st.lists(st.floats(0, 50), min_size=1, max_size=12).map(lambda v: torch.tensor(sorted(v, reverse=True)))


@given(variance=st.floats(0.01, 30), sigma=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_powers_are_those_of_the_regression_on_the_noisy_data(variance, sigma, seed):
    """The best estimate of a Gaussian target is linear in the data: here of samples with exactly their covariance."""
    whole = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x0, eps = (torch.linalg.qr(whole).Q * 10**0.5).T
    x0 = x0 * variance**0.5
    seen = ((1 - sigma) * x0 + sigma * eps)[:, None]
    found = criterion.powers(torch.tensor(variance).double(), torch.tensor(sigma).double())
    for power, target in zip(found, (x0, eps - x0), strict=True):
        estimate = seen @ torch.linalg.lstsq(seen, target[:, None]).solution
        assert power.item() == pytest.approx(estimate.square().mean().item(), rel=1e-5, abs=1e-9)


@given(variances)
def test_without_bounds_the_best_rank_is_the_automatic_one(values):
    threshold = energy_threshold()
    if (values - threshold).abs().min() > 0.01:
        best = min(range(len(values) + 1), key=lambda rank: criterion.burden(*criterion.errors(values), rank))
        assert best == auto_rank(values)


@given(variances, st.floats(13, 500), st.floats(1.01, 3))
def test_less_room_never_makes_the_best_rank_larger(values, room, larger):
    best = [
        min(
            range(len(values) + 1), key=lambda rank, room=space: criterion.burden(*criterion.errors(values), rank, room)
        )
        for space in (room, room * larger)
    ]
    assert best[0] <= best[1]
    assert criterion.burden(*criterion.errors(values), 13, 13) == float("inf")


def test_the_spectrum_is_about_the_mean_and_in_the_order_of_the_fitted_basis():
    """A bright mean is the first direction of the basis, and no variance."""
    images = torch.full((40, 3, 8, 8), 200, dtype=torch.uint8)
    images[::2, 0] += 20
    found = criterion.spectrum(images, 4)
    assert found.sum().item() == pytest.approx(16 * (10 / 127.5) ** 2)
    assert found[2:].max() < 1e-12
