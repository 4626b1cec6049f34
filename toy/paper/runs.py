"""The trainings of an experiment, one after the other, and what is measured of each: a JSON file a run.

A run is `train_ddp.py` with a configuration beside this file, and a few keys changed. It goes on where it was stopped.
What is measured of it is of its moving average (a power function of width 0.05), after each snapshot and at the end.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from asymflow import opening, streams
from asymflow.averages import Profile
from asymflow.cli.averages import rebuild
from asymflow.cli.models import load_model
from asymflow.errors import InputError
from asymflow.evaluation.drawn import quantized
from asymflow.evaluation.features import Oracle, load_extractor
from asymflow.evaluation.measures import ORACLE
from asymflow.files import replacing
from asymflow.fitting import fit_pca
from asymflow.model import AsymFlow
from asymflow.patches import patchify
from asymflow.pictures import image_grid
from asymflow.progress import progress_bar
from asymflow.sampling import euler, generate, heun, image_noise, sample, sigma_grid
from asymflow.subspace import Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from toy.common import commit, machine
from toy.emoji64 import JUDGE, judge_in, load
from toy.paper import measures
from toy.paper.ancestral import ancestral
from toy.paper.damage import DAMAGES
from toy.paper.data import PATCH, SIZE, EmojiData, ShapesData
from toy.paper.teacher import teacher_in

HERE = Path(__file__).resolve().parent
EMBEDDED = "toy.paper.embedding:network"
WIDTH = 0.05  # of the moving average
GUIDANCE = 2.0
GUIDANCES = (1.5, 3.0)  # further ones
SWITCHED_AT = (0.9, 0.7, 0.4)  # noise levels at which one rank takes over from another
EULER = {"the same noise": euler, "new noise": ancestral}
COMMIT = commit()  # of the code that runs, which takes hours
SHOWN = 256  # samples in the picture of a run
AVERAGED = 50  # steps over which the mean of a term of the loss is kept


@dataclass(frozen=True)
class Run:
    """A training, and what is measured of it.

    settings: keys of the configuration, as text. random: the rank of its subspace, if that is a random one. repa:
    whether it is aligned with `teacher`. given: the key that gets the path of rank 8's subspace. trained: the run
    whose training this is, if not its own.

    drawn: when samples are measured: "always" (also on the way), "at the end" or "never"; held-out losses always are.
    again: what is measured in place of all that:

    - guidance: samples with more and less guidance.
    - directions: the held-out losses in two parts.
    - speed: guided samples after each quarter of the steps but the last.
    - switch: samples that this rank draws above or below a noise level, and rank 8 on the other side.
    - renew: samples of Euler's method, with and without new noise in each step.
    """

    name: str
    seed: int
    settings: tuple[str, ...]
    config: str = "shapes64"
    random: int = 0
    repa: bool = False
    given: str = ""
    drawn: str = "always"
    again: str = ""
    trained: str = ""

    @property
    def folder(self) -> str:
        return self.trained or self.name


def of_rank(rank: str, seed: int, mark: str = "", settings: tuple[str, ...] = ()) -> Run:
    """A run whose subspace has this rank: "8", "full" or "random 8". mark: goes into its name."""
    random = int(rank.removeprefix("random ")) if rank.startswith("random") else 0
    settings += () if random else (f"subspace.rank={rank}",)
    return Run(f"rank-{rank.replace(' ', '-')}{mark}-seed-{seed}", seed, settings, random=random)


@dataclass(frozen=True)
class Scale:
    """How much is drawn and measured. way, end: samples on the way and at the end, and the steps of their sampler.

    At the end of 50 steps, as in the paper, noise levels come below 0.04, where sigma_min matters.
    """

    held_out: int = 256
    way: tuple[int, int] = (256, 16)
    end: tuple[int, int] = (256, 50)
    pictures: int = 6000  # for the classifier
    epochs: int | None = None  # of the classifier; None: as many as the data needs
    taught: int = 2000  # steps of the network for REPA
    settings: tuple[str, ...] = ()


QUICK = Scale(
    held_out=16,
    way=(16, 2),
    end=(8, 30),
    pictures=200,
    epochs=1,
    taught=4,
    settings=(
        "train.steps=8",
        "train.global_batch_size=8",
        "ema.snapshot_every=4",
        "subspace.images=40",
        "model.options.depth=2",
        "model.options.in_context_start=0",
    ),
)


def stated(plan: Run | Scale) -> dict:
    """What a result says of its plan, as JSON gives it back: all that is not by default."""
    values = {f.name: getattr(plan, f.name) for f in fields(plan)}
    return json.loads(json.dumps({f.name: values[f.name] for f in fields(plan) if values[f.name] != f.default}))


@dataclass
class Lab:
    """Where runs are, and what they are held against. Made once."""

    out: Path
    scale: Scale
    data: ShapesData | EmojiData

    def __post_init__(self):
        pictures = self.data.judged_by(self.scale.pictures)
        judge_in(self.out / self.data.folder, pictures, *load(pictures), self.scale.epochs or self.data.epochs)
        self.judge = self.out / self.data.folder / JUDGE
        self.features = load_extractor("classifier", self.judge)
        self.real, self.labels = self.data.held_out(max(self.scale.held_out, self.scale.way[0], self.scale.end[0]))
        self.reference = measures.reference_of(self.features, self.real)
        self.oracle = Oracle("cpu")

    def yardsticks(self) -> None:
        """Measure other pictures in place of samples, whole and damaged, and keep the results as those of runs.

        They say how good a result can be, and which faults a measure sees.
        """
        others = self.data.others(self.labels[: self.scale.end[0]])
        for name, (_, damage) in DAMAGES.items():
            file = self.out / f"{self.data.name}-{name}-seed-0.json"
            about = {"run": {"name": file.stem, "seed": 0}, "scale": stated(self.scale)}
            if not file.exists():
                end = {"guided": self.judged(damage(others))}
                keep(file, about, self.judge, {"hours": {"training": 0.0, "measuring": 0.0}, "at the end": end})
            stored(file, about)

    # ---- A run -------------------------------------------------------------------------------------------------------
    def result(self, run: Run) -> dict:
        """What is measured of a run, which is trained first unless that is done.

        InputError if there is a result of another run or another scale in its place.
        """
        file = self.out / f"{run.name}.json"
        about = {"run": stated(run), "scale": stated(self.scale)}
        if not file.exists():
            self.train(run)
            started = time.time()
            found = self.measure(run)
            found["hours"]["measuring"] = (time.time() - started) / 3600
            keep(file, about, self.judge, found)
        return stored(file, about)

    def train(self, run: Run) -> None:
        folder = self.out / run.folder
        settings = [*self.data.settings, *run.settings, *self.scale.settings, f"train.seed={run.seed}"]
        if run.random:
            settings.append(f"subspace.file={self.random_subspace(run)}")
        if run.repa:
            settings.append(f"loss.repa.model={self.out / 'teacher'}")
            teacher_in(self.out / "teacher", SIZE // PATCH, self.scale.taught)
        if run.given:
            settings.append(f"{run.given}={self.first_directions(run)}")
        words = [sys.executable, "train_ddp.py", "--config", HERE / f"{run.config}.yaml", "--out", folder]
        words = [*map(str, words), *(f"--set={setting}" for setting in settings)]
        print(" ".join(words[1:]), flush=True)
        if subprocess.run(words, cwd=HERE.parent.parent, check=False).returncode:
            raise InputError(f"the training in {folder} failed; see above")

    def first_directions(self, run: Run) -> Path:
        """The file of the subspace of rank 8 that the training of a run would fit, were that its rank."""
        path = self.out / f"pca-8-{run.config}-{run.seed}.safetensors"
        if not path.exists():
            settings = [*self.data.settings, *self.scale.settings, f"train.seed={run.seed}"]
            config = load_config(HERE / f"{run.config}.yaml", settings)
            dataset = make_dataset(config)
            chosen = streams.permutation(run.seed, 0, len(dataset))[: config.subspace.images]
            images = (dataset[int(i)].image[None].double() / 127.5 - 1 for i in chosen)
            tokens = (patchify(image, PATCH) for image in images)
            fit_pca(tokens, 8, patch_size=PATCH, token_order="channel_last").save(path)
        return path

    def random_subspace(self, run: Run) -> Path:
        path = self.out / f"random-{run.random}-{run.seed}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(run.seed)
            basis = torch.linalg.qr(torch.randn(3 * PATCH**2, run.random, generator=generator)).Q
            Subspace(basis, patch_size=PATCH).save(path)
        return path

    def measure(self, run: Run) -> dict:
        folder, way = self.out / run.folder, {}
        if run.again:
            again = {
                "guidance": self.by_guidance,
                "directions": self.by_direction,
                "speed": self.by_step,
                "switch": self.by_switch,
                "renew": self.by_renewal,
            }
            hours = 0.0 if run.trained else training_hours(folder)
            return {"hours": {"training": hours}, "at the end": again[run.again](run)}
        images, labels = self.real[: self.scale.held_out], self.labels[: self.scale.held_out]
        for step in progress_bar(snapshots(folder), f"measuring {run.name}", "snapshot"):
            flow = averaged(folder, step)
            way[step] = {"held_out": measures.held_out_losses(flow, images, labels)}
            if run.drawn == "always":
                way[step] |= self.judged(self.draw(flow, *self.scale.way, 1.0))
        end = {} if run.drawn == "never" else self.ending(run, flow)
        terms = {"losses": means(folder, "loss")}
        if run.repa:
            terms |= {"alignment": means(folder, "repa"), "teacher": checksum(self.out / "teacher/model.safetensors")}
        return {"hours": {"training": training_hours(folder)}, **terms, "on the way": way, "at the end": end}

    def ending(self, run: Run, flow: AsymFlow) -> dict[str, dict]:
        """What is measured of samples of the trained model, and a picture of some."""
        guided = self.draw(flow, *self.scale.end, GUIDANCE)
        image_grid(guided[:SHOWN] / 127.5 - 1).save(self.out / f"{run.name}.png")
        end = {
            "guided": self.judged(guided),
            "unguided": self.judged(self.draw(flow, *self.scale.end, 1.0)),
        }
        flow.sigma_min = 0.0
        end["guided, no clamp"] = self.judged(self.draw(flow, *self.scale.end, GUIDANCE))
        return end

    def by_guidance(self, run: Run) -> dict[str, dict]:
        flow, bar = averaged(self.out / run.folder), progress_bar(GUIDANCES, "drawing", "guidance")
        return {f"guidance {by:g}": self.judged(self.draw(flow, *self.scale.end, by)) for by in bar}

    def by_step(self, run: Run) -> dict[str, dict]:
        folder = self.out / run.folder
        *way, last = snapshots(folder)
        bar = progress_bar([step for step in way if 4 * step % last == 0], "drawing", "snapshot")
        return {str(step): self.judged(self.draw(averaged(folder, step), *self.scale.end, GUIDANCE)) for step in bar}

    def by_direction(self, run: Run) -> dict[str, dict]:
        images, labels = self.real[: self.scale.held_out], self.labels[: self.scale.held_out]
        basis = Subspace.load(self.first_directions(run)).basis.double()
        parts = measures.losses_by_direction(averaged(self.out / run.folder), images, labels, basis, PATCH)
        return dict(zip(("inside", "outside"), parts, strict=True))

    def by_switch(self, run: Run) -> dict[str, dict]:
        """Without guidance, where the ranks differ most. Rank 8 is trained in the same way, unless that is done."""
        settings = tuple(setting.replace("subspace.rank=32", "subspace.rank=8") for setting in run.settings)
        self.train(other := replace(run, trained=run.trained.replace("rank-32", "rank-8"), settings=settings))
        this, eight = (averaged(self.out / each.folder) for each in (run, other))
        pairs = {f"{side} {level:g}": (level, side) for level in SWITCHED_AT for side in ("above", "below")}
        bar, found = progress_bar(pairs.items(), "drawing", "pair"), {}
        for name, (level, side) in bar:
            found[name] = self.judged(self.draw_by_two(*((this, eight) if side == "above" else (eight, this)), level))
        return found

    def by_renewal(self, run: Run) -> dict[str, dict]:
        flow, bar = averaged(self.out / run.folder), progress_bar(EULER, "drawing", "sampler")
        return {how: self.judged(self.draw(flow, *self.scale.end, 1.0, EULER[how])) for how in bar}

    def draw_by_two(self, above: AsymFlow, below: AsymFlow, level: float) -> Tensor:
        """Samples as of `draw`, without guidance, by one model above a noise level, and by another from there on."""
        (count, steps), parts = self.scale.end, []
        for numbers in torch.arange(count).split(measures.BATCH):
            labels, noise = self.labels[numbers], image_noise(0, numbers.tolist(), self.real.shape[1:])
            velocity = lambda x, sigma, labels=labels: (above if sigma[0] > level else below)(x, sigma, labels=labels)
            parts.append(quantized(sample(velocity, noise, sigma_grid(steps)), "round"))
        return torch.cat(parts)

    def draw(self, flow: AsymFlow, count: int, steps: int, guidance: float, sampler: Callable = heun) -> Tensor:
        """Samples (count, 3, H, W), uint8, of the held-out pictures' classes; each has the noise of its number."""
        parts = []
        for numbers in torch.arange(count).split(measures.BATCH):
            method = partial(ancestral, numbers.tolist()) if sampler is ancestral else sampler
            options = dict(steps=steps, guidance=guidance, method=method)
            parts.append(quantized(generate(flow, self.labels[numbers], numbers.tolist(), **options), "round"))
        return torch.cat(parts)

    def judged(self, samples: Tensor) -> dict[str, float | None]:
        """All measures of samples of the classes of the held-out pictures."""
        count = len(samples)
        judged = measures.compared(samples, self.real[:count], self.features, self.reference, PATCH)
        if self.data.oracle:
            seen, _ = self.oracle.both(samples, self.labels[:count].tolist())
            for name, column in zip(ORACLE, seen.T, strict=True):
                known = column[column >= 0]
                judged[name] = known.mean().item() if len(known) else None  # None: nothing was recognized
        return judged


