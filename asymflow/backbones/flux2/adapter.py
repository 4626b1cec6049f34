"""Adapter files: what turns a latent model into a pixel model. LoRA layers, whole projections, and the subspace.

The layout is that of the published `Lakonik/AsymFLUX.2-klein-9B`: safetensors with the names of diffusers'
`Flux2Transformer2DModel`. A module with LoRA has `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight`
(out, rank), with alpha = rank: its weight becomes W + B A. Other tensors replace those of the base model:
`x_embedder.weight` (inner, D), `proj_out.weight` (D, inner), `norm_out.linear.weight`, and after a full finetuning all
others. `proj_buffer` (D, r) and `scale_buffer` are the subspace, of channel-first tokens of Oklab images, D = 3
patch^2.

    add_lora(transformer, rank=256)                          # for training: changes nothing yet
    write_adapter(folder, published_names(trained), subspace, transformer.config, fingerprint(latent_transformer))
    flow = load_adapter(latent_transformer, folder)          # the pixel model
"""

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from asymflow import files, hub, opening
from asymflow.backbones.flux2 import SIGMA_MIN, Flux2, check_transformer, with_projections
from asymflow.backbones.flux2.adapter_checks import (
    FORMAT,
    LORA_A,
    check_lora,
    check_values,
    check_whole,
    is_lora,
    patch_size_of,
    prompt_length_of,
    scale_of,
)
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.patches import CHANNEL_FIRST
from asymflow.subspace import Subspace, checked_subspace

ADAPTER = "asymflow"  # the name of its LoRA layers in the transformer, which may have other LoRAs too
WEIGHTS, CONFIG, CARD = "diffusion_pytorch_model.safetensors", "config.json", "README.md"
FULL = ("x_embedder", "proj_out", "norm_out")  # modules that train in full
BUFFERS = ("proj_buffer", "scale_buffer")
ALWAYS = ("x_embedder.weight", "proj_out.weight", "norm_out.linear.weight")  # in every adapter, as are the buffers
# The layers that the paper trains with LoRA: all linear layers whose names are, or end with, one of these. The output
# projection of attention is called `attn.to_out` in single blocks only. In double blocks it is `attn.to_out.0`, and
# gets no LoRA on purpose.
LORA_TARGETS = (
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
    "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
    "attn.to_out",
)
ARCHITECTURE = (  # keys of the transformer's configuration that the reference's config.json has
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "timestep_guidance_channels",
    "mlp_ratio",
    "axes_dims_rope",
    "rope_theta",
    "eps",
    "guidance_embeds",
)
CARD_TEXT = """\
---
library_name: asymflow
tags: [asymflow, diffusers, lora, text-to-image]
---

An adapter that makes a FLUX.2 klein base model one of pixels (https://arxiv.org/abs/2605.12964): LoRA layers of the
transformer, its first and last layers in full, and the low-rank subspace. It needs the base model that it was made of.

    from asymflow.pipelines.flux2 import AsymFlux2KleinPipeline
    pipeline = AsymFlux2KleinPipeline.from_pretrained("BASE MODEL", adapter="THIS FOLDER OR REPOSITORY")
    pipeline(prompt="a red square").images[0].save("red.png")
"""


