"""Fitting: planted subspaces come back, the results are the optima they claim to be, and no process is left hanging.

e is the machine epsilon of float64. A sum of n products |a_i| |b_i| is off by at most n e sum |a_i b_i|, so a matrix of
such sums by at most n e |a| |b| in the Frobenius norm; eigenvalues, singular values and the like of a D x D matrix M
cost some D e |M| on top. `rounding` is 4 (n + D) e |a| |b|.
"""

import datetime
import math
import time

import numpy as np
import pytest
import scipy
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from asymflow import InputError, Subspace, fitting
from asymflow.fitting import auto_rank, canonical_signs, energy_threshold, fit_pca, fit_procrustes

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def rounding(a, b):
    """See above; a (n, p), b (n, q)."""
    return 4 * (len(a) + a.shape[1] + b.shape[1]) * EPS * float(a.norm() * b.norm())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def projection(basis):
    return basis @ basis.mT


def cut(x, sizes):
    """x (n, D) in batches of these sizes, over and over."""
    start, batches = 0, []
    while start < len(x):
        batches.append(x[start : start + sizes[len(batches) % len(sizes)]])
        start += len(batches[-1])
    return batches


@st.composite
def planted_tokens(draw):
    """(basis (D, r), tokens (n, D) in its span, the r energies of the tokens along it)."""
    dim = draw(st.integers(1, 12))
    rank = draw(st.integers(1, dim))
    count, seed = draw(st.integers(rank, 60)), draw(SEEDS)
    energies = torch.linspace(2, 1, rank, dtype=torch.float64) * draw(st.floats(1e-3, 1e3))
    basis = orthonormal(dim, rank, seed)
    return basis, math.sqrt(count) * orthonormal(count, rank, seed + 1) * energies.sqrt() @ basis.mT, energies


@st.composite
def planted_pairs(draw):
    """(basis (D, r), scale, z (n, r)) with n >= 4 r, so that z is far from singular."""
    dim = draw(st.integers(1, 12))
    rank = draw(st.integers(1, dim))
    count, seed = draw(st.integers(4 * rank, 80)), draw(SEEDS)
    return orthonormal(dim, rank, seed), draw(st.floats(0.05, 20)), normal(count, rank, seed=seed + 1)


# ---- PCA -------------------------------------------------------------------------------------------------------------


@given(planted_tokens())
def test_pca_finds_a_planted_subspace_and_its_energies(planted):
    """By Davis and Kahan |P - P0| <= 2 sqrt(2) |G - G0| / gap, here rounding over the smallest planted energy."""
    basis, x, energies = planted
    fit = fit_pca([x], basis.shape[1])
    error = rounding(x, x) / len(x)
    assert (projection(fit.basis) - projection(basis)).norm() <= 4 * error / energies[-1]
    assert (fit.spectrum[: fit.rank] - energies).abs().max() <= error
    assert fit.spectrum[fit.rank :].abs().sum() <= error * fit.dim
    assert fit.scale == 1


@given(planted_tokens(), st.floats(1e-6, 0.3), SEEDS)
def test_noise_turns_a_planted_subspace_by_no_more_than_it_must(planted, size, seed):
    """By Davis and Kahan again (in the form of Yu, Wang and Samworth, which needs no gap of the noisy matrix)."""
    basis, clean, energies = planted
    x = clean + size * energies[-1].sqrt() * normal(*clean.shape, seed=seed)
    fit = fit_pca([x], basis.shape[1])
    moved = ((x.mT @ x - clean.mT @ clean) / len(x)).norm() + rounding(x, x) / len(x)
    assert (projection(fit.basis) - projection(basis)).norm() <= math.sqrt(2) * 2 * moved / energies[-1]


