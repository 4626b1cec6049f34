"""Fitting: planted subspaces come back, the results are the optima they claim to be, and no process is left hanging.

e is the machine epsilon of float64. A sum of n products |a_i| |b_i| is off by at most n e sum |a_i b_i|, so a matrix of
such sums by at most n e |a| |b| in the Frobenius norm; eigenvalues, singular values and the like of a D x D matrix M
cost some D e |M| on top. `rounding` is 4 (n + D) e |a| |b|.
"""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tokens import cut, normal
from torch.utils._python_dispatch import TorchDispatchMode

from asymflow import InputError, Subspace, fitting
from asymflow.fitting import canonical_signs, fit_pca, fit_procrustes

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


def rounding(a, b):
    """See above; a (n, p), b (n, q)."""
    return 4 * (len(a) + a.shape[1] + b.shape[1]) * EPS * float(a.norm() * b.norm())


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def projection(basis):
    return basis @ basis.mT


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
    monkeypatch.setattr(fitting, "energy_threshold", lambda *_: 0.5)  # has its own, of 100,000
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
