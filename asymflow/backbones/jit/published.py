"""Reading published files: the AsymFlow and JiT models of ImageNet, and the reference implementation's subspaces.

They become objects of this library, so that no other module needs to know their layouts:

* `Lakonik/AsymFlow-ImageNet`, safetensors: a JiT with the subspace in it (`proj_buffer`, `scale_buffer`).
* Plain JiT (arXiv 2511.13720), the same without a subspace: safetensors, or the checkpoints of LTH14/JiT, pickles that
  hold the weights three times (as trained, and two moving averages). It predicts x0, not -x0, and its input is the time
  1 - sigma, not sigma. Both differences are linear, and folded into the weights, so it is an asymmetric flow of rank 0.
* Subspace files, pickles: `proj_mat_p16` (D, r), and `scale_p16` if it was fitted by Procrustes.

A checkpoint also holds position embeddings, which are not trained. Our JiT computes them; here they are only compared.
"""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from asymflow import opening
from asymflow.backbones.jit import SIZES, JiT, NoiseLevelEmbedding, rope, sincos_positions, swiglu_width
from asymflow.errors import InputError
from asymflow.model import AsymFlow, make_backbone
from asymflow.patches import CHANNEL_FIRST, CHANNEL_LAST
from asymflow.subspace import Subspace, checked_subspace

WEIGHTS = {"ema1": "model_ema1", "ema2": "model_ema2", "model": "model"}  # in LTH14/JiT's checkpoints
WRAPPERS = ("module.", "net.", "model.")  # of DistributedDataParallel, LTH14/JiT's training module, Lightning's
JIT_TENSORS = {"x_embedder.proj1.weight", "in_context_posemb", "blocks.0.mlp.w12.weight"}  # any of them: it is a JiT
SUBSPACE_TENSORS = {"proj_buffer", "scale_buffer"}
PUBLISHED_NAMES = [  # replacements, in this order, that turn the names of our JiT into the published ones
    ("attention.", "attn."),
    ("modulation.", "adaLN_modulation.1."),
    ("head.norm.", "final_layer.norm_final."),
    ("head.", "final_layer."),
    ("y_embedder.", "y_embedder.embedding_table."),
    ("in_context_positions", "in_context_posemb"),
]
SIGMA_MIN = 0.04  # with which the reference samples
# How far positions may differ from ours. In files of 16 bits they differ by up to 2^-9. In LTH14/JiT's averages they
# differ by about 1e-4, because it averages them too, and an average of equal numbers drifts in float32. Those of
# another model differ by about 1.
POSITION_TOLERANCE = 0.01


