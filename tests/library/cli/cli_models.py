"""Small models for commands, as a folder and as a published file."""

import json

import torch
from safetensors.torch import save_file

from asymflow import AsymFlow, Subspace
from asymflow.backbones.jit import JiT, sincos_positions
from asymflow.backbones.jit.published import published_name, published_positions

PATCH, SIDE = 4, 16


def flow(rank=5, scale=1.0, **sizes):
    torch.manual_seed(0)
    jit = JiT.from_name(f"tiny/{PATCH}", **{"image_size": SIDE, "num_classes": 10, "depth": 2, **sizes})
    torch.nn.init.normal_(jit.head.linear.weight)  # zero at first: every model would be the same
    return AsymFlow(jit, Subspace.random(jit.dim, rank, scale=scale)).eval()


def publish(model, path, subspace=True):
    """Write the weights in the published layout (method: the names, convolutions, and positions as weights)."""
    jit = model.backbone
    tensors = {published_name(name): tensor for name, tensor in jit.state_dict().items()}
    proj1, proj2 = (f"x_embedder.proj{n}.weight" for n in (1, 2))
    tensors[proj1] = tensors[proj1].unflatten(1, (PATCH, PATCH, 3)).movedim(-1, 1)
    tensors[proj2] = tensors[proj2][..., None, None]
    tensors["in_context_posemb"] = tensors["in_context_posemb"][None]
    tensors["x_embedder.pos_embed"] = sincos_positions(jit.grid, jit.config["width"])[None].float()
    if subspace:
        tensors |= {"proj_buffer": model.subspace.basis, "scale_buffer": torch.tensor(model.subspace.scale)}
        ropes = {name: t for name, t in published_positions(jit).items() if ".base_rope." in name}
        tensors |= {name: t.float() for name, t in ropes.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save({"model_ema1": tensors}, path)
    return path


def info(run, *argv):
    return json.loads(run("info", *argv, "--json"))
