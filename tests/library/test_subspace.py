"""asymflow/subspace.py and asymflow/files.py: what a subspace is, and what files may do to it."""

import copy
import errno
import json
import os
import pickle
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from asymflow import InputError, Subspace, files
from asymflow.subspace import TOLERANCE

ONE_LINE = r"\A[^\n]+\Z"
SEEDS = st.integers(0, 2**32 - 1)
DOUBLE = {"dtype": torch.float64}


@st.composite
def subspaces(draw, dtype=None):
    """Any dimension, rank, scale and record."""
    dim = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, : draw(st.integers(0, dim))]
    words = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return Subspace(
        basis.to(dtype or draw(st.sampled_from([torch.float32, torch.float64]))),
        draw(st.floats(1e-300, 1e300)),
        patch_size=draw(st.sampled_from([None, *(p for p in range(1, 5) if dim % p**2 == 0)])),
        token_order=draw(st.sampled_from([None, "channel_last", "channel_first"])),
        color_space=draw(words),
        fitted_on=draw(words),
        spectrum=torch.rand(draw(st.integers(0, 5)), generator=generator, **DOUBLE) if draw(st.booleans()) else None,
    )


RECORD = ("dim", "rank", "scale", "patch_size", "token_order", "color_space", "fitted_on")


def same(a, b):
    """All of it, to the last bit."""
    tensors = [(getattr(a, name), getattr(b, name)) for name in ("basis", "spectrum")]
    return all(getattr(a, name) == getattr(b, name) for name in RECORD) and all(
        (x is y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in tensors
    )


def folder_content(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


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

EYE = torch.eye(4)
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


# ---- Files -----------------------------------------------------------------------------------------------------------


@given(subspaces())
def test_a_file_keeps_every_bit(subspace):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a new folder" / "subspace.safetensors"
        subspace.save(path)
        assert same(Subspace.load(path), subspace)
        assert same(Subspace.load(str(path)), subspace)
        assert list(folder_content(path.parent)) == ["subspace.safetensors"]


@pytest.fixture(scope="module")
def whole():
    """The bytes of a subspace file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.safetensors"
        Subspace.random(8, 2, scale=0.5, patch_size=2, spectrum=torch.ones(3)).save(path)
        return path.read_bytes()


def refused(path, *named):
    with pytest.raises(InputError, match=ONE_LINE) as error:
        Subspace.load(path)
    assert [word for word in (str(path), *named) if word not in str(error.value)] == []


def test_a_file_that_is_cut_anywhere_is_refused_by_name(whole, tmp_path):
    path, header = tmp_path / "cut.safetensors", 8 + struct.unpack("<Q", whole[:8])[0]
    for length in {0, 1, 7, 8, 9, header - 1, header, header + 1, (header + len(whole)) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path, "not a whole safetensors file")
    path.write_bytes(whole + b"\0")
    refused(path)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused_by_name(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.safetensors"
        path.write_bytes(content)
        refused(path)


@settings(max_examples=200)
@given(st.data())
def test_a_file_with_a_changed_byte_is_refused_or_is_a_subspace(whole, data):
    """Any byte of header or content: never another error, never a basis that is not orthonormal."""
    place = data.draw(st.integers(0, len(whole) - 1))
    content = bytearray(whole)
    content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.safetensors"
        path.write_bytes(content)
        try:
            exact = Subspace.load(path).basis.double()
        except InputError:
            refused(path)
        else:
            assert (exact.mT @ exact - torch.eye(exact.shape[1], **DOUBLE)).abs().max() <= TOLERANCE


def test_what_is_no_subspace_file_is_refused_by_name(tmp_path):
    refused(tmp_path, "folder")
    refused(tmp_path / "missing.safetensors", "does not exist")
    path = tmp_path / "some.safetensors"
    torch.save({"basis": EYE, "scale": torch.tensor(1.0)}, path)
    refused(path, "not a whole safetensors file")
    basis, scale = torch.eye(4, 2), torch.tensor(1.0, **DOUBLE)
    for tensors, metadata, named in [
        ({}, {}, "none"),
        ({"basis": basis}, {}, "basis"),
        ({"scale": scale}, {}, "scale"),
        ({"basis": basis, "scale": scale, "weight": basis.clone()}, {}, "weight"),
        ({"basis": 2 * basis, "scale": scale}, {}, "orthonormal"),
        ({"basis": basis.int(), "scale": scale}, {}, "int32"),
        ({"basis": basis, "scale": -scale}, {}, "-1.0"),
        ({"basis": basis, "scale": torch.ones(2)}, {}, ""),
        ({"basis": basis, "scale": scale}, {"patch_size": "two"}, "two"),
        ({"basis": basis, "scale": scale}, {"patch_size": "3"}, "3 x 3"),
        ({"basis": basis, "scale": scale}, {"token_order": "hwc"}, "hwc"),
    ]:
        save_file(tensors, path, metadata or None)
        refused(path, named)


class DiskFull:
    """Writes half of the file, then there is no space left."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, tensors, path, metadata):
        self.stream(tensors, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "subspace.safetensors"
    first = Subspace.random(8, 2)
    first.save(path)
    before = folder_content(tmp_path)
    monkeypatch.setattr(files, "stream", DiskFull(files.stream))
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="No space"):
            Subspace.random(8, 3).save(target)
        assert folder_content(tmp_path) == before
    monkeypatch.undo()
    Subspace.random(8, 3).save(path)
    assert Subspace.load(path).rank == 3
    assert list(folder_content(tmp_path)) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="other systems have other permissions")
def test_others_may_read_a_file_if_they_may_read_a_new_one(tmp_path):
    """Colleagues on a shared disk; the umask says who."""
    Subspace.random(8, 2).save(tmp_path / "subspace.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "subspace.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_save_to_a_folder_that_is_read_only_changes_nothing(tmp_path):
    path = tmp_path / "subspace.safetensors"
    Subspace.random(8, 2).save(path)
    before = folder_content(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="ermission"):
            Subspace.random(8, 3).save(path)
        assert folder_content(tmp_path) == before
    finally:
        tmp_path.chmod(0o700)


# ---- asymflow.files --------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("existed", [True, False])
def test_a_block_that_ends_badly_changes_nothing(tmp_path, error, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(error), files.replacing(path) as beside:  # noqa: PT012
        beside.write_text("half")
        assert beside.parent == tmp_path
        assert (path.read_text() if existed else not path.exists()) in ("old", True)
        raise error
    assert folder_content(tmp_path) == ({"file.txt": b"old"} if existed else {})


def test_a_block_that_ends_well_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for content in ("first", "second"):
        with files.replacing(str(path)) as beside:
            assert beside.suffix == path.suffix  # writers that look at it
            beside.write_text(content)
        assert folder_content(path.parent) == {"file.txt": content.encode()}


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    path, named = tmp_path / "file.txt", []
    monkeypatch.setattr(os, "fsync", lambda file: named.append(path.exists()))
    with files.replacing(path) as beside:
        beside.write_text("content")
    assert named == [False]


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), files.replacing(path):
        pass
    assert folder_content(tmp_path) == {"file.txt": b"old"}


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with files.replacing(path) as a, files.replacing(path) as b:
        a.write_text("a")
        b.write_text("b")
    assert folder_content(tmp_path) == {"file.txt": b"a"}  # whole, and of the one that ended last


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])


