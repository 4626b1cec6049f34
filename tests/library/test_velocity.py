"""asymflow/parameterization.py: with a scale, at sigma = 0, in low precision, compiled, transformed, differentiated.

All tolerances are `rounding` below, a bound on what finite precision can do, unless a test derives its own.
"""

import itertools
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import nano_asymflow as nano
from asymflow import AsymFlow, InputError, Subspace, asymmetric_velocity, calibration, patchify, recover_velocity

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(0.05, 20)
SIGMAS = st.floats(0, 1)
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


# ---- The same as nano_asymflow.py, at s = 1 --------------------------------------------------------------------------


@given(problems(rank="some", scale=st.just(1.0)), st.sampled_from([0.0, 1e-6, 0.04]))
def test_without_a_scale_it_is_nano_asymflow_bit_for_bit(problem, sigma_min):
    x0, eps, sigma, subspace = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, subspace)
    assert torch.equal(u_a, nano.asymmetric_velocity(x0, eps, subspace.basis))
    expected = nano.recover_velocity(u_a, x_sigma, sigma, subspace.basis, sigma_min)
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


def textbook(u_a, x_sigma, sigma, subspace, sigma_min=0.0):
    """Sections 2 and 3 of the method as they are written, with D x D matrices."""
    s, inside = subspace.scale, subspace.basis @ subspace.basis.mT
    outside = torch.eye(subspace.dim, **DOUBLE) - inside
    k = 1 / (s + (1 - s) * sigma)
    u_par = k * (s * u_a + (1 - s) * x_sigma) @ inside
    return u_par + (x_sigma + s * u_a) @ outside / sigma.clamp(min=sigma_min)


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


# ---- Precision -------------------------------------------------------------------------------------------------------

LOW = st.sampled_from([torch.bfloat16, torch.float16])


@given(problems(torch.float32, scale=st.floats(0.5, 2)), LOW)
def test_low_precision_inputs_are_computed_in_float32(problem, dtype):
    """Bit for bit what float32 tensors of the same values give."""
    x0, eps, sigma, subspace = problem
    low = [v.to(dtype) for v in (x0, eps, sigma.clamp(min=1e-3))]
    high = [v.float() for v in low]
    actual, expected = asymmetric_velocity(*low[:2], subspace), asymmetric_velocity(*high[:2], subspace)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    actual, expected = recover_velocity(*low, subspace), recover_velocity(*high, subspace)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@given(problems(torch.float32))
def test_one_tensor_in_float64_makes_all_of_it_float64(problem):
    x0, eps, sigma, subspace = problem
    wide = subspace.double()
    x_sigma, u_a = path_and_prediction(x0.double(), eps.double(), sigma.double(), wide)
    for target in (asymmetric_velocity(x0, eps.double(), wide), asymmetric_velocity(x0.double(), eps, wide)):
        assert torch.equal(target, u_a)
    tolerance = rounding(wide, sigma, x0, eps)
    assert tolerance.dtype == torch.float64
    u = recover_velocity(u_a, x_sigma, sigma.double(), wide)
    assert within(u, eps.double() - x0.double(), tolerance)
    for a, x in ((u_a.float(), x_sigma), (u_a, x_sigma.float())):
        expected = recover_velocity(a.double(), x.double(), sigma.double(), wide)
        assert torch.equal(recover_velocity(a, x, sigma, wide), expected)


@given(problems(torch.float32), st.sampled_from([torch.bfloat16, torch.float16]))
def test_autocast_changes_no_bit(problem, dtype):
    x0, eps, sigma, subspace = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, subspace)
    expected = u_a, recover_velocity(u_a, x_sigma, sigma, subspace), *calibration(sigma, subspace.scale)
    with torch.autocast("cpu", dtype):
        actual = asymmetric_velocity(x0, eps, subspace), recover_velocity(u_a, x_sigma, sigma, subspace)
        actual += calibration(sigma, subspace.scale)
        assert torch.is_autocast_enabled("cpu")
        assert (eps @ subspace.basis).dtype == dtype  # the control: others are cast
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


class TensorCores(TorchDispatchMode):
    """Hardware that rounds the factors of float32 products to bfloat16, as a user may allow it to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            args = tree_map(lambda t: t.bfloat16().float() if getattr(t, "dtype", 0) == torch.float32 else t, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def matmul_precision():
    """Sets it, and restores it afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def error_of_recovery(recover=recover_velocity):
    """Largest error of u, where the complement is divided by 0.01."""
    x0, eps = torch.randn(2, 20, 64, generator=seeded(0))
    subspace = Subspace.random(64, 8, scale=0.7)
    x_sigma, u_a = path_and_prediction(x0, eps, 0.01, subspace)
    u = recover(u_a, x_sigma, torch.full((20,), 0.01), subspace)
    assert u_a.dtype == u.dtype == torch.float32
    return (u - (eps - x0)).abs().max().item()