# ---- For training ----------------------------------------------------------------------------------------------------
def lora_modules(transformer: nn.Module, targets: Sequence[str] = LORA_TARGETS) -> list[str]:
    """The names of the linear layers that `targets` match. InputError if a target matches none."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    if missing := [target for target, names in found.items() if not names]:
        raise InputError(f"LoRA is to change {', '.join(missing)}, but the transformer has no such linear layer")
    meant = {name for names in found.values() for name in names}
    return [name for name in linear if name in meant]


def add_lora(
    transformer: Flux2Transformer2DModel,
    rank: int,
    dropout: float = 0.0,
    targets: Sequence[str] = LORA_TARGETS,
    name: str = ADAPTER,
) -> None:
    """Add LoRA to the linear layers that `targets` match: W x + B A x, where B starts at zero.

    dropout: of the input of A, in training mode. The weights are now called `<module>.base_layer.weight`,
    `<module>.lora_A.<name>.weight` and `<module>.lora_B.<name>.weight`; only the last two require gradients.
    Raises InputError if a target matches no linear layer, or the rank is below 1.
    """
    from peft import LoraConfig

    if rank < 1:
        raise InputError(f"the rank of LoRA layers must be at least 1, but it is {rank}")
    modules = lora_modules(transformer, targets)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=modules)
    transformer.add_adapter(config, adapter_name=name)


def published_names(state: Mapping[str, Tensor], name: str = ADAPTER) -> dict[str, Tensor]:
    """The same tensors under the names of the published layout.

    state: tensors under the names of the parameters of a transformer, or of the `AsymFlow` around it. name: of its LoRA
    layers.
    """

    def published(parameter: str) -> str:
        parameter = parameter.removeprefix("backbone.").removeprefix("transformer.").replace(".base_layer.", ".")
        return re.sub(rf"\.(lora_[AB])\.{re.escape(name)}\.weight$", r".\1.weight", parameter)

    return {published(parameter): tensor for parameter, tensor in state.items()}


def fingerprint(transformer: Flux2Transformer2DModel) -> str:
    """SHA-256, in hexadecimal, of the projections of a latent model, which differ between models of the same shapes.

    The weights are rounded to bfloat16 first, so that it is the same if they were loaded as float32. It does not detect
    a change of the blocks alone, such as a LoRA merged into them.
    """
    digest = hashlib.sha256()
    for layer in (transformer.x_embedder, transformer.proj_out):
        weight = layer.weight.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


# ---- Writing ---------------------------------------------------------------------------------------------------------
def write_adapter(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    subspace: Subspace,
    transformer_config: Mapping[str, object],
    fingerprint: str,
    base_name: str | None = None,
    prompt_length: int | None = None,
) -> None:
    """Write the weights, a config.json for the reference's loader, and a model card, to a new or an empty folder.

    tensors: under their published names, in the dtypes that the file is to have. transformer_config: of the latent or
    the pixel transformer. fingerprint: of the latent transformer; with it, loading refuses another base model.
    base_name: the folder or repository of the base model. It is never opened; loading names it when it refuses a base.
    prompt_length: positions of the prompts that it was trained on, if that is known.

    The file of weights is written last, whole or not at all, and without it the folder is no adapter. Buffers are in
    float32; the metadata have the exact scale, and names and shapes of all tensors. Raises InputError if the folder is
    not empty, if a tensor that every adapter has is missing, or if the subspace is for other tokens.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already, and is not overwritten: choose another name or remove it")
    check_values(tensors, ALWAYS, f"the adapter for {folder}")
    if subspace.token_order not in (None, CHANNEL_FIRST) or subspace.color_space not in (None, "oklab"):
        raise InputError(
            f"an adapter is for {CHANNEL_FIRST} tokens of Oklab images, but the subspace says {subspace.token_order} "
            f"and {subspace.color_space}"
        )
    patch_size = patch_size_of(subspace.dim, f"the adapter for {folder}")
    usual = inspect.signature(Flux2Transformer2DModel).parameters  # defaults of keys that a config.json may leave out
    config = {
        "_class_name": "AsymFlux2Transformer2DModel",
        "patch_size": patch_size,
        "in_channels": 3,
        "base_rank": subspace.rank,
        **{name: transformer_config.get(name, usual[name].default) for name in ARCHITECTURE},
        "sigma_min": SIGMA_MIN,
        "num_timesteps": 1,
    }
    buffers = {"proj_buffer": subspace.basis.float(), "scale_buffer": torch.tensor(subspace.scale, dtype=torch.float32)}
    metadata = {
        "asymflow_format": FORMAT,
        "asymflow_version": own_version(),
        "base_fingerprint": fingerprint,
        **({"base": base_name} if base_name else {}),
        **({"prompt_length": str(prompt_length)} if prompt_length else {}),
        "scale": repr(subspace.scale),
        "tensors": json.dumps({name: list(tensor.shape) for name, tensor in sorted({**tensors, **buffers}.items())}),
    }
    for name, text in ((CONFIG, json.dumps(config, indent=2) + "\n"), (CARD, CARD_TEXT)):
        with files.replacing(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
    files.write_tensors(folder / WEIGHTS, {**tensors, **buffers}, metadata)


def own_version() -> str:
    try:
        return version("asymflow")
    except PackageNotFoundError:
        return "(not installed)"


# ---- Reading ---------------------------------------------------------------------------------------------------------
def load_adapter(transformer: Flux2Transformer2DModel, path: str | Path, name: str = ADAPTER) -> AsymFlow:
    """The pixel model made of a latent model and an adapter, in eval mode, with the latent model's device and dtype.

    transformer: that of the latent model. The pixel model takes over its blocks, and adds LoRA layers called `name` to
        them, or replaces their weights if the adapter is of a full finetuning. The first and last layers of
        `transformer` do not change: with LoRA, `flow.backbone.transformer.disable_adapters()` makes `transformer` the
        latent model again, to the last bit. It takes no second adapter; load it again for that, or copy it before.
    path: a folder of `write_adapter`, a safetensors file, or a repository of the Hugging Face Hub, or a file in one.
    Raises InputError if the file is damaged, a pickle, or no adapter; if a tensor is missing, unexpected, misshaped or
    not finite, or the basis not orthonormal; if the adapter was made of another base model; if the blocks of
    `transformer` have an adapter already.
    """
    check_transformer(transformer)
    path = find(path)
    tensors, metadata = opening.read_tensors(path)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    check_values(tensors, (*ALWAYS, *BUFFERS), path)
    check_unused(transformer, path)
    check_base(transformer, tensors, metadata, path)
    patch_size, prompt_length = patch_size_of(len(tensors["proj_buffer"]), path), prompt_length_of(metadata, path)
    record = {"patch_size": patch_size, "token_order": CHANNEL_FIRST, "color_space": "oklab"}
    subspace = checked_subspace(path, tensors["proj_buffer"], scale_of(tensors, metadata, path), **record)
    lora = {key: tensor for key, tensor in tensors.items() if is_lora(key)}
    full = {key: tensor for key, tensor in tensors.items() if not is_lora(key) and key not in BUFFERS}

    pixel = with_projections(transformer, full["x_embedder.weight"], full["proj_out.weight"])
    pixel.norm_out = copy.deepcopy(transformer.norm_out)
    # Apart from the projections, whose shapes were checked above, all parameters must have the shapes of the base's.
    shapes = {key: tuple(weight.shape) for key, weight in pixel.named_parameters() if key in full}
    opening.check_tensors(full, shapes, str(path))
    check_lora(pixel, lora, path)
    check_whole(pixel, tensors, metadata, path)
    for key, tensor in full.items():
        module, _, leaf = key.rpartition(".")
        module = pixel.get_submodule(module)
        old = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(tensor.to(old), old.requires_grad))
    if lora:
        ranks = {key.removesuffix(LORA_A): len(tensor) for key, tensor in lora.items() if key.endswith(LORA_A)}
        patterns = {f"^{re.escape(module)}": rank for module, rank in ranks.items()}  # ^: from the start of the name
        rank = max(ranks.values())
        config = dict(r=rank, lora_alpha=rank, rank_pattern=patterns, alpha_pattern=patterns, target_modules=[*ranks])
        pixel.load_lora_adapter(lora, prefix=None, adapter_name=name, metadata=config)
    mark_used(pixel)
    pixel.requires_grad_(False)
    backbone = Flux2(pixel, patch_size, subspace.scale, prompt_length)
    return AsymFlow(backbone, subspace, sigma_min=SIGMA_MIN).to(pixel.device).eval()


