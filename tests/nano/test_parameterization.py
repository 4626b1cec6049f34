"""The parameterization: what it must give back, its limits, its symmetries, its gradients.

All tolerances are `rounding` below, a bound on what finite precision can do, unless a test derives its own.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from nano_asymflow import Flow, asymmetric_velocity, flow_loss, project, recover_velocity

SEEDS = st.integers(0, 2**32 - 1)


def orthogonal(dim, generator):
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


@st.composite
def problems(draw, dtype=torch.float64, rank=None, smallest_sigma=1e-6):
    """(x0, eps, sigma, basis): any leading axes, dimension, rank and size of the numbers; sigma in (0, 1]."""
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    dim = draw(st.integers(1, 12))
    rank = draw(st.integers(0, dim)) if rank is None else {"none": 0, "all": dim}[rank]
    generator = torch.Generator().manual_seed(draw(SEEDS))
    options = {"generator": generator, "dtype": torch.float64}
    x0, eps = 10 ** draw(st.floats(-2, 2)) * torch.randn(2, *leading, dim, **options)
    shape = draw(st.sampled_from(["scalar", "one per vector", "full"]))
    sigma = draw(st.floats(smallest_sigma, 1)) ** torch.rand([] if shape == "scalar" else [*leading, 1], **options)
    if shape == "full":
        sigma = sigma.expand(x0.shape)
    return tuple(v.to(dtype) for v in (x0, eps, sigma, orthogonal(dim, generator)[:, :rank]))


def rounding(basis, sigma, *vectors):
    """A bound on the error of recovery from vectors of these norms, in the dtype of the basis.

    Let e be the machine epsilon. A product with |A| and then |A^T| (each of norm <= sqrt(rank)) accumulates at most
    (dim + rank) * rank * e times the norm. Three such products, of vectors no longer than twice the sum of the norms,
    and a handful of sums cost less than 4 (dim + rank + 2) (rank + 1) e; the complement's share is divided by sigma.
    A basis that is off by `skew` = |A^T A - 1| makes P P differ from P by as much, which is divided by sigma as well.
    """
    (dim, rank), exact = basis.shape, basis.double()
    skew = (exact.mT @ exact - torch.eye(rank, dtype=torch.float64)).norm()
    relative = 4 * (dim + rank + 2) * (rank + 1) * torch.finfo(basis.dtype).eps + 2 * skew
    size = sum(v.double().norm(dim=-1, keepdim=True) for v in vectors)
    sigma = torch.as_tensor(sigma).double()
    return relative * size * (1 + 1 / (sigma[..., :1] if sigma.ndim else sigma))


def within(actual, expected, tolerance):
    return actual.shape == expected.shape and bool(((actual.double() - expected.double()).abs() <= tolerance).all())


def path_and_prediction(x0, eps, sigma, basis):
    return (1 - sigma) * x0 + sigma * eps, asymmetric_velocity(x0, eps, basis)


# ---- The identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
def test_recovery_gives_back_the_velocity(dtype, data):
    """recover(asymmetric(x0, eps)) == eps - x0, for every shape, rank and noise level, to rounding."""
    x0, eps, sigma, basis = data.draw(problems(dtype))
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    u = recover_velocity(u_a, x_sigma, sigma, basis)
    assert u_a.dtype == u.dtype == dtype
    assert within(u, eps - x0, rounding(basis, sigma, x0, eps))


@given(problems(smallest_sigma=1e-4))
def test_float64_recovers_to_1e_10_where_sigma_is_at_least_1e_4(problem):
    """Rounding errors of random sign grow as the root of their number, here below 16, each at most 2^-53 of a sum.

    Those are below 4 |x|, |x| <= 1 as the vectors are normalized: 16 * 4 * 2^-53 / 1e-4 = 7e-11.
    """
    x0, eps, sigma, basis = problem
    x0, eps = (v / v.norm(dim=-1, keepdim=True) for v in (x0, eps))
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    assert within(recover_velocity(u_a, x_sigma, sigma, basis), eps - x0, 1e-10)


# ---- The limits ------------------------------------------------------------------------------------------------------


@given(problems(rank="none"))
def test_rank_0_is_x0_prediction_bit_for_bit(problem):
    """Nothing is inside: the prediction is -x0, and u = (x_sigma - x0) / sigma."""
    x0, eps, sigma, basis = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    assert torch.equal(u_a, -x0)
    assert torch.equal(recover_velocity(u_a, x_sigma, sigma, basis), (x_sigma - x0) / sigma)


@given(problems(rank="all"))
def test_full_rank_is_u_prediction(problem):
    """Nothing is outside: bit for bit with the identity as the basis, to rounding with any other."""
    x0, eps, sigma, basis = problem
    identity = torch.eye(x0.shape[-1], dtype=x0.dtype)
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, identity)
    assert torch.equal(u_a, eps - x0)
    assert torch.equal(recover_velocity(u_a, x_sigma, sigma, identity), u_a)
    assert within(asymmetric_velocity(x0, eps, basis), eps - x0, rounding(basis, sigma, x0, eps))
    assert within(recover_velocity(u_a, x_sigma, sigma, basis), u_a, rounding(basis, sigma, x0, eps))


@given(problems())
def test_the_prediction_is_the_velocity_inside_and_minus_the_data_outside(problem):
    x0, eps, _, basis = problem
    u_a, tolerance = asymmetric_velocity(x0, eps, basis), rounding(basis, 1, x0, eps)
    assert within(u_a @ basis, (eps - x0) @ basis, tolerance)
    assert within(u_a - project(u_a, basis), project(x0, basis) - x0, tolerance)


@given(problems())
def test_projecting_twice_is_projecting_once_and_leaves_a_right_angle(problem):
    x0, _, _, basis = problem
    inside, tolerance = project(x0, basis), rounding(basis, 1, x0)
    assert within(project(inside, basis), inside, tolerance)
    assert within((x0 - inside) @ basis, torch.zeros_like(x0 @ basis), tolerance)


# ---- What is divided by sigma, and what is not -----------------------------------------------------------------------


@given(problems(), st.sampled_from([1.0, 1e-3, 1e-12, 1e-30]))
def test_inside_the_subspace_nothing_is_divided(problem, sigma):
    """With a basis of coordinate axes it shows bit for bit: there u is the prediction, however small sigma is."""
    x_sigma, u_a, _, basis = problem
    rank, axes = basis.shape[1], torch.eye(len(basis), dtype=basis.dtype)[:, : basis.shape[1]]
    u = recover_velocity(u_a, x_sigma, torch.tensor(sigma, dtype=u_a.dtype), axes)
    assert torch.equal(u[..., :rank], u_a[..., :rank])
    assert torch.equal(u[..., rank:], (x_sigma + u_a)[..., rank:] / sigma)


@given(problems(), SEEDS)
def test_an_error_inside_the_subspace_changes_the_velocity_by_itself(problem, seed):
    """For every basis and sigma; whereas an error outside comes out divided by sigma."""
    x_sigma, u_a, sigma, basis = problem
    error = torch.randn(u_a.shape, generator=torch.Generator().manual_seed(seed), dtype=u_a.dtype)
    inside = project(error, basis)
    outside = error - inside
    before, tolerance = recover_velocity(u_a, x_sigma, sigma, basis), 2 * rounding(basis, sigma, u_a, x_sigma, error)
    assert within(recover_velocity(u_a + inside, x_sigma, sigma, basis) - before, inside, tolerance)
    assert within(recover_velocity(u_a + outside, x_sigma, sigma, basis) - before, outside / sigma, tolerance)


@given(problems(torch.float32))
def test_rounding_inside_the_subspace_is_not_divided(problem):
    """Inside, the error is that of sigma = 1 at every sigma: rounding outside comes in only to second order.

    That is, times the rounding of one more projection: 4 (dim + rank + 2) (rank + 1) e and the skew, as in `rounding`.
    """
    x0, eps, sigma, basis = problem
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    error = (recover_velocity(u_a, x_sigma, sigma, basis) - (eps - x0)).double() @ basis.double()
    once = rounding(basis, 1, torch.ones(1))
    inside = rounding(basis, 1, x0, eps) + rounding(basis, sigma, x0, eps) * once
    assert within(error, torch.zeros_like(error), inside)


# ---- Symmetries ------------------------------------------------------------------------------------------------------


@given(problems(), SEEDS)
def test_only_the_span_of_the_basis_counts(problem, seed):
    """A rotation of the columns within their span changes neither the prediction's target nor the recovery."""
    x0, eps, sigma, basis = problem
    turned = basis @ orthogonal(basis.shape[1], torch.Generator().manual_seed(seed))
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    tolerance = rounding(basis, sigma, x0, eps) + rounding(turned, sigma, x0, eps)
    assert within(asymmetric_velocity(x0, eps, turned), u_a, tolerance)
    other = recover_velocity(u_a, x_sigma, sigma, turned)
    assert within(other, recover_velocity(u_a, x_sigma, sigma, basis), 2 * tolerance)


