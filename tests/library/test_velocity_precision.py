"""asymflow/parameterization.py: in low precision, compiled, transformed, differentiated."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
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

from asymflow import InputError, Subspace, asymmetric_velocity, calibration, recover_velocity

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
MISTAKES = {
    "x0 of another dimension": (lambda x, a: asymmetric_velocity(x[..., :3], x, a), "these are (2, 3, 3)"),
    "eps of another dimension": (lambda x, a: asymmetric_velocity(x, x[..., :3], a), "these are (2, 3, 3)"),
    "a number": (lambda x, a: asymmetric_velocity(torch.tensor(1.0), x, a), "vectors of dimension 4, but these are ()"),
    "prediction of another dimension": (lambda x, a: recover_velocity(x[..., :3], x, 0.5, a), "these are (2, 3, 3)"),
    "input of another dimension": (lambda x, a: recover_velocity(x, x[..., :3], 0.5, a), "these are (2, 3, 3)"),
    "too many axes of sigma": (
        lambda x, a: recover_velocity(x, x, torch.ones(2, 3, 1, 1), a),
        "(2, 3, 1, 1) does not go with the leading axes of vectors (2, 3, 4)",
    ),
    "not as many noise levels as vectors": (
        lambda x, a: recover_velocity(x, x, torch.ones(3), a),
        "(3,) does not go with the leading axes of vectors (2, 3, 4)",
    ),
    "more noise levels than vectors": (
        lambda x, a: recover_velocity(x[:1], x[:1], torch.ones(3), a),
        "(3,) does not go with the leading axes of vectors (1, 3, 4)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(name):
    call, named = MISTAKES[name]
    with pytest.raises(InputError, match=r"\A[^\n]+\Z") as error:
        call(torch.ones(2, 3, 4), Subspace.random(4, 2))
    assert named in str(error.value)
