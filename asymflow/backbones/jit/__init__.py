"""JiT: the plain pixel transformer of Li and He (arXiv 2511.13720), as a network on tokens.

Shape letters: B images, N tokens of an image, n tokens including those of the class, D numbers in a token, W width,
H heads, d numbers in a head.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asymflow.conditions import check_labels
from asymflow.errors import InputError
from asymflow.numerics import at_least_float32, has_float64, no_autocast
from asymflow.subspace import Subspace

SIZES = {  # B, L, H as published; tiny for tests, S for laptops
    "tiny": dict(width=64, depth=4, heads=2, bottleneck=32, in_context_start=1, in_context_tokens=4),
    "S": dict(width=384, depth=12, heads=6, bottleneck=64, in_context_start=4),
    "B": dict(width=768, depth=12, heads=12, bottleneck=128, in_context_start=4),
    "L": dict(width=1024, depth=24, heads=16, bottleneck=128, in_context_start=8),
    "H": dict(width=1280, depth=32, heads=16, bottleneck=256, in_context_start=10, dropout=0.2),
}


class JiT(nn.Module):
    """A transformer from tokens, their noise level and a class to a prediction of the tokens' shape.

    `jit(tokens (B, N, D), tau (B,), labels (B,), grid=(h, w))` returns (B, N, D). Labels run from 0 to num_classes - 1;
    num_classes, the last index, means "no class".

    patch_size, channels: D = channels * patch_size^2. image_size: in pixels, of square images; `grid` overrides it.
    width, depth, heads: of the transformer. bottleneck: the rank of the patch embedding.
    in_context_start, in_context_tokens: so many tokens, made from the label, join the sequence before this block,
        which is one of 0 to depth - 1.
    mlp_ratio: the SwiGLUs have int(2/3 mlp_ratio width) hidden units.
    dropout: of the projections; attention_dropout: of the attention. Both only in the middle half of the blocks,
        of which there must be 4 then.
    checkpoint_every: recompute every n-th block in the backward pass to save memory; 1 means all of them, 0 none.

    Tokens between the blocks have the dtype of the weights, under autocast too: the residual sums stay in float32.
    Raises InputError if the sizes do not fit together.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        bottleneck: int,
        in_context_start: int,
        image_size: int = 256,
        channels: int = 3,
        num_classes: int = 1000,
        in_context_tokens: int = 32,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        checkpoint_every: int = 0,
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_sizes(self.config)
        self.patch_size, self.num_classes = patch_size, num_classes
        self.in_context_start, self.checkpoint_every = in_context_start, checkpoint_every
        self.dim = channels * patch_size**2
        self.grid = (image_size // patch_size,) * 2
        self.noise_scale = max(1.0, image_size / 256)  # it takes more noise to hide a larger image
        self.head_dim = width // heads

        self.x_embedder = PatchEmbedding(self.dim, bottleneck, width)
        self.t_embedder = NoiseLevelEmbedding(width)
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.in_context_positions = nn.Parameter(torch.empty(in_context_tokens, width))
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, *((dropout, attention_dropout) if i in middle else (0.0, 0.0)))
            for i in range(depth)
        )
        self.head = Head(width, self.dim)
        self.reset_parameters()

    @classmethod
    def from_name(cls, name: str, **options) -> "JiT":
        """A JiT by its name SIZE/PATCH, such as "B/16". Sizes are B, L and H, as published, and S and tiny.

        The image size is 16 patches, unless given: 256 pixels for /16, 512 for /32. `options`: as for the class.
        """
        size, _, patch = name.partition("/")
        if size not in SIZES or not patch.isdecimal() or int(patch) == 0:
            raise InputError(
                f"{name!r} is not a JiT: expected SIZE/PATCH, such as B/16, with SIZE in {', '.join(SIZES)}"
            )
        return cls(**{"patch_size": int(patch), "image_size": 16 * int(patch), **SIZES[size], **options})

    def forward(
        self,
        tokens: Tensor,
        tau: Tensor,
        labels: Tensor,
        grid: tuple[int, int] | None = None,
        return_tokens_after: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction (B, N, D). With `return_tokens_after=n` also the image tokens (B, N, W) after n blocks.

        grid: rows and columns of tokens; by default those of `image_size`. Raises InputError if shapes do not fit.
        """
        grid = grid or self.grid
        self.check_inputs(tokens, tau, labels, grid, return_tokens_after)
        label = self.y_embedder(labels)
        condition = F.silu(self.t_embedder(tau) + label)
        x = self.x_embedder(tokens).to(label.dtype)
        x = x + sincos_positions(grid, x.shape[-1], x.device if has_float64(x.device) else "cpu").to(x)
        rotation = rope(grid, self.head_dim, x.device, at_least_float32(x))
        in_context, after = 0, None
        for i, block in enumerate(self.blocks):
            if i == self.in_context_start:
                prefix = label[:, None] + self.in_context_positions
                in_context = prefix.shape[1]
                x = torch.cat([prefix, x], dim=1)
                rotation = F.pad(rotation, (0, 0, in_context, 0), value=0.0)
                rotation[0, :in_context] = 1.0  # cos 0, sin 0: these tokens have no place in the image
            if torch.is_grad_enabled() and self.checkpoint_every and i % self.checkpoint_every == 0:
                x = checkpoint(block, x, condition, rotation, use_reentrant=False)
            else:
                x = block(x, condition, rotation)
            if i + 1 == return_tokens_after:
                after = x[:, in_context:]
        prediction = self.head(x[:, in_context:], condition)
        return prediction if return_tokens_after is None else (prediction, after)

    def check_inputs(
        self, tokens: Tensor, tau: Tensor, labels: Tensor, grid: tuple[int, ...], return_tokens_after: int | None
    ) -> None:
        if len(grid) != 2:
            raise InputError(f"JiT is for images, with a grid of rows and columns, but the grid is {grid}")
        if tokens.shape[1:] != (grid[0] * grid[1], self.dim):
            raise InputError(
                f"JiT expects tokens (B, {grid[0] * grid[1]}, {self.dim}), but got {tuple(tokens.shape)}: see its "
                "image_size, patch_size and channels"
            )
        if tau.shape != tokens.shape[:1]:
            raise InputError(
                f"tau must be {len(tokens)} noise levels, one for each image, but it is {tuple(tau.shape)}"
            )
        if labels.shape != tokens.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"labels must be {len(tokens)} integers, one for each image, but they are {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        if return_tokens_after is not None and not 1 <= return_tokens_after <= len(self.blocks):
            raise InputError(
                f"return_tokens_after must be from 1 to {len(self.blocks)}, but it is {return_tokens_after}"
            )
        # Not on a GPU, where reading the labels would make the CPU wait: samplers and data sets check them beforehand.
        # Nor for the fake tensors by which costs are counted: they have no values.
        if labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling():
            check_labels(labels, self.num_classes)

    @torch.no_grad()
    def seed_patch_embedding(self, subspace: Subspace) -> None:
        """Set the first rows of the bottleneck to the directions of the subspace (arXiv 2605.12964).

        They get the norm that Xavier initialization gives to the other rows. If the rank is above the bottleneck, the
        leading directions are taken. Raises InputError if the subspace is for other tokens.
        """
        weight = self.x_embedder.proj1.weight
        if subspace.dim != self.dim:
            raise InputError(f"the subspace is of tokens of dimension {subspace.dim}, the backbone's have {self.dim}")
        rows = min(subspace.rank, len(weight))
        norm = math.sqrt(2 * self.dim / (self.dim + len(weight)))
        weight[:rows] = norm * subspace.basis[:, :rows].mT.to(weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as published: Xavier-uniform; N(0, 0.02) for embeddings; zero for the modulation and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for weight in (
            self.y_embedder.weight,
            self.in_context_positions,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for module in (*(block.modulation for block in self.blocks), self.head.modulation, self.head.linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class PatchEmbedding(nn.Module):
    """Tokens to width W through a bottleneck. On tokens, it is what JiT's convolution with stride patch_size does."""

    def __init__(self, dim: int, bottleneck: int, width: int):
        super().__init__()
        self.proj1 = nn.Linear(dim, bottleneck, bias=False)
        self.proj2 = nn.Linear(bottleneck, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj2(self.proj1(tokens))


class NoiseLevelEmbedding(nn.Module):
    """256 sinusoids of the noise level in [0, 1], cosines first, with periods up to 10,000 * 2 pi; then two layers."""

    WAVES = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tau: Tensor) -> Tensor:
        waves = tau[:, None] * self.frequencies(tau.device, at_least_float32(tau))
        return self.mlp(torch.cat([waves.cos(), waves.sin()], dim=-1).to(self.mlp[0].weight.dtype))

    @classmethod
    def frequencies(cls, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        half = cls.WAVES // 2
        return torch.exp(-math.log(10000) * torch.arange(half, device=device, dtype=dtype) / half)


class Block(nn.Module):
    """Attention and SwiGLU, each after RMSNorm, shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, attention_dropout: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, dropout, attention_dropout)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, swiglu_width(width, mlp_ratio), dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotation)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    """Self-attention with RMSNorm and rotary positions on queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        # Whether attention is computed in float32, even under autocast: see `asymflow.precision`. An attribute of the
        # instance: if it were one of the class, setting it on an instance would make Dynamo compile every block anew.
        self.float32_attention = False
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, n, d)
        weights = self.q_norm.weight.dtype  # so that under autocast q and k are rounded once, after norm and rotation
        met = at_least_float32(v) if self.float32_attention else v.dtype
        q = rotate(self.q_norm(q.to(weights)), rotation).to(met)
        k = rotate(self.k_norm(k.to(weights)), rotation).to(met)
        dropout = self.attention_dropout if self.training else 0.0
        with no_autocast(x) if self.float32_attention else nullcontext():
            x = F.scaled_dot_product_attention(q, k, v.to(met), dropout_p=dropout).to(v.dtype)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


def swiglu_width(width: int, mlp_ratio: float) -> int:
    return int(width * mlp_ratio * 2 / 3)  # a SwiGLU has three matrices, an MLP two: so it has as many weights


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(gate) * value))


