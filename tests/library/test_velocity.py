"""asymflow/parameterization.py: the identity, with a scale, at sigma = 0, at the ends of the rank.

All tolerances are `rounding` of velocity_problems.py, a bound on what finite precision can do, unless a test derives
its own.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from velocity_problems import (
    DOUBLE,
    SCALES,
    SEEDS,
    path_and_prediction,
    planted,
    problems,
    rounding,
    seeded,
    textbook,
    within,
)

import nano_asymflow as nano
from asymflow import AsymFlow, Subspace, asymmetric_velocity, calibration, patchify, recover_velocity

SIGMAS = st.floats(0, 1)


# ---- The same as nano_asymflow.py, at s = 1 --------------------------------------------------------------------------
@given(problems(rank="some", scale=st.just(1.0)), st.sampled_from([0.0, 1e-6, 0.04]))
def test_without_a_scale_it_is_nano_asymflow_bit_for_bit(problem, sigma_min):
    x0, eps, sigma, subspace = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, subspace)
    assert torch.equal(u_a, nano.asymmetric_velocity(x0, eps, subspace.basis))
    expected = nano.recover_velocity(u_a, x_sigma, sigma.clamp(min=sigma_min), subspace.basis)
    assert torch.equal(recover_velocity(u_a, x_sigma, sigma, subspace, sigma_min), expected)


@given(problems(rank="all", scale=st.just(1.0)))
def test_at_full_rank_it_is_nano_asymflow_without_its_rounding(problem):
    """Nano multiplies by A A^T where here nothing is done."""
    x0, eps, sigma, subspace = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, subspace)
    tolerance = rounding(subspace, sigma, x0, eps)
    assert within(u_a, nano.asymmetric_velocity(x0, eps, subspace.basis), tolerance)
    expected = nano.recover_velocity(u_a, x_sigma, sigma, subspace.basis)
    assert within(recover_velocity(u_a, x_sigma, sigma, subspace), expected, tolerance)


class TokenMLP(torch.nn.Module):
    """Nano's network on each token by itself."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, tokens, tau):
        return self.mlp(tokens.flatten(0, 1), tau.repeat_interleave(tokens.shape[1])[:, None]).view_as(tokens)


@given(SEEDS, st.integers(0, 12), st.sampled_from(["channel_first", "channel_last"]))
def test_the_wrapper_around_an_mlp_is_nanos_flow_around_it(seed, rank, order):
    """Velocities and gradients, to 1e-12 of their size: 12 dimensions and width 8 make sums of some ten terms."""
    generator = seeded(seed)
    torch.manual_seed(seed)
    mlp, subspace = nano.MLP(12, 8).double(), planted(12, rank, generator)
    torch.nn.init.normal_(mlp.output.weight)
    x = torch.randn(2, 3, 4, 6, generator=generator, **DOUBLE)
    sigma = 0.01 + 0.99 * torch.rand(2, generator=generator, **DOUBLE)
    tokens = patchify(x, 2, order)
    actual = patchify(AsymFlow(TokenMLP(mlp), subspace, patch_size=2, token_order=order)(x, sigma), 2, order)
    expected = nano.Flow(mlp, subspace.basis)(tokens.flatten(0, 1), sigma.repeat_interleave(6)[:, None])
    gradients = [torch.autograd.grad(u.square().sum(), list(mlp.parameters())) for u in (actual, expected)]
    for a, b in zip([actual.flatten(0, 1), *gradients[0]], [expected, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * (1 + b.abs().max().item()))


# ---- The identity ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
def test_recovery_gives_back_the_velocity_at_any_scale(dtype, data):
    """recover(asymmetric(x0, eps)) == eps - x0, for every shape, rank, scale and noise level, to rounding."""
    x0, eps, sigma, subspace = data.draw(problems(dtype))
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, subspace)
    u = recover_velocity(u_a, x_sigma, sigma, subspace)
    assert u_a.dtype == u.dtype == dtype
    assert within(u, eps - x0, rounding(subspace, sigma, x0, eps))


@given(problems())
def test_the_target_is_noise_inside_and_scaled_data_everywhere(problem):
    x0, eps, _, subspace = problem
    expected = eps @ (subspace.basis @ subspace.basis.mT) - x0 / subspace.scale
    assert within(asymmetric_velocity(x0, eps, subspace), expected, rounding(subspace, 1, x0, eps))


