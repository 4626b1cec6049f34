"""What must hold of the tensors and the metadata of an adapter file, whose layout `adapter` describes."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from asymflow import opening
from asymflow.backbones.flux2 import PROMPT_LENGTH
from asymflow.errors import InputError

FORMAT = "asymflow adapter 1"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def is_lora(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def check_values(tensors: Mapping[str, Tensor], needed: Sequence[str], source: str | Path) -> None:
    """InputError unless all `needed` tensors are there, and all tensors are of finite floating point numbers."""
    if missing := [name for name in needed if name not in tensors]:
        raise InputError(f"{source} does not fit: missing tensors: {', '.join(missing)}")
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):  # float8 has no isfinite
            raise InputError(f"{source} does not fit: {name} has entries that are not finite floating point numbers")


def check_lora(transformer: nn.Module, lora: Mapping[str, Tensor], path: Path) -> None:
    """InputError unless the LoRA tensors come in pairs that fit linear layers of the transformer."""
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    for key in lora:
        module = key.removesuffix(LORA_A).removesuffix(LORA_B)
        other = module + (LORA_B if key.endswith(LORA_A) else LORA_A)
        if other not in lora:
            raise InputError(f"{path} does not fit: it has {key}, but not {other}, its other half")
        if module not in linear:
            raise InputError(
                f"{path} does not fit: it has LoRA for {module}, which is no linear layer of this base model"
            )
        layer, a, b = linear[module], lora[module + LORA_A], lora[module + LORA_B]
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] > 0:
            raise InputError(
                f"{path} does not fit: the LoRA for {module} must be (rank, in) and (out, rank) with one rank, but it "
                f"is {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
            raise InputError(
                f"{path} is of another base model: its LoRA for {module} has {a.shape[1]} features in and {b.shape[0]} "
                f"out, where this base has {layer.in_features} and {layer.out_features}"
            )


def check_whole(transformer: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """InputError if a tensor is missing.

    A file of this library lists its tensors in its metadata. In any other file, a layer that has LoRA in one block must
    have it in all blocks.
    """
    if metadata.get("asymflow_format") == FORMAT and "tensors" in metadata:
        try:
            listed = {name: tuple(shape) for name, shape in json.loads(metadata["tensors"]).items()}
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"{path} does not fit: its list of tensors cannot be read") from None
        opening.check_tensors(tensors, listed, str(path))
        return
    kind = lambda name: re.sub(r"\d+", "*", name)
    changed = {key.removesuffix(LORA_A) for key in tensors if key.endswith(LORA_A)}
    kinds = {kind(name) for name in changed}
    linear = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    if missing := [f"{name}{LORA_A}" for name in linear if kind(name) in kinds and name not in changed]:
        raise InputError(f"{path} does not fit: missing tensors: {', '.join(missing)}, which its other blocks have")


def scale_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> float:
    """The scale: from the metadata, which have it exactly, in our own files; else from the buffer.

    InputError if the two differ.
    """
    stored = tensors["scale_buffer"].item()
    if metadata.get("asymflow_format") != FORMAT:
        return stored
    try:
        scale = float(metadata["scale"])
    except (KeyError, ValueError):
        scale = math.nan
    if not math.isclose(scale, stored, rel_tol=2**-7):  # somebody may have rounded the tensors to bfloat16
        raise InputError(f"{path} does not fit: scale_buffer is {stored:g}, its metadata say {metadata.get('scale')}")
    return scale


def patch_size_of(dim: int, path: str | Path) -> int:
    patch_size = math.isqrt(dim // 3)
    if not dim or 3 * patch_size**2 != dim:
        raise InputError(f"{path} does not fit: tokens of dimension {dim} are no square patches of 3 channels")
    return patch_size


def prompt_length_of(metadata: Mapping[str, str], path: Path) -> int:
    """Positions of the prompts of its training; files that do not say so are of the usual ones."""
    said = metadata.get("prompt_length", str(PROMPT_LENGTH))
    if not re.fullmatch("[1-9][0-9]{0,5}", said):
        raise InputError(f"{path} does not fit: its metadata say that prompts have {said!r:.40} positions")
    return int(said)
