"""Finetuning a latent text-to-image model into a pixel model."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from asymflow.color import clamp_to_gamut, oklab_to_rgb
from asymflow.errors import InputError
from asymflow.flow_matching import noise_level, noisy
from asymflow.model import AsymFlow
from asymflow.parameterization import calibration
from asymflow.patches import patchify, unpatchify
from asymflow.precision import computing
from asymflow.sampling import dynamic_shift, guided, image_noise, sample, sigma_grid
from asymflow.training.config.derived import frozen_dtype, sampler, sampling_precision
from asymflow.training.config.reading import Config
from asymflow.training.loader import Batches
from asymflow.training.objectives.encoded_batches import EncodedBatch, EncodedBatches
from asymflow.training.objectives.variance import (
    SHIFT,
    PerceptualLoss,
    agreement,
    denoising_loss,
    signal_share,
    variance_reduced_target,
)


class LatentToPixel:
    """The objective for `Finetuned`: a variance-reduced or plain loss, plus a perceptual term if that is given."""

    def __init__(self, config: Config, dataset, perceptual: PerceptualLoss | None = None):
        self.config, self.dataset, self.perceptual = config, dataset, perceptual
        self.terms = ("loss", "perceptual") if perceptual else ("loss",)
        self.weights = (config.loss.weight, *([config.loss.perceptual.weight] if perceptual else []))

    @classmethod
    def prepare(cls, config: Config, dataset, device: torch.device) -> Callable[[AsymFlow], "LatentToPixel"]:
        vgg = config.loss.perceptual
        perceptual = PerceptualLoss(vgg.vgg, device, frozen_dtype(config)) if vgg else None
        return lambda flow: cls(config, dataset, perceptual)

    def model(self, flow: AsymFlow) -> nn.Module:
        return flow

    def batches(self, dataset, rank: int, world: int) -> Batches:
        return EncodedBatches(dataset, self.config, rank, world)

    def losses(self, model: nn.Module, batch: EncodedBatch) -> Tensor:
        """The terms of the loss, (B, terms): see variance.py for the formulas."""
        c, flow = self.config.loss, getattr(model, "module", model)
        x0, sigma, text = batch.x0, noise_level(batch.normal, c.sigma_mean, c.sigma_std, c.sigma_shift), batch.prompts
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
            # The error of the latent model, z - z_ref with z_ref = z_tau - tau v, then lifted to pixels.
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
            weight = weight.view(-1, 1, 1, 1) * tokens_to_pixels(gate.square().mean(2).sqrt(), x0, flow.patch_size)
            terms.append(self.perceptual(x0_pred, x0, weight))
        return torch.stack(terms, dim=1)

    def draw(self, flow: AsymFlow, indices: range) -> Tensor:
        """Images for the prompts of the first samples in the largest bucket, repeated if there are too few."""
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
            images = sample(velocity, noise, sigmas, sampler(c.method), lambda x0, sigma: clamp_to_gamut(x0))
        return oklab_to_rgb(images)

    def prompt(self, index: int) -> Tensor:
        try:
            return self.dataset[index].prompt
        except InputError:  # a damaged sample: training goes on without it, and so does drawing
            return self.dataset.empty_prompt


def tokens_to_pixels(values: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Repeat one value per token (B, N, 1) over the pixels of its patch: (B, 1, H, W)."""
    height, width = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    grid = values.view(-1, 1, height, width)
    return grid.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
