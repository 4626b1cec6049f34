"""Training does what it promises to the weights; sampling solves the differential equation at the order it claims."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_asymflow import (
    MLP,
    Flow,
    ToyData,
    flow_loss,
    integrate,
    pca_basis,
    profile,
    random_stream,
    train,
)

DOUBLE = {"dtype": torch.float64}
SEEDS = st.integers(0, 2**32 - 1)


def last(iterator):
    *_, x = iterator
    return x


# ---- Sampling --------------------------------------------------------------------------------------------------------

MEAN, SPREAD = torch.tensor([0.7, -0.4, 1.5], **DOUBLE), torch.tensor([0.3, 1.0, 0.6], **DOUBLE)


def gaussian_velocity(x, sigma):
    """E[eps - x0 | x_sigma] for data N(MEAN, SPREAD^2): x_sigma is normal, so that it is linear in x."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return (sigma - (1 - sigma) * SPREAD**2) / variance * (x - (1 - sigma) * MEAN) - MEAN


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_the_error_of_a_gaussian_flow_shrinks_at_the_order_of_the_method(heun, order):
    """The exact flow takes noise x to MEAN + SPREAD x. Halving the step divides the error by 2^order (1 + O(step)).

    So the observed order nears the order as the steps get finer, to 5 % at 256, and the last Euler step of Heun's
    method does not spoil it: one step of error step^2 is of order 2.
    """
    noise = torch.randn(200, 3, generator=random_stream(0, "test"), **DOUBLE)
    exact = MEAN + SPREAD * noise
    errors = [
        (last(integrate(gaussian_velocity, noise, steps, heun)) - exact).abs().max().item()
        for steps in (16, 32, 64, 128, 256)
    ]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.05)
    assert abs(orders[-1] - order) < abs(orders[0] - order)


def test_heun_is_what_is_used_unless_told_otherwise():
    noise = torch.randn(200, 3, generator=random_stream(0, "test"), **DOUBLE)
    default, heun, euler = (
        last(integrate(gaussian_velocity, noise, 50, *choice)) for choice in ((), (True,), (False,))
    )
    assert torch.equal(default, heun)
    assert (heun - MEAN - SPREAD * noise).abs().max() < (euler - MEAN - SPREAD * noise).abs().max() / 10


@given(st.integers(1, 60), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_a_path_goes_from_the_noise_at_1_to_0_in_even_steps(steps, heun, n, dim):
    """A velocity of 1 makes x a clock: it shows sigma. Nothing is ever evaluated at 0, where it may not exist.

    The grid is in float32, and sums of `steps` numbers: hence the tolerance.
    """
    seen = []

    def clock(x, sigma):
        assert sigma.shape == (n, 1)
        seen.append((x, sigma))
        return torch.ones_like(x)

    noise = torch.ones(n, dim)
    path = list(integrate(clock, noise, steps, heun))
    tolerance = 2 * steps * torch.finfo(torch.float32).eps
    assert len(path) == steps + 1
    assert path[0] is noise
    expected = (1 - torch.arange(steps + 1) / steps)[:, None, None].expand(-1, n, dim)
    assert (torch.stack(path) - expected).abs().max() < tolerance
    assert all((x - sigma).abs().max() < tolerance for x, sigma in seen)
    assert all((sigma > 0).all() for _, sigma in seen)
    assert len(seen) == (2 * steps - 1 if heun else steps)


def test_sampling_keeps_no_gradients():
    network = MLP(3, 4)
    for x in integrate(Flow(network, torch.eye(3)), torch.ones(2, 3), steps=2):
        assert not x.requires_grad


@given(SEEDS, st.integers(1, 20), st.booleans(), st.data())
def test_a_single_point_is_sampled_exactly_at_every_rank(seed, steps, heun, data):
    """Paths to one point are straight, and either method is exact on a line.

    Rounding errors of one step, a few epsilon, are not amplified: dividing by sigma, it steps by at most sigma.
    """
    dim = data.draw(st.integers(1, 6))
    rank = data.draw(st.integers(0, dim))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, :rank]
    point, noise = torch.randn(dim, generator=generator, **DOUBLE), torch.randn(5, dim, generator=generator, **DOUBLE)
    oracle = lambda x, sigma: ((x - (1 - sigma) * point) / sigma) @ basis @ basis.mT - point
    samples = last(integrate(Flow(oracle, basis), noise, steps, heun))
    tolerance = 20 * steps * dim * torch.finfo(torch.float64).eps * (1 + noise.norm() + point.norm())
    assert (samples - point).abs().max() < tolerance


