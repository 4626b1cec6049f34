"""Evaluation in training: samples of the model held against images, by the protocols of `asymflow evaluate`."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from asymflow import streams
from asymflow.errors import InputError
from asymflow.evaluation import result
from asymflow.evaluation.drawn import Drawn, quantized
from asymflow.evaluation.features import load_extractor
from asymflow.evaluation.frechet import load_statistics, save_statistics
from asymflow.evaluation.measures import CAPTIONS, Measured, Reference, Samples
from asymflow.evaluation.protocol import Protocol, load_protocol, renamed, with_fitting_measures
from asymflow.evaluation.reference import DATA, Opened
from asymflow.evaluation.rows import Rows
from asymflow.model import AsymFlow
from asymflow.progress import progress_bar
from asymflow.training.config.derived import bf16_weights, sampler, sampling_precision
from asymflow.training.config.reading import Config
from asymflow.training.loader import read_or_replace
from asymflow.training.run.ranks import all_or_raise, rank0_broadcast
from asymflow.yaml12 import shown

REFERENCE = "reference.npz"  # in the folder of the run
MOST = 50_000  # at most so many training images are compared with

Stop = Callable[[], object]
"""Returns whether to stop. All ranks call it together, and it returns the same on all."""


def all_gather_rows(values: Tensor) -> Tensor:
    """Concatenate (n, ...) of every rank to (world * n, ...), in the order of the ranks, on all of them."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values.contiguous())
    return torch.cat(everyone)


def protocol_of(config: Config) -> Protocol:
    """The protocol that section `evaluate` names, or else what its keys and those of `sample` say. InputError."""
    c, s = config.evaluate, config.sample
    if c.protocol:
        protocol = load_protocol(c.protocol, {"weights": c.weights and str(c.weights)})
        if c.reference and protocol.reference:
            raise InputError("evaluate.reference is what evaluate.protocol says: leave one of the two out")
        protocol = with_fitting_measures(renamed(protocol, reference=str(c.reference or protocol.reference or DATA)))
        if strange := [name for name in protocol.measures if name in CAPTIONS]:
            raise InputError(f"{strange[0]} is not measured in a training: see asymflow evaluate")
        return protocol
    keys = dict(num=c.num, seed=config.train.seed, classes=c.labels, method=s.method, steps=s.steps)
    keys |= dict(extractor=c.extractor, weights=c.weights and str(c.weights), measures=c.measures)
    try:
        made = Protocol(name="training", reference=str(c.reference or DATA), **keys)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        said = first["msg"][0].lower() + first["msg"][1:]
        raise InputError(f"evaluate.{first['loc'][0]} is {shown(first['input'])}: {said}") from None
    return with_fitting_measures(made)


def settings_of(config: Config, protocol: Protocol) -> dict[str, dict]:
    """What a measurement depends on besides the weights and the device, as evaluations.jsonl has it."""
    c, p = config, protocol
    sample = {"steps": p.steps, "method": p.method}
    sample |= c.sample.model_dump(include={"guidance", "interval"}, mode="json")
    found = {"evaluate": c.evaluate.model_dump(exclude={"every", "batch_size"}, mode="json"), "sample": sample}
    if c.evaluate.protocol:  # its file may change
        found["protocol"] = p.model_dump(exclude={"name", "about", "weights"}, mode="json")
    return found


