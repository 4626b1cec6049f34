"""The toys, the basis that is fitted to them, and the distance between sets of points: what each claims to be."""

import math

import numpy as np
import pytest
import torch
from devices import NoFloat64
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nano_asymflow import TOYS, ToyData, pca_basis, profile, random_stream

EPSILON = torch.finfo(torch.float32).eps
SEEDS = st.integers(0, 2**32 - 1)
every_toy = pytest.mark.parametrize("toy", TOYS)


def rms(x):
    """Root mean square of the norms of vectors (n, dim)."""
    return x.double().square().sum(-1).mean().sqrt().item()


# ---- All toys --------------------------------------------------------------------------------------------------------


@every_toy
def test_each_axis_of_the_picture_has_mean_0_and_variance_1(toy):
    """Within 5 standard errors, of these n draws and of the fewer than n that the toy was standardized with."""
    n = 2**17
    x = ToyData(toy, 2).position(n, random_stream(1, "test")).double()
    kurtosis = x.pow(4).mean(0)
    assert (x.mean(0).abs() < 5 * (2 / n) ** 0.5).all()
    assert ((x.std(0) - 1).abs() < 5 * ((kurtosis - 1) / 4 * 2 / n).sqrt()).all()


@every_toy
@pytest.mark.parametrize("detail", [0, 0.3])
def test_a_seed_fixes_every_bit(toy, detail):
    one, same, other = (ToyData(toy, 6, detail, seed=seed) for seed in (3, 3, 4))
    x = one.sample(100, random_stream(0, "test"))
    assert x.shape == (100, 6)
    assert x.dtype == torch.float32
    assert torch.equal(x, same.sample(100, random_stream(0, "test")))
    assert not torch.equal(x, same.sample(100, random_stream(1, "test")))
    assert (one.frame - other.frame).norm() > 0.1


@every_toy
def test_the_seed_turns_the_frame_and_leaves_the_picture(toy):
    one, other = (ToyData(toy, 6, seed=seed).position(100, random_stream(0, "test")) for seed in (3, 4))
    assert torch.equal(one, other)


@given(SEEDS, SEEDS, st.sampled_from(["frame", "training"]))
def test_a_random_stream_is_fixed_by_its_seed_and_its_purpose(seed, other, purpose):
    draw = lambda *key: torch.rand(4, generator=random_stream(*key)).tolist()
    assert draw(seed, purpose) == draw(seed, purpose)
    assert draw(seed, purpose) != draw(seed, "evaluation")
    assume(seed != other)
    assert draw(seed, purpose) != draw(other, purpose)


@every_toy
@pytest.mark.parametrize("dim", [2, 3, 8, 64])
def test_without_detail_the_data_lies_in_a_plane(toy, dim):
    """Rank exactly 2: the third singular value is what rounding leaves, the second is as large as the first."""
    x = ToyData(toy, dim).sample(1000, random_stream(0, "test"))
    values = torch.linalg.svdvals(x.double())
    assert values[1] > values[0] / 2
    assert (values[2:] < 2 * EPSILON * values[0]).all()  # each number is a sum of two products
    assert rms(x @ ToyData(toy, dim).outside) <= dim**1.5 * EPSILON


@every_toy
@pytest.mark.parametrize("dim", [3, 8, 16, 32])
def test_with_detail_the_data_has_full_rank(toy, dim):
    """The last singular value is above all that rounding, dim additions a number, could have made of a zero."""
    x = ToyData(toy, dim, detail=0.3).sample(4096, random_stream(0, "test"))
    values = torch.linalg.svdvals(x.double())
    assert values[-1] > dim**1.5 * EPSILON / 2 * values[0]


@every_toy
@pytest.mark.parametrize("detail", [0.1, 0.3, 1])
def test_detail_is_the_size_outside_the_plane_over_the_size_inside(toy, detail):
    """About: the energy is a mean of cos^2 over 256 random phases, each of mean 1/2 and deviation at most 8^-1/2.

    Five standard errors of that mean are 5 * 8^-1/2 / 256^1/2 = 0.11, so 22 % of the energy, 12 % of the size.
    """
    data = ToyData(toy, 258, detail)
    x = data.sample(2000, random_stream(0, "test"))
    assert rms(x @ data.outside) / rms(x @ data.frame) == pytest.approx(detail, rel=0.12)


@every_toy
def test_detail_is_a_function_of_the_position(toy):
    """A curved surface, not noise: equal positions have equal details, and near ones have near ones."""
    data = ToyData(toy, 10, detail=0.3)
    x = data.position(100, random_stream(0, "test"))
    assert torch.equal(data.lift(x), data.lift(x.clone()))
    assert rms(data.lift(x + 1e-3) - data.lift(x)) < 0.05 * rms(data.lift(x + 1) - data.lift(x))


