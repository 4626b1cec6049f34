"""What a training minimizes: a class-conditional model from scratch, or a pixel model that goes on from a latent one.

An objective knows the terms of the loss, the batches that they need, and how its model is drawn from. The loop knows
nothing of the model.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from asymflow.color import clamp_to_gamut, oklab_to_rgb
from asymflow.cost import flops
from asymflow.data.batches import Batch, Batches
from asymflow.data.encoded_batches import EncodedBatch, EncodedBatches
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.parameterization import calibration
from asymflow.patches import patchify, unpatchify
from asymflow.precision import computing
from asymflow.sampling import dynamic_shift, generate, guided, image_noise, sample, sigma_grid, time_shift
from asymflow.training.config.derived import batch_sizes, sampling_precision
from asymflow.training.config.reading import Config
from asymflow.training.loss import flow_matching_loss, noise_level, noisy
from asymflow.training.repa import Aligned, Encoder, misalignment
from asymflow.training.variance import (
    SHIFT,
    Perceptual,
    agreement,
    denoising_loss,
    signal_share,
    variance_reduced_target,
)


class Objective(Protocol):
    terms: tuple[str, ...]
    """Of the loss, as they are called in the metrics."""
    weights: tuple[float, ...]
    """Of the terms, in what is minimized."""
    flops: int | None
    """Of a training step on one image, without what is computed twice to save memory; None: not counted."""

    def model(self, flow: AsymFlow) -> nn.Module:
        """What the engine trains: an AsymFlow, perhaps with more to say while it is trained."""

    def batches(self, dataset, rank: int, world: int) -> Batches: ...

    def prepared(self, batches: Iterator[Batch]) -> Iterable[tuple[Batch, Tensor | None]]:
        """The micro-batches of a step, each with what is computed of all of them at once."""

    def losses(self, model: nn.Module, batch: Batch, features: Tensor | None) -> Tensor:
        """The terms of the loss of each image of a micro-batch, not yet weighted: (B, terms)."""

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        """RGB images (n, 3, H, W) in [-1, 1], always the same for the same weights and indices."""


class ClassConditional:
    """Flow matching of images of classes, with REPA if there is an encoder."""

    def __init__(self, config: Config, flow: AsymFlow, encoder: Encoder | None = None):
        self.config, self.encoder = config, encoder
        self.terms = ("loss", "repa") if encoder else ("loss",)
        self.weights = (config.loss.weight, config.loss.repa.weight) if encoder else (config.loss.weight,)
        shape = (flow.channels, config.model.image_size, config.model.image_size)
        # Of the model alone, as is usual: what DINOv2 and the projection to its features cost is not in the MFU.
        self.flops = flops(flow, shape, training=True, recomputed=False)

    def model(self, flow: AsymFlow) -> nn.Module:
        if not self.encoder:
            return flow
        return Aligned(flow, self.config.loss.repa.after, self.config.loss.repa.hidden, self.encoder.width)

    def batches(self, dataset, rank: int, world: int) -> Batches:
        return Batches(dataset, self.config, rank, world)

    def prepared(self, batches: Iterator[Batch]) -> Iterable[tuple[Batch, Tensor | None]]:
        """With what the tokens are aligned with: see repa.py."""
        if not self.encoder:
            return ((batch, None) for batch in batches)
        batches = list(batches)
        features = self.encoder(torch.cat([batch.x0 for batch in batches]))
        return zip(batches, features.split(batch_sizes(self.config, dist.get_world_size())[0]), strict=True)

    def losses(self, model: nn.Module, batch: Batch, features: Tensor | None) -> Tensor:
        sigma = sigma_of(batch, self.config)
        output = model(noisy(batch.x0, batch.eps, sigma), sigma, labels=batch.labels)
        velocity, *projected = (output,) if features is None else output
        terms = [flow_matching_loss(velocity, batch.x0, batch.eps, sigma, self.config.loss.sigma_floor)]
        terms += [misalignment(tokens, features) for tokens in projected]
        return torch.stack(terms, dim=1)

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        return drawn(flow, self.config, [i % self.config.model.num_classes for i in indices], indices)


def drawn(flow: AsymFlow, config: Config, labels: list[int], indices: Iterable[int]) -> Tensor:
    """Images (n, C, H, W) of the classes, with the sampler of the configuration; the noise of each is its index's."""
    c = config.sample
    options = dict(steps=c.steps, guidance=c.guidance, interval=tuple(c.interval), method=c.method)
    with computing(flow, sampling_precision(config, flow.subspace.basis.device)):
        return generate(flow, labels, indices, seed=config.train.seed, **options)


