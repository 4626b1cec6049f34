"""Data sets by index, and the batches made of them: what was planted comes out, for every sharing of the work."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tarfile
import weakref
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from asymflow import streams
from asymflow.data.folder import ImageFolder
from asymflow.data.sample import Sample
from asymflow.data.shapes import COLORS, COUNTS, Shapes, make_scene, render
from asymflow.data.shards import TarShards, fingerprint, index_path, read_index, save_index
from asymflow.errors import InputError
from asymflow.pixels import UnreadableError, adm_crop
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.loader import ATTEMPTS, Batch, Batches, on_device, read_or_replace


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)


# ---- Batches ---------------------------------------------------------------------------------------------------------
class Planted:
    """Images that tell their index: label i, and random pixels of seed i. Some are corrupt."""

    def __init__(self, count, corrupt=()):
        self.count, self.num_classes, self.corrupt = count, count, set(corrupt)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.corrupt:
            raise UnreadableError(f"image {i} is broken")
        return Sample(as_tensor(pixels(i)), i, f"image {i}")


def configured(*settings):
    return load_config("shapes_tiny", ["train.global_batch_size=12", "data.flip=true", *settings])


def by_sample(batches, steps):
    """Everything about each sample of the first steps."""
    found = {}
    for k in range(steps * batches.accumulation):
        b = batches[k]
        for i, g in enumerate(b.samples):
            assert g not in found
            found[g] = (b.pixels[i], b.eps[i], b.labels[i], b.normal[i])
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(st.sampled_from([(1, 12), (1, 4), (2, 6), (2, 3), (2, 1), (3, 2), (4, 3), (12, 1)]), st.integers(0, 2**40))
def test_a_sample_is_the_same_however_the_batch_is_shared(sharing, seed):
    world, micro = sharing
    data = Planted(7, corrupt=[3])  # so that a step crosses epochs
    whole = by_sample(Batches(data, configured(f"train.seed={seed}"), 0, 1), steps=2)
    config = configured(f"train.seed={seed}", f"train.micro_batch_size={micro}")
    shared = [by_sample(Batches(data, config, rank, world), steps=2) for rank in range(world)]
    assert sorted(g for part in shared for g in part) == list(range(24))
    assert all(same(values, whole[g]) for part in shared for g, values in part.items())


def test_worker_processes_make_the_same_bits_from_any_step_on():
    runs = [
        list(Batches(Planted(30, corrupt=[4]), configured(f"data.workers={workers}"), 0, 1).run(first, 5))
        for workers, first in [(0, 0), (2, 3)]
    ]
    assert [batch.samples for batch in runs[0]] == [list(range(12 * k, 12 * k + 12)) for k in range(5)]
    assert len(runs[1]) == 2
    for one, two in zip(runs[0][3:], runs[1], strict=True):
        assert same((one.x0, one.eps, one.labels, one.normal), (two.x0, two.eps, two.labels, two.normal))
        assert (one.samples, one.problems) == (two.samples, two.problems)


def test_an_epoch_shows_each_image_once():
    batches = Batches(Planted(36), configured("loss.label_dropout=0"), 0, 1)
    labels = torch.cat([batches[k].labels for k in range(6)])
    assert labels[:36].sort().values.tolist() == labels[36:].sort().values.tolist() == list(range(36))
    assert labels[:36].tolist() != labels[36:].tolist()


def test_pixels_are_scaled_and_mirrored_as_drawn():
    config, data = configured("train.global_batch_size=600", "loss.label_dropout=0"), Planted(600)
    batch = Batches(data, config, 0, 1)[0]
    assert batch.x0.dtype == torch.float32
    assert (batch.x0.min(), batch.x0.max()) == (-1, 1)
    assert torch.equal(((batch.x0 + 1) * 127.5).round(), batch.pixels.float())
    originals = torch.stack([data[i].image for i in batch.labels.tolist()])
    mirrored = (batch.pixels == originals.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(batch.pixels == originals).flatten(1).all(1))
    assert abs(mirrored.sum() - 300) < 4 * 150**0.5
    assert mirrored.tolist() == [streams.draws(config.train.seed, g).flip < 0.5 for g in batch.samples]
    never = Batches(data, configured("train.global_batch_size=600", "data.flip=false", "loss.label_dropout=0"), 0, 1)[0]
    assert torch.equal(never.pixels, originals)


@pytest.mark.parametrize("rate", [0, 0.1, 1])
def test_dropped_labels_become_no_class_of_the_model(rate):
    settings = ["model.num_classes=50", f"loss.label_dropout={rate}", "train.global_batch_size=1000"]
    labels = Batches(Planted(16), configured(*settings), 0, 1)[0].labels  # more classes in the model than in the data
    dropped = labels == 50
    assert abs(dropped.sum() - 1000 * rate) <= 4 * (1000 * rate * (1 - rate)) ** 0.5
    assert labels.dtype == torch.int64
    assert ((labels < 16) | dropped).all()


def test_noise_has_the_scale_of_the_model_and_is_of_each_sample():
    settings = ["train.global_batch_size=100"]
    one = Batches(Planted(1), configured(*settings), 0, 1)[0]
    two = Batches(Planted(1), configured(*settings, "model.noise_scale=2"), 0, 1)[0]
    assert torch.equal(two.eps, 2 * one.eps)
    assert one.eps.std() == pytest.approx(1, abs=5 / (2 * one.eps.numel()) ** 0.5)
    assert len(one.eps.flatten(1).unique(dim=0)) == 100
    assert stats.kstest(one.normal, "norm").pvalue > 1e-3
    assert torch.equal(one.normal, two.normal)


@given(st.sets(st.integers(0, 9), max_size=9), st.integers(0, 2**40))
def test_a_corrupt_image_is_replaced_and_reported(corrupt, seed):
    data, problems = Planted(10, corrupt), []
    for g in range(10):
        before = len(problems)
        first = streams.image_index(seed, g, 10)
        label = read_or_replace(data, seed, g, problems).label
        assert label not in corrupt
        assert (label == first) == (first not in corrupt)
        assert problems[before : before + 1] == ([f"image {first} is broken"] if first in corrupt else [])
        assert read_or_replace(data, seed, g, []).label == label
    assert len(problems) >= len(corrupt)


def test_replacements_differ_from_sample_to_sample():
    labels = [read_or_replace(Planted(1000, range(500)), 0, g, []).label for g in range(1000)]
    assert max(Counter(labels).values()) < 10


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_images_in_a_row_are_an_error_of_one_line(workers):
    batches = Batches(Planted(10, range(10)), configured(f"data.workers={workers}"), 0, 1)
    with pytest.raises(
        InputError, match=f"^{ATTEMPTS} images in a row could not be read; the last: image . is broken$"
    ):
        next(batches.run(0, 3))


def test_workers_outlive_the_signals_of_a_scheduler():
    stream = Batches(Planted(10), configured("data.workers=1"), 0, 1).run(0, 10)
    next(stream)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(stream)) == 9
    worker.join(300)
    assert worker.exitcode == 0


def test_a_batch_moves_with_all_it_has():
    batch = Batches(Planted(5, [1]), configured(), 0, 1)[0]
    moved = batch.to(torch.device("meta"))
    assert {moved.x0.device.type, moved.eps.device.type, moved.labels.device.type, moved.normal.device.type} == {"meta"}
    assert (moved.samples, moved.problems) == (batch.samples, batch.problems)
    assert batch.problems


# ---- To the GPU ------------------------------------------------------------------------------------------------------
class Stream:
    """A stream of a GPU that does nothing, but knows of each of its operations what is sure to be over before it."""

    current = None

    def __init__(self, device=None):
        self.over, self.before = frozenset(), {}

    def run(self, operation):
        self.before.setdefault(operation, self.over)
        self.over |= {operation}

    def wait_stream(self, other):
        self.over |= other.over

    def record_event(self):
        return self.over

    def wait_event(self, event):
        self.over |= event

    def synchronize(self):
        pass


class OnGPU(torch.Tensor):
    def copy_(self, source, non_blocking=False):
        assert non_blocking
        Stream.current.run(f"copy {int(source.flatten()[0])}")
        return super().copy_(source)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of `Stream`s: the one that computes, the one that copies, and (weakly) the tensors there."""
    streams_made, tensors = [], weakref.WeakSet()

    @contextmanager
    def on(stream):
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    def empty_like(tensor, device):
        assert Stream.current is compute  # which the memory belongs to
        made = torch.empty(tensor.shape, dtype=tensor.dtype).as_subclass(OnGPU)
        tensors.add(made)
        return made

    def make(device):
        streams_made.append(Stream())
        return streams_made[-1]

    compute = Stream.current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return SimpleNamespace(compute=compute, made=streams_made, tensors=tensors, device=torch.device("cuda"))