@given(st.integers(1, 10), st.integers(1, 40), SEEDS, st.data())
def test_pca_is_that_of_numpy_and_holds_the_most_energy(dim, count, seed, data):
    """Ky Fan: no r orthonormal directions hold more than the r largest eigenvalues. Also where tokens are few."""
    rank = data.draw(st.integers(0, dim))
    x = normal(count, dim, seed=seed) @ normal(dim, dim, seed=seed + 1)
    fit, error = fit_pca([x], rank), rounding(x, x) / count
    singular = np.linalg.svd(x.numpy(), compute_uv=False) ** 2 / count
    expected = np.concatenate([singular, np.zeros(dim - len(singular))])
    assert np.abs(fit.spectrum.numpy() - expected).max() <= error
    assert np.abs(fit.spectrum.numpy() - np.linalg.eigvalsh((x.mT @ x / count).numpy())[::-1]).max() <= error
    assert abs((x @ fit.basis).square().sum() / count - expected[:rank].sum()) <= dim * error
    assert (fit.basis.mT @ fit.basis - torch.eye(rank)).abs().max() <= 100 * dim * EPS if rank else fit.rank == 0
    assert (fit.spectrum >= 0).all()
    assert (fit.spectrum.diff() <= 0).all()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_full_rank_is_a_whole_basis_even_when_there_are_fewer_tokens_than_dimensions(count):
    x = normal(count, 16).float()
    fit = fit_pca([x], 16)
    assert fit.basis.shape == (16, 16)
    assert (fit.basis.mT @ fit.basis - torch.eye(16)).abs().max() <= 100 * 16 * EPS
    for rank in range(17):  # ranks are nested
        assert torch.equal(fit_pca([x], rank).basis, fit.basis[:, :rank])


def test_the_mean_is_a_direction_as_any_other():
    """Uncentred: tokens that are nearly constant have one strong direction, the constant."""
    fit = fit_pca([1 + 0.01 * normal(500, 9)], 1)
    assert (fit.basis[:, 0] - 1 / 3).abs().max() < 0.01


@given(st.integers(2, 8), st.integers(2, 40), st.lists(st.integers(1, 9), min_size=1, max_size=4), SEEDS)
def test_order_and_batches_do_not_matter(dim, count, sizes, seed):
    x, z = normal(count, dim, seed=seed), normal(count, 1, seed=seed + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    one, other = fit_pca([x], dim), fit_pca(cut(x[order], sizes), dim)
    error = rounding(x, x) / count
    assert (one.spectrum - other.spectrum).abs().max() <= error
    turned = other.basis * other.spectrum @ other.basis.mT - one.basis * one.spectrum @ one.basis.mT
    assert turned.norm() <= dim * error
    pairs = zip(cut(z[order], sizes), cut(x[order], sizes), strict=True)
    one, other = fit_procrustes([(z, x)]), fit_procrustes(pairs)
    assert (one.basis - other.basis).norm() <= 3 * rounding(z, x) / (z.mT @ x).norm()
    assert abs(one.scale / other.scale - 1) <= 3 * (
        rounding(z, x) / (z.mT @ x).norm() * x.norm() / (x @ one.basis).norm()
    )


@given(SEEDS)
def test_signs_are_canonical(seed):
    x = normal(50, 7, seed=seed)
    basis = fit_pca([x], 7).basis
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(fit_pca([-x], 7).basis, basis)
    assert torch.equal(canonical_signs(basis * normal(7, seed=seed).sign()), basis)
    assert canonical_signs(basis[:, :0]).shape == (7, 0)


@pytest.mark.parametrize("dust", [0, 1e-9, -1e-9])
def test_of_entries_of_one_size_the_first_decides_whatever_rounding_does(dust):
    column = torch.tensor([[0.48], [-0.5], [0.5 + dust], [0.5]], dtype=torch.float64)
    for either in (column, -column):
        assert torch.equal(canonical_signs(either), -column)


# ---- Precision, memory, and what is read -----------------------------------------------------------------------------


def test_sums_are_float64():
    """A direction 1e-5 as large as another, so 1e-10 in energy: lost in float32, kept to 1e-5 in float64.

    The largest energy is 1e10, the smallest 1; the rounding in float64 is 20 * 2^-53 * 1e10 < 1e-4 at most.
    """
    frame = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    x = torch.stack([torch.tensor([1e5, 1.0]) * torch.tensor([a, b]) for a in (-1.0, 1) for b in (-1.0, 1)]) @ frame
    x = x.repeat(64, 1)
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)[1] ** 2 / len(x)
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing in float64
        fit = fit_pca(cut(x, [10]), 2)
    assert fit.basis.dtype == fit.spectrum.dtype == torch.float64
    assert abs(fit.spectrum[1].item() - exact) < 1e-4
    assert abs(torch.linalg.eigvalsh((x.mT @ x / len(x)).double())[0].item() - exact) > 1
    z = x @ frame.mT[:, 1:]  # the faint direction
    lifted = fit_procrustes([(z, x)])
    assert abs(lifted.basis.mT.double() @ lifted.basis - 1) < 1e-12
    c = z.double().mT @ x.double()
    assert (lifted.basis - (c / c.norm()).mT).norm() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_read_exactly(dtype):
    x, z = normal(5, 20, 6).to(dtype), normal(5, 20, 2, seed=1).to(dtype)
    for one, other in [
        (fit_pca(x, 3), fit_pca(x.double(), 3)),
        (fit_procrustes([(z, x)]), fit_procrustes([[z.double(), x]])),
    ]:
        assert torch.equal(one.basis, other.basis)
        assert torch.equal(one.spectrum, other.spectrum)
        assert one.scale == other.scale


