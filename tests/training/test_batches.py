"""Batches: the same for every sharing of the work, and copied beside the computation."""

import multiprocessing
import os
import resource
import signal
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_data import as_tensor, pixels
from scipy import stats

from asymflow import streams
from asymflow.data.sample import Sample
from asymflow.entries import UnreadableError
from asymflow.errors import InputError
from asymflow.training.config.reading import load_config
from asymflow.training.loader import ATTEMPTS, Batch, Batches, on_device, read_or_replace


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


class TakesTheSharedMemory(Planted):
    """From the image of sample `at` on, a worker can make no file of shared memory of more than a few bytes."""

    def __init__(self, count, at):
        super().__init__(count)
        self.left = at

    def __getitem__(self, i):
        if self.left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        self.left -= 1
        return super().__getitem__(i)


@pytest.fixture
def guard():
    """An error after a minute, instead of waiting without end."""

    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit does not hold for shared memory")
@pytest.mark.parametrize("whole", [0, 2])
def test_too_little_shared_memory_is_an_error_of_one_line_after_the_batches_before(guard, whole):
    batches = Batches(TakesTheSharedMemory(36, at=12 * whole), configured("data.workers=1"), 0, 1)
    stream = batches.run(0, 3)
    assert [next(stream).samples[0] for _ in range(whole)] == [12 * k for k in range(whole)]
    with pytest.raises(OSError, match=r"through shared memory .*File too large.*: make /dev/shm larger") as error:
        next(stream)
    assert len(str(error.value).splitlines()) == 1


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