# ---- The evidence ----------------------------------------------------------------------------------------------------


def test_a_flow_that_knows_the_data_scores_the_floor():
    """Six Gaussians have a velocity in closed form. Two sets of samples differ as two sets of data do: by 1 floor.

    A set of 2,000 is off by chance by a few tenths of that.
    """
    data = ToyData("gaussians", 4)
    angle = torch.arange(6) * math.pi / 3
    centers = (torch.stack([angle.cos(), angle.sin()], 1) - data.mean) / data.std
    spread = (0.1 / data.std).mean()  # both axes alike, to a percent

    def oracle(x, sigma):
        """-E[x0 | x_sigma]: x0-prediction, rank 0."""
        seen, variance = x @ data.frame, (1 - sigma) ** 2 * spread**2 + sigma**2
        offset = seen[:, None] - (1 - sigma)[..., None] * centers
        weight = (-offset.square().sum(-1) / (2 * variance)).softmax(-1)
        gain = (1 - sigma) * spread**2 / variance
        return -data.lift((weight[..., None] * (centers + gain[..., None] * offset)).sum(1))

    fresh = data.position(12_000, random_stream(0, "test")).view(6, 2000, 2)
    reference = profile(fresh).mean(0)
    distance = lambda points: (profile(points) - reference).abs().mean()
    noise = torch.randn(4000, 4, generator=random_stream(1, "test"))
    samples = last(integrate(Flow(oracle, torch.eye(4)[:, :0]), noise))
    seen = (samples @ data.frame).view(2, 2000, 2)
    assert 0.5 * distance(fresh) < distance(seen) < 2 * distance(fresh) < distance(noise.view(2, 2000, 4)[..., :2])
    assert (samples @ data.outside).abs().max() < 1e-4


# ---- The network -----------------------------------------------------------------------------------------------------


def test_an_untrained_network_predicts_zero():
    assert torch.equal(MLP(5, 8)(torch.ones(3, 5), torch.rand(3, 1)), torch.zeros(3, 5))


def test_a_network_sees_the_noise_level_and_passes_no_more_numbers_than_it_is_wide():
    """Outputs (n, 16) of a network of width 4 lie in an affine subspace of dimension 4: the rest is rounding."""
    torch.manual_seed(0)
    network = MLP(16, 4)
    for weight in network.parameters():
        torch.nn.init.normal_(weight)
    x, sigma = torch.randn(100, 16), torch.rand(100, 1)
    out = network(x, sigma).detach()
    values = torch.linalg.svdvals((out - out.mean(0)).double())
    assert values[4] < 1e-5 * values[0]
    assert values[3] > 1e-3 * values[0]
    assert (network(x, 1 - sigma) - out).norm() > 1e-3 * out.norm()


# ---- Training --------------------------------------------------------------------------------------------------------

DATA = ToyData("swissroll", 8)
BASIS = pca_basis(DATA.sample(1000, random_stream(0, "pca")), 2)
RANKS = {"asym": BASIS, "x0": BASIS[:, :0], "u": torch.eye(8), "eps": None}
every_prediction = pytest.mark.parametrize("prediction", RANKS)


def new_flow(prediction="asym"):
    torch.manual_seed(0)
    return Flow(MLP(8, 16), RANKS[prediction])


def weights(module):
    return torch.cat([w.detach().flatten() for w in module.parameters()])


def run(flow, steps=20, seed=0, **options):
    return train(flow, DATA.sample, steps, 32, random_stream(seed, "training"), **options)


@every_prediction
def test_training_twice_gives_the_same_bits(prediction):
    flows = [new_flow(prediction) for _ in range(3)]
    for flow, seed in zip(flows, (0, 0, 1), strict=True):
        run(flow, seed=seed)
    assert torch.equal(weights(flows[0]), weights(flows[1]))
    assert not torch.equal(weights(flows[0]), weights(flows[2]))


