"""Data sets by index: what was planted comes out."""

import json
import os
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import as_tensor, pixels, png, write_tar
from PIL import Image
from scipy import ndimage, stats

from asymflow.data.folder import ImageFolder
from asymflow.data.shapes import COLORS, COUNTS, Shapes, make_scene, render
from asymflow.data.shards import TarShards, fingerprint, index_path, read_index, save_index
from asymflow.entries import UnreadableError
from asymflow.errors import InputError
from asymflow.pixels import adm_crop
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset, said


# ---- Shapes ----------------------------------------------------------------------------------------------------------
def test_shapes_are_the_same_for_an_index_wherever_it_is_drawn():
    data = Shapes(50, 32, seed=4)
    copy = pickle.loads(pickle.dumps(Shapes(1000, 32, seed=4)))
    for i in reversed(range(50)):
        assert torch.equal(data[i].image, copy[i].image)
        assert data[i][1:] == copy[i][1:]
    assert not torch.equal(data[0].image, Shapes(50, 32, seed=5)[0].image)
    assert len({data[i].image.numpy().tobytes() for i in range(50)}) == 50
    with pytest.raises(IndexError):
        data[50]


@given(st.integers(0, 10**6), st.sampled_from([16, 24, 32]))
def test_a_scene_is_the_same_at_any_resolution(index, size):
    scene = make_scene(0, index)
    small, large = render(scene, size).float(), render(scene, 2 * size).float()
    halved = torch.nn.functional.avg_pool2d(large[None], 2)[0]
    # Both estimate what share of a pixel is covered, from 16 and 64 points: at an edge they differ by few of the 16, on
    # average by about one; and the edges, at most 3 x 8 x 0.135 = 3.24 long, are in 4 size of the size^2 pixels.
    assert (small - halved).abs().max() <= 255 * 5 / 16
    assert (small - halved).abs().mean() < 255 / 16 * 4 / size


def test_shapes_have_their_areas():
    areas = [np.pi, 1.7**2, 1.8 * 2 / 2, 2 * 2 * 0.6 - 0.6**2]  # circle, square, triangle, cross, of radius 1
    for scene in (make_scene(2, i) for i in range(60)):
        color = torch.tensor(list(COLORS.values())[scene.color])[:, None, None]
        ground = round(scene.ground)
        share = (ground - render(scene, 128).double()) / (ground - color)
        area = share[color.argmin()].mean()  # in the channel that differs most from the ground
        expected = areas[scene.shape] * sum(r**2 for r in scene.radii)
        # Counted in 512ths, an arm of the cross is 34 wide or more, or one off: 3 %. The others are larger.
        assert area == pytest.approx(expected, rel=0.03)


def test_classes_appear_evenly():
    scenes = [make_scene(1, i) for i in range(4000)]
    for value in (lambda s: s.label, lambda s: len(s.cells), lambda s: s.cells[0] if len(s.cells) == 1 else -1):
        counts = Counter(map(value, scenes))
        counts.pop(-1, None)
        assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert {s.label for s in scenes} == set(range(Shapes.num_classes))


def seen(image):
    """The caption and the class of a picture of shapes, from its pixels."""
    values = image.permute(1, 2, 0).numpy().astype(float)
    ground = np.median(values[:3].reshape(-1, 3), axis=0)
    mask = abs(values - ground).sum(-1) > abs(values - ground).sum(-1).max() / 2
    pieces, count = ndimage.label(mask)
    color = np.median(values[mask], axis=0)
    color = min(COLORS, key=lambda name: abs(np.array(COLORS[name]) - color).sum())
    kinds, cells = set(), []
    for box in ndimage.find_objects(pieces):
        piece = mask[box]
        height = ndimage.center_of_mass(piece)[0] / piece.shape[0]
        fill = piece.mean()
        kinds.add("square" if fill > 0.93 else "circle" if fill > 0.7 else "triangle" if height > 0.55 else "cross")
        row, column = ((s.start + s.stop) / 2 / len(values) * 3 for s in box)
        cells.append((int(row), int(column)))
    (kind,) = kinds
    rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
    plural = "" if count == 1 else "es" if kind == "cross" else "s"
    places = ", ".join(f"{rows[r]} {columns[c]}" for r, c in sorted(cells))
    label = ["circle", "square", "triangle", "cross"].index(kind) * 4 + ["red", "green", "blue", "orange"].index(color)
    return f"{COUNTS[count - 1]} {color} {kind}{plural}: {places}", label


def test_captions_and_classes_say_what_the_pixels_show():
    data = Shapes(100, 128)
    for i in range(100):
        assert seen(data[i].image) == (data[i].caption, data[i].label)


