"""toy.paper's criterion for the rank: its powers are those of Gaussian data, and its limits are as they should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.fitting import auto_rank, energy_threshold
from toy.paper import criterion

variances = st.lists(st.floats(0, 50), min_size=1, max_size=12).map(lambda v: torch.tensor(sorted(v, reverse=True)))


@given(variance=st.floats(0.01, 30), sigma=st.floats(0.05, 0.95))
def test_powers_are_those_of_the_regression_on_the_noisy_data(variance, sigma):
    """The best estimate of a Gaussian target has the power of its covariance with the data, squared, over theirs."""
    x0, velocity = criterion.powers(torch.tensor(variance).double(), torch.tensor(sigma).double())
    seen = (1 - sigma) ** 2 * variance + sigma**2
    assert x0.item() == pytest.approx(((1 - sigma) * variance) ** 2 / seen, rel=1e-5)
    assert velocity.item() == pytest.approx((sigma - (1 - sigma) * variance) ** 2 / seen, rel=1e-4, abs=1e-5)


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
