"""The process of `Trainings`: runs `asymflow.training.start.main` for each line on stdin, and looks on.

Nothing of the training is replaced: the watch begins when `Training.fit` is entered, and ends with it. The exceptions
are what `Watch` is told to do.
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

WARM = 3  # forward passes after which nothing is to be compiled any more


class Watch:
    """What is seen of one training, in `found`; and what it is made to do other than train, for the measurement:

    kill_at: the forward pass (1, 2, ...) before which the process kills itself. deterministic: torch's switch.
    unsaved: no checkpoint is written (a JiT-H's has 23 GB). resident: the first batch again and again, from the memory
    of the GPU. dtypes: note those of activations and weights. states: note the bytes of the tensors that it keeps.
    random_base: the transformer is not read, but drawn on the GPU, in the sizes of the configuration that is there.
    loading: the loader makes batches to the very end, also such as are not trained on: else its processes would have
    nothing to do in the last steps, which are faster then.
    guided: time so many guided evaluations of a finetuned model afterwards. profiled: note what the last step spent
    its time in.
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
                from asymflow.bench.flux2 import random_transformer
                from asymflow.training.objectives import finetuning

                changes.enter_context(mock.patch.object(finetuning, "load_transformer", random_transformer))
            if self.deterministic:
                torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's buckets have gigabytes
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
            from asymflow.bench.flux2 import guided_seconds

            self.found["guided_seconds"] = guided_seconds(training, self.guided)
        training.engine.destroy()  # else its hooks keep all weights: the next training would find them on the GPU

    def grown(self) -> int | None:
        """Bytes that are allocated on the GPU since the watch began."""
        return None if self.at_start is None else allocated() - self.at_start

    def note_dtypes(self, module: torch.nn.Module) -> None:
        """Of what goes out of linear layers, which are where autocast acts."""
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
    """Bytes of the tensors that a training keeps, by kind, each memory once; those of stage 3 are in pieces."""
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
    """By each kernel of the GPU, or operator of a CPU: the longest first."""
    seconds = lambda e: (e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total) / 1e6
    kinds = [{"name": e.key[:120], "calls": e.count, "seconds": seconds(e)} for e in seen.key_averages()]
    return sorted(kinds, key=lambda kind: -kind["seconds"])


def allocated() -> int | None:
    """Bytes, as they were asked for: without what the allocator adds to each."""
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0) if torch.cuda.is_available() else None


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def lines() -> Iterator[dict]:
    """Of stdin. When that is closed, whoever asked is gone, and so is this process, whatever it is doing."""
    tasks: queue.Queue[str] = queue.Queue()
    given = os.fdopen(os.dup(sys.stdin.fileno()))  # a fork closes sys.stdin, and would wait for the thread

    def read() -> None:
        while line := given.readline():
            tasks.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(tasks.get())


def main(descriptor: int) -> None:
    dist.destroy_process_group = lambda: None  # DeepSpeed would not find its way in the next group
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