@every_prediction
def test_no_steps_change_nothing(prediction):
    flow = new_flow(prediction)
    run(flow, steps=0)
    assert torch.equal(weights(flow), weights(new_flow(prediction)))


@every_prediction
@torch.no_grad()
def test_a_short_training_lowers_the_loss(prediction):
    """On 50 sets of draws that it was not trained on, by more than 5 standard errors of the mean."""
    flow, generator = new_flow(prediction), random_stream(1, "test")
    x0, eps = DATA.sample(5000, generator), torch.randn(5000, 8, generator=generator)
    sigma = 1 - torch.rand(5000, 1, generator=generator)
    sets = list(zip(*(v.split(100) for v in (x0, eps, sigma)), strict=True))
    losses = lambda: torch.stack([flow_loss(flow, *draws) for draws in sets])
    before = losses()
    with torch.enable_grad():
        run(flow, steps=300)
    gain = before - losses()
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


def test_the_weights_left_are_an_average_of_all_steps():
    """Each of them within the range of the weights on the way, and all of them neither the first nor the last of these.

    An average over several of 30 steps lags; the rate falls to zero, so by little.
    """
    flow, way = new_flow(), []

    def look(*draws):
        way.append(weights(flow))
        return flow_loss(*draws)

    run(flow, steps=30, loss=look)
    left, way = weights(flow), torch.stack(way)  # but for those after the last step, which is almost none
    slack = 1e-3 * (way.amax(0) - way.amin(0)).amax()
    assert (left >= way.amin(0) - slack).all()
    assert (left <= way.amax(0) + slack).all()
    moved = (way[-1] - way[0]).norm()
    assert (left - way[-1]).norm() > 0.002 * moved  # the last step alone moves by less than a quarter of that
    assert (left - way[0]).norm() > 0.02 * moved


@given(st.integers(1, 64), SEEDS)
def test_noise_levels_in_training_are_one_from_each_of_equal_intervals(batch, seed):
    """In (0, 1]; noise and data are what they are said to be."""
    seen = []

    def loss(flow, x0, eps, sigma):
        seen.append((x0, eps, sigma))
        return flow_loss(flow, x0, eps, sigma)

    flow = Flow(MLP(8, 2), BASIS)
    train(flow, DATA.sample, 2, batch, random_stream(seed, "training"), loss=loss)
    (x0, eps, sigma), (_, _, other) = seen
    assert x0.shape == eps.shape == (batch, 8)
    assert sigma.shape == (batch, 1)
    assert ((sigma > 0) & (sigma <= 1)).all()
    position = sigma.sort(dim=0).values[:, 0] * batch - torch.arange(batch)
    assert ((position > -1e-5) & (position < 1 + 1e-5)).all()
    assert not torch.equal(sigma, other)


def test_the_noise_in_training_is_standard_normal_and_has_nothing_to_do_with_the_data():
    """Over 50 * 500 draws in 8 dimensions, to 5 standard errors: n^-1/2 for means, at most twice that for products."""
    seen = []

    def loss(flow, x0, eps, sigma):
        seen.append((x0, eps, sigma))
        return flow_loss(flow, x0, eps, sigma)

    train(new_flow(), DATA.sample, 50, 500, random_stream(0, "training"), loss=loss)
    x0, eps, sigma = (torch.cat(v).double() for v in zip(*seen, strict=True))
    error = 5 / len(eps) ** 0.5
    assert (eps.mean(0).abs() < error).all()
    assert (eps.mT @ eps / len(eps) - torch.eye(8)).abs().max() < 2 * error
    assert (eps.mT @ x0 / len(eps)).abs().max() < 2 * error
    assert (eps * (sigma - 0.5)).mean(0).abs().max() < error
    assert (x0 * (sigma - 0.5)).mean(0).abs().max() < error
    assert (sigma.mean() - 0.5).abs() < error


def test_a_flow_carries_its_basis_and_does_not_train_it():
    flow = new_flow()
    assert torch.equal(flow.state_dict()["basis"], BASIS)
    assert "basis" not in dict(flow.named_parameters())
    run(flow)
    assert torch.equal(flow.basis, RANKS["asym"])
