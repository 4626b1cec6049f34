"""The process of `Trainings`: runs `asymflow.training.start.main` for each line on stdin, and observes the training.

It observes from the beginning to the end of `Training.fit`, and changes nothing, except what the arguments of `Watch`
ask for.
"""

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from asymflow.bench.trainings import synchronize
from asymflow.training import start
from asymflow.training.loop import Training
from asymflow.training.zero import internals as deepspeed_internals
from asymflow.training.zero import shards

WARM = 3  # forward passes, after which nothing more may be compiled


class Watch:
    """Observes one training, and keeps what it saw in `found`. Arguments change the training, or say what to observe:

    kill_at: kill the process before this forward pass (1, 2, ...). deterministic: use deterministic algorithms.
    unsaved: write no checkpoint (a JiT-H's has 23 GB). resident: train on the first batch again and again, without the
    loader. dtypes: note the dtypes of activations and weights. states: note the bytes of the tensors that the training
    keeps. random_base: do not read the transformer, but make a random one of its configuration, on the GPU.
    loading: let the loader make batches to the very end, more than are trained on. Otherwise its processes have nothing
    to do during the last steps, which are then faster. guided: afterwards, time so many guided evaluations of a
    finetuned model. profiled: note what the last step spent its time in.
    """

    def __init__(
        self,
        kill_at: int | None = None,
        deterministic: bool = False,
        unsaved: bool = False,
        resident: bool = False,
        dtypes: bool = False,
        states: bool = False,
        random_base: bool = False,
        guided: int = 0,
        profiled: bool = False,
        loading: bool = False,
    ):
        self.kill_at, self.deterministic, self.unsaved, self.resident = kill_at, deterministic, unsaved, resident
        self.dtypes, self.states, self.random_base, self.guided = dtypes, states, random_base, guided
        self.profiled, self.loading = profiled, loading
        self.found, self.passes, self.graphs, self.at_start = {"memory": {}}, 0, None, allocated()

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        """A context in which trainings are observed."""
        fit, watch = Training.fit, self

        def watched(training: Training):
            watch.before(training)
            ending = fit(training)
            watch.after(training)
            return ending

        with ExitStack() as changes:
            changes.enter_context(mock.patch.object(Training, "fit", watched))
            if self.unsaved:
                changes.enter_context(mock.patch.object(Training, "save", return_value=None))
            if self.random_base:
                from asymflow.bench.finetuning import random_transformer
                from asymflow.training.objectives import finetuning

                changes.enter_context(mock.patch.object(finetuning, "load_transformer", random_transformer))
            if self.deterministic:
                torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill gigabytes of buckets
                torch.use_deterministic_algorithms(True, warn_only=True)
                changes.callback(torch.use_deterministic_algorithms, False)
            yield

    def before(self, training: Training) -> None:
        module = training.engine.module
        self.found |= {"device": str(training.device), "begun_at": training.step}
        if self.dtypes:
            self.note_dtypes(module)
        if self.states:
            self.found["states"] = states(training)
        if self.resident:
            self.make_resident(training)
        if self.loading:
            keep_loading(training)
        if self.profiled:
            self.profile_last(training)
        module.register_forward_pre_hook(self.each_pass)
        self.found["memory"]["before"] = self.grown()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def each_pass(self, *_) -> None:
        self.passes += 1
        if self.passes == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.passes == WARM + 1:
            self.graphs = compiled_graphs()

    def after(self, training: Training) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.found["memory"]["peak"] = torch.cuda.memory_stats()["requested_bytes.all.peak"] - self.at_start
            self.found["memory"]["reserved"] = torch.cuda.max_memory_reserved()
        self.found["memory"]["after"] = self.grown()
        if self.graphs is not None:
            self.found["graphs"] = {"warm": self.graphs, "end": compiled_graphs()}
        if self.guided:
            from asymflow.bench.finetuning import guided_seconds

            self.found["guided_seconds"] = guided_seconds(training, self.guided)
        training.engine.destroy()  # else its hooks keep all weights on the GPU during the next training

    def grown(self) -> int | None:
        """How many more bytes are allocated on the GPU than when this object was made."""
        return None if self.at_start is None else allocated() - self.at_start

    def note_dtypes(self, module: torch.nn.Module) -> None:
        """Note the dtypes of the weights, and of the outputs of linear layers, where autocast acts."""
        seen = self.found["dtypes"] = {"weights": [], "linear": []}

        def note(kind: str, dtype: torch.dtype) -> None:
            if (name := str(dtype).removeprefix("torch.")) not in seen[kind]:
                seen[kind].append(name)

        for p in module.parameters():
            note("weights", p.dtype)
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda layer, given, out: note("linear", out.dtype))

    def profile_last(self, training: Training) -> None:
        one_step, last = training.one_step, training.config.train.steps
        kind = ProfilerActivity.CUDA if training.device.type == "cuda" else ProfilerActivity.CPU

        def watched(stream: Iterator) -> str | None:
            if training.step + 1 < last:
                return one_step(stream)
            with profile(activities=[kind]) as seen:
                stopped_by = one_step(stream)
                synchronize(training.device)
            self.found["spent"] = spent(seen, training.device)
            return stopped_by

        training.one_step = watched

    def make_resident(self, training: Training) -> None:
        batches = training.objective.batches(training.dataset, training.rank, training.world)
        batch = batches[0].to(training.device)
        repeated = mock.Mock()
        repeated.run = lambda first, last: (batch for _ in range(first, last))
        training.objective.batches = lambda *_: repeated