class LargestFloat64(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype == torch.float64:
                self.size = max(self.size, t.untyped_storage().nbytes() // 8)
        return out


def test_nothing_in_float64_is_larger_than_a_chunk_or_d_times_d(monkeypatch):
    x, z = normal(4000, 16).float(), normal(4000, 3, seed=1).float()
    whole = fit_pca([x], 5), fit_procrustes([(z, x)])
    monkeypatch.setattr(fitting, "CHUNK", 100)
    monkeypatch.setattr(fitting, "energy_threshold", lambda _: 0.5)  # has its own, of 100,000
    with LargestFloat64() as largest:
        small = fit_pca([x], 5), fit_procrustes([(z, x)])
    assert largest.size == 16 * 16
    for one, other in zip(whole, small, strict=True):
        assert (projection(one.basis) - projection(other.basis)).norm() < 1e-10
        assert (one.spectrum - other.spectrum).abs().max() < 1e-10


def test_any_leading_axes_layout_and_empty_batches():
    x = normal(4, 6, 5)
    fit = fit_pca([x], 5)
    rows = x.reshape(-1, 5)
    for batches in ([*rows], [x.permute(1, 0, 2)], [x[:0], rows, x[:, :0]], x, [x.requires_grad_()]):
        other = fit_pca(batches, 5)
        assert (other.spectrum - fit.spectrum).abs().max() < 1e-12
        assert not other.spectrum.requires_grad


def test_data_is_read_once_and_no_longer_than_it_is_good():
    read = []

    def batches(bad):
        for i in range(5):
            read.append(i)
            yield normal(10, 3, seed=i) * (math.nan if i == bad else 1)

    expected = fit_pca(list(batches(None)), 2)
    read.clear()
    assert torch.equal(fit_pca(batches(None), 2).basis, expected.basis)
    assert read == [0, 1, 2, 3, 4]
    read.clear()
    with pytest.raises(InputError, match="batch 2"):
        fit_pca(batches(2), 2)
    assert read == [0, 1, 2]
    read.clear()
    for rank, record in [(4, {}), (2, {"token_order": "diagonal"}), (2, {"patch_size": 2})]:
        with pytest.raises(InputError):  # at the first batch, not after an hour
            fit_pca(batches(None), rank, **record)
    with pytest.raises(InputError, match="patch"):
        fit_procrustes(((x[:, :1], x) for x in batches(None)), patch_size=2)
    assert read == [0, 0, 0, 0]


def test_the_record_and_every_bit_survive_saving(tmp_path):
    record = dict(patch_size=2, token_order="channel_first", color_space="oklab", fitted_on="40 images")
    x = normal(40, 12)
    for fit in (fit_pca([x], 5, **record), fit_procrustes([(x[:, :5] + x[:, 5:10], x)], **record)):
        assert isinstance(fit, Subspace)
        assert fit.spectrum.shape == (12,)
        fit.save(tmp_path / "fit.safetensors")
        loaded = Subspace.load(tmp_path / "fit.safetensors")
        for name, value in record.items():
            assert getattr(fit, name) == getattr(loaded, name) == value
        assert fit.scale == loaded.scale
        for name in ("basis", "spectrum"):
            assert torch.equal(getattr(fit, name), getattr(loaded, name))


# ---- Procrustes ------------------------------------------------------------------------------------------------------


@given(planted_pairs())
def test_procrustes_finds_a_planted_basis_and_scale(planted):
    """The polar factor of C moves by at most 3 |C - C0| / (smallest singular value of C) (R.-C. Li, 1995)."""
    basis, scale, z = planted
    x = scale * z @ basis.mT
    fit = fit_procrustes([(z, x)])
    moved = 3 * rounding(z, x) / torch.linalg.svdvals(z.mT @ x)[-1]
    assert (fit.basis - basis).norm() <= moved
    assert abs(fit.scale / scale - 1) <= moved + 1e-13
    assert (fit.spectrum[: fit.rank] - torch.linalg.eigvalsh(x.mT @ x / len(x)).flip(0)[: fit.rank]).abs().max() <= (
        rounding(x, x) / len(x)
    )


@given(planted_pairs(), st.floats(1e-6, 1), SEEDS)
def test_procrustes_with_noise(planted, size, seed):
    """The basis moves by the bound above, and the scale takes in the noise that falls into the subspace."""
    basis, scale, z = planted
    x0 = scale * z @ basis.mT
    x = x0 + scale * size * normal(*x0.shape, seed=seed)
    c0 = z.mT @ x0
    moved = 3 * ((z.mT @ x - c0).norm() + rounding(z, x)) / torch.linalg.svdvals(c0)[-1]
    fit = fit_procrustes([(z, x)])
    assert (fit.basis - basis).norm() <= moved
    off = (x @ fit.basis - scale * z).norm() / (scale * z).norm()  # by the triangle inequality on norms
    assert abs(fit.scale / scale - 1) <= off + 1e-13
    assert (fit.basis.mT @ fit.basis - torch.eye(fit.rank)).abs().max() <= 100 * fit.dim * EPS


@given(planted_pairs(), st.floats(0.05, 1), SEEDS)
def test_procrustes_is_that_of_scipy_and_cannot_be_improved(planted, size, seed):
    """scipy finds the square Q of least |z Q - x|; with zeros appended to z, the first rows of Q are A^T.

    Its sum of singular values over |z|^2 is the scale of least squares: ours is not smaller (Cauchy and Schwarz).
    """
    basis, scale, z = planted
    (dim, rank), x = basis.shape, scale * (z @ basis.mT + size * normal(len(z), len(basis), seed=seed))
    fit = fit_procrustes([(z, x)])
    padded = torch.nn.functional.pad(z, (0, dim - rank))
    q, total = scipy.linalg.orthogonal_procrustes(padded.numpy(), x.numpy())
    error = 3 * rounding(padded, x) / torch.linalg.svdvals(z.mT @ x)[-1]
    assert (fit.basis - torch.from_numpy(q[:rank]).mT).norm() <= 2 * error
    assert fit.scale >= total / z.square().sum() * (1 - 1e-13)
    if rank == dim:
        assert fit.scale == pytest.approx((x.norm() / z.norm()).item(), rel=1e-13)
    loss = lambda a, s: (s * z @ a.mT - x).square().sum()
    for s in (0.1 * fit.scale, fit.scale, 3):
        for step in (1e-3, 0.1, 10):
            other = torch.linalg.qr(fit.basis + step * normal(dim, rank, seed=seed + 2))
            other = other.Q * other.R.diagonal().sign()
            assert loss(other, s) >= loss(fit.basis, s) * (1 - 1e-12)


@given(planted_pairs(), st.floats(0.05, 1), SEEDS)
def test_lifted_latents_have_the_energy_of_the_pixels_and_the_spectrum_says_how_much(planted, size, seed):
    basis, scale, z = planted
    x = scale * (z @ basis.mT + size * normal(len(z), len(basis), seed=seed))
    fit = fit_procrustes([(z, x)])
    held, error = (x @ fit.basis).square().sum() / len(x), fit.dim * rounding(x, x) / len(x)
    assert abs((fit.scale * z @ fit.basis.mT).square().sum() / len(z) - held) <= error
    assert abs(fit.spectrum[: fit.rank].sum() - held) <= error
    assert abs(fit.spectrum.sum() - x.square().sum() / len(x)) <= error
    assert (fit_procrustes([(z, scale * z @ basis.mT)]).spectrum >= 0).all()  # outside, rounding of either sign
    best = fit_pca([x], fit.rank).spectrum
    assert (fit.spectrum.cumsum(0) <= best.cumsum(0) + error)[[fit.rank - 1, -1]].all()
    # Along the principal directions inside, by itself; and outside, where the projected tokens have r zeros besides.
    inside, outside = x @ fit.basis, x - x @ projection(fit.basis)
    for tokens, part in [(inside, fit.spectrum[: fit.rank]), (outside, fit.spectrum[fit.rank :])]:
        energies = torch.linalg.eigvalsh(tokens.mT @ tokens / len(x)).flip(0)
        assert (part - energies[: len(part)]).abs().sum() <= error


@given(planted_pairs(), SEEDS)
def test_the_basis_turns_with_the_latents_and_with_the_pixels(planted, seed):
    basis, scale, z = planted
    x = scale * (z @ basis.mT + 0.1 * normal(len(z), len(basis), seed=seed))
    r, q = orthonormal(z.shape[1], z.shape[1], seed + 1), orthonormal(len(basis), len(basis), seed + 2)
    fit, turned = fit_procrustes([(z, x)]), fit_procrustes([(2 * z @ r, x @ q)])
    error = 12 * rounding(z, x) / torch.linalg.svdvals(z.mT @ x)[-1]
    assert (turned.basis - q.mT @ fit.basis @ r).norm() <= error
    assert abs(2 * turned.scale / fit.scale - 1) <= error * x.norm() / (x @ fit.basis).norm()


def test_latents_that_are_principal_components_give_the_subspace_of_pca():
    x = normal(200, 8) @ normal(8, 8, seed=1)
    pca = fit_pca([x], 3)
    fit = fit_procrustes([(x @ pca.basis / 4, x)])
    assert (fit.basis - pca.basis).abs().max() < 1e-12
    assert abs(fit.scale - 4) < 1e-12
    assert (fit.spectrum - pca.spectrum).abs().max() < 1e-11


@pytest.mark.parametrize("fault", ["a channel of zeros", "a repeated channel", "two tokens"])
@pytest.mark.parametrize("size", [1e-150, 1, 1e150])
def test_latents_that_the_pixels_cannot_place_are_refused(fault, size):
    z, x = size * normal(100, 3), size * normal(100, 7, seed=1)
    if fault == "a channel of zeros":
        z[:, 1] = 0
    elif fault == "a repeated channel":
        z[:, 1] = z[:, 0] * 3
    else:
        z, x = z[:2], x[:2]
    with pytest.raises(InputError, match="only 2 of 3 latent directions"):
        fit_procrustes([(z, x)])
    assert fit_procrustes([(size * normal(100, 3), size * normal(100, 7, seed=1))]).rank == 3


# ---- The rank that it chooses ----------------------------------------------------------------------------------------


def modelled_errors(spectrum, noise_scale, sigma, probability):
    """Error of the velocity for every rank 0, ..., D, as the docstring of `auto_rank` models it, in numpy."""
    weight = (sigma / np.maximum(sigma, 0.05)) ** 2
    inside = lambda energy: (probability * weight * (noise_scale**2 + energy)).sum()
    outside = lambda energy: (probability * weight * energy / sigma**2).sum()
    return [sum(map(inside, spectrum[:r])) + sum(map(outside, spectrum[r:])) for r in range(len(spectrum) + 1)]


def training_sigma():
    """Noise levels sigmoid(0.8 + 0.8 n) and their probabilities, by the trapezoidal rule in n."""
    n = np.linspace(-8, 8, 2001)
    probability = np.exp(-(n**2) / 2)
    return 1 / (1 + np.exp(-0.8 - 0.8 * n)), probability / probability.sum()


@given(st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=20), st.floats(0.2, 4))
def test_no_rank_has_a_smaller_modelled_error(energies, noise_scale):
    spectrum = sorted(energies, reverse=True)
    errors = modelled_errors(spectrum, noise_scale, *training_sigma())
    rank = auto_rank(torch.tensor(spectrum, dtype=torch.float64), noise_scale)
    assert auto_rank(spectrum) == auto_rank(spectrum, 1.0)
    # Both rules for the means have errors of 2e-4 at most, as large as what a direction can lose that they misplace.
    assert errors[rank] <= min(errors) * (1 + 4e-4)


def test_the_threshold_is_the_integral_that_it_claims():
    def mean(f):
        density = lambda n: math.exp(-n * n / 2) / math.sqrt(2 * math.pi) * f(1 / (1 + math.exp(-0.8 - 0.8 * n)))
        return scipy.integrate.quad(density, -9, 9, points=[(math.log(0.05 / 0.95) - 0.8) / 0.8], epsabs=1e-10)[0]

    inside, outside = mean(lambda s: min(s / 0.05, 1) ** 2), mean(lambda s: 1 / max(s, 0.05) ** 2)
    assert energy_threshold() == pytest.approx(inside / (outside - inside), rel=2e-4)
    assert energy_threshold() == pytest.approx(0.51, abs=0.005)
    # Uniform: E[w] = 0.95 + 0.05 / 3 and E[w / sigma^2] = 0.05 * 400 + (1 / 0.05 - 1), both by hand.
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert energy_threshold(sigma=uniform) == pytest.approx((0.95 + 0.05 / 3) / (39 - 0.95 - 0.05 / 3), rel=1e-4)
    assert energy_threshold(2.0) == pytest.approx(4 * energy_threshold())
    assert energy_threshold(sigma=torch.tensor([0.0, 1.0])) == pytest.approx(0.5 / 200)
    assert auto_rank(torch.tensor([1e9]), sigma=torch.ones(3)) == 0  # at pure noise, the data is never divided


def test_the_threshold_is_also_that_of_the_best_possible_output():
    """Gaussian data of variance v, on one axis: the powers of E[u | x], E[x0 | x] / sigma differ as do those of u, x0.

    With s = (1 - sigma)^2 v + n^2 sigma^2 they are (n^2 sigma - (1 - sigma) v)^2 / s, ((1 - sigma) v / sigma)^2 / s.
    """
    sigma, v, n = (torch.rand(1000, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    sigma, v, n = 0.05 + 0.95 * sigma, 4 * v, 0.1 + 2 * n
    s = (1 - sigma) ** 2 * v + n**2 * sigma**2
    best = ((1 - sigma) * v / sigma) ** 2 / s - (n**2 * sigma - (1 - sigma) * v) ** 2 / s
    assert torch.allclose(best, v / sigma**2 - (n**2 + v), rtol=1e-9, atol=1e-9)


def test_the_rank_for_the_gaussian_toy_is_that_of_its_strong_directions():
    """toy/closed_form.py trains with uniform noise levels; ranks 4 and 5 are the best there (README)."""
    from toy.closed_form import Gaussian  # here, because the processes below import this file and need no matplotlib

    data = Gaussian(0, "cpu")
    fit = fit_pca([data.sample(10_000, torch.Generator().manual_seed(0))], 32)
    uniform = (torch.arange(1000) + 0.5) / 1000
    assert auto_rank(fit.spectrum, sigma=uniform) == auto_rank(data.variance, sigma=uniform) == 4


def test_auto_is_auto_rank():
    x = normal(300, 10) * torch.logspace(1, -1, 10)
    for noise_scale in (0.01, 1, 2, 100):
        fit = fit_pca([x], "auto", noise_scale=noise_scale)
        assert fit.rank == auto_rank(fit.spectrum, noise_scale)
        assert torch.equal(fit.basis, fit_pca([x], fit.rank).basis)
    ranks = [fit_pca([x], "auto", noise_scale=noise_scale).rank for noise_scale in (0.01, 1, 2, 100)]
    assert ranks[0] == 10 > ranks[1] > ranks[2] > ranks[3] == 0


# ---- Mistakes --------------------------------------------------------------------------------------------------------

X, Z = normal(6, 20, 4), normal(6, 20, 2, seed=1)
MISTAKES = {
    "no batches": (lambda: fit_pca([], 1), "no tokens"),
    "empty batches": (lambda: fit_pca([X[:0], X[:, :0]], 1), "no tokens"),
    "rank too large": (lambda: fit_pca(X, 5), "at most the dimension of the tokens, 4, but it is 5"),
    "rank negative": (lambda: fit_pca(X, -1), "0 or more.*-1"),
    "rank misspelled": (lambda: fit_pca(X, "atuo"), "'atuo'"),
    "rank a fraction": (lambda: fit_pca(X, 2.5), "2.5"),
    "noise_scale 0": (lambda: fit_pca(X, "auto", noise_scale=0), "noise_scale"),
    "noise_scale NaN": (lambda: auto_rank(X[0, 0], math.nan), "noise_scale"),
    "noise_scale infinite": (lambda: auto_rank(X[0, 0], math.inf), "noise_scale"),
    "sigma above 1": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([0.5, 1.5])), "sigma"),
    "sigma negative": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([0.5, -0.5])), "sigma"),
    "sigma NaN": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([math.nan])), "sigma"),
    "no sigma": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([])), "sigma"),
    "NaN": (lambda: fit_pca([X, X.where(X.max() > X, math.nan)], 1), "batch 1.*NaN"),
    "infinity": (lambda: fit_pca([X, X, X.where(X.max() > X, -math.inf)], 1), "batch 2.*infinity"),
    "squares too large": (lambda: fit_pca([1e160 * X], 1), "batch 0.*squares"),
    "other dimension": (lambda: fit_pca([X, X[..., :3]], 1), "batch 1.*3.*4"),
    "not a tensor": (lambda: fit_pca([[X]], 1), "batch 0.*list"),
    "a pair": (lambda: fit_pca([X, (Z, X)], 1), "batch 1.*tuple"),
    "integers": (lambda: fit_pca([X.byte()], 1), "torch.uint8"),
    "a number": (lambda: fit_pca([X[0, 0, 0]], 1), "shape"),
    "dimension 0": (lambda: fit_pca([X[..., :0]], 0), "shape"),
    "zeros": (lambda: fit_pca([0 * X], 1), "all tokens are 0"),
    "no pairs": (lambda: fit_procrustes([]), "no tokens"),
    "empty pairs": (lambda: fit_procrustes([(Z[:0], X[:0])]), "no tokens"),
    "no pair": (lambda: fit_procrustes([X]), "batch 0.*pair.*Tensor"),
    "three": (lambda: fit_procrustes([(Z, X, X)]), "pair"),
    "other squares": (lambda: fit_procrustes([(Z, X), (Z[:, :19], X)]), r"batch 1.*\(6, 19, 2\).*\(6, 20, 4\)"),
    "as many squares": (lambda: fit_procrustes([(Z.mT.reshape(20, 6, 2), X)]), "same squares"),
    "swapped": (lambda: fit_procrustes([(X, Z)]), "latent tokens have 4 dimensions and pixel tokens only 2"),
    "no latent dimension": (lambda: fit_procrustes([(Z[..., :0], X)]), "latent tokens must"),
    "other latents": (lambda: fit_procrustes([(Z, X), (Z[..., :1], X)]), "batch 1"),
    "NaN in latents": (lambda: fit_procrustes([(Z, X), (Z * math.nan, X)]), "batch 1.*NaN"),
    "NaN in pixels": (lambda: fit_procrustes([(Z, X), (Z, X * math.nan)]), "batch 1.*NaN"),
    "zero latents": (lambda: fit_procrustes([(Z * 0, X)]), "are 0"),
    "zero pixels": (lambda: fit_procrustes([(Z, X * 0)]), "are 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_in_one_line(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


# ---- Many processes --------------------------------------------------------------------------------------------------


def lazily(batches):
    """As a data loader may do it: in inference mode, which lasts while the generator is suspended."""
    with torch.inference_mode():
        yield from [b.clone() for b in batches]


def broken(batches):
    yield batches[0]
    raise OSError("the disk is gone")


def scenarios(process, alone):
    """What two processes try, from the data of each: (name, call)."""
    x, z = normal(90, 6).float(), normal(90, 2, seed=1).float()
    share, mine = [x[:30], x[30:]][process], slice(0, 30) if process == 0 else slice(30, None)
    bad = share * math.nan
    return {
        "pca": lambda: fit_pca(cut(share, [7]), 3, patch_size=1),
        "auto": lambda: fit_pca([share], "auto"),
        "lazy": lambda: fit_pca(lazily([share]), 3),
        "procrustes": lambda: fit_procrustes(zip(cut(z[mine], [7]), cut(share, [7]), strict=True)),
        "0 has no data": lambda: fit_pca([x] if process == 1 else [], 3),
        "1 has no data": lambda: fit_procrustes([(z, x)] if process == 0 else []),
        "0 has NaN": lambda: fit_pca([share, bad if process == 0 else share], 3),
        "1 has NaN": lambda: fit_procrustes([(z[mine], bad if process == 1 else share)]),
        "1 has no data, 0 NaN": lambda: fit_pca([bad] if process == 0 else [], 3),
        "none has data": lambda: fit_pca([], 3),
        "all is empty": lambda: fit_pca([share[:0]], 3),
        "other dimension": lambda: fit_pca([share[:, : 5 + process]], 3),
        "1 is broken": lambda: fit_pca(broken([share]) if process == 1 else [share], 3),
        "no correlation": lambda: fit_procrustes([(0 * z[mine] + 1, share)]),
        "rank too large": lambda: fit_pca([x] if process == 0 else [], 7),
        "1 alone": lambda: fit_pca([share], 3, group=alone) if process == 1 else None,
    }


def numbers_of(fit):
    return fit.basis, torch.tensor(fit.scale, dtype=torch.float64), fit.spectrum


def run_scenarios(process, folder):
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout, world_size=2, rank=process)
    results = {}
    for name, call in scenarios(process, dist.new_group([1])).items():
        try:
            fit = call()
            results[name] = fit and numbers_of(fit)
        except Exception as e:
            results[name] = f"{type(e).__name__}: {e}"
    torch.save(results, f"{folder}/{process}.pt")
    time.sleep(0.1)  # torch 2.6 hangs if gloo's threads have not let go of the last tensors: they need the GIL
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes got in each scenario: a list of two dicts."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("fork")  # nothing here goes backwards: autograd does not survive it
    processes = [context.Process(target=run_scenarios, args=(i, str(folder)), daemon=True) for i in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout=300)
    hanging = [p.is_alive() for p in processes]
    for p in processes:
        p.kill()
    assert not any(hanging)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.parametrize("name", ["pca", "auto", "lazy", "procrustes", "0 has no data", "1 has no data"])