@every_toy
@pytest.mark.parametrize("dim", [2, 3, 16])
@pytest.mark.parametrize("detail", [0, 0.3])
def test_the_frame_shows_the_picture_again(toy, dim, detail):
    """Frame and outside are one orthonormal basis of all space; whatever is added outside does not change the inside.

    A QR decomposition is orthonormal to a small multiple of dim * epsilon, and so are the products with it.
    """
    data = ToyData(toy, dim, detail if dim > 2 else 0)
    everything = torch.cat([data.frame, data.outside], dim=1)
    tolerance = 4 * dim * EPSILON
    assert data.frame.shape == (dim, 2)
    assert (everything.mT @ everything - torch.eye(dim)).abs().max() < tolerance
    position, x = (draw(500, random_stream(0, "test")) for draw in (data.position, data.sample))
    assert (x @ data.frame - position).abs().max() < tolerance * x.norm(dim=-1).max()
    assert torch.equal(data.lift(position), x)


# ---- What each of them shows -----------------------------------------------------------------------------------------


def picture(toy, noise):
    """4,000 points before standardization, in float64; `noise` 0 shows the bare curve."""
    generator = random_stream(0, "test")
    a, b = torch.rand(2, 4000, generator=generator, dtype=torch.float64)
    return TOYS[toy](a, b, noise * torch.randn(4000, 2, generator=generator, dtype=torch.float64))


def radius_and_turns(x):
    return x.norm(dim=-1), torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1


def away_from_whole(x):
    return (x - x.round()).abs().max()


def is_even(counts, n=4000):
    """Counts of n draws over equally likely classes, within 5 standard deviations (at most those of Poisson)."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return counts.sum() == n and ((counts - n / len(counts)).abs() < 5 * (n / len(counts)) ** 0.5).all()


def test_gaussians_are_six_at_equal_angles():
    radius, turns = radius_and_turns(picture("gaussians", noise=0))
    assert (radius - 1).abs().max() < 1e-12
    assert away_from_whole(6 * turns) < 1e-12
    assert is_even(torch.bincount((6 * turns).round().long() % 6, minlength=6))


def test_rings_have_two_radii_and_no_angle():
    radius, turns = radius_and_turns(picture("rings", noise=0))
    assert away_from_whole(radius) < 1e-12
    assert is_even(torch.bincount(radius.round().long(), minlength=3)[1:])
    assert is_even(torch.bincount((16 * turns).long(), minlength=16))


def test_checkerboard_fills_every_other_cell():
    x = picture("checkerboard", noise=1)
    column, row = x.floor().long().T
    assert ((x >= 0) & (x <= torch.tensor([3, 4]))).all()
    assert ((column + row) % 2 == (column + row)[0] % 2).all()
    cells, counts = torch.unique(4 * column + row, return_counts=True)
    assert len(cells) == 6
    assert is_even(counts)


def test_moons_are_two_half_circles_that_reach_into_each_other():
    x, center = picture("moons", noise=0), torch.tensor([0.5, 0.25], dtype=torch.float64)
    up = ((x + center).norm(dim=-1) - 1).abs() < 1e-12
    down = ((x - center).norm(dim=-1) - 1).abs() < 1e-12
    assert is_even([up.sum(), down.sum()])
    assert (x[up, 1] >= -0.25 - 1e-12).all()
    assert (x[down, 1] <= 0.25 + 1e-12).all()
    assert x[down, 0].min() < 0 < x[up, 0].max()
    assert x[up, 1].min() < 0 < x[down, 1].max()


def test_spirals_are_two_arms_half_a_turn_apart():
    """Archimedean: the radius grows with the angle, three quarters of a turn in all, evenly dense in the plane."""
    radius, turns = radius_and_turns(picture("spirals", noise=0))
    halves = 2 * (turns - 0.75 * radius)
    assert away_from_whole(halves) < EPSILON  # the half turn is added in float32
    assert is_even(torch.bincount(halves.round().long() % 2, minlength=2))
    assert is_even(torch.bincount((4 * radius**2).long(), minlength=4))


def test_swissroll_is_one_arm():
    """From radius 1 to 3, three quarters of a turn for each unit of radius."""
    radius, turns = radius_and_turns(picture("swissroll", noise=0))
    assert away_from_whole(turns - 0.75 * radius) < 1e-12
    assert is_even(torch.bincount((4 * (radius - 1)).long(), minlength=8))


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy != "checkerboard"])
def test_a_curve_is_blurred_but_not_beyond_recognition(toy):
    """The same draws with and without noise are apart, by less than a fifth of the picture's size."""
    bare, blurred = picture(toy, noise=0), picture(toy, noise=1)
    assert 0.01 < rms(blurred - bare) / rms(bare) < 0.2


# ---- PCA -------------------------------------------------------------------------------------------------------------


@st.composite
def planted(draw):
    """Samples (n, dim) with the singular values 1, 1/2, 1/4, ... along directions (dim, dim), and n >= dim."""
    dim = draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    options = {"generator": generator, "dtype": torch.float64}
    rows = torch.linalg.qr(torch.randn(dim + draw(st.integers(0, 20)), dim, **options)).Q
    directions = torch.linalg.qr(torch.randn(dim, dim, **options)).Q
    return rows @ torch.diag(0.5 ** torch.arange(dim, dtype=torch.float64)) @ directions.mT, directions


