"""Micro-batches by number. Each is made from the seed and the numbers of its samples, so it can be made again."""

import errno
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from asymflow import streams
from asymflow.data.sample import Sample
from asymflow.errors import InputError
from asymflow.extensions import is_own
from asymflow.training.config.derived import batch_sizes
from asymflow.training.config.reading import Config
from asymflow.training.run.signals import ignore

ATTEMPTS = 100  # unreadable images in a row before giving up
# Workers are forked: they start at once, share the memory of the list of images, and inherit the signal handlers. They
# do not use what a fork breaks: the GPU, the process group, torch's threads. Python 3.14's default is a fork server; a
# SIGTERM that a scheduler sends to all processes would kill it, and the workers with it. (macOS cannot fork safely.)
START = "fork" if sys.platform == "linux" else None
T = TypeVar("T")


@dataclass
class Batch:
    """A micro-batch.

    pixels: (B, C, H, W) uint8. eps: (B, C, H, W) float32, the noise, times the model's noise scale. labels: (B,), after
    label dropout. normal: (B,) standard normal numbers, from which the loss makes noise levels. samples: the numbers of
    the samples, counted from the start of the training. problems: "name: reason" of images that could not be read.
    """

    pixels: Tensor
    eps: Tensor
    labels: Tensor
    normal: Tensor
    samples: list[int]
    problems: list[str]

    @property
    def x0(self) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1]. Not stored, because bytes are faster to send to the GPU than floats."""
        return self.pixels.float().div_(127.5).sub_(1)

    def to(self, device: torch.device) -> "Batch":
        return self.map_tensors(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader. `on_device` can copy beside a computation only from pinned memory."""
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(change(value) if isinstance(value, Tensor) else value for value in values))