def keep_loading(training: Training) -> None:
    batches = training.objective.batches

    def more(*args: object) -> mock.Mock:
        made = batches(*args)
        return mock.Mock(run=lambda first, last: made.run(first, last + 2 * training.config.data.workers))

    training.objective.batches = more


def states(training: Training) -> dict[str, int]:
    """Bytes of the tensors that a training keeps, by kind. Memory that tensors share counts once."""
    module, held = training.engine.module, shards.held_fragments(training.engine)
    kinds = {
        "weights": [deepspeed_internals.held_part(p) for p in module.parameters()],
        "buffers": list(module.buffers()),
        "master_weights": [f.weight for f in held],
        "adam": [moment for f in held for moment in f.moments.values()],
        "ema": [value for values in training.averages.values.values() for value in values],
    }
    seen, sizes = set(), {}
    for kind, tensors in kinds.items():
        sizes[kind] = 0
        for tensor in tensors:
            if (place := (str(tensor.device), tensor.data_ptr())) not in seen and tensor.numel():
                seen.add(place)
                sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


def spent(seen: profile, device: torch.device) -> list[dict]:
    """The calls and seconds of each kernel of a GPU, or operator of a CPU, longest first."""
    seconds = lambda e: (e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total) / 1e6
    kinds = [{"name": e.key[:120], "calls": e.count, "seconds": seconds(e)} for e in seen.key_averages()]
    return sorted(kinds, key=lambda kind: -kind["seconds"])


def allocated() -> int | None:
    """Bytes allocated on the GPU, as requested, without what the allocator adds to each request. None on a CPU."""
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0) if torch.cuda.is_available() else None


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def lines() -> Iterator[dict]:
    """The tasks on stdin. When stdin is closed, the parent is gone, and this process ends, whatever it is doing."""
    tasks: queue.Queue[str] = queue.Queue()
    given = os.fdopen(os.dup(sys.stdin.fileno()))  # a copy: a forked worker closes sys.stdin, and would wait for `read`

    def read() -> None:
        while line := given.readline():
            tasks.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(tasks.get())


def main(descriptor: int) -> None:
    dist.destroy_process_group = lambda: None  # keep one group for all trainings: DeepSpeed cannot change to another
    with os.fdopen(descriptor, "w") as answers:
        for task in lines():
            arguments = task.pop("arguments")
            print("##", *arguments, flush=True)
            watch, started = Watch(**task), time.perf_counter()
            with watch.looking_on():
                code = start.main(arguments)
            found = watch.found | {"code": code, "seconds": time.perf_counter() - started}
            del watch
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            torch._dynamo.reset()
            print(json.dumps(found), file=answers, flush=True)