def find(path: str | Path, **hub_options) -> Path:
    """The weights file of an adapter that is on this disk, or downloaded from the Hub with these options."""
    path = Path(path)
    if path.suffix in hub.PICKLES:
        raise InputError(f"{path} is a pickle, which can carry code, and is not read: ask for safetensors")
    path = hub.locate(path, WEIGHTS, what="an adapter", **hub_options)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise InputError(f"{path} is not the folder of an adapter: it has no {WEIGHTS}")
        return path / WEIGHTS
    return path


def adapter_patch_size(path: str | Path) -> int:
    """That of an adapter's tokens; nothing else of it is read. InputError if it has no subspace of square patches."""
    tensors, _ = opening.read_tensors(path := find(path))
    for key, tensor in tensors.items():
        if key.removeprefix("transformer.") == BUFFERS[0] and tensor.ndim:
            return patch_size_of(len(tensor), path)
    raise InputError(f"{path} does not fit: missing tensors: {BUFFERS[0]}")


def mark_used(transformer: nn.Module) -> None:
    """Note that a pixel model has these blocks: another one, which shared them, would have what is done to either."""
    transformer.transformer_blocks.used = True


def check_unused(transformer: nn.Module, path: Path) -> None:
    lora = any(".lora_A." in key for key, _ in transformer.named_parameters())
    if lora or hasattr(transformer.transformer_blocks, "used"):
        raise InputError(
            f"{path} is for a base model as it is, but this one has an adapter or other LoRA layers already: load it "
            "again, or give each adapter a copy.deepcopy of it"
        )


def check_base(
    transformer: Flux2Transformer2DModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> None:
    """InputError unless shapes and, if the file has one, the fingerprint are those of this base model."""
    inner, channels = transformer.x_embedder.weight.shape
    dim = len(tensors["proj_buffer"]) if tensors["proj_buffer"].ndim else 0
    base = "".join(filter(str.isprintable, metadata.get("base", "")))[:200]  # printed below, and written by a stranger
    trained_on = f" (it was trained on {base})" if base else ""
    shapes = {
        "x_embedder.weight": (inner, dim),
        "proj_out.weight": (dim, inner),
        "norm_out.linear.weight": tuple(transformer.norm_out.linear.weight.shape),
        "proj_buffer": (dim, channels),
        "scale_buffer": (),
    }
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} there, where this base needs {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise InputError(f"{path} is of another base model: {'; '.join(wrong)}{trained_on}")
    # Not if the weights were loaded as float16: they may have been rounded, and the fingerprint would differ.
    made_of = metadata.get("base_fingerprint")
    if made_of and transformer.dtype != torch.float16 and made_of != fingerprint(transformer):
        given = transformer.config.get("_name_or_path") or "this one"
        raise InputError(
            f"{path} is of another base model of the same shapes{trained_on or ' (a distilled sibling?)'}: its weights "
            f"have the fingerprint {made_of[:12]}, those of {given} {fingerprint(transformer)[:12]}"
        )
