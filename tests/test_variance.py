"""The variance-reduced loss: the same expectation where it should be, and less variance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.training.loss import flow_matching_loss, noisy
from asymflow.training.variance import agreement, denoising_loss, signal_share, variance_reduced_target


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_with_the_plain_target_it_is_the_flow_matching_loss():
    x0, eps, velocity = (drawn(4, 6, 12, seed=i) for i in range(3))
    sigma = torch.tensor([0.01, 0.05, 0.5, 1.0], dtype=torch.float64)
    x0_pred = noisy(x0, eps, sigma) - sigma.view(-1, 1, 1) * velocity
    plain = flow_matching_loss(velocity, x0, eps, sigma)
    torch.testing.assert_close(denoising_loss(x0_pred, x0, sigma), plain)


def test_agreement_is_one_for_the_same_error_and_zero_for_an_opposite_or_foreign_one():
    d = drawn(2, 3, 12)
    one = torch.ones(2, 3, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(agreement(d, d, 3), one)
    torch.testing.assert_close(agreement(0.25 * d, d, 3), 0.25 * one)
    torch.testing.assert_close(agreement(3 * d, d, 3), one)  # never more than all of it
    assert (agreement(-d, d, 3) == 0).all()
    assert (agreement(d, torch.zeros_like(d), 3) == 0).all()  # and nothing is divided by zero


def test_agreement_is_for_each_patch_and_channel_alone():
    d, d_low = drawn(1, 2, 12), drawn(1, 2, 12, seed=1)
    mixed = torch.where(torch.arange(12) < 4, d, d_low)  # the first of 3 channels agrees
    c = agreement(d, mixed, 3)
    torch.testing.assert_close(c[:, :, 0], torch.ones(1, 2, 1, dtype=torch.float64))
    torch.testing.assert_close(c[:, :, 1:], agreement(d, d_low, 3)[:, :, 1:])


def test_the_share_of_the_signal_goes_from_one_to_zero():
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    w = signal_share(sigma)
    assert w[0] == 1
    assert w[-1] == 0
    assert (w.diff() < 0).all()
    assert signal_share(torch.tensor(1 / 1.3)).item() == pytest.approx(0.5)  # 1 - sigma = 0.3 sigma


@given(seed=st.integers(0, 10_000), sigma=st.floats(0, 1))
def test_the_target_lies_between_the_data_and_the_data_without_the_error(seed, sigma):
    x0, d_low = drawn(1, 2, 12, seed=seed), drawn(1, 2, 12, seed=seed + 1)
    c = agreement(drawn(1, 2, 12, seed=seed + 2), d_low, 3)
    target = variance_reduced_target(x0, d_low, c, torch.tensor([sigma], dtype=torch.float64))
    low, high = torch.minimum(x0, x0 - d_low), torch.maximum(x0, x0 - d_low)
    assert ((low - 1e-12 <= target) & (target <= high + 1e-12)).all()


def test_near_the_data_the_target_is_the_data():
    x0, d_low = drawn(1, 2, 12), drawn(1, 2, 12, seed=1)
    c = torch.ones(1, 2, 3, 1, dtype=torch.float64)
    assert torch.equal(variance_reduced_target(x0, d_low, c, torch.tensor([0.0]).double()), x0)
    torch.testing.assert_close(variance_reduced_target(x0, d_low, c, torch.tensor([1.0]).double()), x0 - d_low)


def test_a_reference_that_is_right_leaves_the_expected_gradient_and_takes_away_variance():
    """Gaussian data in the subspace, whose conditional mean is known: the reference is that mean, and c fixed.

    The gradient of the squared error in x0_pred is 2 (x0_pred - target). Its mean over the data given the noisy image
    must not change; of its variance nothing is left where all the data is in the subspace.
    """
    generator = torch.Generator().manual_seed(0)
    n, d, sigma = 200_000, 12, torch.tensor([0.7], dtype=torch.float64)
    basis = torch.linalg.qr(drawn(d, 4)).Q
    z = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x0 = z @ basis.mT
    x_sigma = (1 - sigma) * x0 + sigma * eps
    gain = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)  # of the conditional mean, for unit variances
    x0_ref = gain * x_sigma @ basis @ basis.mT
    d_low = (x0 - x0_ref).unsqueeze(1)
    x0_pred = x0_ref + 0.1  # a model that is off by a constant
    c = torch.ones(n, 1, 3, 1, dtype=torch.float64)
    reduced = x0_pred - variance_reduced_target(x0.unsqueeze(1), d_low, c, sigma.expand(n)).squeeze(1)
    plain = x0_pred - x0
    noise = plain.std() / math.sqrt(n)
    torch.testing.assert_close(reduced.mean(0), plain.mean(0), rtol=0, atol=(6 * noise).item())
    left = signal_share(sigma).item() ** 2  # of the variance: w of the deviation stays
    assert reduced.var() / plain.var() == pytest.approx(left, rel=0.05)