class Evaluation:
    """Samples of a model held against images. Each rank draws, and reads, its share of them; rank 0 measures."""

    def __init__(self, config: Config, dataset, out: Path, device: torch.device):
        """Raises AgreedError if the protocol, the extractor or the reference cannot be used."""
        self.config, self.dataset, self.path, self.device = config, dataset, out / REFERENCE, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.reference: Reference | None = None  # known on rank 0 alone
        self.protocol = p = all_or_raise(lambda: protocol_of(config), "evaluate")
        self.method = all_or_raise(lambda: sampler(p.method), "evaluate")
        load = lambda: load_extractor(p.extractor, p.weights, device)
        # Rank 0 loads first, and may download the weights; then the others find the file.
        all_or_raise(lambda: self.rank or load(), "evaluate")
        self.features = all_or_raise(load, "evaluate")
        has_own = p.reference != DATA and not self.features.columns
        self.given = all_or_raise(self.open_reference, "evaluate.reference") if has_own else None
        self.about = (
            f"{min(len(dataset), MOST)} training images ({getattr(dataset, 'digest', 'unknown')[:16]}), "
            f"{config.model.image_size} px, {p.extractor}, {self.features.weights[:16]}"
        )

    def open_reference(self) -> Opened:
        p, side = self.protocol, self.config.model.image_size
        return Opened(p.reference, (side, side), p.crop, self.features.width(side), turn=p.turn)

    def settings(self) -> dict[str, dict]:
        """What a measurement depends on besides the weights, as evaluations.jsonl has it."""
        found = settings_of(self.config, self.protocol)
        found["sample"]["precision"] = "bf16 weights" if bf16_weights(self.config) else self.precision
        return found

    @property
    def precision(self) -> str:
        given = self.protocol.precision
        return sampling_precision(self.config, self.device) if given == "usual" else given

    def measured(self, flow: AsymFlow, stop: Stop) -> dict[str, Measured] | None:
        """The measures of samples of `flow`, in eval mode, by their names; None if `stop` said so.

        Without values if any sample has numbers that are not finite.
        """
        if not self.know_reference(stop):
            return None
        c, p = self.config, self.protocol
        guidance = dict(guidance=c.sample.guidance, interval=tuple(c.sample.interval))
        label = self.label_of_data if p.classes == "data" else None
        size, classes = (c.model.image_size,) * 2, c.model.num_classes
        drawn = Drawn(flow, p, self.precision, guidance, self.method, size, classes, label)

        def samples(numbers: list[int]) -> list[Tensor]:
            images = drawn.draw(numbers)
            broken = ~images.flatten(1).isfinite().all(1, keepdim=True)
            found = self.features.both(quantized(images, p.quantize), list(map(drawn.label, numbers)))
            return [values.masked_fill(broken, torch.nan) for values in found if values is not None]

        found = self.gather(samples, p.num, "evaluating", stop)
        if found is None:
            return None
        if found[0].isnan().any():
            remark = ("not measured: samples have numbers that are NaN or infinite",)
            return {name: Measured(None, None, remark) for name in p.measures}
        sample = Samples(*(Rows([values.cpu()]) for values in found), columns=self.features.columns)
        return rank0_broadcast(lambda: result.measure(p.measures, sample, self.reference))

    def label_of_data(self, number: int) -> int:
        """The class of the training image of this number."""
        return self.dataset.label(streams.image_index(self.config.train.seed, number, len(self.dataset)))

    def know_reference(self, stop: Stop) -> bool:
        """See to it that rank 0 knows what samples are held against. False if `stop` said so."""
        if self.features.columns or rank0_broadcast(lambda: self.reference is not None):
            return True
        source = self.given.source if self.given else None
        statistics = self.given.statistics if self.given else rank0_broadcast(self.kept, "evaluate")
        needs_images = set(self.protocol.measures) & {"kid", "precision", "recall"}
        if statistics is not None and not (needs_images and (source or not self.given)):
            self.reference = Reference(statistics)
            return True
        replaced: list[str] = []
        seed, count = self.config.train.seed, len(source) if source else min(len(self.dataset), MOST)

        def features_of(numbers: list[int]) -> list[Tensor]:
            if source:
                images = torch.cat([source.read(number, number + 1) for number in numbers])
            else:
                samples = (read_or_replace(self.dataset, seed, number, replaced) for number in numbers)
                images = torch.stack([sample.image for sample in samples])
            return [self.features(images.to(self.device))]

        found = self.gather(features_of, count, "reading the images to compare with", stop)
        if found is None:
            return False
        for problem in dict.fromkeys(replaced):
            print(f"evaluate: replaced by another image of the data: {problem}", file=sys.stderr)
        sample = Samples(Rows([found[0].cpu()]))
        self.reference = Reference(statistics or sample.statistics(), sample.features)
        if not self.given:
            rank0_broadcast(lambda: save_statistics(self.path, self.reference.statistics, self.about), "evaluate")
        return True

    def kept(self) -> dict | None:
        """The statistics of the training images, if they were measured before."""
        if not self.path.exists():
            return None
        found, about = load_statistics(self.path)
        return found if about == self.about else None

    def gather(
        self, features_of: Callable[[list[int]], list[Tensor]], count: int, title: str, stop: Stop
    ) -> list[Tensor] | None:
        """What `features_of` returns of the images 0 to count - 1, each tensor (count, ...); None if `stop` said so.

        features_of: of the numbers of images, tensors with a row for each.
        """
        each_rank = -(-count // self.world)  # as many on every rank: under ZeRO-3 all must take part in each call
        mine = [i % count for i in range(self.rank * each_rank, (self.rank + 1) * each_rank)]
        size, parts = self.config.evaluate.batch_size, []
        starts = range(0, each_rank, size)
        for start in progress_bar(starts, title, "batch", silent=self.rank > 0):
            if stop():
                return None
            parts.append(features_of(mine[start : start + size]))
        return [all_gather_rows(torch.cat(kind))[:count] for kind in zip(*parts, strict=True)]