# ---- Results ---------------------------------------------------------------------------------------------------------
def keep(file: Path, about: dict, judge: Path, found: dict) -> None:
    """Write a result, and where it comes from. about: what tells this run from others. judge: the classifier's file.

    Which classifier it was matters: another machine rounds otherwise, and learns another one from the same pictures.
    """
    origin = {"commit": COMMIT, "machine": machine(), "classifier": checksum(judge)}
    with replacing(file) as beside:
        beside.write_text(json.dumps({**about, **origin, **found}, indent=1))


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def stored(file: Path, about: dict) -> dict:
    """A result that was kept. InputError if it is of another run."""
    found = opening.read_json(file)
    if differing := [key for key in about if found.get(key) != about[key]]:
        raise InputError(f"{file} is of another {' and '.join(differing)}: choose another --out")
    return found


def in_words(found: dict[str, float | None]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None)


# ---- The folder of a training ----------------------------------------------------------------------------------------
def snapshots(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "snapshots").iterdir() if path.name.isdecimal())


def averaged(folder: Path, step: int | None = None) -> AsymFlow:
    """The moving average of a training after a step, by default the last."""
    path = rebuild(folder, Profile(sigma_rel=WIDTH), step)
    own = EMBEDDED if load_config(folder / "config.yaml").model.backbone == EMBEDDED else None
    return load_model(path, torch.device("cpu"), own)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def means(folder: Path, term: str) -> list[float]:
    """Of a term of the loss in a training's metrics, over every `AVERAGED` steps."""
    values = torch.tensor([line[term] for line in read_metrics(folder)], dtype=torch.float64)
    return [part.mean().item() for part in values.split(AVERAGED)]


def training_hours(folder: Path) -> float:
    """The time of all its steps, however often it was stopped."""
    batch = load_config(folder / "config.yaml").train.global_batch_size
    return sum(batch / line["images_per_second"] for line in read_metrics(folder)) / 3600