@given(
    SEEDS, DTYPES, st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text("ab", min_size=1), st.text("cd"))
)
def test_tensors_come_back_to_the_last_bit_with_their_metadata(seed, dtype, shape, metadata):
    """Also those that share memory, are transposed, empty, or want a gradient."""
    tensor = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    tensors = {"a": tensor, "b.c": tensor, "d": tensor.reshape(-1)[::2], "e": torch.randn(3, 2, requires_grad=True).mT}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        files.write_tensors(path, tensors, metadata)
        found, record = files.read_tensors(path)
        assert found.keys() == tensors.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
        assert record == {"format": "pt", **metadata}
        for t in found.values():  # theirs to change: the file stays as it is
            t.zero_()
        assert torch.equal(files.read_tensors(path)[0]["a"], tensor)


def test_equal_content_gives_equal_bytes_whose_size_and_checksum_are_returned(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.bool), "a": torch.rand(2, 3), "é": torch.rand(5).bfloat16()}
    metadata = {"y": "1", "x": "ü"}
    path, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    said = files.write_tensors(path, tensors, metadata)
    assert said == (path.stat().st_size, files.sha256(path))
    backwards = (dict(reversed(d.items())) for d in (tensors, metadata))
    assert files.write_tensors(other, *backwards) == said
    assert other.read_bytes() == path.read_bytes()
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    for name, tensor in tensors.items():  # where they can be used in place
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_file_may_be_replaced_while_its_tensors_are_in_use(tmp_path):
    path = tmp_path / "tensors.safetensors"
    files.write_tensors(path, {"a": torch.ones(10_000)})
    tensors, _ = files.read_tensors(path)
    files.write_tensors(path, {"a": torch.zeros(10)})
    assert (tensors["a"] == 1).all()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.target,)

    def __init__(self, target):
        self.target = target


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path, target = tmp_path / "bomb.pt", tmp_path / "it ran"
    torch.save({"weight": torch.ones(2), "bomb": Bomb(str(target))}, path)
    with pytest.raises(InputError, match=ONE_LINE) as error:
        files.read_pickle(path)
    assert str(path) in str(error.value)
    assert not target.exists()
    path.write_bytes(pickle.dumps(Bomb(str(target))))
    with pytest.raises(InputError, match=ONE_LINE):
        files.read_pickle(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the control: the bomb is one
    assert target.exists()


def test_the_refusal_of_a_pickle_does_not_advise_to_run_it(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"bomb": Bomb(str(tmp_path / "it ran"))}, path)
    with pytest.raises(InputError) as error:
        files.read_pickle(path)
    assert "weights_only" not in str(error.value)