def test_two_processes_have_one_result_and_it_is_that_of_one_process(together, name):
    """Bit for bit the same in both; off by rounding from the fit of all data in one process (gaps are about 0.1)."""
    x, z = normal(90, 6).float(), normal(90, 2, seed=1).float()
    assert not isinstance(together[0][name], str), together[0][name]
    for one, other in zip(*(results[name] for results in together), strict=True):
        assert torch.equal(one, other)
    fit = fit_procrustes([(z, x)]) if name in ("procrustes", "1 has no data") else fit_pca([x], 3)
    rank = auto_rank(fit.spectrum) if name == "auto" else fit.rank
    if name == "auto":
        fit = fit_pca([x], rank)
    for one, other in zip(numbers_of(fit), together[0][name], strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0 has NaN", "InputError: process 0: batch 1: it has NaN"),
        ("1 has NaN", "InputError: process 1: batch 0: it has NaN"),
        ("1 has no data, 0 NaN", "InputError: process 0: batch 0: it has NaN"),
        ("none has data", "InputError: there are no tokens"),
        ("all is empty", "InputError: there are no tokens"),
        ("other dimension", "InputError: the tokens must have one dimension in all processes"),
        ("1 is broken", "RuntimeError: process 1: OSError('the disk is gone')"),
        ("no correlation", "InputError: only 1 of 2 latent directions"),
        ("rank too large", "InputError: process 0: rank must be at most"),
    ],
)
def test_two_processes_raise_what_fails_in_one(together, name, message):
    for results in together:
        assert results[name].startswith(message)


def test_two_processes_may_fit_each_alone(together):
    alone = fit_pca([normal(90, 6).float()[30:]], 3)
    assert together[0]["1 alone"] is None
    for one, other in zip(numbers_of(alone), together[1]["1 alone"], strict=True):
        assert torch.equal(one, other)
