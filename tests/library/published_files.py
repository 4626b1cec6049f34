"""Published checkpoints in each of their layouts."""

from functools import partial
from pathlib import Path

import random_jits
import torch
from safetensors.torch import save_file

from asymflow import Subspace
from asymflow.backbones.jit import JiT

SIZES = dict(patch_size=4, image_size=12, channels=3, width=16, depth=3, heads=2, bottleneck=8, num_classes=5)
SIZES |= dict(in_context_start=1, in_context_tokens=2)
D, IMAGES = 48, (4, 3, 12, 12)
BETWEEN = dict(in_context_start=1)  # what the tensors do not show


random_jit = partial(random_jits.random_jit, **SIZES)


def positions(grid, width, head_dim, in_context):
    """Sines and cosines of columns, then of rows; and the cosines and sines of the rotations, of no angle at first."""
    row, column = (
        axis.flatten()[:, None] for axis in torch.meshgrid(*[torch.arange(grid).double()] * 2, indexing="ij")
    )
    slow = 10000.0 ** -(torch.arange(width // 4) / (width // 4)).double()
    fixed = torch.cat([(column * slow).sin(), (column * slow).cos(), (row * slow).sin(), (row * slow).cos()], dim=-1)
    slow = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4)).double()
    angle = torch.cat([row * slow, column * slow], dim=-1).repeat_interleave(2, dim=-1)
    return fixed[None], angle, torch.cat([torch.zeros(in_context, head_dim), angle])


def published(jit: JiT, subspace: Subspace | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a JiT in the layout of Lakonik/AsymFlow-ImageNet; without a subspace, of its plain JiT."""
    patch, channels = jit.patch_size, jit.dim // jit.patch_size**2
    proj1, proj2 = jit.x_embedder.proj1.weight, jit.x_embedder.proj2.weight
    width, (grid, _), count = proj2.shape[0], jit.grid, len(jit.in_context_positions)
    fixed, angle, _ = positions(grid, width, jit.head_dim, 0)
    tensors = {
        "x_embedder.proj1.weight": proj1.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2),
        "x_embedder.proj2.weight": proj2[:, :, None, None],
        "x_embedder.proj2.bias": jit.x_embedder.proj2.bias,
        "x_embedder.pos_embed": fixed,
        "y_embedder.embedding_table.weight": jit.y_embedder.weight,
        "in_context_posemb": jit.in_context_positions[None],
        "final_layer.norm_final.weight": jit.head.norm.weight,
    }
    assert tensors["in_context_posemb"].shape == (1, count, width)
    layers = {"final_layer.linear": jit.head.linear, "final_layer.adaLN_modulation.1": jit.head.modulation}
    layers |= {f"t_embedder.mlp.{i}": jit.t_embedder.mlp[i] for i in (0, 2)}
    for i, block in enumerate(jit.blocks):
        for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
            tensors[f"blocks.{i}.{name}.weight"] = norm.weight
        tensors[f"blocks.{i}.attn.q_norm.weight"] = block.attention.q_norm.weight
        tensors[f"blocks.{i}.attn.k_norm.weight"] = block.attention.k_norm.weight
        layers |= {f"blocks.{i}.attn.qkv": block.attention.qkv, f"blocks.{i}.attn.proj": block.attention.proj}
        layers |= {f"blocks.{i}.mlp.w12": block.mlp.w12, f"blocks.{i}.mlp.w3": block.mlp.w3}
        layers[f"blocks.{i}.adaLN_modulation.1"] = block.modulation
    for name, layer in layers.items():
        tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    for name in ("feat_rope", "feat_rope_incontext"):
        tensors |= {f"{name}.base_rope.freqs_cos": angle.cos(), f"{name}.base_rope.freqs_sin": angle.sin()}
    if subspace is not None:
        tensors |= {"proj_buffer": subspace.basis, "scale_buffer": torch.tensor(subspace.scale, dtype=torch.float64)}
    dtype = jit.head.linear.weight.dtype
    return {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in tensors.items()}


def lth14(jit: JiT, prefix="net.") -> dict[str, torch.Tensor]:
    """The same in the layout of LTH14/JiT, which has its positions at the top, and no rotations."""
    tensors = {name: tensor for name, tensor in published(jit).items() if "rope" not in name}
    tensors["pos_embed"] = tensors.pop("x_embedder.pos_embed")
    tensors["blocks.0.mlp.w3.weight"] = tensors["blocks.0.mlp.w3.weight"].mT.contiguous().mT  # a pickle keeps strides
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save(tensors, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path