class LatentToPixel:
    """The finetuning of `Finetuned`: variance-reduced or plain, with a perceptual term if there is `perceptual`."""

    flops = None

    def __init__(self, config: Config, dataset, device: torch.device, perceptual: Perceptual | None = None):
        self.config, self.dataset, self.device, self.perceptual = config, dataset, device, perceptual
        self.terms = ("loss", "perceptual") if perceptual else ("loss",)
        self.weights = (config.loss.weight, *([config.loss.perceptual.weight] if perceptual else []))

    def model(self, flow: AsymFlow) -> nn.Module:
        return flow

    def batches(self, dataset, rank: int, world: int) -> Batches:
        return EncodedBatches(dataset, self.config, rank, world)

    def prepared(self, batches: Iterator[EncodedBatch]) -> Iterable[tuple[EncodedBatch, None]]:
        return ((batch, None) for batch in batches)

    def losses(self, model: nn.Module, batch: EncodedBatch, features: None) -> Tensor:
        """See variance.py."""
        c, flow = self.config.loss, getattr(model, "module", model)
        x0, sigma, text = batch.x0, sigma_of(batch, self.config), batch.prompts
        tokens = lambda images: patchify(images, flow.patch_size, flow.token_order)
        x_sigma = noisy(x0, batch.eps, sigma)
        if c.variance_reduction is None and self.perceptual is None:
            velocity, d_low = model(x_sigma, sigma, encoder_hidden_states=text), None
        else:
            basis, scale = flow.subspace.basis, flow.subspace.scale
            tau = calibration(sigma, scale)[1]
            latent_noise = unpatchify(tokens(batch.eps) @ basis.to(x0), tuple(batch.latents.shape[-2:]), 1)
            noisy_latents = noisy(batch.latents, latent_noise, tau)
            velocity, latent_velocity = model(
                x_sigma, sigma, noisy_latents=noisy_latents, tau=tau, encoder_hidden_states=text
            )
            # z - z_ref, with z_ref = z_tau - tau v: what the latent model gets wrong, then lifted to pixels
            wrong = batch.latents - (noisy_latents - tau.view(-1, 1, 1, 1) * latent_velocity)
            d_low = patchify(wrong, 1) @ (scale * basis).to(x0).mT
        x0_pred = x_sigma - sigma.view(-1, 1, 1, 1) * velocity
        target, gate = tokens(x0), None
        if d_low is not None:
            gate = agreement(target - tokens(x0_pred.detach()), d_low, flow.channels)
            if c.variance_reduction is not None:
                target = variance_reduced_target(target, d_low, gate, sigma, c.variance_reduction)
        terms = [denoising_loss(tokens(x0_pred), target, sigma, c.sigma_floor)]
        if self.perceptual is not None:
            weight = signal_share(sigma, c.variance_reduction or SHIFT) / sigma.clamp(min=c.sigma_floor).square()
            weight = weight.view(-1, 1, 1, 1) * spread(gate.square().mean(2).sqrt(), x0, flow.patch_size)
            terms.append(self.perceptual(x0_pred, x0, weight))
        return torch.stack(terms, dim=1)

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        """With the prompts of samples of the largest bucket, in their order; the empty one for a damaged sample."""
        c, device = self.config.sample, flow.subspace.basis.device
        bucket = np.bincount(self.dataset.bucket).argmax()
        members = np.flatnonzero(self.dataset.bucket == bucket)
        height, width = self.dataset.buckets[bucket]
        text = torch.stack([self.prompt(int(members[i % len(members)])) for i in indices]).to(device)
        empty = self.dataset.empty_prompt.to(device).expand_as(text)
        noise = image_noise(self.config.train.seed, indices, (flow.channels, height, width), device)
        conditions, unconditional = {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}
        velocity = guided(flow, conditions, unconditional, c.guidance, tuple(c.interval), orthogonal=1.0)
        sigmas = sigma_grid(c.steps, dynamic_shift(height, width))
        with computing(flow, sampling_precision(self.config, device)):
            images = sample(velocity, noise, sigmas, c.method, lambda x0, sigma: clamp_to_gamut(x0))
        return oklab_to_rgb(images)

    def prompt(self, index: int) -> Tensor:
        try:
            return self.dataset[index].prompt
        except InputError:  # training goes on without it, too
            return self.dataset.empty_prompt


def sigma_of(batch: Batch, config: Config) -> Tensor:
    """The noise levels (B,) of a batch."""
    c = config.loss
    sigma = noise_level(batch.normal, c.sigma_mean, c.sigma_std)
    return sigma if c.sigma_shift == 1 else time_shift(sigma, c.sigma_shift)


def spread(values: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Of a value for each token (B, N, 1), one for each pixel (B, 1, H, W)."""
    height, width = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    grid = values.view(-1, 1, height, width)
    return grid.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