@given(planted())
def test_pca_finds_planted_directions_in_the_order_of_their_energy(samples_and_directions):
    """As spans of every rank, as signs mean nothing; and the same ones as NumPy's SVD.

    Energies next to each other are at least 4^-dim apart, and rounding turns the span by dim^2 * epsilon over that.
    """
    samples, directions = samples_and_directions
    dim = samples.shape[1]
    tolerance = 4 * dim**2 * 4.0**dim * torch.finfo(torch.float64).eps
    rows = torch.from_numpy(np.linalg.svd(samples.numpy())[2])
    for rank in range(dim + 1):
        basis = pca_basis(samples, rank)
        inside = basis @ basis.mT
        assert basis.shape == (dim, rank)
        assert (inside - directions[:, :rank] @ directions[:, :rank].mT).norm() < tolerance
        assert (inside - rows[:rank].mT @ rows[:rank]).norm() < tolerance


@given(st.integers(1, 30), st.integers(1, 12), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_pca_is_orthonormal_at_every_rank_and_keeps_the_dtype(n, dim, seed, dtype):
    """Even of fewer samples than dimensions. The energy outside never grows with the rank, and ends at nothing."""
    samples = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    tolerance, left = 10 * dim * torch.finfo(dtype).eps, torch.inf
    for rank in range(dim + 1):
        basis = pca_basis(samples, rank)
        assert basis.dtype == dtype
        assert (basis.mT @ basis - torch.eye(rank)).norm() < tolerance
        outside = rms(samples - samples @ basis @ basis.mT) / rms(samples)
        assert outside < left + tolerance
        left = outside
    assert left < tolerance


def test_pca_is_in_float64_on_the_cpu_and_back_on_the_device(monkeypatch):
    """On meta, which holds no numbers: the device of a Mac has no float64."""
    with NoFloat64(monkeypatch), FakeTensorMode():
        basis = pca_basis(torch.empty(9, 4, device="meta"), 2)
    assert (basis.shape, basis.device.type, basis.dtype) == ((4, 2), "meta", torch.float32)


@given(SEEDS)
def test_pca_is_not_centred(seed):
    """A cloud far from the origin, 100 times its own size: the direction to it comes first, turned by at most 1/100."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.nn.functional.normalize(torch.randn(5, generator=generator), dim=0)
    cloud = torch.nn.functional.normalize(torch.randn(1000, 5, generator=generator), dim=1)
    first = pca_basis(100 * center + cloud, 1)[:, 0]
    assert (first @ center).abs() > math.cos(1 / 100)


@every_toy
def test_pca_finds_the_plane_of_a_toy(toy):
    """Energies are summed in float64, but the samples are rounded to float32, dim of them in a product."""
    data = ToyData(toy, 16)
    basis = pca_basis(data.sample(2000, random_stream(0, "pca")), 2)
    assert (basis @ basis.mT - data.frame @ data.frame.mT).norm() < 16 * EPSILON


# ---- Distances -------------------------------------------------------------------------------------------------------


def distance(a, b):
    return (profile(a) - profile(b)).abs().mean().item()


@st.composite
def clouds(draw, sets):
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return torch.randn(sets, draw(st.integers(1, 40)), 2, generator=generator, dtype=torch.float32)


@given(clouds(sets=3))
def test_sliced_wasserstein_is_a_distance_between_sets(three):
    a, b, c = three
    assert distance(a, a) == distance(a, a.flip(0)) == 0
    assert distance(a, b) == distance(b, a) > 0
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 100 * EPSILON
    assert distance(a, torch.stack([b, c])) == pytest.approx((distance(a, b) + distance(a, c)) / 2)


@given(clouds(sets=1), st.floats(0.1, 10), st.floats(0, 2 * math.pi))
def test_a_shift_costs_the_mean_of_its_projections(cloud, length, angle):
    """The mean of |cos| over the circle is 2 / pi, and over 64 directions the same to h^2 / 4 pi for h = pi / 64:
    the error of the trapezoidal rule at its one kink, of slope 2. Rounding is epsilon times the largest number."""
    (points,) = cloud
    shifted = points + length * torch.tensor([math.cos(angle), math.sin(angle)])
    tolerance = length * math.pi / 64**2 / 4 + 4 * EPSILON * shifted.abs().max().item()
    assert abs(distance(points, shifted) - length * 2 / math.pi) < tolerance


@given(clouds(sets=2), st.floats(0.1, 10))
def test_distances_scale_with_the_points(two, scale):
    a, b = two
    assert distance(scale * a, scale * b) == pytest.approx(scale * distance(a, b), rel=100 * EPSILON, abs=EPSILON)


@every_toy
def test_two_sets_of_the_same_toy_are_closer_the_more_points_they_have(toy):
    """As n^-1/2: a quarter, for 16 times the points. Half of them would be many standard errors above it."""
    data, generator = ToyData(toy, 2), random_stream(0, "test")
    few, many = (distance(*data.position(12 * n, generator).view(2, 6, n, 2)) for n in (125, 2000))
    assert 0 < many < few / 2