class Linear(nn.Linear):
    """A linear layer that a GPU computes with sizes which suit its tensor cores.

    The 3,413 hidden units of H do not: an H100 multiplies by 3,456 three to five times faster (docs/benchmarks.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        return filled_up(x, self.weight, self.bias) if x.is_cuda else super().forward(x)


def filled_up(x: Tensor, weight: Tensor, bias: Tensor, to: int = 64) -> Tensor:
    """`F.linear`, with sizes that are not multiples of 8 filled up to multiples of `to` with zeros."""
    high, wide = weight.shape
    rows, columns = (-size % to if size % 8 else 0 for size in (high, wide))
    if columns:
        x, weight = F.pad(x, (0, columns)), F.pad(weight, (0, columns))
    if rows:
        weight, bias = F.pad(weight, (0, 0, 0, rows)), F.pad(bias, (0, rows))
    return F.linear(x, weight, bias)[..., :high]


class Head(nn.Module):
    """RMSNorm, shifted and scaled by the condition, and a linear layer to tokens."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, dim)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


# ---- Positions: computed when they are used, so that any grid works, and no checkpoint contains them -----------------
def sincos_positions(grid: tuple[int, int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed positions (h * w, width): sines, then cosines of the column in the first half, of the row in the second."""
    omega = 10000.0 ** -(torch.arange(width // 4, device=device, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float64) for n in grid), indexing="ij")
    waves = [axis.flatten()[:, None] * omega for axis in (column, row)]
    return torch.cat([f(w) for w in waves for f in (torch.sin, torch.cos)], dim=-1)


def rope(grid: tuple[int, int], head_dim: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Rotations (2, h * w, head_dim / 2), cosines and sines, of adjacent pairs: half of them by row, half by column."""
    quarter = head_dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, device=device, dtype=dtype) / quarter)
    row, column = torch.meshgrid(*(torch.arange(n, device=device, dtype=dtype) for n in grid), indexing="ij")
    angle = torch.cat([axis.flatten()[:, None] * omega for axis in (row, column)], dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, H, n, d) by `rotation` (2, n, d / 2)."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


