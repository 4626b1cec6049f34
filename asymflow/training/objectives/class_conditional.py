"""Training a class-conditional model from scratch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from asymflow.errors import InputError
from asymflow.flow_matching import flow_matching_loss, noise_level, noisy
from asymflow.model import AsymFlow
from asymflow.precision import computing
from asymflow.sampling import generate
from asymflow.training.config.derived import frozen_dtype, patch_size, sampler, sampling_precision
from asymflow.training.config.reading import Config
from asymflow.training.loader import Batch, Batches
from asymflow.training.objectives.repa import Aligned, Encoder, misalignment


class ClassConditional:
    """Flow matching on images with class labels, plus REPA if `encoder` is given.

    config: all of the training's. flow: the model. encoder: of the images that its tokens are aligned with.
    """

    def __init__(self, config: Config, flow: AsymFlow, encoder: Encoder | None = None):
        self.config, self.flow, self.encoder = config, flow, encoder
        self.terms = ("loss", "repa") if encoder else ("loss",)
        self.weights = (config.loss.weight, config.loss.repa.weight) if encoder else (config.loss.weight,)

    @classmethod
    def prepare(cls, config: Config, dataset, device: torch.device) -> Callable[[AsymFlow], "ClassConditional"]:
        encoder = None
        if repa := config.loss.repa:
            side = config.model.image_size // patch_size(config.model)
            try:
                encoder = Encoder(repa.model, (side, side), device, frozen_dtype(config))
            except InputError as e:
                raise InputError(f"loss.repa.model: {e}") from None
        return lambda flow: cls(config, flow, encoder)

    def model(self, flow: AsymFlow) -> nn.Module:
        if not self.encoder:
            return flow
        return Aligned(flow, self.config.loss.repa.after, self.config.loss.repa.hidden, self.encoder.width)

    def batches(self, dataset, rank: int, world: int) -> Batches:
        return Batches(dataset, self.config, rank, world)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        c = self.config.loss
        x0, sigma = batch.x0, noise_level(batch.normal, c.sigma_mean, c.sigma_std, c.sigma_shift)
        features = self.encoder(x0) if self.encoder else None
        output = model(noisy(x0, batch.eps, sigma), sigma, labels=batch.labels)
        velocity, *projected = (output,) if features is None else output
        terms = [flow_matching_loss(velocity, x0, batch.eps, sigma, c.sigma_floor)]
        terms += [misalignment(tokens, features) for tokens in projected]
        return torch.stack(terms, dim=1)

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        return drawn(flow, self.config, [i % self.config.model.num_classes for i in indices], indices)


def drawn(flow: AsymFlow, config: Config, labels: list[int], indices: Iterable[int]) -> Tensor:
    """Images (n, C, H, W) of the classes, with the configured sampler. Its index determines the noise of an image."""
    c = config.sample
    options = dict(steps=c.steps, guidance=c.guidance, interval=tuple(c.interval), method=sampler(c.method))
    options |= dict(size=(config.model.image_size,) * 2, null_label=config.model.num_classes)
    with computing(flow, sampling_precision(config, flow.subspace.basis.device)):
        return generate(flow, labels, indices, seed=config.train.seed, **options)
