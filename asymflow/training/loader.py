"""Micro-batches by number: what a rank trains on in micro-step k, drawn anew from (seed, index) each time."""

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
from torch.utils.data import DataLoader

from asymflow import streams
from asymflow.data.sample import Sample
from asymflow.errors import InputError
from asymflow.training.config.derived import batch_sizes
from asymflow.training.config.reading import Config
from asymflow.training.run.signals import ignore

ATTEMPTS = 100  # images in a row that may be unreadable
# Forked workers share the list of a million images, start at once, and take over the handlers of signals. They never
# use what a fork breaks: the GPU, the process group, the threads of torch. Python 3.14 would start a server for them,
# which dies of the SIGTERM that a scheduler sends to all processes, and they with it. (macOS cannot fork safely.)
START = "fork" if sys.platform == "linux" else None
T = TypeVar("T")


@dataclass
class Batch:
    """pixels: (B, C, H, W) uint8. eps: (B, C, H, W) float32, with the noise scale of the model.

    labels: (B,), after label dropout. normal: (B,) standard normal, of the noise level. samples: their indices in the
    training. problems: what could not be read, "name: reason".
    """

    pixels: Tensor
    eps: Tensor
    labels: Tensor
    normal: Tensor
    samples: list[int]
    problems: list[str]

    @property
    def x0(self) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1]. Not stored: the way from the worker to the GPU is shorter for bytes."""
        return self.pixels.float().div_(127.5).sub_(1)

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: only from pinned memory can `on_device` copy while the GPU computes."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(change(value) if isinstance(value, Tensor) else value for value in values))


class Batches(torch.utils.data.Dataset):
    """Item k is the k-th micro-batch of this rank, counted from the start of the training."""

    def __init__(self, dataset, config: Config, rank: int, world: int):
        self.dataset, self.config, self.rank, self.world = dataset, config, rank, world
        self.micro, self.accumulation = batch_sizes(config, world)

    def __getitem__(self, k: int) -> Batch:
        c = self.config
        step, part = divmod(k, self.accumulation)
        share = streams.share(step, c.train.global_batch_size, self.rank, self.world)
        samples = list(share[part * self.micro : (part + 1) * self.micro])
        problems = []
        images, labels, normals = [], [], []
        for sample in samples:
            picked = read(self.dataset, c.train.seed, sample, problems)
            drawn = streams.draws(c.train.seed, sample)
            images.append(picked.image.flip(-1) if c.data.flip and drawn.flip < 0.5 else picked.image)
            if not 0 <= picked.label < c.model.num_classes:
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
        """Items first to last - 1, made ahead of time by `data.workers` processes. Raises what they raise."""
        workers = self.config.data.workers
        loader = DataLoader(
            Outcomes(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin,
            multiprocessing_context=START if workers else None,
            # Of its own: it draws a seed when it begins, in the first step, and torch's is seeded for dropout by then.
            generator=torch.Generator(),
        )
        for outcome in handed_over(loader):
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


# ---- To the GPU ------------------------------------------------------------------------------------------------------
def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on `device`. A GPU copies the next one while it computes with the one that was handed over.

    So there are two batches on a GPU, and for a moment a third: the one that the caller lets go of when it asks for the
    next. What `batches` raises is raised in its turn, after the batches before it.

    The copies run on a stream of their own. Their memory is allocated on the stream that computes, and the two streams
    wait for each other, so the allocator needs no `record_stream`, whose memory is not given back in time by a CPU that
    runs ahead of the GPU: see the warning in torch's documentation of it.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    compute, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def begin(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        copies.synchronize()  # at most one batch ahead of the GPU: else pinned memory would pile up

        def copy(tensor: Tensor) -> Tensor:
            there = torch.empty_like(tensor, device=device)
            copies.wait_stream(compute)  # which may still use this memory, for an earlier batch
            with torch.cuda.stream(copies):
                return there.copy_(tensor, non_blocking=True)

        return batch.each(copy), copies.record_event()

    def finish(begun: tuple[Batch, torch.cuda.Event]) -> Batch:
        compute.wait_event(begun[1])
        return begun[0]

    try:
        yield from map(finish, one_ahead(map(begin, batches)))
    finally:
        compute.wait_stream(copies)  # if the last one is never handed over, its memory is free for others only then


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items. Each is asked for before the one before it is handed over; an error is raised in its turn."""
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
def handed_over(loader: DataLoader) -> Iterator:
    """What it gives. A worker that dies is a RuntimeError, also if it dies as it hands something over."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as e:
        raise RuntimeError(f"DataLoader worker (pid unknown) exited unexpectedly: {e}") from None


class Outcomes(torch.utils.data.Dataset):
    """What `batches[k]` returns, or what is no fault of ours: raised in a worker, it would come with its traceback."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, k: int) -> Batch | InputError | OSError:
        try:
            return self.batches[k]
        except (InputError, OSError) as e:
            return e


def begin(worker: int) -> None:
    """What a worker does first."""
    ignore()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker may wait for work, or to be rid of it: this thread waits for the end of the training, also if killed.

    DataLoader looks only every five seconds whether the parent is still there, and under a fork server not even that.
    Meanwhile a forked worker would hold the connections of the training open, and the other ranks think that it lives.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def read(dataset, seed: int, sample: int, problems: list[str]) -> Sample:
    """The image of a sample of the training; if it cannot be read, another one, always the same.

    What could not be read is added to `problems`. InputError after `ATTEMPTS` of them.
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