@given(problems(), SEEDS)
def test_a_rotation_of_all_space_rotates_the_result(problem, seed):
    x0, eps, sigma, basis = problem
    rotation = orthogonal(x0.shape[-1], torch.Generator().manual_seed(seed))
    turned = rotation @ basis
    x_sigma, u_a = path_and_prediction(x0, eps, sigma, basis)
    # The rotations before and after are products like those within: their errors have the same bound, at rank D.
    tolerance = 2 * sum(rounding(b, sigma, x0, eps) for b in (basis, turned, rotation))
    assert within(asymmetric_velocity(x0 @ rotation.mT, eps @ rotation.mT, turned), u_a @ rotation.mT, tolerance)
    u = recover_velocity(u_a @ rotation.mT, x_sigma @ rotation.mT, sigma, turned)
    assert within(u, recover_velocity(u_a, x_sigma, sigma, basis) @ rotation.mT, tolerance)


@given(problems(), SEEDS, st.integers(-3, 3), st.integers(-3, 3))
def test_recovery_is_linear_in_prediction_and_input_together(problem, seed, a, b):
    x, u_a, sigma, basis = problem
    x2, u_a2 = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    together = recover_velocity(a * u_a + b * u_a2, a * x + b * x2, sigma, basis)
    apart = a * recover_velocity(u_a, x, sigma, basis) + b * recover_velocity(u_a2, x2, sigma, basis)
    assert within(together, apart, 2 * rounding(basis, sigma, a * x, a * u_a, b * x2, b * u_a2))


