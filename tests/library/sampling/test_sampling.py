"""Samplers: order of convergence, exact cases, one noise for each image."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_seeds import SEEDS, normal

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT
from asymflow.sampling import generate, guided, image_noise, sample, sigma_grid, time_shift


# ---- Grids -----------------------------------------------------------------------------------------------------------
@given(st.integers(1, 300), st.floats(0.05, 50))
def test_a_grid_runs_from_one_to_zero_and_decreases(steps, shift):
    grid = sigma_grid(steps, shift)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_without_shift_the_grid_holds_the_decimal_fractions_themselves():
    """So that an interval that ends at 0.88 has the level 0.88 in it: 44 / 50 is rounded once."""
    assert sigma_grid(50).tolist() == [i / 50 for i in range(50, -1, -1)]
    assert 0.88 in sigma_grid(50).tolist()


@given(st.floats(0, 1), st.floats(0.05, 20), st.floats(0.05, 20))
def test_shifts_compose_and_invert(sigma, a, b):
    """A shift multiplies the odds sigma / (1 - sigma)."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    assert torch.allclose(time_shift(time_shift(sigma, a), b), time_shift(sigma, a * b), rtol=1e-12, atol=0)
    assert torch.allclose(time_shift(time_shift(sigma, a), 1 / a), sigma, rtol=1e-12, atol=0)
    assert torch.equal(time_shift(sigma, 1.0), sigma)


@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [2.0, 0.0], [1.0, -0.1], [1.0, math.nan]]
)
def test_a_grid_that_does_not_decrease_within_zero_and_one_is_refused(sigmas):
    with pytest.raises(InputError, match="decrease within"):
        sample(lambda x, sigma: x, torch.ones(1, 1), sigmas)


def test_other_bad_settings_are_refused():
    with pytest.raises(InputError, match="at least 1 step"):
        sigma_grid(0)
    for shift in (0, -1, math.nan):
        with pytest.raises(InputError, match="shift"):
            sigma_grid(10, shift)
    with pytest.raises(InputError, match="heun, euler"):
        sample(lambda x, sigma: x, torch.ones(1, 1), [1, 0], method="rk4")


# ---- Samplers --------------------------------------------------------------------------------------------------------
@given(st.sampled_from(["euler", "heun"]), st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True), SEEDS)
def test_straight_paths_are_followed_exactly_on_any_grid(method, levels, seed):
    """A constant velocity is integrated without error by any step."""
    levels = sorted(levels, reverse=True)
    x0, eps = normal(2, 3, 4, seed=seed)
    x = (1 - levels[0]) * x0 + levels[0] * eps
    end = (1 - levels[-1]) * x0 + levels[-1] * eps
    assert torch.allclose(sample(lambda x, sigma: eps - x0, x, levels, method), end, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    """dx/dsigma = x cos(3 sigma) is solved by exp(sin(3 sigma) / 3): half the step, the error divided by 2^order."""
    exact = math.exp((math.sin(0.3) - math.sin(3)) / 3)
    velocity = lambda x, sigma: x * torch.cos(3 * sigma)[:, None]
    errors = []
    for steps in (128, 256, 512):
        grid = 0.1 + 0.9 * sigma_grid(steps)  # ends above 0: every step of Heun's is of two evaluations
        errors.append(abs(sample(velocity, torch.ones(1, 1, dtype=torch.float64), grid, method).item() - exact))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 50), ("heun", 99)])
def test_the_velocity_is_never_evaluated_at_zero(method, evaluations):
    seen = []
    sample(lambda x, sigma: seen.append(sigma.clone()) or x, torch.ones(3, 1), sigma_grid(50), method)
    assert len(seen) == evaluations
    assert all(sigma.shape == (3,) and (sigma > 0).all() for sigma in seen)


def test_the_flow_of_one_gaussian_ends_at_its_quantiles():
    """Of N(m, v^2) the velocity is known, and the exact flow maps the noise z to m + v z."""
    m, v = 0.7, 0.4

    def velocity(x, sigma):
        s = sigma[:, None]
        variance = (1 - s) ** 2 * v**2 + s**2
        x0 = m + (1 - s) * v**2 / variance * (x - (1 - s) * m)
        return (x - x0) / s

    z = normal(5, 1)
    assert torch.allclose(sample(velocity, z, sigma_grid(400), "heun"), m + v * z, atol=2e-4)


def test_half_precision_noise_is_integrated_in_float32():
    assert sample(lambda x, sigma: x, torch.ones(1, 2, dtype=torch.bfloat16), [1, 0.5, 0]).dtype == torch.float32


def test_sampling_keeps_no_graph_and_leaves_its_input_alone():
    x = torch.ones(1, 2)
    weight = torch.ones(1, requires_grad=True)
    assert not sample(lambda x, sigma: weight * x, x, [1, 0.5, 0]).requires_grad
    assert torch.equal(x, torch.ones(1, 2))


