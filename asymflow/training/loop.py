"""The training loop."""

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from asymflow import files, streams
from asymflow.averages import Profile
from asymflow.cost import peak_flops
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.pictures import image_grid
from asymflow.training.config.derived import batch_sizes, bf16_weights, sampling_precision
from asymflow.training.config.reading import Config
from asymflow.training.evaluate import Evaluation, gathered
from asymflow.training.loader import Batch, on_device
from asymflow.training.objectives import Objective
from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run
from asymflow.training.run.checkpoint import Piece
from asymflow.training.run.problems import Problems
from asymflow.training.run.progress import Progress
from asymflow.training.run.ranks import AgreedError, on_first
from asymflow.training.run.signals import CAUGHT, Signals
from asymflow.training.zero import internals, shards
from asymflow.training.zero.averages import Averages
from asymflow.training.zero.engine import averaged, make_engine, set_learning_rate, step_if_finite


class Training:
    """One run: the engine, its averages, its data, and the folder that they are kept in.

    `step` counts the steps that are done. Everything that a further step depends on is in the checkpoint, or a function
    of the configuration and the step.
    """

    def __init__(self, config: Config, out: Path, flow: AsymFlow, dataset, device: torch.device, objective: Objective):
        self.config, self.out, self.device = config, out, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.micro, self.accumulation = batch_sizes(config, self.world)
        self.autocast = config.train.precision == "bf16" and not bf16_weights(config)
        self.dataset, self.objective = dataset, objective
        self.peak = peak_flops(device)
        self.flops = objective.flops() if self.peak else None  # counted only where it is of use: that takes seconds
        self.term_weights = torch.tensor(objective.weights, device=device)
        flow = objective.model(flow)
        self.shapes = {name: tuple(p.shape) for name, p in flow.named_parameters() if p.requires_grad}
        if self.autocast:  # inside of the engine, which on GPUs switches off what is entered outside of it
            usual, in_bf16 = flow.forward, torch.autocast(device.type, torch.bfloat16)(flow.forward)
            # Samples are drawn in a precision of their own, see `sampling_precision`.
            flow.forward = lambda *args, **conditions: (in_bf16 if flow.training else usual)(*args, **conditions)
        self.engine = make_engine(flow.to(device).train(), config, out)
        profiles = [Profile(decay=d) for d in config.ema.decays] + [Profile(sigma_rel=w) for w in config.ema.sigma_rel]
        self.averages = Averages(shards.owned_fragments(self.engine), profiles)
        self.evaluation = Evaluation(config, dataset, out, device) if config.evaluate.every else None
        self.step, self.skipped, self.how_resumed = 0, 0, ""

    # ---- Steps -------------------------------------------------------------------------------------------------------
    def fit(self) -> str | None:
        """Train to the configured number of steps and save. Returns the name of the signal that ended it early."""
        c = self.config
        first, last = self.step * self.accumulation, c.train.steps * self.accumulation
        batches = self.objective.batches(self.dataset, self.rank, self.world).run(first, last)
        stream = on_device(self.waited_for(batches), self.device)
        with Signals() as self.signals, Progress(c, self.step, silent=self.rank > 0) as self.progress:
            if self.due(c.sample.every) and on_first(lambda: not self.picture().exists()):
                self.draw()  # the first, or one that was not drawn yet when the training was stopped or killed
            if self.step > 0 and self.due(c.evaluate.every):  # stopped before it was done, or only now asked for
                self.evaluate()
            stopped_by = self.signalled()
            while self.step < c.train.steps and not stopped_by:
                stopped_by = self.one_step(stream)
                if self.due(c.ema.snapshot_every):
                    self.snapshot()
                if stopped_by or self.due(c.checkpoint.every) or self.due(c.evaluate.every):
                    self.save()
                if self.due(c.sample.every) and not stopped_by:
                    self.draw()
                if self.due(c.evaluate.every) and not stopped_by:
                    self.evaluate()
                    stopped_by = self.signalled()
        return stopped_by if self.step < c.train.steps else None

    def signalled(self) -> str | None:
        """The name of the signal that any rank has got, between steps. All ranks ask together, and so stop together."""
        received = torch.tensor(self.signals.received, device=self.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        number = received.item()
        return signal.Signals(number).name if number else None

    def due(self, every: int | None) -> bool:
        """Whether to do now what is done every so many steps: also after the last step, but not if `every` is null."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps)

    def one_step(self, stream: Iterator[Batch]) -> str | None:
        """Take a step and log it. Returns the name of a signal that any rank had got before it ended.

        A step whose loss or gradient is not finite changes nothing but the averages, which see the same weights again.
        Logged as `loss` is flow matching alone, also with other terms, so trainings compare: but with variance
        reduction its target is another, and the loss less.
        """
        started = time.perf_counter()
        lr = learning_rate(self.config, self.step)
        set_learning_rate(self.engine, lr)
        torch.manual_seed(streams.dropout_seed(self.config.train.seed, self.step, self.rank))
        self.waited = 0.0
        samples, problems, losses = [], [], []  # of a micro-batch nothing else is kept: there may be many
        for part in range(1, self.accumulation + 1):
            batch = next(stream)
            terms = self.objective.losses(self.engine, batch)
            if terms.shape != (expected := (len(batch.samples), len(self.objective.terms))):
                raise InputError(f"losses of the objective must have the shape {expected}, not {tuple(terms.shape)}")
            self.engine.backward((terms * self.term_weights).sum(1).mean())
            samples += batch.samples
            problems += batch.problems
            losses.append(terms.detach())
            if part < self.accumulation:
                self.engine.step()  # which only accumulates
        losses = torch.cat(losses)
        flags = [self.signals.received == number for number in CAUGHT]
        sums = self.summed(losses.sum(0) / self.config.train.global_batch_size, [self.waited, len(problems), *flags])
        values, norm = step_if_finite(self.engine, sums)
        terms, (waited, unreadable, *flags) = values[: losses.shape[1]], values[losses.shape[1] :]
        finite = all(map(math.isfinite, terms))
        if not finite or norm == math.inf:
            self.skip("gradient" if finite else "loss", samples, losses)
        self.step += 1
        self.averages.update(self.step)
        seconds = time.perf_counter() - started
        record = {
            "step": self.step,
            **{name: value if finite else None for name, value in zip(self.objective.terms, terms, strict=True)},
            "grad_norm": norm if finite and norm < math.inf else None,
            "lr": lr,
            "images_per_second": self.config.train.global_batch_size / seconds,
            "waiting": waited / self.world / seconds,
        }
        self.log(record)
        if unreadable:
            self.problems.add(self.step, problems)
        return next((number.name for number, count in zip(CAUGHT, flags, strict=True) if count), None)

    def waited_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches. How long each was waited for is added to `self.waited`, in seconds."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def summed(self, terms: Tensor, numbers: Sequence[float]) -> Tensor:
        """Both in one tensor, summed over the ranks: a step talks to the others here and nowhere else.

        The numbers are filled in on the device: to copy them there would wait for it.
        """
        sums = torch.cat([terms.float(), torch.zeros(len(numbers), device=self.device)])
        for i, number in enumerate(numbers, len(terms)):
            if number:
                sums[i] = number
        dist.all_reduce(sums)
        return sums

    def skip(self, what: str, samples: list[int], losses: Tensor) -> None:
        """Answer a loss or gradient that is not finite: say so, or raise if that was allowed often enough."""
        mine = [samples[i] for i in (~losses.isfinite().all(1)).nonzero()]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine)
        where = "; ".join(
            f"rank {rank}: samples {shortened(samples)}" for rank, samples in enumerate(everyone) if samples
        )
        self.skipped += 1
        message = f"the {what} of step {self.step + 1} is not finite" + (f" ({where})" if where else "")
        if self.skipped > self.config.train.skip_nonfinite:
            raise AgreedError(f"{message}. {self.last_good()}. Steps skipped before: {self.skipped - 1}")
        if self.rank == 0:
            tqdm.write(f"{message}: skipped, {self.skipped} of {self.config.train.skip_nonfinite}", file=sys.stderr)

    def last_good(self) -> str:
        saved = checkpoint.steps(self.out / run.CHECKPOINTS)
        good = checkpoint.folder_of(self.out / run.CHECKPOINTS, saved[-1]) if saved else "none yet"
        return f"The last good checkpoint: {good}"

    # ---- What is kept ------------------------------------------------------------------------------------------------
    def open_journals(self) -> None:
        """Continue the metrics and the list of problems after `step`. Called by all ranks."""
        self.journals: list[run.Journal] = []  # on rank 0

        def begin():
            names = run.METRICS, run.PROBLEMS, run.EVALUATIONS
            self.journals += [run.Journal(self.out / name, self.step) for name in names]

        on_first(begin)
        self.problems = Problems(self.journals[1] if self.journals else None, len(self.dataset))

    def save(self) -> None:
        folder = checkpoint.folder_of(self.out / run.CHECKPOINTS, self.step)
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "zero_stage": self.engine.zero_optimization_stage(),
            "subspace": checkpoint.fingerprint(self.engine.module.subspace),
            "base": getattr(self.engine.module, "base", None),
            "images": len(self.dataset),
            "averages": {profile.name: profile.sigma_rel for profile in self.averages.values},
        }
        on_first(lambda: [journal.sync() for journal in self.journals] and None, f"before {folder} was written")
        checkpoint.save(folder, self.pieces(), self.shapes, state)
        keep = self.config.checkpoint
        on_first(lambda: checkpoint.prune(folder.parent, keep.keep_last, keep.keep_every), "an old checkpoint stays")

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint holds of this rank."""
        for f in self.averages.fragments:
            yield Piece("weights", f.name, f.start, f.weight)
            for moment, values in f.moments.items():
                yield Piece(moment, f.name, f.start, values)
        for profile in self.averages.values:
            yield from self.average_pieces(profile)

    def average_pieces(self, profile: Profile) -> Iterator[Piece]:
        for name, (start, values) in self.averages.named_pieces(profile).items():
            yield Piece(checkpoint.average_kind(profile.name), name, start, values)

    def snapshot(self) -> None:
        """Keep the power-function averages as they are now, for `asymflow ema`."""
        widths = [profile for profile in self.averages.values if profile.sigma_rel]
        pieces = (piece for profile in widths for piece in self.average_pieces(profile))
        state = {
            "step": self.step,
            "subspace": checkpoint.fingerprint(self.engine.module.subspace),
            "averages": {profile.name: profile.sigma_rel for profile in widths},
        }
        folder = checkpoint.folder_of(self.out / run.SNAPSHOTS, self.step)
        checkpoint.save(folder, pieces, self.shapes, state)
        on_first(lambda: run.forget_abandoned(folder), "an abandoned snapshot stays")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint, of any ZeRO stage and number of ranks. Raises AgreedError if it does not fit."""
        reader = checkpoint.Reader(folder)
        if reader.shapes != self.shapes:
            raise AgreedError(f"{folder} is of another model: its parameters have other names or shapes")
        if reader.state["subspace"] != checkpoint.fingerprint(self.engine.module.subspace):
            raise AgreedError(f"{folder} was trained with another subspace than {self.out / run.SUBSPACE}: restore it")
        if reader.state.get("base") != getattr(self.engine.module, "base", None):
            raise AgreedError(f"{folder} goes on from another latent model than {self.config.finetune.base}")
        images, branch = reader.state["images"], folder.parent != self.out / run.CHECKPOINTS
        if images != len(self.dataset) and not branch:
            raise AgreedError(
                f"{folder} was trained on {images} images, and now there are {len(self.dataset)}, in another order: "
                f"restore the data, or begin another run from there with --out and --resume"
            )
        self.step, self.skipped = reader.state["step"], reader.state["skipped"]
        then = (reader.state["ranks"], reader.state["zero_stage"])
        now = (self.world, self.engine.zero_optimization_stage())
        if then != now:
            self.how_resumed = ", written by {} ranks at ZeRO stage {}, on {} at stage {}".format(*then, *now)
        for f in shards.held_fragments(self.engine):
            f.weight.copy_(reader.read("weights", f.name, f.start, len(f.weight)))
            for moment, values in f.moments.items():
                values.copy_(reader.read(moment, f.name, f.start, len(values)))
            if "step" in f.state:  # of Adam; by a tensor or a number
                f.state["step"] = torch.full_like(torch.as_tensor(f.state["step"]), self.step - self.skipped)
        internals.spread_weights(self.engine)
        for profile, values in self.averages.values.items():
            for f, value in zip(self.averages.fragments, values, strict=True):
                value.copy_(reader.read(checkpoint.average_kind(profile.name), f.name, f.start, len(value)))
        self.how_resumed += on_first(lambda: run.abandon_snapshots(self.out, self.step), "later snapshots stay")

    # ---- What is shown -----------------------------------------------------------------------------------------------
    def log(self, record: dict) -> None:
        """To the journal, to stderr and to DeepSpeed's monitors.

        With the MFU (Chowdhery et al. 2022, arXiv 2204.02311) where the GPU's peak is known: the part of the peaks of
        all ranks that the model needs, in bfloat16, without what is computed twice to save memory. On CPUs there is
        none.
        """
        if self.rank > 0:
            return
        if self.flops:
            record["mfu"] = self.flops * record["images_per_second"] / (self.peak * self.world)
        if self.device.type == "cuda":
            record["gpu_memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.journals[0].add(record)
        self.progress.add(record, len(self.problems.known))
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self.engine.monitor.write_events([(f"train/{name}", value, self.step) for name, value in values.items()])

    @torch.no_grad()
    def draw(self) -> None:
        """A grid of samples of the first average, from the same noise and classes every time."""
        count = self.config.sample.num
        each = -(-count // self.world)  # as many on every rank: under ZeRO-3 all have to take part in every call
        mine = range(self.rank * each, (self.rank + 1) * each)
        with self.model_to_show() as flow:
            parts = [self.objective.draw(flow, mine[i : i + self.micro]) for i in range(0, each, self.micro)]
        images = gathered(torch.cat(parts))
        if self.rank == 0:
            with files.replacing(self.picture()) as beside:
                image_grid(images[:count].cpu()).save(beside)

    def picture(self) -> Path:
        return self.out / run.SAMPLES / f"{self.step:08d}.png"

    @contextmanager
    def model_to_show(self) -> Iterator[AsymFlow]:
        """The model that is drawn from and evaluated: the first average, or the weights where none is configured."""
        first = next(iter(self.averages.values), None)
        self.engine.module.eval()
        try:
            with (
                averaged(self.engine, self.averages, first) if first else nullcontext(),
                torch.compiler.set_stance("force_eager"),  # else each number of images would be compiled for
            ):
                yield self.engine.module
        finally:
            self.engine.module.train()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Hold samples against the data, unless that was done with the same settings at this step already.

        A signal ends it. Then the same command does it anew.
        """
        c = self.config
        sampler = c.sample.model_dump(include={"steps", "method", "guidance", "interval"}, mode="json")
        sampler["precision"] = "bf16 weights" if bf16_weights(c) else sampling_precision(c, self.device)
        settings = {"evaluate": c.evaluate.model_dump(exclude={"every", "batch_size"}, mode="json"), "sample": sampler}
        asked = {"step": self.step, **settings}
        if on_first(lambda: any(asked.items() <= entry.items() for entry in self.journals[2].entries())):
            return
        with self.model_to_show() as flow:
            distance = self.evaluation.distance(flow, stop=self.signalled)
        if self.rank == 0 and distance is not None:
            self.journals[2].add({"step": self.step, "frechet_distance": distance, **settings})
            words = f"{c.evaluate.num} samples in {sampler['precision']}, {c.evaluate.extractor}"
            tqdm.write(f"step {self.step}: Fréchet distance {distance:.4g} ({words})", file=sys.stderr)
            self.engine.monitor.write_events([("evaluation/frechet_distance", distance, self.step)])


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant (arXiv 2605.12964)."""
    return config.optimizer.lr * min(1.0, (step + 1) / max(config.optimizer.warmup_steps, 1))


def shortened(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