# ---- Folders ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Three classes, one with a folder inside, and a caption; the pixels are those of seeds 0 to 4, in order."""
    root = tmp_path / "images"
    for seed, name in enumerate(["a/1.png", "a/sub/2.PNG", "b/x.y.png", "c/0.png", "c/1.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(path)
    (root / "b/x.y.txt").write_text("ein Würfel\n", encoding="utf-8")
    (root / "c/.hidden.png").write_bytes(b"")
    (root / "c/readme.md").write_text("")
    return root


def test_a_folder_has_its_images_in_order_with_class_and_caption(folder):
    data = pickle.loads(pickle.dumps(ImageFolder(folder, 8)))
    assert (len(data), data.num_classes, data.classes) == (5, 3, ["a", "b", "c"])
    samples = [data[i] for i in range(5)]
    for seed, sample in enumerate(samples):
        assert sample.image.dtype == torch.uint8
        assert torch.equal(sample.image, as_tensor(pixels(seed)))
    assert [s.label for s in samples] == [0, 0, 1, 2, 2]
    assert [s.caption for s in samples] == ["", "", "ein Würfel", "", ""]
    assert samples[1].name == str(folder / "a/sub/2.PNG")


def test_a_folder_is_cropped_as_by_adm(folder):
    Image.fromarray(pixels(9, 30, 50)).save(folder / "a/0.png")
    expected = adm_crop(Image.fromarray(pixels(9, 30, 50)), 8)
    assert torch.equal(ImageFolder(folder, 8)[0].image, as_tensor(np.array(expected)))


def test_a_corrupt_file_is_named(folder):
    (folder / "b/x.y.png").write_bytes((folder / "b/x.y.png").read_bytes()[:90])
    data = ImageFolder(folder, 8)
    with pytest.raises(UnreadableError, match=re.escape(str(folder / "b/x.y.png"))):
        data[2]
    data[3]


def test_what_is_no_folder_of_classes_is_refused(folder, tmp_path):
    def refused(path, words):
        with pytest.raises(InputError, match=words) as caught:
            ImageFolder(path, 8)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "does not exist")
    refused(folder / "a/1.png", "is not a folder")
    refused(folder / "c", "c/0.png is in no class")
    (folder / "d.heic").touch()
    refused(folder, "d.heic is in no class")
    (folder / "d.heic").unlink()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no folders in it")
    (tmp_path / "empty/0.tar").touch()
    refused(tmp_path / "empty", "data.kind webdataset")
    (folder / "bb").mkdir()
    refused(folder, "bb has no images")


# ---- Shards ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def shards(tmp_path):
    """Two shards, of three samples and of two; the pixels are those of seeds 0 to 4."""
    first = [
        *[("a/0.png", png(pixels(0))), ("a/0.cls", b"2"), ("a/0.txt", "würfel".encode())],
        *[("a/1.cls", b"0\n"), ("a/1.json", b"{}"), ("a/1.png", png(pixels(1))), ("a/1.seg.png", png(pixels(7)))],
        *[("n" * 150 + ".webp", png(pixels(2))), ("n" * 150 + ".cls", b"1"), ("notes.md", b"")],
    ]
    write_tar(tmp_path / "shards/00.tar", first)
    write_tar(tmp_path / "shards/01.tar", [(f"{i}.{kind}", png(pixels(i)) if kind == "png" else b"4")
                                           for i in (3, 4) for kind in ("png", "cls")])  # fmt: skip
    return tmp_path / "shards"


def check_shards(data):
    samples = [data[i] for i in range(len(data))]
    assert all(torch.equal(s.image, as_tensor(pixels(seed))) for seed, s in enumerate(samples))
    assert [s.label for s in samples] == [2, 0, 1, 4, 4]
    assert [s.caption for s in samples] == ["würfel", "", "", "", ""]
    assert data.num_classes == 5


def test_shards_have_their_samples_in_order(shards):
    data = pickle.loads(pickle.dumps(TarShards(shards, 8)))
    check_shards(data)
    assert data[1].name == f"{shards / '00.tar'}: a/1.png"
    assert len(TarShards(shards / "01.tar", 8)) == 2


def test_the_index_beside_a_shard_is_used_only_for_that_shard(shards, monkeypatch):
    for shard in shards.glob("*.tar"):
        save_index(shard, read_index(str(shard)), fingerprint(shard))
    with monkeypatch.context() as m:
        m.setattr("asymflow.data.shards.tar_entries", None)  # the headers are not read
        check_shards(TarShards(shards, 8))
    size = (shards / "01.tar").stat().st_size
    write_tar(shards / "01.tar", [("5.png", png(pixels(5))), ("5.cls", b"1")])
    assert (shards / "01.tar").stat().st_size == size  # it is a multiple of 10,240
    assert torch.equal(TarShards(shards, 8)[3].image, as_tensor(pixels(5)))
    index_path(shards / "00.tar").write_bytes(b"damaged")
    assert len(TarShards(shards, 8)) == 4


@pytest.fixture
def unread(monkeypatch):
    """After `unread()`, no header of a tar file can be read."""
    return lambda: monkeypatch.setattr("asymflow.data.shards.tar_entries", None)


def test_headers_are_read_once_and_again_when_a_shard_has_changed(shards, unread):
    check_shards(TarShards(shards, 8))
    os.utime(shards / "01.tar", ns=(0, 0))  # as if it had been copied
    check_shards(TarShards(shards, 8))
    for label in (5, 6):
        write_tar(shards / "01.tar", [("3.png", png(pixels(3))), ("3.cls", b"%d" % label)])
        with (shards / "01.tar").open("ab") as tar:
            tar.write(bytes(1 << 17))  # more than a fingerprint sees: only the time tells one from the other
        assert TarShards(shards, 8).num_classes == label + 1
    unread()
    assert TarShards(shards, 8).num_classes == 7


def test_where_nothing_can_be_written_the_index_is_in_the_cache(shards, unread, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for shard in shards.glob("*.tar"):
        index_path(shard).mkdir()  # in the way, also for root
    check_shards(TarShards(shards, 8))
    assert len(list(tmp_path.glob("cache/asymflow/indices/*.index.npz"))) == 2
    assert not list(shards.glob(".*"))
    with monkeypatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(shards / "00.tar"))  # no folder, and nothing can be made in it
        assert capsys.readouterr().err == ""
        check_shards(TarShards(shards, 8))
        said = capsys.readouterr().err
        assert said.startswith("the index of 2 shards could not be kept, so the next start reads the headers again")
        assert (said.count("\n"), f"{shards / '00.tar'} (" in said) == (1, True)
    unread()
    check_shards(TarShards(shards, 8))


@pytest.mark.parametrize("lie", [
    {"image": np.array([[0, 1 << 40], [0, 1], [0, 1]])},
    {"image": np.array([[-5, 3], [0, 1], [0, 1]])},
    {"label": np.array([1, 2])},
    {"name": None},
    {"modified": np.array(0)},
    {"fingerprint": np.array("0 0")},
])  # fmt: skip
def test_an_index_that_cannot_be_of_its_shard_is_made_anew(shards, lie, unread):
    TarShards(shards, 8)
    index = {**np.load(index_path(shards / "00.tar")), **lie}
    np.savez(index_path(shards / "00.tar"), **{column: value for column, value in index.items() if value is not None})
    check_shards(TarShards(shards, 8))
    unread()
    check_shards(TarShards(shards, 8))


def rename(folder):
    """As many images, and as many classes: but one of them has another number."""
    first = sorted(folder.iterdir())[0]
    first.rename(folder / "zzz")


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (TarShards, lambda path: write_tar(path / "01.tar", [("5.png", png(pixels(5)))]), r"01\.tar is another"),
        (TarShards, lambda path: (path / "01.tar").unlink(), r"01\.tar is missing"),
        (ImageFolder, rename, "has other images here"),
        (ImageFolder, lambda path: (path / "d").mkdir(), "d has no images"),
        (ImageFolder, shutil.rmtree, "does not exist"),
    ],
)
def test_a_machine_with_other_files_is_found(make, change, message, folder, shards):
    path = shards if make is TarShards else folder
    made = pickle.loads(pickle.dumps(make(path, 8)))
    made.check()
    change(path)
    with pytest.raises(InputError, match=message):
        made.check()


