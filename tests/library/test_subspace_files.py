"""asymflow/subspace.py and asymflow/files.py: what files may do to a subspace."""

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
from random_subspaces import DOUBLE, EYE, ONE_LINE, SEEDS, same, subspaces
from safetensors.torch import save_file

from asymflow import InputError, Subspace, files, opening
from asymflow.subspace import TOLERANCE


def folder_content(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


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
        found, record = opening.read_tensors(path)
        assert found.keys() == tensors.keys()
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
        assert record == {"format": "pt", **metadata}
        for t in found.values():  # theirs to change: the file stays as it is
            t.zero_()
        assert torch.equal(opening.read_tensors(path)[0]["a"], tensor)


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
    tensors, _ = opening.read_tensors(path)
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
        opening.read_pickle(path)
    assert str(path) in str(error.value)
    assert not target.exists()
    path.write_bytes(pickle.dumps(Bomb(str(target))))
    with pytest.raises(InputError, match=ONE_LINE):
        opening.read_pickle(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the control: the bomb is one
    assert target.exists()


def test_the_refusal_of_a_pickle_does_not_advise_to_run_it(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"bomb": Bomb(str(tmp_path / "it ran"))}, path)
    with pytest.raises(InputError) as error:
        opening.read_pickle(path)
    assert "weights_only" not in str(error.value)


def test_plain_tensors_in_a_pickle_are_read(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save({"proj_mat_p16": EYE, "scale": 0.5, "list": [1, "two"]}, path)
    content = opening.read_pickle(path)
    assert torch.equal(content.pop("proj_mat_p16"), EYE)
    assert content == {"scale": 0.5, "list": [1, "two"]}


def test_a_pickle_that_is_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"weight": EYE}, path)
    whole = path.read_bytes()
    for length in (0, 1, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=ONE_LINE) as error:
            opening.read_pickle(path)
        assert str(path) in str(error.value)
    for other in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(InputError, match=ONE_LINE) as error:
            opening.read_pickle(other)
        assert str(other) in str(error.value)


def test_tensors_are_checked_by_name_and_shape():
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(())}
    opening.check_tensors(tensors, {"a": (2, 3), "b": ()}, "there")
    opening.check_tensors({}, {}, "there")
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
            opening.check_tensors(tensors, expected, "there")
        assert str(error.value) == message
    with pytest.raises(InputError, match=r"x4 \(\); and 2 more\Z"):
        opening.check_tensors({}, {f"x{i}": () for i in range(7)}, "there")


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


@pytest.mark.parametrize("wrong", [lambda basis: basis.bfloat16(), lambda basis: 2 * basis, lambda basis: basis / 0])
def test_a_state_dict_is_refused_whose_basis_the_constructor_would_refuse(wrong):
    subspace = Subspace.random(48, 8)
    state = subspace.state_dict() | {"basis": wrong(subspace.basis)}
    with pytest.raises(InputError) as constructed:
        Subspace(state["basis"])
    with pytest.raises(RuntimeError) as loaded:
        subspace.load_state_dict(state)
    assert f"basis: {constructed.value}" in str(loaded.value)


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


def test_a_name_is_claimed_without_hard_links_too(tmp_path, monkeypatch):
    """On exFAT, network and cloud drives."""

    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with files.replacing(tmp_path / "file", new=True) as beside:
        beside.write_text("first")
    with pytest.raises(FileExistsError), files.replacing(tmp_path / "file", new=True) as beside:
        beside.write_text("second")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]
