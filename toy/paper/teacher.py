"""A small DINOv2, trained on the spot: what REPA aligns with, where the published one cannot be had.

It has the class, the files and the patches of 14 pixels of the published DINOv2, but learns from labels: from the mean
of its patch tokens, the class of a picture; from each of them, how much of its patch is covered.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asymflow import opening
from asymflow.data.shapes import Shapes
from asymflow.errors import InputError
from asymflow.evaluation.dinov2 import MEAN, STD
from asymflow.progress import progress_bar

GROUND = 200  # grey level: the background is lighter in its darkest channel, and no colour is
WIDTH, DEPTH, PATCH = 96, 4, 14
BATCH = 64


def teacher_in(folder: Path, grid: int, steps: int, size: int = 64, seed: int = 0) -> None:
    """Train the network, unless it is in the folder. InputError if that has learnt for another number of steps.

    grid: patches along a side, as many as the transformer has that is aligned with it. size: of pictures, in pixels.
    """
    about = folder / "about.json"
    if not about.exists():
        from transformers import Dinov2Config, Dinov2Model  # of the extra `repa`, which no other experiment needs

        torch.manual_seed(seed)
        sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, mlp_ratio=2)
        model = Dinov2Model(Dinov2Config(**sizes, patch_size=PATCH, image_size=grid * PATCH))
        heads = nn.ModuleList([nn.Linear(WIDTH, Shapes.num_classes), nn.Linear(WIDTH, 1)])
        optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        pictures = Shapes((steps + 8) * BATCH, size, seed=6)
        for step in progress_bar(range(steps), "training the network for REPA", "step"):
            images, labels, covered = batch(pictures, step, grid)
            tokens = model(images).last_hidden_state[:, 1:]
            loss = F.cross_entropy(heads[0](tokens.mean(1)), labels)
            loss = loss + F.binary_cross_entropy_with_logits(heads[1](tokens)[..., 0], covered)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval().requires_grad_(False)
        right = []
        for step in range(steps, steps + 8):
            images, labels, _ = batch(pictures, step, grid)
            right.append(heads[0](model(images).last_hidden_state[:, 1:].mean(1)).argmax(1) == labels)
        model.save_pretrained(folder)
        about.write_text(json.dumps({"right": torch.cat(right).double().mean().item(), "steps": steps}) + "\n")
    found = opening.read_json(about)
    if found["steps"] != steps:
        raise InputError(f"{folder} has a network of {found['steps']} steps, not of {steps}: choose another --out")


def batch(pictures: Shapes, step: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images as DINOv2 expects them, their classes, and the share of each patch that shapes cover."""
    samples = [pictures[step * BATCH + i] for i in range(BATCH)]
    images = torch.stack([sample.image for sample in samples])
    shape = (images.amin(1, keepdim=True) < GROUND).float()
    covered = F.adaptive_avg_pool2d(shape, grid).flatten(1)
    pixels = F.interpolate(images / 255, (grid * PATCH,) * 2, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor([sample.label for sample in samples]), covered