def numbered(count, log, fault=None):
    """Batches whose tensors all hold their number; then perhaps a fault."""
    for k in range(count):
        log.append(f"made {k}")
        yield Batch(*(torch.full((2,), k) for _ in range(4)), samples=[k], problems=[])
    if fault:
        raise fault


def test_a_gpu_copies_the_next_batch_while_it_computes_with_this_one(gpu):
    log, count, most = [], 6, 0
    for k, batch in enumerate(on_device(numbered(count, log), gpu.device)):
        gpu.compute.run(f"compute {k}")
        log.append(f"got {k}")
        assert batch.pixels.tolist() == batch.normal.tolist() == [k, k]
        assert batch.samples == [k]
        most = max(most, len(gpu.tensors))
    (copies,) = gpu.made
    assert most == 2 * 4  # tensors: those of this batch, and of the next
    for k in range(count):
        assert f"copy {k}" in gpu.compute.before[f"compute {k}"]
        assert f"copy {k + 1}" not in gpu.compute.before[f"compute {k}"]
        assert f"compute {k - 1}" not in copies.before[f"copy {k}"]  # they run side by side
        assert k < 2 or f"compute {k - 2}" in copies.before[f"copy {k}"]  # whose memory it may be
    assert log == ["made 0", *(what for k in range(5) for what in (f"made {k + 1}", f"got {k}")), "got 5"]