# Bfloat16 keeps 16 bits less than float32. Errors of products are not all of the error: a hundred times as much is less
# than what such products must cost, and twice as much is more than other products as good as those of float32 can.
EXACT, ROUNDED = 2, 100


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_recovery_is_exact_where_products_of_float32_may_be_rounded(matmul_precision, setting):
    """The control is the same hardware, unannounced."""
    usual = error_of_recovery()
    with TensorCores():
        assert error_of_recovery() > ROUNDED * usual
        matmul_precision(setting)
        assert error_of_recovery() <= EXACT * usual


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_recovery_is_as_accurate_on_this_very_machine(matmul_precision, setting):
    """Without a control: few CPUs round the factors of products even if they may."""
    usual = error_of_recovery()
    matmul_precision(setting)
    assert error_of_recovery() <= EXACT * usual


def test_a_compiled_recovery_follows_the_setting(matmul_precision):
    def backend(graph, example_inputs):
        def run(*args):
            with TensorCores():
                return graph(*args)

        return run

    compiled, usual = torch.compile(recover_velocity, fullgraph=True, backend=backend), error_of_recovery()
    assert error_of_recovery(compiled) > ROUNDED * usual
    matmul_precision("high")
    assert error_of_recovery(compiled) <= EXACT * usual
    matmul_precision("highest")
    assert error_of_recovery(compiled) > ROUNDED * usual


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has only the older setting")
@pytest.mark.parametrize(("backend", "setting"), [("cuda", "tf32"), ("mkldnn", "tf32"), ("mkldnn", "bf16")])
def test_recovery_is_exact_also_with_the_newer_setting_of_torch(backend, setting):
    matmul, usual = getattr(torch.backends, backend).matmul, error_of_recovery()
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        with TensorCores():
            assert error_of_recovery() <= EXACT * usual
    finally:
        matmul.fp32_precision = before


# ---- Compiled and transformed ----------------------------------------------------------------------------------------


def example(rank=3, scale=0.7, dtype=torch.float32):
    generator = seeded(0)
    u_a, x = torch.randn(2, 2, 4, 12, generator=generator, dtype=dtype)
    return u_a, x, torch.rand(2, generator=generator, dtype=dtype), planted(12, rank, generator, dtype, scale)


INDUCTOR = pytest.param(
    "inductor",
    marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")],
)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_everything_compiles_without_a_break(backend):
    """To rounding: a compiler may contract a b + c."""
    u_a, x, sigma, subspace = example()

    def everything(u_a, x, sigma):
        k, tau = calibration(sigma, subspace.scale)
        return k, tau, asymmetric_velocity(u_a, x, subspace), recover_velocity(u_a, x, sigma, subspace, 0.04)

    expected = everything(u_a, x, sigma)
    actual = torch.compile(everything, fullgraph=True, backend=backend)(u_a, x, sigma)
    tolerance = rounding(subspace, sigma.clamp(min=0.04)[:, None, None], u_a, x)
    for a, e in zip(actual, expected, strict=True):
        assert within(a, e, tolerance if a.ndim == 3 else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 12])
@pytest.mark.parametrize("sigma_min", [0.0, 0.04])
def test_compiled_gradients_are_those_of_eager_mode(rank, sigma_min):
    *inputs, subspace = example(rank, dtype=torch.float64)
    recover = lambda u_a, x, sigma: recover_velocity(u_a, x, sigma, subspace, sigma_min).square().sum()
    compiled = torch.compile(recover, fullgraph=True, backend="aot_eager")
    inputs = [v.requires_grad_() for v in inputs]
    actual, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, recover))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@given(problems(scale=SCALES), st.sampled_from([0.0, 0.04]))
def test_mapping_over_vectors_is_a_batch(problem, sigma_min):
    x0, eps, sigma, subspace = problem
    x0, eps, sigma = x0.reshape(-1, subspace.dim), eps.reshape(-1, subspace.dim), sigma.reshape(-1)
    recover = lambda u_a, x, sigma: recover_velocity(u_a, x, sigma, subspace, sigma_min)
    tolerance = 2 * rounding(subspace, sigma[:, None], x0, eps)
    assert within(vmap(recover)(eps, x0, sigma), recover(eps, x0, sigma), tolerance)
    target = lambda x0, eps: asymmetric_velocity(x0, eps, subspace)
    assert within(vmap(target)(x0, eps), target(x0, eps), tolerance)
    for one, all_of_them in zip(
        vmap(lambda s: calibration(s, subspace.scale))(sigma), calibration(sigma, subspace.scale), strict=True
    ):
        assert within(one, all_of_them, 1e-14 * all_of_them)


