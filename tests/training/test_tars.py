"""Tar files as people have them: every image in them is used, or said not to be."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_data import pixels, png, write_tar

from asymflow import InputError
from asymflow.data.captioned import find_captioned
from asymflow.data.shards import INDEX, TarShards, index_path, shard_paths
from asymflow.entries import UnreadableError, tar_entries


def sample(key, label=0):
    return [(f"{key}.png", png(pixels(label))), (f"{key}.cls", str(label).encode())]


def test_a_dot_in_a_key_is_said(tmp_path):
    """WebDataset's key ends at the first dot: `c.seg` is a second picture of c, but `img.v2` no sample of its own."""
    files = [*sample("a"), *sample("b"), *sample("c"), ("c.seg.png", png(pixels(9)))]
    write_tar(tmp_path / "t.tar", [*files, *sample("img.v2"), *sample("img.v3")])
    for _ in range(2):  # also from the index
        data = TarShards(tmp_path / "t.tar", 8)
        assert len(data) == 3
        (remark,) = data.remarks
        said = "passed over, because of a dot in the name: 2 images (the first: img.v2.png). WebDataset takes a name up"
        assert remark.startswith(said)
    write_tar(tmp_path / "u.tar", [*sample("img.v2"), *sample("img.v3")])
    with pytest.raises(InputError, match=r"has no images: passed over, because of a dot in the name: 2 images"):
        TarShards(tmp_path / "u.tar", 8)


def test_images_of_kinds_that_are_not_read_are_said(tmp_path):
    write_tar(tmp_path / "t.tar", [*sample("a"), ("b.heic", b"heic"), ("b.cls", b"0"), ("notes.csv", b"")])
    (remark,) = TarShards(tmp_path / "t.tar", 8).remarks
    assert remark.startswith("passed over, of a kind that is not read: 1 image (b.heic)")


def test_an_index_that_does_not_say_what_was_passed_over_is_made_anew(tmp_path):
    write_tar(tmp_path / "t.tar", [*sample("a"), *sample("img.v2")])
    TarShards(tmp_path / "t.tar", 8)
    columns = dict(np.load(index_path(tmp_path / "t.tar")))
    del columns["passed"]
    np.savez(index_path(tmp_path / "t.tar"), **columns)
    assert TarShards(tmp_path / "t.tar", 8).remarks


@pytest.mark.parametrize("second", ["a.png", "./a.png", "a.PNG", "a.cls"])
def test_one_name_twice_is_refused(tmp_path, second):
    """By all who read tar files: with `tar --append`, an image and its caption may be of different times."""
    content = png(pixels(2)) if second.lower().endswith("png") else b"1"
    write_tar(tmp_path / "t.tar", [*sample("a"), (second, content)])
    kind = r"t\.tar: a\.\w+ and .*t\.tar: a.PNG are of the same sample and kind"
    twice = kind if second == "a.PNG" else r"t\.tar has a\.\w+ twice, as `tar --append` leaves it"
    for read in (TarShards, find_captioned) if second != "a.PNG" else (TarShards,):
        with pytest.raises(InputError, match=twice):
            read(*([[tmp_path / "t.tar"]] if read is find_captioned else [tmp_path / "t.tar"]), 8)


def test_what_lies_beside_shards_and_is_not_read_is_said(tmp_path):
    write_tar(tmp_path / "t.tar", [*sample("a"), ("inner.tar", b""), ("more.zip", b"")])
    assert TarShards(tmp_path / "t.tar", 8).remarks == [
        "not opened: 2 archives (the first: inner.tar). Unpack what has images in it"
    ]
    (tmp_path / "more").mkdir()
    (tmp_path / "notes").mkdir()
    write_tar(tmp_path / "more" / "u.tar", sample("b"))
    (tmp_path / "licence.zip").write_bytes(b"")
    _, packed, folders = TarShards(tmp_path, 8).remarks
    assert packed == f"not opened: 1 archive ({tmp_path}/licence.zip). Unpack what has images in it"
    assert folders.startswith(f"not read: 1 folder ({tmp_path}/more) with tar files.")
    assert len(TarShards(tmp_path / "*" / "*.tar", 8)) == 1


