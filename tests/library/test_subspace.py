"""asymflow/subspace.py: what a subspace is, and what is none."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_subspaces import DOUBLE, EYE, ONE_LINE, SEEDS, same, subspaces

from asymflow import InputError, Subspace
from asymflow.subspace import TOLERANCE


# ---- The projection --------------------------------------------------------------------------------------------------
@given(subspaces(torch.float64), SEEDS)
def test_projecting_twice_is_projecting_once_and_leaves_a_right_angle(subspace, seed):
    """24 dimensions: sums of 24 terms of a few units, so 1e-13 is a hundred roundings of the largest."""
    v = torch.randn(5, subspace.dim, generator=torch.Generator().manual_seed(seed), **DOUBLE)
    inside = subspace.project(v)
    torch.testing.assert_close(subspace.project(inside), inside, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        (v - inside) @ subspace.basis, torch.zeros(5, subspace.rank, **DOUBLE), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(inside @ subspace.basis, v @ subspace.basis, rtol=0, atol=1e-13)


def test_all_of_space_projects_to_itself_and_nothing_to_nothing():
    v = torch.randn(3, 6)
    assert torch.equal(Subspace.full(6).project(v), v)
    assert torch.equal(Subspace.empty(6).project(v), torch.zeros(3, 6))
    assert (Subspace.full(6).rank, Subspace.empty(6).rank, Subspace.empty(6).dim) == (6, 0, 6)
    assert Subspace.full(6).scale == Subspace.empty(6).scale == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_basis_is_kept_in_float32_at_least(dtype):
    basis = Subspace(torch.eye(6, 2, dtype=dtype)).basis
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_tokens_are_of_whole_patches():
    assert Subspace(torch.eye(12, 2), patch_size=2).patch_size == 2
    with pytest.raises(InputError, match="tokens of dimension 12 cannot be for patches of 3 x 3"):
        Subspace(torch.eye(12, 2), patch_size=3)


@pytest.mark.parametrize("rank", [0, 3, pytest.param(6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projection_is_in_float32_or_better(rank, dtype):
    v, subspace = torch.randn(3, 6).to(dtype), Subspace.random(6, rank)
    assert subspace.project(v).dtype == torch.float32
    assert torch.equal(subspace.project(v), subspace.project(v.float()))
    assert subspace.project(v.double()).dtype == torch.float64


def test_a_projection_is_in_float32_under_autocast_too():
    v, subspace = torch.randn(3, 6), Subspace.random(6, 3)
    expected = subspace.project(v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(subspace.project(v), expected)


# ---- Random subspaces ------------------------------------------------------------------------------------------------
@given(st.integers(1, 40), st.data(), st.integers(0, 2**63 - 1))
def test_a_seed_makes_one_orthonormal_basis(dim, data, seed):
    """Of doubles rounded to floats: each entry is off by 2^-25 at most, so A^T A by 2 sqrt(dim) 2^-24 at most."""
    rank = data.draw(st.integers(0, dim))
    subspace = Subspace.random(dim, rank, seed, scale=0.5, fitted_on="nothing")
    assert (subspace.dim, subspace.rank, subspace.scale, subspace.fitted_on) == (dim, rank, 0.5, "nothing")
    assert subspace.basis.dtype == torch.float32
    exact = subspace.basis.double()
    skew = exact.mT @ exact - torch.eye(rank, **DOUBLE)
    assert (skew.abs() <= 2 * dim**0.5 * 2**-24).all()
    assert same(subspace, Subspace.random(dim, rank, seed, scale=0.5, fitted_on="nothing"))
    assert same(Subspace.random(dim, rank), Subspace.random(dim, rank, seed=0, scale=1.0))
    torch.manual_seed(seed % 1000)
    before = torch.get_rng_state()
    Subspace.random(dim, rank, seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_subspaces_are_uniform():
    """E P = r / D, and P_11 is Beta(r / 2, (D - r) / 2) of variance 2 r (D - r) / (D^2 (D + 2)); to 5 standard errors.

    The off-diagonal entries of P are symmetric around 0 and no larger in the mean square than r / D^2.
    """
    dim, rank, n = 6, 2, 2000
    bases = torch.stack([Subspace.random(dim, rank, seed).basis for seed in range(n)])
    p = bases @ bases.mT
    variance = 2 * rank * (dim - rank) / (dim**2 * (dim + 2))
    diagonal = p.diagonal(dim1=1, dim2=2)
    assert (diagonal.mean(0) - rank / dim).abs().max() < 5 * (variance / n) ** 0.5
    assert (diagonal.var(0) / variance - 1).abs().max() < 0.2  # a Beta of kurtosis near 3: 5 sqrt(2 / n) is 0.16
    off = p.mean(0) - torch.diag(p.mean(0).diagonal())
    assert off.abs().max() < 5 * (rank / dim**2 / n) ** 0.5


# ---- What is no subspace ---------------------------------------------------------------------------------------------
MISTAKES = {
    "a vector": (lambda: Subspace(torch.ones(4) / 2), "(4,)"),
    "a stack": (lambda: Subspace(EYE.expand(2, 4, 4)), "(2, 4, 4)"),
    "more columns than rows": (lambda: Subspace(torch.eye(4, 6)), "(4, 6)"),
    "no rows": (lambda: Subspace(torch.empty(0, 0)), "(0, 0)"),
    "not a number": (lambda: Subspace(torch.full((4, 1), torch.nan)), "not finite"),
    "infinity": (lambda: Subspace(torch.full((4, 1), torch.inf)), "not finite"),
    "integers": (lambda: Subspace(torch.eye(4, dtype=torch.int64)), "int64"),
    "booleans": (lambda: Subspace(torch.eye(4, dtype=torch.bool)), "bool"),
    "complex numbers": (lambda: Subspace(torch.eye(4, dtype=torch.complex64)), "complex64"),
    "too long": (lambda: Subspace(1.01 * EYE), "0.02"),
    "not orthogonal": (lambda: Subspace(torch.tensor([[1, 0.6], [0, 0.8], [0, 0], [0, 0]])), "0.6"),
    "a column twice": (lambda: Subspace(EYE[:, [0, 0]]), "torch.linalg.qr"),
    "a transposed basis": (lambda: Subspace(EYE[:2]), "(2, 4)"),
    "a scale of 0": (lambda: Subspace(EYE, 0.0), "0.0"),
    "a negative scale": (lambda: Subspace(EYE, -1.0), "-1.0"),
    "a scale that is no number": (lambda: Subspace(EYE, float("nan")), "nan"),
    "an infinite scale": (lambda: Subspace(EYE, float("inf")), "inf"),
    "a patch size of 0": (lambda: Subspace(EYE, patch_size=0), "0"),
    "a patch size that does not divide": (lambda: Subspace(EYE, patch_size=3), "dimension 4"),
    "another order": (lambda: Subspace(EYE, token_order="hwc"), "'hwc'"),
    "a rank above the dimension": (lambda: Subspace.random(4, 5), "5"),
    "a negative rank": (lambda: Subspace.random(4, -1), "-1"),
    "no dimension": (lambda: Subspace.random(0, 0), "(0, 0)"),
    "a random scale of 0": (lambda: Subspace.random(4, 2, scale=0), "0"),
    "a full scale of 0": (lambda: Subspace.full(4, scale=0), "0"),
    "an empty scale of 0": (lambda: Subspace.empty(4, scale=0), "0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_subspace_is_refused_in_one_line_that_names_it(name):
    call, named = MISTAKES[name]
    with pytest.raises(InputError, match=ONE_LINE) as error:
        call()
    assert named in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tolerance_is_where_it_is_said_to_be(dtype):
    """A column of length sqrt(1 + t) is off by t; float32 rounds the length by 6e-8, the tolerance is 1e-4."""
    basis = torch.eye(4, 2, dtype=dtype)
    assert TOLERANCE == 1e-4
    Subspace(basis * (1 + 0.99 * TOLERANCE) ** 0.5)
    with pytest.raises(InputError, match="not orthonormal"):
        Subspace(basis * (1 + 1.01 * TOLERANCE) ** 0.5)


def test_lists_and_low_precision_are_welcome_if_they_are_orthonormal():
    for basis in ([[1.0], [0.0]], torch.eye(2, 1).bfloat16(), torch.eye(2, 1).half(), torch.eye(2, 1).numpy()):
        assert torch.equal(Subspace(basis).basis, torch.eye(2, 1))


def test_every_basis_has_one_memory_layout():
    """The order in which products are summed depends on it; files keep none."""
    basis = Subspace.random(6, 3).basis
    assert Subspace(basis.mT.contiguous().mT).basis.stride() == basis.stride() == (3, 1)


def test_a_subspace_does_not_change_with_the_tensor_that_it_was_made_from():
    basis = torch.eye(4, 2)
    subspace = Subspace(basis)
    basis.zero_()
    assert torch.equal(subspace.basis, torch.eye(4, 2))


# ---- As part of a module ---------------------------------------------------------------------------------------------
def test_it_has_no_weights_and_a_record_in_words():
    subspace = Subspace.random(4, 2, scale=0.5)
    assert list(subspace.parameters()) == []
    assert set(subspace.state_dict()) == {"basis", "scale"}
    assert str(subspace) == "Subspace(rank=2, dim=4, scale=0.5)"


@given(subspaces())
def test_no_cast_makes_it_narrower_than_float32(subspace):
    model = torch.nn.Sequential(copy.deepcopy(subspace))
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.float16), lambda: model.type(torch.bfloat16)):
        cast()
        assert same(model[0], subspace)
    model.double()
    assert model[0].basis.dtype == torch.float64
    assert torch.equal(model[0].basis, subspace.basis.double())
    model.float()
    assert model[0].basis.dtype == torch.float32
    assert torch.equal(model[0].basis, subspace.basis.float())
    model[0].basis = subspace.basis
    assert same(model[0], subspace)  # scale and spectrum have never changed


@given(subspaces())
def test_copies_and_state_dicts_are_the_same_to_the_last_bit(subspace):
    assert same(copy.deepcopy(subspace), subspace)
    assert same(pickle.loads(pickle.dumps(subspace)), subspace)
    other = Subspace.random(subspace.dim, subspace.rank, seed=1).to(subspace.basis.dtype)
    other.load_state_dict(subspace.state_dict())
    assert torch.equal(other.basis, subspace.basis)
    assert other.scale == subspace.scale
    with pytest.raises(RuntimeError, match="scale"):
        other.load_state_dict({"basis": subspace.basis})


def test_it_goes_to_the_meta_device_and_comes_back_empty():
    subspace = Subspace.random(4, 2, scale=0.3, spectrum=torch.ones(4, **DOUBLE))
    state = {name: tensor.clone() for name, tensor in subspace.state_dict().items()}
    assert state["scale"].dtype == torch.float64
    subspace.to("meta")
    assert subspace.basis.is_meta
    assert subspace.spectrum.is_meta
    assert str(subspace) == "Subspace(rank=2, dim=4, scale=0.3)"
    subspace.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(subspace.basis, state["basis"])
    assert subspace.scale == 0.3