def test_mapping_over_noise_levels_is_a_loop_over_them():
    u_a, x, _, subspace = example(dtype=torch.float64)
    levels = torch.linspace(0, 1, 5, **DOUBLE)
    mapped = vmap(lambda sigma: recover_velocity(u_a, x, sigma, subspace, 0.04))(levels)
    looped = torch.stack([recover_velocity(u_a, x, sigma, subspace, 0.04) for sigma in levels])
    torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)


@given(problems(smallest_sigma=0.1), SEEDS)
def test_forward_and_reverse_derivatives_are_those_of_the_textbook(problem, seed):
    """Divisions by sigma^2 >= 0.01 and s^2 >= 0.0025: 1e-8 of the size is a million roundings."""
    *inputs, subspace = problem
    tangents = tuple(torch.randn(v.shape, generator=seeded(seed), **DOUBLE) for v in inputs)
    results = []
    for formula in (recover_velocity, textbook):
        recover = lambda u_a, x, sigma, f=formula: f(u_a, x, sigma, subspace)
        value, tangent = jvp(recover, tuple(inputs), tangents)
        total = lambda *v, f=recover: f(*v).sin().sum()
        results.append([value, tangent, *grad(total, argnums=(0, 1, 2))(*inputs)])
    for a, e in zip(*results, strict=True):
        # The argument of sin is rounded, in absolute terms, before its derivative is taken.
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8 * (1 + e.abs().max().item()))


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_derivatives_of_first_and_second_order_are_right(rank, scale):
    """Also with respect to sigma where it is above 0.5, and at sigma = 0, where only sigma's have two sides."""
    generator = seeded(rank)
    subspace = planted(3, rank, generator, scale=scale)
    u_a, x = torch.randn(2, 2, 3, generator=generator, **DOUBLE)
    sigma = 0.5 + 0.5 * torch.rand(2, 1, generator=generator, **DOUBLE)
    inputs = [v.requires_grad_() for v in (u_a, x, sigma)]
    recover = lambda *v: recover_velocity(*v, subspace)
    assert torch.autograd.gradcheck(recover, inputs)
    assert torch.autograd.gradgradcheck(recover, inputs)
    for sigma_min in (0.0, 0.1):
        recover = lambda u_a, x, m=sigma_min: recover_velocity(u_a, x, torch.zeros(2), subspace, m).square()
        assert torch.autograd.gradcheck(recover, inputs[:2])
        assert torch.autograd.gradgradcheck(recover, inputs[:2])


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_nothing_is_larger_than_the_vectors_and_the_basis(matmul_precision, rank, setting):
    """Forward and backward; a D x D matrix would have 512^2 elements, 85 times as many."""
    matmul_precision(setting)
    subspace = Subspace.random(512, rank)
    x0, eps = (torch.randn(2, 3, 512, generator=seeded(seed)).requires_grad_() for seed in (0, 1))
    with LargestTensor() as largest:
        x_sigma, u_a = path_and_prediction(x0, eps, 0.5, subspace)
        recover_velocity(u_a, x_sigma, 0.5, subspace).square().sum().backward()
    assert largest.numel == 2 * 3 * 512


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x0 of another dimension", lambda x, a: asymmetric_velocity(x[..., :3], x, a)),
        ("eps of another dimension", lambda x, a: asymmetric_velocity(x, x[..., :3], a)),
        ("a number", lambda x, a: asymmetric_velocity(torch.tensor(1.0), x, a)),
        ("prediction of another dimension", lambda x, a: recover_velocity(x[..., :3], x, 0.5, a)),
        ("input of another dimension", lambda x, a: recover_velocity(x, x[..., :3], 0.5, a)),
        ("too many axes of sigma", lambda x, a: recover_velocity(x, x, torch.ones(2, 3, 1, 1), a)),
        pytest.param(
            "not as many noise levels as vectors",
            lambda x, a: recover_velocity(x, x, torch.ones(3), a),
        ),
        pytest.param(
            "more noise levels than vectors",
            lambda x, a: recover_velocity(x[:1], x[:1], torch.ones(3), a),
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, call):
    with pytest.raises(InputError, match=r"\A[^\n]+\Z"):
        call(torch.ones(2, 3, 4), Subspace.random(4, 2))