def test_the_digest_is_of_names_and_classes_wherever_they_lie(folder, shards, tmp_path):
    first, packed = ImageFolder(folder, 8).digest, TarShards(shards, 8).digest
    shutil.copytree(folder, tmp_path / "moved/a")
    shutil.copytree(shards, tmp_path / "moved/b")
    assert ImageFolder(tmp_path / "moved/a", 8).digest == first
    assert TarShards(tmp_path / "moved/b", 8).digest == packed
    rename(folder)
    assert len(ImageFolder(folder, 8)) == len(ImageFolder(tmp_path / "moved/a", 8))
    assert ImageFolder(folder, 8).digest != first
    (shards / "00.tar").rename(shards / "99.tar")
    assert TarShards(shards, 8).digest != packed


def test_only_images_of_another_size_are_cropped(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", png(pixels(0, 9, 31))), ("0.cls", b"0")])
    expected = adm_crop(Image.fromarray(pixels(0, 9, 31)), 8)
    assert torch.equal(TarShards(tmp_path / "0.tar", 8)[0].image, as_tensor(np.array(expected)))


def test_what_is_no_shard_of_images_with_classes_is_refused(shards, tmp_path):
    image = ("0.png", png(pixels(0)))

    def refused(words, contents=None, path=tmp_path / "x.tar"):
        if contents is not None:
            write_tar(path, contents)
        with pytest.raises(InputError, match=words) as caught:
            TarShards(path, 8)
        assert "\n" not in str(caught.value)

    refused(r"x.tar: 0 has an image \(png\) but no class \(cls\)", [image])
    refused("must be a class, a whole number from 0, but it is b'-1'", [image, ("0.cls", b"-1")])
    refused("must be a class", [image, ("0.cls", "²".encode())])
    refused("must be a class", [image, ("0.cls", b"9" * 30)])
    refused("more than one image", [image, ("0.jpg", b""), ("0.cls", b"1")])
    refused("has no images", [("0.cls", b"1")])
    refused("does not exist", path=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("no tar files", path=tmp_path / "empty")
    whole = (shards / "01.tar").read_bytes()
    (shards / "01.tar").write_bytes(whole[:1500])
    refused("01.tar is not a whole", path=shards)


def test_a_damaged_image_in_a_shard_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("k.png", png(pixels(0))[:80]), ("k.cls", b"0")])
    with pytest.raises(UnreadableError, match=r"0\.tar: k\.png"):
        TarShards(tmp_path / "0.tar", 8)[0]