@given(problems(), SIGMAS)
def test_recovery_is_the_formula_of_the_paper(problem, sigma_min):
    """For any prediction and input, and also as the published code writes it, where that does not clamp inside."""
    u_a, x_sigma, sigma, subspace = problem
    u = recover_velocity(u_a, x_sigma, sigma, subspace, sigma_min)
    tolerance = 2 * rounding(subspace, sigma, u_a, x_sigma)
    assert within(u, textbook(u_a, x_sigma, sigma, subspace, sigma_min), tolerance)
    s, inside = subspace.scale, subspace.basis @ subspace.basis.mT
    k = 1 / (s + (1 - s) * sigma)
    published = (s * k * u_a + (1 - s * k) / sigma * x_sigma) @ inside  # (1 - s k) / sigma is (1 - s) k
    assert within(u @ inside, published, tolerance)


@given(problems(), st.floats(0.01, 0.99))
def test_the_clamp_acts_on_the_complement_only(problem, sigma_min):
    u_a, x_sigma, sigma, subspace = problem
    clamped = recover_velocity(u_a, x_sigma, sigma, subspace, sigma_min)
    free = recover_velocity(u_a, x_sigma, sigma, subspace)
    tolerance = 2 * rounding(subspace, sigma, u_a, x_sigma)
    assert within(clamped @ subspace.basis, free @ subspace.basis, tolerance)
    outside = (free - subspace.project(free)) * sigma / sigma.clamp(min=sigma_min)
    assert within(clamped - subspace.project(clamped), outside, tolerance)


@given(SEEDS, SCALES, st.sampled_from(["()", "(B)", "(B,1)", "(B,N)", "(B,N,1)"]), st.integers(0, 5))
def test_a_noise_level_belongs_to_the_leading_axes(seed, scale, shape, rank):
    """Every shape of sigma is the loop over its vectors; a number is that number everywhere."""
    generator = seeded(seed)
    u_a, x = torch.randn(2, 2, 3, 5, generator=generator, **DOUBLE)
    level = torch.rand({"()": (), "(B)": (2,), "(B,1)": (2, 1)}.get(shape, (2, 3)), generator=generator, **DOUBLE)
    subspace = planted(5, rank, generator, scale=scale)
    each = (level if level.ndim != 1 else level[:, None]).expand(2, 3)
    u = recover_velocity(u_a, x, level[..., None] if shape == "(B,N,1)" else level, subspace)
    for b in range(2):
        for n in range(3):
            expected = recover_velocity(u_a[b, n], x[b, n], each[b, n], subspace)
            assert within(u[b, n], expected, 2 * rounding(subspace, each[b, n], u_a[b, n], x[b, n]))


@given(problems(), SIGMAS)
def test_a_number_is_that_noise_level_everywhere_to_the_last_bit(problem, sigma):
    u_a, x, _, subspace = problem
    everywhere = torch.full(x.shape[:-1], sigma, dtype=x.dtype)
    u = recover_velocity(u_a, x, sigma, subspace, 0.04)
    assert torch.equal(u, recover_velocity(u_a, x, everywhere, subspace, 0.04))


# ---- The calibration -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(scale=SCALES, tensor=st.booleans())
def test_the_calibration_is_exact_at_its_ends(dtype, scale, tensor):
    """1 / s is one division in `dtype`, of s that is given there: s is rounded to it here beforehand."""
    scale = torch.tensor(scale, dtype=dtype)
    k, tau = calibration(torch.tensor([0.0, 1.0], dtype=dtype), scale if tensor else scale.item())
    assert torch.equal(k, torch.stack([1 / scale, torch.ones((), dtype=dtype)]))
    assert torch.equal(tau, torch.tensor([0.0, 1.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=SEEDS, smallest=st.floats(1e-30, 1))
def test_without_a_scale_the_calibration_changes_no_bit(dtype, seed, smallest):
    sigma = smallest ** torch.rand(1000, generator=seeded(seed), dtype=dtype)
    for scale in (1.0, torch.tensor(1.0, **DOUBLE)):
        k, tau = calibration(sigma, scale)
        assert torch.equal(k, torch.ones_like(sigma))
        assert torch.equal(tau, sigma)


@given(SEEDS, SCALES, st.sampled_from([torch.float32, torch.float64]))
def test_the_calibrated_level_is_a_noise_level_that_grows_with_sigma(seed, scale, dtype):
    """Four roundings lie between sigma and tau, so 8 e is more than they can take from the order."""
    sigma = torch.rand(200, generator=seeded(seed), dtype=dtype).sort().values
    k, tau = calibration(sigma, scale)
    assert tau.dtype == k.dtype == dtype
    assert ((tau >= 0) & (tau <= 1)).all()
    assert (tau.diff() >= -8 * torch.finfo(dtype).eps * tau[1:]).all()
    assert (k - 1).sign().eq(torch.sign(torch.tensor(1 - scale))).logical_or((k - 1).abs() < 1e-6).all()


@given(SEEDS, SCALES, SIGMAS)
def test_the_calibration_makes_scaled_data_a_path_of_its_own(seed, scale, sigma):
    """k ((1 - sigma) s z + sigma eps) = (1 - tau) z + tau eps. Rounding: below 10 e times the largest number, 20."""
    z, eps = torch.randn(2, 50, generator=seeded(seed), **DOUBLE)
    k, tau = calibration(torch.tensor(sigma, **DOUBLE), scale)
    path = k * ((1 - sigma) * scale * z + sigma * eps)
    torch.testing.assert_close(path, (1 - tau) * z + tau * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 0), (2, 3, 1)])
