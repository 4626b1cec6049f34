"""Configurations and trainings of a tiny FLUX.2."""

import numpy as np
import torch

from asymflow.backbones.flux2 import latent_flow
from asymflow.flow_matching import flow_matching_loss, noise_level, noisy
from asymflow.training.config.reading import load_config

SIZES = [(48, 48)] * 48 + [(32, 64)] * 16  # of the images; two buckets


def learn(transformer, data, steps=60):
    """Some of the distribution of the latents: enough for a reference that is better than nothing."""
    torch.manual_seed(0)
    flow, optimizer = latent_flow(transformer.train()), torch.optim.Adam(transformer.parameters(), lr=3e-3)
    samples = [data[i] for i in np.flatnonzero(data.bucket == data.bucket[0])]
    latents, prompts = torch.stack([s.latent for s in samples]), torch.stack([s.prompt for s in samples])
    for _ in range(steps):
        chosen = torch.randint(len(latents), (16,))
        x0, sigma = latents[chosen], noise_level(torch.randn(16), 0.0, 1.0)
        eps = torch.randn_like(x0)
        velocity = flow(noisy(x0, eps, sigma), sigma, encoder_hidden_states=prompts[chosen])
        optimizer.zero_grad()
        flow_matching_loss(velocity, x0, eps, sigma).mean().backward()
        optimizer.step()
    transformer.eval()


def settings(made, *more):
    return [
        f"finetune.base={made}/base",
        f"finetune.subspace={made}/subspace.safetensors",
        "finetune.lora={rank: 4, dropout: 0.0}",
        f"data.path={made}/shards",
        "train.global_batch_size=8",
        "train.steps=6",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "sample.every=null",
        "optimizer.warmup_steps=2",
        "loss.sigma_shift=2.0",
        "ema.decays=[0.5]",
        "ema.snapshot_every=6",
        *more,
    ]


def config_of(made, *more):
    return load_config("asymflux2_tiny", settings(made, *more))
