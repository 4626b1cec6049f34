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
from asymflow.evaluation.result import as_json, lines
from asymflow.model import AsymFlow
from asymflow.pictures import GRID_WIDTH, image_grid
from asymflow.progress import progress_bar
from asymflow.training.config.derived import batch_sizes, bf16_weights
from asymflow.training.config.reading import Config
from asymflow.training.evaluate import Evaluation, all_gather_rows
from asymflow.training.loader import Batch, on_device
from asymflow.training.objectives import Objective
from asymflow.training.objectives.cost import Step, needed_flops
from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run
from asymflow.training.run.checkpoint import Piece
from asymflow.training.run.problems import Problems
from asymflow.training.run.progress import Progress
from asymflow.training.run.ranks import AgreedError, rank0_broadcast
from asymflow.training.run.signals import CAUGHT, Signals
from asymflow.training.zero import internals, shards
from asymflow.training.zero.averages import Averages
from asymflow.training.zero.engine import averaged, make_engine, set_learning_rate, step_if_finite


class Training:
    """One run: the engine, the averages, the data, and the folder of the run.

    `step` is the number of steps done. All that the next step depends on is either in the checkpoint, or a function of
    the configuration and `step`: so a resumed training takes the same steps.
    """

    def __init__(self, config: Config, out: Path, flow: AsymFlow, dataset, device: torch.device, objective: Objective):
        self.config, self.out, self.device = config, out, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.micro, self.accumulation = batch_sizes(config, self.world)
        self.autocast = config.train.precision == "bf16" and not bf16_weights(config)
        self.dataset, self.objective = dataset, objective
        self.term_weights = torch.tensor(objective.weights, device=device)
        flow = objective.model(flow).train()
        self.peak = peak_flops(device)
        self.flops = self.counted_flops(flow) if self.peak and self.rank == 0 else None
        self.shapes = {name: tuple(p.shape) for name, p in flow.named_parameters() if p.requires_grad}
        if self.autocast:  # in the model's forward: on GPUs DeepSpeed switches off an autocast around the engine
            usual, in_bf16 = flow.forward, torch.autocast(device.type, torch.bfloat16)(flow.forward)
            # Not in eval mode: samples are drawn in the precision that `sampling_precision` says.
            flow.forward = lambda *args, **conditions: (in_bf16 if flow.training else usual)(*args, **conditions)
        self.engine = make_engine(flow.to(device), config, out)
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
            if self.due(c.sample.every) and rank0_broadcast(lambda: not self.picture().exists()):
                self.draw()  # before the first step, or because the training ended before it drew this grid
            if self.step > 0 and self.due(c.evaluate.every):  # it was interrupted, or has been configured only now
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
        """The name of a signal that any rank has received. Called by all ranks; all get the same answer."""
        received = torch.tensor(self.signals.received, device=self.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        number = received.item()
        return signal.Signals(number).name if number else None

    def due(self, every: int | None) -> bool:
        """Whether `step` is a multiple of `every` or the last step. False if `every` is None."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps)

    def one_step(self, stream: Iterator[Batch]) -> str | None:
        """Take a step and log it. Returns the name of a signal that any rank received during the step.

        If the loss or the gradient is not finite, the step changes no weights; the averages take the same weights in
        once more. The logged `loss` is the flow-matching term alone, so that trainings with different other terms can
        be compared. Variance reduction changes its target and makes it smaller: do not compare with and without.
        """
        started = time.perf_counter()
        lr = learning_rate(self.config, self.step)
        set_learning_rate(self.engine, lr)
        torch.manual_seed(streams.dropout_seed(self.config.train.seed, self.step, self.rank))
        self.waited = 0.0
        samples, problems, losses = [], [], []  # keep nothing else of a micro-batch: there may be many of them
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
                self.engine.step()  # takes no step yet: DeepSpeed counts micro-batches by these calls
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
        """Yield the batches, and add the seconds spent waiting for each to `self.waited`."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def summed(self, terms: Tensor, numbers: Sequence[float]) -> Tensor:
        """`terms` and `numbers` in one tensor, summed over the ranks: the one collective of a step besides DeepSpeed's.

        The numbers are filled in one by one: copying a tensor from the CPU would make it wait for the GPU.
        """
        sums = torch.cat([terms.float(), torch.zeros(len(numbers), device=self.device)])
        for i, number in enumerate(numbers, len(terms)):
            if number:
                sums[i] = number
        dist.all_reduce(sums)
        return sums

    def skip(self, what: str, samples: list[int], losses: Tensor) -> None:
        """Print that a step was skipped. Raises AgreedError if more were skipped than train.skip_nonfinite allows.

        what: "loss" or "gradient", whichever is not finite. losses: of this rank's `samples`.
        """
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
        """Open the journals of the run, to continue after `step`. Called by all ranks."""
        self.journals: list[run.Journal] = []  # empty on all ranks but rank 0

        def begin():
            self.journals += [run.Journal(self.out / name, self.step) for name in run.JOURNALS]
            for remark in filter(None, (journal.remark for journal in self.journals)):
                print(remark, file=sys.stderr)

        rank0_broadcast(begin)
        self.problems = Problems(self.journals[1] if self.journals else None, len(self.dataset))

    def save(self) -> None:
        folder = checkpoint.folder_of(self.out / run.CHECKPOINTS, self.step)
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "zero_stage": self.engine.zero_optimization_stage(),
            **checkpoint.ingredients(self.engine.module, self.dataset),
            "config": self.config.model_dump(mode="json"),
            "images": len(self.dataset),
            "data": getattr(self.dataset, "digest", None),
            "averages": {profile.name: profile.sigma_rel for profile in self.averages.values},
        }
        rank0_broadcast(lambda: [journal.sync() for journal in self.journals] and None, f"before {folder} was written")
        checkpoint.save(folder, self.pieces(), self.shapes, state)
        keep = self.config.checkpoint
        prune = lambda: checkpoint.prune(folder.parent, keep.keep_last, keep.keep_every)
        rank0_broadcast(prune, "an old checkpoint stays")

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of a checkpoint: its weights, the optimizer's moments, and the averages."""
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
        """Save the power-function averages as they are now, for `asymflow ema`."""
        widths = [profile for profile in self.averages.values if profile.sigma_rel]
        pieces = (piece for profile in widths for piece in self.average_pieces(profile))
        state = {
            "step": self.step,
            **checkpoint.ingredients(self.engine.module, self.dataset),
            "averages": {profile.name: profile.sigma_rel for profile in widths},
        }
        folder = checkpoint.folder_of(self.out / run.SNAPSHOTS, self.step)
        checkpoint.save(folder, pieces, self.shapes, state)
        rank0_broadcast(lambda: run.forget_abandoned(folder), "an abandoned snapshot stays")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Load a checkpoint of any ZeRO stage and number of ranks. Raises AgreedError if it does not fit."""
        reader = checkpoint.Reader(folder)
        if reader.shapes != self.shapes:
            raise AgreedError(f"{folder} is of another model: its parameters have other names or shapes")
        if reader.state["subspace"] != checkpoint.fingerprint(self.engine.module.subspace):
            raise AgreedError(f"{folder} was trained with another subspace than {self.out / run.SUBSPACE}: restore it")
        if reader.state.get("base") != getattr(self.engine.module, "base", None):
            raise AgreedError(f"{folder} goes on from another latent model than {self.config.finetune.base}")
        images, branch = reader.state["images"], folder.parent != self.out / run.CHECKPOINTS
        # RUN/config.yaml has been compared, but it may have been edited by hand since.
        if not branch and (differing := run.differences_of_state(reader.state, self.config)):
            raise AgreedError(
                f"{folder} was trained with another configuration ({'; '.join(differing)}): use that, or begin another "
                "run from there with --out and --resume"
            )
        others = reader.state.get("data") not in (None, getattr(self.dataset, "digest", None))
        if (images != len(self.dataset) or others) and not branch:
            count = len(self.dataset)
            now = f"there are {count}, in another order" if count != images else "they are others, by name or class"
            raise AgreedError(
                f"{folder} was trained on {images} images, and now {now}: "
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
            if "step" in f.state:  # Adam's count of steps, a tensor or a number
                f.state["step"] = torch.full_like(torch.as_tensor(f.state["step"]), self.step - self.skipped)
        internals.refresh_model_weights(self.engine)
        for profile, values in self.averages.values.items():
            for f, value in zip(self.averages.fragments, values, strict=True):
                value.copy_(reader.read(checkpoint.average_kind(profile.name), f.name, f.start, len(value)))
        self.how_resumed += rank0_broadcast(lambda: run.abandon_snapshots(self.out, self.step), "later snapshots stay")

    # ---- What is shown -----------------------------------------------------------------------------------------------
    def counted_flops(self, flow: AsymFlow) -> int | None:
        """The FLOPs of a step for each image of the first micro-batch. It takes some seconds."""
        try:
            batch = self.objective.batches(self.dataset, self.rank, self.world)[0]
            return needed_flops(Step(self.config, self.objective, flow), batch)
        except Exception as e:  # an objective of the user's own may do anything
            why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            print(f"the MFU is not shown, because the operations of a step cannot be counted: {why}", file=sys.stderr)
            return None

    def log(self, record: dict) -> None:
        """Write a record to metrics.jsonl, to stderr and to DeepSpeed's monitors.

        On GPUs whose peak is known it gets the MFU (Chowdhery et al. 2022, arXiv 2204.02311): the FLOPs that the step
        needs, without recomputation, divided by those that all GPUs could do in this time in bfloat16.
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
        """Save a grid of samples of `model_to_show`, from the same noise and classes every time."""
        count = self.config.sample.num
        each = -(-count // self.world)  # as many on every rank: under ZeRO-3 all must take part in each call
        mine = range(self.rank * each, (self.rank + 1) * each)
        with self.model_to_show() as flow:
            starts = progress_bar(range(0, each, self.micro), "drawing samples", "batch", silent=self.rank > 0)
            parts = [self.objective.draw(flow, mine[i : i + self.micro]) for i in starts]
        images = all_gather_rows(torch.cat(parts))
        if self.rank == 0:
            if broken := (~images[:count].flatten(1).isfinite().all(1)).sum().item():
                said = f"{broken} of {count} samples at step {self.step} have numbers that are NaN or infinite"
                tqdm.write(f"{said}: black or white in {self.picture()}", file=sys.stderr)
            grid = image_grid(images[:count].cpu(), width=GRID_WIDTH)
            with files.replacing(self.picture()) as beside:
                grid.save(beside)
            internals.show_picture(self.engine, "samples", grid, self.step)

    def picture(self) -> Path:
        return self.out / run.SAMPLES / f"{self.step:08d}.png"

    @contextmanager
    def model_to_show(self) -> Iterator[AsymFlow]:
        """A context with the model to draw from and evaluate, in eval mode, with the weights of the first average.

        Without averages it has the trained weights. Afterwards it has the trained weights again.
        """
        first = next(iter(self.averages.values), None)
        self.engine.module.eval()
        try:
            with (
                averaged(self.engine, self.averages, first) if first else nullcontext(),
                torch.compiler.set_stance("force_eager"),  # else it would be compiled anew for each batch size
            ):
                yield self.engine.module
        finally:
            self.engine.module.train()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure samples, unless evaluations.jsonl has it for this step and these settings already.

        A signal interrupts it; the next start begins it anew.
        """
        settings = self.evaluation.settings()
        asked = {"step": self.step, **settings}
        if rank0_broadcast(lambda: any(asked.items() <= entry.items() for entry in self.journals[2].entries())):
            if self.rank == 0:
                tqdm.write(f"step {self.step} has been evaluated with these settings before", file=sys.stderr)
            return
        with self.model_to_show() as flow:
            measured = self.evaluation.measured(flow, stop=self.signalled)
        if self.rank == 0 and measured is not None:
            found = {name: one.value for name, one in measured.items()}
            uncertainty = {name: one.uncertainty for name, one in measured.items()}
            self.journals[2].add({"step": self.step, **found, "uncertainty": uncertainty, **settings})
            protocol, precision = self.evaluation.protocol, settings["sample"]["precision"]
            shown = {"extractor": {"name": protocol.extractor}, "measures": as_json(measured)}
            tqdm.write(
                f"step {self.step}, {protocol.num:,} samples in {precision}, protocol {protocol.name}:\n"
                + "\n".join(f"  {line}" for line in lines(shown)),
                file=sys.stderr,
            )
            events = [(f"evaluation/{name}", value, self.step) for name, value in found.items() if value is not None]
            self.engine.monitor.write_events(events)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then constant (arXiv 2605.12964)."""
    return config.optimizer.lr * min(1.0, (step + 1) / max(config.optimizer.warmup_steps, 1))


def shortened(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