@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.half, torch.float32), (torch.int64, torch.float32)]
    + 2 * [(torch.float64, torch.float64)],
)
def test_the_calibration_keeps_the_shape_and_computes_in_float32_or_better(shape, given_dtype, dtype):
    for scale in (2, 0.5, torch.tensor(0.5, **DOUBLE)):
        for result in calibration(torch.ones(shape, dtype=given_dtype), scale):
            assert (result.shape, result.dtype) == (shape, dtype)
            assert (result == 1).all()


# ---- A latent model in pixels ----------------------------------------------------------------------------------------
def latent_network(rank, generator):
    """A velocity on latents (B, N, r) that mixes tokens and depends on the noise level, with a slope below 3."""
    weights = torch.randn(2, rank, rank, generator=generator, **DOUBLE) / max(rank, 1)

    def v(z, tau):
        wave = (3 * tau[:, None, None]).cos()
        return torch.tanh(z @ weights[0] + z.mean(1, keepdim=True) + wave) @ weights[1] + z.sin()

    return v


class Lifted(torch.nn.Module):
    """A latent velocity as a backbone on pixel tokens."""

    def __init__(self, v, basis):
        super().__init__()
        self.v, self.basis = v, basis

    def forward(self, tokens, tau):
        return self.v(tokens @ self.basis, tau) @ self.basis.mT


def lifted(seed, scale, rank, sigma_min):
    generator = seeded(seed)
    subspace, v = planted(12, rank, generator, scale=scale), latent_network(rank, generator)
    flow = AsymFlow(Lifted(v, subspace.basis), subspace, patch_size=2, sigma_min=sigma_min).eval()
    return flow, v, torch.randn(2, 3, 4, 6, generator=generator, **DOUBLE), generator


@given(SEEDS, SCALES, st.integers(0, 12), SIGMAS)
def test_inside_the_subspace_a_lifted_model_is_the_latent_model(seed, scale, rank, sigma):
    """A^T u = k (s v(z, tau) + (1 - s) A^T x_sigma) where z = k A^T x_sigma: the derivative of x_sigma = z / k.

    1 / sigma_min is 25, x and v have a few units: no number is above 200 (1 + s + 1 / s), and 1e-12 is 20 roundings of
    that, while they are of random sign in sums of 12 terms.
    """
    flow, v, x, _ = lifted(seed, scale, rank, 0.04)
    level = torch.full((2,), sigma, **DOUBLE)
    k, tau = calibration(level, scale)
    inside = patchify(x, 2) @ flow.subspace.basis
    expected = k[:, None, None] * (scale * v(k[:, None, None] * inside, tau) + (1 - scale) * inside)
    actual = patchify(flow(x, level), 2) @ flow.subspace.basis
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * (1 + scale + 1 / scale))