def load_published(
    path: str | Path,
    *,
    weights: str | None = None,
    dtype: torch.dtype = torch.float32,
    in_context_start: int | None = None,
    noise_scale: float | None = None,
    sigma_min: float = SIGMA_MIN,
) -> AsymFlow | Subspace:
    """The model in a published checkpoint, in eval mode, or the subspace in one of the reference's subspace files.

    path: a safetensors file, or a pickle of plain tensors (.pth, .pt).
    weights: which set of weights, if the file has several: "ema1" (the default, which LTH14/JiT evaluates), "ema2", or
        "model" for those without averaging.
    dtype: of the backbone's weights, whatever the file has. Folding is done in float64, and rounded once.
    in_context_start: the block before which the class tokens join the sequence; the tensors do not show it. Required
        unless the model has a published size (JiT-B 4, L 8, H 10).
    noise_scale: of the training; by default 1, and above 256 pixels image size / 256, as in JiT.
    sigma_min: see `AsymFlow`. LTH14/JiT samples with 0.05, the reference with 0.04.

    A subspace takes none of these options. It gets its patch size from the file. If it has a scale, it is for FLUX.2,
    and of channel-first tokens in Oklab. Otherwise it is from PCA and of channel-last tokens, and its directions are
    reordered, strongest first. A basis that was rounded to 16 bits is made orthonormal again.
    Raises InputError if the file is damaged or holds anything else, such as code, which is never run; if a tensor is
    missing, unexpected or misshaped; if position embeddings are not those that JiT computes.
    """
    content = read(path)
    if any(isinstance(name, str) and name.startswith("proj_mat_p") for name in content):
        of_models = dict(weights=weights, in_context_start=in_context_start, noise_scale=noise_scale)
        given = [name for name, value in of_models.items() if value is not None]
        given += ["dtype"] * (dtype != torch.float32) + ["sigma_min"] * (sigma_min != SIGMA_MIN)
        if given:
            raise InputError(f"{path} is a subspace, and no model: it has no {given[0]} to choose")
        return reference_subspace(content, path)
    tensors = chosen_weights(content, weights, path)
    sizes = jit_sizes(tensors, in_context_start, path)
    jit = make_backbone(JiT.__name__, sizes)  # on the meta device: its weights are those of the file, without a copy
    check_jit(tensors, jit, path)
    opening.check_numbers(tensors, path)

    named = {name: as_in_jit(tensors[published_name(name)].detach()) for name in jit.state_dict()}
    if "proj_buffer" in tensors:
        subspace = checked_subspace(path, tensors["proj_buffer"], tensors["scale_buffer"])
    else:
        subspace = Subspace.empty(jit.dim)
        named |= {name: -named[name] for name in ("head.linear.weight", "head.linear.bias")}
        named["t_embedder.mlp.0.weight"] = reverse_time(named["t_embedder.mlp.0.weight"])
    jit.load_state_dict({name: tensor.to(dtype).contiguous() for name, tensor in named.items()}, assign=True)
    return AsymFlow(jit, subspace, sizes["patch_size"], CHANNEL_LAST, sigma_min, noise_scale).eval()


# ---- The file --------------------------------------------------------------------------------------------------------
def read(path: str | Path) -> dict:
    if is_safetensors(path):
        return opening.read_tensors(path)[0]
    # LTH14/JiT saves its command-line options beside the weights, as a Namespace, which is data and cannot run code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = opening.read_pickle(path)
    return content if isinstance(content, dict) else {}


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is safetensors, by its name, or by its first bytes: the header's length, then JSON."""
    return Path(path).suffix == ".safetensors" or first_bytes(path, 9)[8:] == b"{"


def first_bytes(path: str | Path, count: int) -> bytes:
    with opening.opened(path) as file:
        return file.read(count)


