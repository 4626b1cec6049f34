"""A tiny FLUX.2 pipeline, with adapters of random weights."""

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from asymflow import Subspace
from asymflow.backbones.flux2 import latent_to_pixel
from asymflow.backbones.flux2.adapter import add_lora, fingerprint, published_names, write_adapter
from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline
from toy.tiny_flux2 import TEXT_LENGTH

SCALE = 1.6
FULL = ("x_embedder", "proj_out", "norm_out")
PROMPTS = ["a red square", "two blue circles"]
SMALL = dict(height=32, width=48, num_inference_steps=3, max_sequence_length=TEXT_LENGTH, output_type="latent")


def save_adapter(base, folder, strength):
    """The mere lift, or one with LoRA and full layers that moved by some random `strength`."""
    latent = Flux2KleinPipeline.from_pretrained(base, vae=None, text_encoder=None, tokenizer=None).transformer
    made_of = fingerprint(latent)
    subspace = Subspace.random(768, 16, scale=SCALE)
    flow = latent_to_pixel(latent, subspace)
    if strength:
        add_lora(flow.backbone.transformer, 3)
    parameters = dict(flow.backbone.transformer.named_parameters())
    tensors = {n: p.detach() for n, p in parameters.items() if "lora_" in n or n.startswith(FULL)}
    torch.manual_seed(1)
    moved = {n: p + strength * torch.randn_like(p) for n, p in tensors.items()}
    write_adapter(folder, published_names(moved), subspace, latent.config, made_of, prompt_length=TEXT_LENGTH)
    return folder


def load(base, adapter, **options):
    pipeline = AsymFlux2KleinPipeline.from_pretrained(base, adapter=adapter, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, noise, **options):
    """Normalized Oklab images (n, 3, H, W)."""
    return pipeline(**{"prompt": PROMPTS, "latents": noise, **SMALL, **options}).images


def picture(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