def test_packed_shards_must_be_all_there_and_large_enough(shards):
    meta = {"format": "asymflow shards 1", "shards": 2, "size": 8}
    (shards / "meta.json").write_text(json.dumps(meta))
    assert len(TarShards(shards, 4)) == 5
    with pytest.raises(InputError, match="packed at 8 pixels, which is too small for 9"):
        TarShards(shards, 9)
    (shards / "00.tar").unlink()
    with pytest.raises(InputError, match="has 1 of 2 shards"):
        TarShards(shards, 8)
    (shards / "meta.json").write_text("something else")
    assert len(TarShards(shards, 9)) == 2


# ---- By configuration ------------------------------------------------------------------------------------------------
def test_the_data_set_of_a_configuration(folder, shards):
    def make(kind, *settings):
        return make_dataset(load_config("shapes_tiny", [f"data.kind={kind}", *settings]))

    assert len(make("shapes", "data.size=77")) == 77
    assert make("shapes")[0].image.shape == (3, 32, 32)
    for kind, path, classes in [("image_folder", folder, 3), ("webdataset", shards, 5)]:
        data = make(kind, f"data.path={path}", "data.fewer_classes=true")
        assert data[0].image.shape == (3, 32, 32)
        make(kind, f"data.path={path}", f"model.num_classes={classes}")
        for other in (classes - 1, classes + 1):
            wrong = rf"{path} has {classes} classes.*, but model.num_classes is {other}: .*model.num_classes={classes}"
            with pytest.raises(InputError, match=wrong):
                make(kind, f"data.path={path}", f"model.num_classes={other}")


def test_the_start_says_what_there_is(folder):
    config = load_config("shapes_tiny", ["data.size=1234"])
    (line,) = said(make_dataset(config), config)
    assert line == "1,234 images of 16 classes: red circle, green circle, blue circle, ..., orange cross"
    for old, new in zip(sorted(folder.iterdir()), ("10", "2", "b"), strict=True):
        old.rename(folder / new)
    config = load_config("shapes_tiny", ["data.kind=image_folder", f"data.path={folder}", "model.num_classes=3"])
    assert said(make_dataset(config), config) == [
        "data.size 10,000 is not used: image_folder takes all images",
        f"{len(ImageFolder(folder, 8))} images of 3 classes: 10, 2, b",
    ]
    (folder / "b").rename(folder / "30")
    *_, order = said(make_dataset(config), config)
    assert order.endswith("not as numbers: 2 is class 1, and 30 class 2")


def test_a_pipe_or_a_device_is_not_waited_for(folder, tmp_path):
    first = sorted(folder.iterdir())[0]
    os.mkfifo(first / "pipe.png")
    (first / "zero.png").symlink_to("/dev/zero")
    (first / "folder.png").mkdir()
    images, unreadable = ImageFolder(folder, 16), []
    for i in range(len(images)):
        try:
            images[i]
        except UnreadableError as e:
            unreadable.append(str(e))
    assert f"{first}/pipe.png is not a file, but a pipe or a device" in unreadable
    assert f"{first}/zero.png is not a file, but a pipe or a device" in unreadable
    os.mkfifo(tmp_path / "shard.tar")
    with pytest.raises(InputError, match="is not a file"):
        TarShards(tmp_path / "shard.tar", 16)