class Batches(torch.utils.data.Dataset):
    """Item k is the k-th micro-batch of this rank, counted from the start of the training."""

    def __init__(self, dataset, config: Config, rank: int, world: int):
        self.dataset, self.config, self.rank, self.world = dataset, config, rank, world
        self.micro, self.accumulation = batch_sizes(config, world)
        self.own = is_own(config.data.kind)  # the others have been checked

    def __getitem__(self, k: int) -> Batch:
        c = self.config
        step, part = divmod(k, self.accumulation)
        share = streams.share(step, c.train.global_batch_size, self.rank, self.world)
        samples = list(share[part * self.micro : (part + 1) * self.micro])
        problems = []
        images, labels, normals = [], [], []
        for sample in samples:
            picked = read_or_replace(self.dataset, c.train.seed, sample, problems)
            drawn = streams.draws(c.train.seed, sample)
            images.append(picked.image.flip(-1) if c.data.flip and drawn.flip < 0.5 else picked.image)
            if self.own and not 0 <= picked.label < c.model.num_classes:
                raise InputError(f"{picked.name} has the class {picked.label}, not one of model.num_classes")
            labels.append(c.model.num_classes if drawn.drop < c.loss.label_dropout else picked.label)
            normals.append(drawn.normal)
        pixels = torch.stack(images)
        eps = torch.empty(pixels.shape)
        for sample, out in zip(samples, eps, strict=True):
            streams.noise(c.train.seed, sample, out)
        eps.mul_(c.model.noise_scale)
        return Batch(pixels, eps, torch.tensor(labels), torch.tensor(normals), samples, problems)

    def run(self, first: int, last: int) -> Iterator[Batch]:
        """Micro-batches first to last - 1, made ahead of time by `data.workers` processes. Raises what they raise."""
        workers = self.config.data.workers
        loader = DataLoader(
            Outcomes(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=init_worker,
            multiprocessing_context=START if workers else None,
            # Not torch's global generator: DataLoader draws a number from it, which would change the dropout masks.
            generator=torch.Generator(),
        )
        for outcome in outcomes_of(loader):
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


# ---- To the GPU ------------------------------------------------------------------------------------------------------
def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches, on `device`. A GPU copies the next batch while it computes with the last one yielded.

    So a GPU holds two batches, and for a moment a third, until the caller drops the old one. An error of `batches` is
    raised only after all batches before it have been yielded.

    The copies run on a stream of their own, into memory that is allocated on the computing stream, and the streams wait
    for each other. So `record_stream` is not needed; it would free memory too late when the CPU runs ahead of the GPU
    (see the warning in torch's documentation).
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    compute, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def begin(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        copies.synchronize()  # never more than one batch ahead of the GPU, else pinned memory would pile up

        def copy(tensor: Tensor) -> Tensor:
            there = torch.empty_like(tensor, device=device)
            copies.wait_stream(compute)  # it may still be reading an earlier batch from this memory
            with torch.cuda.stream(copies):
                return there.copy_(tensor, non_blocking=True)

        return batch.map_tensors(copy), copies.record_event()

    def finish(begun: tuple[Batch, torch.cuda.Event]) -> Batch:
        compute.wait_event(begun[1])
        return begun[0]

    try:
        yield from map(finish, one_ahead(map(begin, batches)))
    finally:
        compute.wait_stream(copies)  # a batch that was never yielded is freed now, and its copy may still be running


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, but always fetch the next one first. An error is raised after the items before it."""
    waiting, end = deque(), None
    while end is None:
        try:
            waiting.append(next(items))
        except Exception as e:
            end = e
        if len(waiting) == 2 or (waiting and end):
            yield waiting.popleft()
    if not isinstance(end, StopIteration):
        raise end


# ---- In worker processes ---------------------------------------------------------------------------------------------
def outcomes_of(loader: DataLoader) -> Iterator:
    """What the workers made. Raises RuntimeError if a worker dies, even while it sends its result."""
    try:
        yield from begun(loader)
    except (ConnectionError, EOFError) as e:
        raise RuntimeError(f"DataLoader worker (pid unknown) exited unexpectedly: {e}") from None


def begun(loader: DataLoader) -> Iterator:
    """The workers of a loader at work. Raises OSError if there is no shared memory even for their locks."""
    try:
        return iter(loader)
    except OSError as e:
        raise too_little_shared_memory(e) if e.errno == errno.ENOSPC else e from None


def in_shared_memory(batch: Batch) -> Batch:
    """Move its tensors there. Raises OSError if there is too little of it.

    DataLoader would do the same, but in a thread that prints an error and goes on without the batch: the training would
    wait for it without end.
    """
    try:
        return batch.map_tensors(Tensor.share_memory_)
    except RuntimeError as e:
        raise too_little_shared_memory(e) from None


def too_little_shared_memory(e: Exception) -> OSError:
    reason = " ".join(str(e).split())
    return OSError(
        f"a process that reads images cannot hand over a batch through shared memory ({reason}): make /dev/shm larger "
        "(docker run --shm-size 8g), or set fewer data.workers; data.workers=0 needs none"
    )


class Outcomes(torch.utils.data.Dataset):
    """Returns `batches[k]`, or the InputError or OSError that it raises.

    The error is returned, not raised, because DataLoader adds the worker's traceback to the message of what is raised.
    """

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, k: int) -> Batch | InputError | OSError:
        try:
            batch = self.batches[k]
            return in_shared_memory(batch) if get_worker_info() else batch
        except (InputError, OSError) as e:
            return e


def init_worker(worker: int) -> None:
    """Runs first in each worker."""
    ignore()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait, in a thread of a worker, for the training process to end, even if it is killed; then end the worker.

    DataLoader's workers check only every five seconds whether their parent lives, and under a fork server not at all.
    Meanwhile a forked worker would keep the connections of its parent open, and the other ranks would think it lives.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def read_or_replace(dataset, seed: int, sample: int, problems: list[str]) -> Sample:
    """The image of sample number `sample`. If it cannot be read, another one, which depends on seed and number alone.

    Adds what could not be read to `problems`. Raises InputError after `ATTEMPTS` unreadable images.
    """
    index = streams.image_index(seed, sample, len(dataset))
    replacements = streams.generator(seed, streams.REPLACEMENT, sample)
    for _ in range(ATTEMPTS):
        try:
            return dataset[index]
        except InputError as e:
            problems.append(str(e))
            index = int(replacements.integers(len(dataset)))
    raise InputError(f"{ATTEMPTS} images in a row could not be read; the last: {problems[-1]}")