# ---- The hook on the denoised image ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_hook_that_changes_nothing_changes_no_bit(method):
    velocity = lambda x, sigma: torch.sin(3 * x) * sigma[:, None]
    x = normal(4, 3)
    plain = sample(velocity, x, sigma_grid(7), method)
    assert torch.equal(sample(velocity, x, sigma_grid(7), method, lambda x0, sigma: x0), plain)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_hook_decides_where_sampling_ends(method):
    """Steered towards one image at every step, sampling ends at it, whatever the model says."""
    target = normal(2, 3)
    end = sample(
        lambda x, sigma: torch.sin(9 * x), normal(2, 3, seed=1), sigma_grid(5), method, lambda x0, sigma: target
    )
    assert torch.allclose(end, target, atol=1e-12)


def test_clamping_keeps_the_end_within_the_range():
    velocity = lambda x, sigma: (x - 3 * torch.sign(x)) / sigma[:, None]  # towards +-3
    x = normal(50, 3)
    assert sample(velocity, x, sigma_grid(10)).abs().max() > 2.9
    inside = sample(velocity, x, sigma_grid(10), denoised_hook=lambda x0, sigma: x0.clamp(-1, 1))
    assert inside.abs().max() <= 1 + 1e-12


# ---- One noise for each image ----------------------------------------------------------------------------------------
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_the_noise_of_an_image_depends_on_its_index_alone(seed, indices):
    together = image_noise(seed, indices, (3, 4, 5))
    for i, noise in zip(indices, together, strict=True):
        assert torch.equal(noise, image_noise(seed, [i], (3, 4, 5))[0])


def test_noise_is_standard_normal_and_differs_between_images_and_seeds():
    noise = torch.cat([image_noise(seed, range(1000), (10, 10)) for seed in (0, 1)]).flatten(1)
    n = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / n)
    correlation = np.corrcoef(noise.numpy()) - np.eye(len(noise))
    assert np.abs(correlation).max() < 7 / math.sqrt(100)  # 2 million pairs: 5.3 sigma expected at most
    assert len(torch.unique(noise[:, 0])) == len(noise)


def test_no_images_is_no_noise():
    assert image_noise(0, [], (3, 4, 4)).shape == (0, 3, 4, 4)


# ---- The whole way ---------------------------------------------------------------------------------------------------
OPTIONS = dict(seed=3, steps=4, guidance=2.0, interval=(0.0, 0.8))


def test_batch_size_and_order_do_not_change_an_image(flow):
    """To rounding: the noise is the same to the bit, matrix products of another size are not."""
    labels = [1, 5, 9, 10]
    together = generate(flow, labels, **OPTIONS)
    tolerance = dict(rtol=0, atol=1e-4 * together.abs().max().item())
    for order in ([3, 1, 0, 2], [2], [0, 3]):
        some = generate(flow, [labels[i] for i in order], order, **OPTIONS)
        assert torch.allclose(some, together[order], **tolerance)
    assert not torch.allclose(together[0], together[1], **tolerance)


def test_the_same_call_gives_the_same_bits_and_another_seed_does_not(flow):
    a, b = (generate(flow, [1, 2], **OPTIONS) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, generate(flow, [1, 2], **{**OPTIONS, "seed": 4}))


def test_noise_scale_is_the_size_of_the_noise_at_the_start(flow):
    """At a velocity of zero the image is the noise."""
    still = AsymFlow(JiT.from_name("tiny/4", image_size=16, num_classes=10), Subspace.full(48), noise_scale=2.0).eval()
    assert torch.equal(generate(still, [0], steps=2), 2 * image_noise(0, [0], (3, 16, 16)))


def test_generate_takes_a_size_and_refuses_what_does_not_fit(flow):
    assert generate(flow, [1], size=(8, 24), steps=1).shape == (1, 3, 8, 24)
    assert torch.equal(generate(flow, [1], size=8, steps=1), generate(flow, [1], size=(8, 8), steps=1))
    with pytest.raises(InputError, match="multiples of 4"):
        generate(flow, [1], size=(9, 24), steps=1)
    with pytest.raises(InputError, match="label 11 is not a class"):
        generate(flow, [1, 11], steps=1)
    with pytest.raises(InputError, match="one label for each image"):
        generate(flow, [1, 2], [0], steps=1)
    with pytest.raises(InputError, match="one label for each image"):
        generate(flow, 5, steps=1)
    assert generate(flow, [], steps=1).shape == (0, 3, 16, 16)
    flow.train()
    try:
        with pytest.raises(InputError, match=r"flow\.eval"):
            generate(flow, [1], steps=1)
    finally:
        flow.eval()


def test_generate_does_all_that_it_is_told(flow):
    told = dict(seed=3, size=(8, 24), steps=3, guidance=2.0, interval=(0.1, 0.8), method="euler", shift=2.0)
    told |= dict(orthogonal=0.5, denoised_hook=lambda x0, sigma: x0.clamp(-1, 1))
    images = generate(flow, [1, 5], [4, 7], **told)
    labels = torch.tensor([1, 5])
    velocity = guided(flow, {"labels": labels}, {"labels": torch.full_like(labels, 10)}, 2.0, (0.1, 0.8), 0.5)
    noise = image_noise(3, [4, 7], (3, 8, 24))
    assert torch.equal(images, sample(velocity, noise, sigma_grid(3, 2.0), "euler", told["denoised_hook"]))
    for name in told:  # and each of these makes a difference
        others = generate(flow, [1, 5], [4, 7], **{other: told[other] for other in told if other != name})
        assert not (others.shape == images.shape and torch.allclose(others, images, atol=1e-3)), name