@given(SEEDS, SCALES, st.integers(0, 12), st.integers(1, 12))
def test_an_euler_run_in_pixels_is_the_euler_run_of_the_latent_model(seed, scale, rank, steps):
    """On any grid: (k x, tau) is a projective map of (x, sigma), it takes lines to lines.

    A slope below 3 over a time of 1 makes errors at most e^3 = 20 times as large; latents stay below 10. Outside of the
    subspace nothing is predicted, and the last step removes what is left of the noise: a sample is inside.
    """
    flow, v, x, generator = lifted(seed, scale, rank, 0.0)
    between = torch.rand(steps - 1, generator=generator, **DOUBLE).sort(descending=True).values
    grid = torch.cat([torch.ones(1, **DOUBLE), between, torch.zeros(1, **DOUBLE)])
    z, basis = patchify(x, 2) @ flow.subspace.basis, flow.subspace.basis
    for sigma, target in itertools.pairwise(grid):
        (_, tau), (k, tau_target) = calibration(sigma, scale), calibration(target, scale)
        z = z + (tau_target - tau) * v(z, tau.expand(2))
        x = x + (target - sigma) * flow(x, sigma)
        bound = 1e-12 * (1 + z.abs().max()) if z.numel() else 0
        assert within(k * patchify(x, 2) @ basis, z, bound)
    tokens = patchify(x, 2)
    assert within(tokens, scale * z @ basis.mT, 1e-11 * (1 + scale))


# ---- sigma = 0 -------------------------------------------------------------------------------------------------------
@given(problems(), st.sampled_from([0.0, 1e-6, 0.04]))
def test_at_sigma_0_the_velocity_is_finite_and_exact_inside(problem, sigma_min):
    """Inside, k = 1 / s. Outside, x_sigma + s u_a over sigma_min; without one the mean of eps - x0, which is s u_a."""
    u_a, x, _, subspace = problem
    s, inside = subspace.scale, subspace.basis @ subspace.basis.mT
    u = recover_velocity(u_a, x, 0.0, subspace, sigma_min)
    rest = (x + s * u_a) / sigma_min if sigma_min else s * u_a
    expected = (u_a + (1 - s) / s * x) @ inside + rest - rest @ inside
    tolerance = rounding(subspace, sigma_min or 1, u_a, x)
    assert within(u, expected, tolerance)
    # Inside, what is divided comes in only as the rounding of a vector of that length: of u itself.
    exact = rounding(subspace, 1, u_a, x, u)
    assert within(u @ subspace.basis, (u_a + (1 - s) / s * x) @ subspace.basis, exact)


@given(problems(), st.sampled_from([0.0, 1e-6, 0.04]))
def test_at_sigma_0_the_gradients_are_finite_also_that_of_sigma(problem, sigma_min):
    u_a, x, sigma, subspace = problem
    inputs = [v.detach().requires_grad_() for v in (u_a, x, torch.zeros_like(sigma))]
    u = recover_velocity(*inputs, subspace, sigma_min)
    first = torch.autograd.grad(u.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    assert all(g.isfinite().all() for g in (*first, *second) if g is not None)


@given(problems(rank="some", scale=st.just(1.0)), st.sampled_from([1e-12, 1e-30]), SIGMAS)
def test_inside_the_subspace_nothing_is_divided(problem, sigma, sigma_min):
    """With a basis of coordinate axes it shows bit for bit: there u is the prediction, however small sigma is."""
    u_a, x, _, subspace = problem
    axes = Subspace(torch.eye(subspace.dim, **DOUBLE)[:, : subspace.rank])
    u = recover_velocity(u_a, x, torch.tensor(sigma, **DOUBLE), axes, sigma_min)
    assert torch.equal(u[..., : axes.rank], u_a[..., : axes.rank])
    assert torch.equal(u[..., axes.rank :], (x + u_a)[..., axes.rank :] / max(sigma, sigma_min))


# ---- The ends of the rank --------------------------------------------------------------------------------------------
@given(problems(rank="none"), st.sampled_from([0.0, 1e-6, 0.04]))
def test_rank_0_is_an_x0_model_bit_for_bit(problem, sigma_min):
    u_a, x, sigma, subspace = problem
    x0 = -subspace.scale * u_a
    u = recover_velocity(u_a, x, sigma, subspace, sigma_min)
    assert torch.equal(u, (x - x0) / sigma.clamp(min=sigma_min))
    assert torch.equal(asymmetric_velocity(x0, x, subspace), -(x0 / subspace.scale))


@given(problems(rank="all", scale=st.just(1.0)), st.sampled_from([0.0, 1e-6, 0.04]), st.booleans())
def test_full_rank_is_a_u_model_bit_for_bit_at_every_noise_level(problem, sigma_min, zero):
    u_a, x, sigma, subspace = problem
    assert torch.equal(recover_velocity(u_a, x, 0 * sigma if zero else sigma, subspace, sigma_min), u_a)
    assert torch.equal(asymmetric_velocity(x, u_a, subspace), u_a - x)
