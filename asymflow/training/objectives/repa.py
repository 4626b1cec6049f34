"""REPA: representation alignment with DINOv2 (Yu et al. 2024, arXiv 2410.06940).

After some blocks of the network, a small projector maps the tokens of the noisy image to DINOv2's features of the clean
image. The cosine between the two becomes part of the loss:

    repa = mean over the tokens of -cos(projector(token), feature)        loss = flow matching + weight * repa

The features depend on the images alone, so they are computed without gradients. Each micro-batch computes its own, so
that their memory does not grow with the number of micro-batches in a step.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asymflow.conditions import forward_parameters
from asymflow.errors import InputError
from asymflow.evaluation import dinov2
from asymflow.evaluation.dinov2 import MEAN, STD
from asymflow.model import OPTIONS, AsymFlow

AT_ONCE = 64  # images in one pass through DINOv2
PROJECTOR = "projector."  # the prefix of the parameters that only training needs


class Aligned(AsymFlow):
    """An AsymFlow that in training mode returns `(velocity, projected tokens (B, N, features))`.

    In eval mode it is the AsymFlow `flow`, with the same backbone, subspace and names of parameters.

    after: the number of blocks after which tokens are projected; only those of the image, not those of the class.
    hidden, features: widths of the projector, three linear layers with SiLU between them.
    """

    def __init__(self, flow: AsymFlow, after: int, hidden: int, features: int):
        super().__init__(flow.backbone, flow.subspace, **{name: getattr(flow, name) for name in OPTIONS})
        self.after = after
        width = (getattr(flow.backbone, "config", None) or {}).get("width")
        if not width or "return_tokens_after" not in forward_parameters(flow.backbone):
            name = type(flow.backbone).__name__
            needed = "config['width'], and that its forward takes return_tokens_after"
            raise InputError(f"loss.repa needs of a backbone {needed}: {name} has not both")
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )
        for layer in self.projector[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_sigma: Tensor, sigma: Tensor | float, **conditions) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return super().forward(x_sigma, sigma, **conditions)
        velocity, tokens = super().forward(x_sigma, sigma, return_tokens_after=self.after, **conditions)
        return velocity, self.projector(tokens)


def misalignment(projected: Tensor, features: Tensor) -> Tensor:
    """`-cos(projected, features)`, the mean over the tokens of each image, (B,) in [-1, 1], in float32 or better.

    projected, features: (B, N, F), of any dtype.
    """
    projected, features = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (projected, features))
    return -F.cosine_similarity(projected, features, dim=-1).mean(1)


class Encoder:
    """DINOv2, frozen, from a folder of the package `transformers`, with or without registers.

    `encoder(x0)` returns its features of images (B, 3, H, W) in [-1, 1]: (B, h * w, width), after the last norm, in
    `dtype`, one for each token of the trained model, row by row. grid: (h, w), the tokens of that model. The images are
    resized so that DINOv2's patches of 14 pixels form the same grid: 256 pixels in 16 x 16 tokens become 224 pixels.
    `transformers` interpolates the position embeddings.

    It is not an nn.Module, so that neither the engine nor checkpoints see it. Only safetensors are read, and no code is
    loaded from the folder. Raises InputError if the folder holds no DINOv2, or not all of one.
    """

    def __init__(
        self,
        folder: str | Path,
        grid: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.model = dinov2.load(Path(folder)).to(device, dtype)
        config = self.model.config
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        self.size = (grid[0] * patch, grid[1] * patch)
        self.not_patches = 1 + getattr(config, "num_register_tokens", 0)  # the class token, then the registers
        self.width, self.dtype = config.hidden_size, dtype
        for name, values in (("pixel_mean", MEAN), ("pixel_std", STD)):
            self.model.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        return torch.cat([self.features(images) for images in x0.split(AT_ONCE)])

    def features(self, x0: Tensor) -> Tensor:
        pixels = F.interpolate((x0 + 1) / 2, self.size, mode="bicubic", antialias=True)
        pixels = ((pixels - self.model.pixel_mean) / self.model.pixel_std).to(self.dtype)
        return self.model(pixels).last_hidden_state[:, self.not_patches :]