# ---- Links -----------------------------------------------------------------------------------------------------------
NAMES = ["a", "d/b", "d/e/c", "f"]
KINDS = {"file": tarfile.REGTYPE, "hard": tarfile.LNKTYPE, "symbolic": tarfile.SYMTYPE}


@given(st.lists(st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(NAMES)), min_size=4, max_size=4))
def test_links_within_an_archive_are_the_files_they_lead_to(tmp_path_factory, members):
    path = tmp_path_factory.mktemp("links") / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, (kind, target) in zip(NAMES, members, strict=True):
            info = tarfile.TarInfo(name)
            info.type = KINDS[kind]
            if kind == "file":
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()))
            else:
                info.linkname = target if kind == "hard" else "../" * name.count("/") + target
                tar.addfile(info)
    kinds = dict(zip(NAMES, members, strict=True))
    for entry in tar_entries(str(path)):
        name, seen = entry.member, set()
        while kinds[name][0] != "file" and name not in seen:
            seen.add(name)
            name = kinds[name][1]
        assert entry.read() == (name.encode() if name not in seen else b"")


def test_a_link_to_nothing_is_named(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in [*sample("a"), ("b.cls", b"0")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    data = TarShards(tmp_path / "t.tar", 8)
    assert len(data) == 2
    assert data[0].image.shape == (3, 8, 8)
    with pytest.raises(UnreadableError, match=r"t\.tar: b\.png is not a whole image"):
        data[1]


# ---- Which files -----------------------------------------------------------------------------------------------------
def test_archives_that_were_put_together_by_cat_are_refused(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", sample(name))
    (tmp_path / "both.tar").write_bytes(b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab"))
    with pytest.raises(InputError, match=r"both\.tar is not a whole.*it goes on behind its end"):
        TarShards(tmp_path / "both.tar", 8)
    (tmp_path / "padded.tar").write_bytes((tmp_path / "a.tar").read_bytes() + bytes(3 << 20))
    assert len(TarShards(tmp_path / "padded.tar", 8)) == 1


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "B.TAR.ZST", "b.tar.bz2"])
def test_a_compressed_shard_beside_others_is_refused(tmp_path, name):
    write_tar(tmp_path / "a.tar", sample("a"))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name} is compressed"):
        TarShards(tmp_path, 8)


def test_capital_letters_make_no_difference(tmp_path):
    write_tar(tmp_path / "a.TAR", sample("a"))
    write_tar(tmp_path / "b.tar", sample("b", 1))
    assert [TarShards(tmp_path, 8)[i].label for i in range(2)] == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"a.TAR", "b.tar", f"a{INDEX}", f"b{INDEX}"}


def test_patterns_as_people_write_them(tmp_path):
    names = [f"train-{i:04d}.tar" for i in range(12)] + ["val-0000.tar", "test-0000.tar", "odd[1].tar"]
    for number, name in enumerate(names):
        write_tar(tmp_path / name, sample(f"k{number}", number))
    found = lambda pattern: [path.rpartition("/")[2] for path in shard_paths(tmp_path / pattern, 8)]
    assert found("train-{0003..0011}.tar") == names[3:12]
    assert found("train-*.tar") == names[:12]
    assert found("train-000[12].tar") == names[1:3]
    assert found("{val,test}-0000.tar") == names[12:14]
    assert found("odd[1].tar") == ["odd[1].tar"]  # a file of this name
    assert len(TarShards(tmp_path / "train-{0000..0011}.tar", 8)) == 12
    (remark,) = TarShards(tmp_path, 8).remarks
    assert "all shards are used: 1 of odd[#].tar, 1 of test-#.tar, 12 of train-#.tar, 1 of val-#.tar" in remark
    for wrong, said in [
        ("train-{0003..0012}.tar", r"train-0012\.tar does not exist"),
        ("tarin-*.tar", r"tarin-\*\.tar: there is no such file"),
        ("train-{9..1}.tar", "must go up"),
        ("train-{0..99999999}.tar", "less than a million"),
    ]:
        with pytest.raises(InputError, match=said):
            found(wrong)