# ---- Derivatives and transformations ---------------------------------------------------------------------------------


def textbook(u_a, x_sigma, sigma, basis):
    """The formula with D x D matrices, as it stands in the paper."""
    inside = basis @ basis.mT
    outside = torch.eye(len(basis), dtype=basis.dtype) - inside
    return u_a @ inside + (x_sigma + u_a) @ outside / sigma


@given(problems(), SEEDS)
def test_gradients_are_those_of_the_textbook_formula(problem, seed):
    x_sigma, u_a, sigma, basis = problem
    weights = torch.randn(u_a.shape, generator=torch.Generator().manual_seed(seed), dtype=u_a.dtype)
    inputs = [u_a.requires_grad_(), x_sigma.requires_grad_()]
    actual, expected = (
        torch.autograd.grad((formula(u_a, x_sigma, sigma, basis) * weights).sum(), inputs)
        for formula in (recover_velocity, textbook)
    )
    # The map is linear and P symmetric: its transpose costs the same products, so the same bound holds.
    tolerance = 2 * rounding(basis, sigma, weights)
    assert all(within(a, e, tolerance) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_derivatives_of_first_and_second_order_are_right(rank):
    """Also those with respect to sigma. Sigma stays above 0.5: finite differences are wrong by powers of 1 / sigma."""
    generator = torch.Generator().manual_seed(rank)
    basis = orthogonal(3, generator)[:, :rank]
    u_a, x_sigma = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    sigma = 0.5 + 0.5 * torch.rand(2, 1, generator=generator, dtype=torch.float64)
    inputs = [v.requires_grad_() for v in (u_a, x_sigma, sigma)]
    recover = lambda *v: recover_velocity(*v, basis)
    assert torch.autograd.gradcheck(recover, inputs)
    assert torch.autograd.gradgradcheck(recover, inputs)


@given(problems())
def test_one_vector_at_a_time_is_the_same_as_a_batch(problem):
    """By a loop and by torch.func.vmap: nothing is shared between the vectors of a batch."""
    x0, eps, sigma, basis = problem
    dim = x0.shape[-1]
    sigma = sigma.expand(x0.shape)[..., :1].reshape(-1, 1)
    x0, eps = x0.reshape(-1, dim), eps.reshape(-1, dim)
    recover = lambda x0, eps, sigma: recover_velocity(*path_and_prediction(x0, eps, sigma, basis)[::-1], sigma, basis)
    batch, tolerance = recover(x0, eps, sigma), 2 * rounding(basis, sigma, x0, eps)
    assert within(vmap(recover)(x0, eps, sigma), batch, tolerance)
    assert within(torch.stack([recover(*v) for v in zip(x0, eps, sigma, strict=True)]), batch, tolerance)


# ---- A basis that is none --------------------------------------------------------------------------------------------

BAD_BASES = {
    "more columns than rows": torch.eye(4, 6),
    "a vector": torch.ones(4) / 2,
    "a stack": torch.eye(4).expand(2, 4, 4),
    "too long": 1.01 * torch.eye(4),
    "not orthogonal": torch.tensor([[1, 0.6], [0, 0.8], [0, 0], [0, 0]]),
    "a column twice": torch.eye(4)[:, [0, 0]],
    "not a number": torch.full((4, 1), torch.nan),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_no_flow_is_made_of_what_is_no_orthonormal_basis(name):
    with pytest.raises(ValueError, match=r"\Athe columns of the basis [^\n]+ are not orthonormal[^\n]+\Z"):
        Flow(torch.nn.Identity(), BAD_BASES[name])


@given(problems(torch.float32))
def test_an_orthonormal_basis_in_float32_makes_a_flow(problem):
    basis = problem[-1]
    for one in (basis, torch.linalg.qr(basis).Q):
        assert torch.equal(Flow(torch.nn.Identity(), one).basis, one)


# ---- A network that knows everything ---------------------------------------------------------------------------------


@given(problems(smallest_sigma=1e-5))
def test_a_perfect_network_has_no_loss_at_any_rank(problem):
    x0, eps, sigma, basis = problem
    flow = Flow(lambda x, sigma: asymmetric_velocity(x0, eps, basis), basis)
    bound = rounding(basis, sigma, x0, eps).square().mean()
    assert flow_loss(flow, x0, eps, sigma) <= bound


@given(problems())
def test_a_perfect_network_has_no_loss_with_eps_prediction(problem):
    """u = (eps - x_sigma) / (1 - sigma) loses the digits of 1 - sigma, so sigma stays below 0.9 here."""
    x0, eps, sigma, basis = problem
    sigma = 0.9 * sigma
    bound = 10 * rounding(basis[:, :0], 1, x0, eps)
    assert flow_loss(Flow(lambda x, sigma: eps, None), x0, eps, sigma) <= bound.square().mean()


@given(problems(), st.floats(0.5, 2))
def test_the_loss_is_the_squared_error_of_the_velocity_but_softer_near_the_data(problem, error):
    """An error in u counts in full from sigma = 0.05 on, and in proportion to sigma below."""
    x0, eps, sigma, _ = problem
    expected = (error * (sigma / 0.05).clamp(max=1)).square().mean()
    actual = flow_loss(lambda x, sigma: eps - x0 + error, x0, eps, sigma)
    size = (x0.abs() + eps.abs()).max()  # u + error - u loses what the larger number cannot hold
    torch.testing.assert_close(actual, expected, rtol=float(1e-14 * (1 + size)), atol=0)