def test_what_goes_wrong_comes_in_its_turn_and_what_is_not_used_is_waited_for(gpu):
    stream = on_device(numbered(2, [], InputError("the third")), gpu.device)
    assert [next(stream).samples, next(stream).samples] == [[0], [1]]
    with pytest.raises(InputError, match="the third"):
        next(stream)
    assert list(on_device(numbered(0, []), gpu.device)) == []
    assert [batch.samples for batch in on_device(numbered(1, []), gpu.device)] == [[0]]
    stream = on_device(numbered(3, []), gpu.device)
    next(stream)
    assert "copy 1" in gpu.made[-1].over
    gpu.compute.over = frozenset()
    stream.close()
    assert "copy 1" in gpu.compute.over  # before others get its memory


def test_on_a_cpu_nothing_is_made_ahead():
    log = []
    stream = on_device(numbered(3, log), torch.device("cpu"))
    for k in range(3):
        assert next(stream).samples == [k]
        assert log == [f"made {i}" for i in range(k + 1)]


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

    refused(tmp_path / "none", "is not a folder")
    refused(folder / "a/1.png", "is not a folder")
    refused(folder / "c", "c/0.png is in no class")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no folders in it")
    (tmp_path / "empty/0.tar").touch()
    refused(tmp_path / "empty", "data.kind webdataset")
    (folder / "bb").mkdir()
    refused(folder, "bb has no images")


# ---- Shards ----------------------------------------------------------------------------------------------------------
def png(array, kind="png"):
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind)
    return content.getvalue()


def write_tar(path, contents):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


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
        assert said.startswith("the index of 2 shards could not be kept, so the next start reads their headers again")
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


@pytest.mark.parametrize("make", [TarShards, ImageFolder])
def test_a_machine_with_other_files_is_found(make, folder, shards):
    made = pickle.loads(pickle.dumps(make({TarShards: shards, ImageFolder: folder}[make], 8)))
    made.check()
    changes = {
        TarShards: [lambda: write_tar(shards / "01.tar", [("5.png", png(pixels(5)))]), (shards / "01.tar").unlink],
        ImageFolder: [(folder / "d").mkdir, lambda: shutil.rmtree(folder)],
    }
    for change in changes[make]:
        change()
        with pytest.raises(InputError, match=r"01\.tar is (another|missing)|has other classes here|is not a folder"):
            made.check()


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
        data = make(kind, f"data.path={path}")  # the model may have more classes
        assert data[0].image.shape == (3, 32, 32)
        make(kind, f"data.path={path}", f"model.num_classes={classes}")
        with pytest.raises(InputError, match=f"{path} has {classes} classes, but model.num_classes is {classes - 1}"):
            make(kind, f"data.path={path}", f"model.num_classes={classes - 1}")


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
