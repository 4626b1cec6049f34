"""Train a network of your own as an asymmetric flow, without train_ddp.py: the whole loop.

    python docs/examples/own_backbone.py         # a small vision transformer, written here
    python docs/examples/own_backbone.py dit     # a transformer of diffusers, unchanged

Ten minutes on one CPU core. It draws images of coloured shapes, one of each class, to runs/own_backbone.png.
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from asymflow import AsymFlow, fit_pca, flow_matching_loss, generate, noise_level, noisy, patchify, without_some
from asymflow.data.shapes import Shapes
from asymflow.pictures import image_grid

torch.set_num_threads(1)  # with so small a network, more threads wait for each other
CLASSES, SIDE, PATCH = 16, 8, 4  # 8 x 8 tokens of 4 x 4 pixels: images of 32 x 32


class ViT(nn.Module):
    """Tokens (B, N, D), noise levels tau (B,) and labels (B,) to tokens (B, N, D). It knows of no flow."""

    patch_size, num_classes, grid = PATCH, CLASSES, (SIDE, SIDE)

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4):
        super().__init__()
        self.enter, self.leave = nn.Linear(3 * PATCH**2, width), nn.Linear(width, 3 * PATCH**2)
        self.position = nn.Parameter(torch.randn(SIDE**2, width))
        self.label = nn.Embedding(CLASSES + 1, width)  # the last one means "no class"
        self.noise_level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens, tau, labels):
        told = self.label(labels) + self.noise_level(tau[:, None])
        h = self.blocks(self.enter(tokens) + self.position + told[:, None])
        return self.leave(h)


class DiT(nn.Module):
    """The same of diffusers' DiTTransformer2DModel, to which a token is a pixel with D channels."""

    patch_size, num_classes, grid = PATCH, CLASSES, (SIDE, SIDE)

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        sizes = dict(num_layers=4, num_attention_heads=4, attention_head_dim=24, sample_size=SIDE, patch_size=1)
        channels = 3 * PATCH**2
        self.dit = DiTTransformer2DModel(**sizes, in_channels=channels, num_embeds_ada_norm=CLASSES)

    def forward(self, tokens, tau, labels):
        pixels = tokens.mT.unflatten(2, self.grid)
        return self.dit(pixels, timestep=1000 * tau, class_labels=labels, return_dict=False)[0].flatten(2).mT


def main(network: str = "vit", steps: int = 1500, out: str = "runs/own_backbone.png") -> None:
    torch.manual_seed(0)
    images = Shapes(20_000, SIDE * PATCH)
    collate = lambda samples: (
        torch.stack([s.image for s in samples]) / 127.5 - 1,
        torch.tensor([s.label for s in samples]),
    )
    loader = DataLoader(images, batch_size=64, shuffle=True, drop_last=True, collate_fn=collate)
    subspace = fit_pca((patchify(x0, PATCH) for x0, _ in islice(loader, 30)), rank=8)  # for the noise
    flow = AsymFlow({"vit": ViT, "dit": DiT}[network](), subspace)
    dropout = 0.1 if network == "vit" else 0.0  # this DiT leaves out a tenth of the labels by itself
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=0.0)
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    batches = (batch for _ in range(steps) for batch in loader)
    for x0, labels in (bar := tqdm((next(batches) for _ in range(steps)), total=steps)):
        sigma = noise_level(torch.randn(len(x0)))
        eps = flow.noise_scale * torch.randn_like(x0)
        velocity = flow(noisy(x0, eps, sigma), sigma, labels=without_some(labels, CLASSES, dropout))
        loss = flow_matching_loss(velocity, x0, eps, sigma).mean()  # of the velocity, whatever the network predicts
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(flow)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    drawn = generate(average.module.eval(), labels=range(CLASSES), seed=0, guidance=2.0, progress=True)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    image_grid(drawn, width=512).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