def chosen_weights(content: Mapping, weights: str | None, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model under their published names. content: the model, or a checkpoint with several of them."""
    sets = {name: content[key] for name, key in WEIGHTS.items() if isinstance(content.get(key), dict)}
    if weights is not None and weights not in sets:
        raise InputError(f"{path} has no weights {weights!r} to choose: it has {', '.join(sets) or 'one set, unnamed'}")
    tensors = dict(sets[weights or next(iter(sets))] if sets else content)
    tensors = without_wrappers(tensors)
    if "subspace.basis" in tensors:
        raise InputError(f"{path} is of this library: give the folder that it is in, or use AsymFlow.from_pretrained")
    if any(".lora_A." in str(name) for name in tensors):
        raise InputError(f"{path} is an adapter, such as AsymFLUX.2's: only the models of ImageNet can be read")
    plain = all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items())
    if not (plain and JIT_TENSORS & tensors.keys()):
        names = ", ".join(map(str, list(tensors)[:4])) or "nothing"
        raise InputError(
            f"{path} is not a layout that can be read: these are the safetensors of Lakonik/AsymFlow-ImageNet, plain "
            f"JiT (safetensors, or LTH14/JiT's .pth) and the reference's subspaces (proj_mat_p16), but it has {names}, "
            "... (what this library wrote is read by AsymFlow.from_pretrained and Subspace.load)"
        )
    return tensors


def without_wrappers(tensors: dict) -> dict:
    """Without what wrappers put into names: torch.compile anywhere, others in front of all of them, in any order."""
    if not tensors or not all(isinstance(name, str) for name in tensors):
        return tensors
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while front := next((front for front in WRAPPERS if all(name.startswith(front) for name in tensors)), None):
        tensors = {name.removeprefix(front): tensor for name, tensor in tensors.items()}
    return tensors


# ---- The model -------------------------------------------------------------------------------------------------------
def jit_sizes(tensors: Mapping[str, Tensor], in_context_start: int | None, path: str | Path) -> dict:
    """The arguments of JiT, from some of the tensors' shapes. `check_jit` checks all shapes later."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"{path} does not fit: missing tensors: {name}")
        if tensors[name].ndim != ndim:
            raise InputError(f"{path} does not fit: {name} has {tuple(tensors[name].shape)}, expected {ndim} axes")
        return tuple(tensors[name].shape)

    bottleneck, channels, patch_size, _ = shape("x_embedder.proj1.weight", 4)
    labels, width = shape("y_embedder.embedding_table.weight", 2)
    _, hidden = shape("blocks.0.mlp.w3.weight", 2)
    (head_dim,) = shape("blocks.0.attn.q_norm.weight", 1)
    if not head_dim or width % head_dim:
        raise InputError(f"{path} does not fit: blocks.0.attn.q_norm.weight has {(head_dim,)}, at a width of {width}")
    tokens = shape("pos_embed" if "pos_embed" in tensors else "x_embedder.pos_embed", 3)[1]
    depth = len({block[1] for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name))})
    published = next((SIZES[n] for n in "BLH" if (SIZES[n]["width"], SIZES[n]["depth"]) == (width, depth)), {})
    if in_context_start is None and not published:
        raise InputError(
            f"{path} has a JiT of width {width} and depth {depth}, not one of the published sizes: give "
            "in_context_start, the block before which the class tokens join (JiT-B 4, L 8, H 10); on the command line, "
            "asymflow import --in-context-start first"
        )
    if in_context_start is not None and not 0 <= in_context_start < depth:
        raise InputError(f"in_context_start {in_context_start} is not one of the {depth} blocks of {path}, from 0 on")
    return {
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(tokens),
        "channels": channels,
        "width": width,
        "depth": depth,
        "heads": width // head_dim,
        "bottleneck": bottleneck,
        "num_classes": labels - 1,
        "in_context_start": published["in_context_start"] if in_context_start is None else in_context_start,
        "in_context_tokens": shape("in_context_posemb", 3)[1],
        "mlp_ratio": 4.0 if hidden == swiglu_width(width, 4.0) else 1.5 * (hidden + 0.5) / width,
        "dropout": published.get("dropout", 0.0),
    }


def check_jit(tensors: Mapping[str, Tensor], jit: JiT, path: str | Path, with_positions: bool = True) -> None:
    """InputError unless the tensors are exactly those of `jit`, and position embeddings are those that it computes."""
    shapes = {published_name(name): tuple(weight.shape) for name, weight in jit.state_dict().items()}
    patch, channels = jit.patch_size, jit.dim // jit.patch_size**2
    shapes["x_embedder.proj1.weight"] = (len(jit.x_embedder.proj1.weight), channels, patch, patch)
    shapes["x_embedder.proj2.weight"] += (1, 1)
    shapes["in_context_posemb"] = (1, *shapes["in_context_posemb"])
    if SUBSPACE_TENSORS & tensors.keys():
        rank = next(iter(tensors["proj_buffer"].shape[1:2]), 0) if "proj_buffer" in tensors else 0
        shapes |= {"proj_buffer": (jit.dim, rank), "scale_buffer": ()}
    possible = published_positions(jit) if with_positions else {}
    if SUBSPACE_TENSORS & tensors.keys():  # a file of AsymFlow-ImageNet has all of its positions
        needed = {name for name in possible if name == "x_embedder.pos_embed" or ".base_rope." in name}
    else:
        needed = set()
    positions = {name: expected for name, expected in possible.items() if name in tensors or name in needed}
    shapes |= {name: tuple(expected.shape) for name, expected in positions.items()}
    opening.check_tensors(tensors, shapes, str(path))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path} does not fit: {name} is of {tensor.dtype}, not of floating point numbers")
    for name, expected in positions.items():
        error = (tensors[name].double() - expected).abs().max().item()
        if not error <= POSITION_TOLERANCE:
            raise InputError(
                f"{path} does not fit: {name} differs by {error:.2g} from the positions that JiT computes: its model "
                "was trained with others"
            )