# ---- Checks ----------------------------------------------------------------------------------------------------------
def check_sizes(config: dict) -> None:
    for name in ("patch_size", "width", "depth", "heads", "bottleneck", "image_size", "channels"):
        if config[name] < 1:
            raise InputError(f"{name} of a JiT must be at least 1, but it is {config[name]}")
    for name in ("num_classes", "in_context_start", "in_context_tokens", "checkpoint_every"):
        if config[name] < 0:
            raise InputError(f"{name} of a JiT must be at least 0, but it is {config[name]}")
    if config["image_size"] % config["patch_size"]:
        raise InputError(f"image_size {config['image_size']} is not a multiple of patch_size {config['patch_size']}")
    if config["width"] % (4 * config["heads"]):
        raise InputError(f"width {config['width']} is not a multiple of 4 * heads: rotary positions need that")
    if not 1 <= config["width"] * config["mlp_ratio"] * 2 / 3 < math.inf:
        raise InputError(f"mlp_ratio {config['mlp_ratio']} makes no hidden layer at width {config['width']}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= config[name] < 1:
            raise InputError(f"{name} of a JiT must be a probability below 1, but it is {config[name]}")
        if config[name] and config["depth"] < 4:
            raise InputError(
                f"{name} {config[name]} of a JiT would reach none of its {config['depth']} blocks: it acts in the "
                "middle half of four or more. Set it to 0"
            )
    if config["in_context_start"] >= config["depth"]:
        raise InputError(
            f"in_context_start {config['in_context_start']} of a JiT must be below its depth {config['depth']}: no "
            "block would see the tokens of the class"
        )