def test_plain_tensors_in_a_pickle_are_read(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save({"proj_mat_p16": EYE, "scale": 0.5, "list": [1, "two"]}, path)
    content = files.read_pickle(path)
    assert torch.equal(content.pop("proj_mat_p16"), EYE)
    assert content == {"scale": 0.5, "list": [1, "two"]}


def test_a_pickle_that_is_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"weight": EYE}, path)
    whole = path.read_bytes()
    for length in (0, 1, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=ONE_LINE) as error:
            files.read_pickle(path)
        assert str(path) in str(error.value)
    for other in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(InputError, match=ONE_LINE) as error:
            files.read_pickle(other)
        assert str(other) in str(error.value)


def test_tensors_are_checked_by_name_and_shape():
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(())}
    files.check_tensors(tensors, {"a": (2, 3), "b": ()}, "there")
    files.check_tensors({}, {}, "there")
    for expected, message in [
        ({"a": (2, 3)}, "there does not fit: unexpected tensors: b ()"),
        ({"a": (2, 3), "b": (), "c": (1,)}, "there does not fit: missing tensors: c (1,)"),
        ({"a": (3, 2), "b": ()}, "there does not fit: wrong shapes: a has (2, 3), expected (3, 2)"),
        (
            {"b": (1,), "c": ()},
            "there does not fit: missing tensors: c (). unexpected tensors: a (2, 3). wrong shapes: b has (), expected "
            "(1,)",
        ),
    ]:
        with pytest.raises(InputError) as error:
            files.check_tensors(tensors, expected, "there")
        assert str(error.value) == message
    with pytest.raises(InputError, match=r"x4 \(\); and 2 more\Z"):
        files.check_tensors({}, {f"x{i}": () for i in range(7)}, "there")


def test_the_same_subspace_makes_the_same_bytes(tmp_path):
    """Although safetensors writes metadata in an order that changes from time to time."""
    subspace = Subspace.random(12, 3, patch_size=2, token_order="channel_last", color_space="ünïcode", fitted_on="a, b")
    written = set()
    for i in range(20):
        subspace.save(tmp_path / f"{i}.safetensors")
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_a_state_dict_with_an_impossible_scale_is_refused_by_name(scale):
    subspace = Subspace.random(6, 2, scale=0.5)
    state = subspace.state_dict() | {"scale": torch.tensor(scale)}
    said = r"of the shape \(2,\)" if isinstance(scale, list) else str(scale)
    with pytest.raises(RuntimeError, match=f"scale must be one finite number above 0, but it is {said}"):
        subspace.load_state_dict(state)
    assert subspace.scale == 0.5


def test_a_state_dict_of_another_subspace_is_refused_by_name():
    subspace = Subspace.random(6, 2)
    state = subspace.state_dict()
    for other, said in (
        (state | {"basis": torch.zeros(6, 3)}, "size mismatch for basis"),
        ({"scale": state["scale"]}, 'Missing.*"basis"'),
        ({"basis": state["basis"]}, 'Missing.*"scale"'),
        (state | {"more": torch.zeros(2)}, 'Unexpected.*"more"'),
    ):
        with pytest.raises(RuntimeError, match=said):
            subspace.load_state_dict(other)
    found = subspace.load_state_dict({}, strict=False)
    assert (sorted(found.missing_keys), found.unexpected_keys) == (["basis", "scale"], [])