def published_positions(jit: JiT) -> dict[str, Tensor]:
    """All position embeddings that a file may have, by name.

    LTH14/JiT calls some of them differently, and never saves the rotary ones.
    """
    sincos = sincos_positions(jit.grid, jit.y_embedder.embedding_dim)[None]
    image = rope(jit.grid, jit.head_dim, "cpu", torch.float64).repeat_interleave(2, dim=-1)
    positions = {"x_embedder.pos_embed": sincos, "pos_embed": sincos}
    for wave, angles, of_zero in zip(("freqs_cos", "freqs_sin"), image, (1.0, 0.0), strict=True):
        in_context = F.pad(angles, (0, 0, len(jit.in_context_positions), 0), value=of_zero)  # class tokens: no rotation
        positions |= {f"{name}.base_rope.{wave}": angles for name in ("feat_rope", "feat_rope_incontext")}
        positions |= {f"feat_rope.{wave}": angles, f"feat_rope_incontext.{wave}": in_context}
    return positions


def published_name(name: str) -> str:
    for ours, theirs in PUBLISHED_NAMES:
        name = name.replace(ours, theirs)
    return name


def as_in_jit(tensor: Tensor) -> Tensor:
    """A published tensor in our shape: a convolution as a matrix on tokens (row, column, channel), no batch axis."""
    if tensor.ndim == 4:
        return tensor.movedim(1, -1).flatten(1)
    return tensor[0] if tensor.ndim == 3 else tensor


def reverse_time(weight: Tensor) -> Tensor:
    """Turn a layer on the waves cos(f t), sin(f t) of t = 1 - sigma into a layer on those of sigma, in float64.

    weight: (width, waves), cosines first. For each frequency f,

        cos(f (1 - sigma)) = cos(f) cos(f sigma) + sin(f) sin(f sigma),
        sin(f (1 - sigma)) = sin(f) cos(f sigma) - cos(f) sin(f sigma).
    """
    f = NoiseLevelEmbedding.frequencies(dtype=torch.float64)
    on_cos, on_sin = weight.double().chunk(2, dim=-1)
    return torch.cat([on_cos * f.cos() + on_sin * f.sin(), on_cos * f.sin() - on_sin * f.cos()], dim=-1)


# ---- The subspace ----------------------------------------------------------------------------------------------------
def reference_subspace(content: Mapping, path: str | Path) -> Subspace:
    name = next(name for name in content if isinstance(name, str) and name.startswith("proj_mat_p"))
    patch = name.removeprefix("proj_mat_p")
    basis, scale = content[name], content.get(f"scale_p{patch}")
    extra = [str(other) for other in content if other not in (name, f"scale_p{patch}")]
    if extra or not patch.isdecimal() or not isinstance(basis, Tensor) or basis.ndim != 2:
        raise InputError(
            f"{path} is not a subspace file: expected proj_mat_pN (D, r), with N the patch size, and perhaps scale_pN, "
            f"but it has {', '.join(map(str, list(content)[:4]))}"
        )
    if scale is None:  # from PCA: eigenvectors, the smallest eigenvalue first
        return checked_subspace(path, basis.flip(-1), patch_size=int(patch), token_order=CHANNEL_LAST)
    record = {"token_order": CHANNEL_FIRST, "color_space": "oklab"}
    return checked_subspace(path, basis, scale, patch_size=int(patch), **record)
