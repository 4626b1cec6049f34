"""The model of a finetuning: a pixel model made of a latent text-to-image model, and which of its weights are trained.

See arXiv 2605.12964.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from asymflow import opening
from asymflow.backbones.flux2 import latent_flow, latent_to_pixel
from asymflow.backbones.flux2.adapter import FULL, LORA_TARGETS, add_lora, fingerprint, published_names
from asymflow.errors import InputError
from asymflow.model import OPTIONS, AsymFlow
from asymflow.progress import limit_loading_bars
from asymflow.subspace import Subspace
from asymflow.training.config.derived import bf16_weights
from asymflow.training.config.reading import Config

TRANSFORMER = "transformer"  # the folder of the transformer in that of the base model
PREFIX = "backbone.transformer."  # the prefix of the transformer's parameters in a Finetuned


class Finetuned(AsymFlow):
    """A pixel model that can also evaluate the latent model that it was made of, as the loss needs it.

    If it is given noisy latents, it returns (velocity of the pixels, velocity of the latents). Otherwise it is the
    AsymFlow `flow`, with the same names of parameters.

    reference: the latent model, see `latent_flow`; None if the loss does not need it. With LoRA it shares the blocks
    with the backbone, whose LoRA layers are switched off for it, but has its own projections and norm_out; in a full
    finetuning it shares nothing.
    base: the fingerprint of the latent model, see `asymflow.backbones.flux2.adapter.fingerprint`.
    """

    def __init__(self, flow: AsymFlow, reference: AsymFlow | None, base: str):
        super().__init__(flow.backbone, flow.subspace, **{name: getattr(flow, name) for name in OPTIONS})
        self.reference, self.base = reference, base

    def forward(
        self,
        x_sigma: Tensor,
        sigma: Tensor | float,
        noisy_latents: Tensor | None = None,
        tau: Tensor | None = None,
        **conditions,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """noisy_latents: (B, r, h, w) at the noise levels tau (B,); the rest as for `AsymFlow`."""
        if noisy_latents is None:
            return super().forward(x_sigma, sigma, **conditions)
        with torch.no_grad(), adapters_off(self.reference):
            latent_velocity = self.reference(noisy_latents, tau, **conditions)
        return super().forward(x_sigma, sigma, **conditions), latent_velocity


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """A context in which the LoRA layers of a module have no effect."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        # Not layer.enable_adapters(False): it also sets requires_grad to False, and the engine trains these weights.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def make_finetuned(config: Config, subspace: Subspace) -> Finetuned:
    """The model of `config.finetune`, ready for an engine: see `finetuned`.

    Raises InputError if the base is no FLUX.2 klein, or does not fit the subspace or the configuration.
    """
    dtype = torch.bfloat16 if bf16_weights(config) else torch.float32
    latent = load_transformer(Path(config.finetune.base), dtype)
    return finetuned(latent, config, subspace, fingerprint(latent))


def finetuned(latent: Flux2Transformer2DModel, config: Config, subspace: Subspace, base: str) -> Finetuned:
    """The model to finetune. What is trained is in float32, except for the blocks in a full finetuning in bf16.

    latent: do not use it afterwards. In bfloat16 if the section `deepspeed` has bf16 switched on, else in float32; its
    frozen weights keep this dtype. base: its `fingerprint`.

    Before the first step the velocity inside of the subspace is that of the latent model, and outside that of x0 = 0,
    up to the rounding of the lifted projections to the dtype of the weights.
    Raises InputError if `latent` does not fit the subspace or the configuration.
    """
    c = config.finetune
    reference = None
    if config.loss.variance_reduction or config.loss.perceptual:
        reference = latent_flow(with_own_projections(latent) if c.lora else copy.deepcopy(latent)).requires_grad_(False)
    for name in ("x_embedder", "proj_out"):  # these two are lifted and trained in float32
        getattr(latent, name).float()
    flow = latent_to_pixel(latent, subspace, subspace.patch_size or 16)
    transformer = flow.backbone.transformer
    if c.lora:
        flow.requires_grad_(False)
        with latent.device:
            add_lora(transformer, c.lora.rank, c.lora.dropout, c.lora.targets or LORA_TARGETS)
        for name in FULL:
            getattr(transformer, name).requires_grad_(True)
    else:
        flow.requires_grad_(True)
    lifted = {id(transformer.x_embedder.weight), id(transformer.proj_out.weight)}
    for p in trained(flow):
        # The other weights of a full finetuning in bf16 stay in bfloat16; DeepSpeed keeps float32 masters of them.
        if c.lora or id(p) in lifted or not bf16_weights(config):
            p.data = p.data.float()
    if c.checkpointing:
        transformer.enable_gradient_checkpointing()
    return Finetuned(flow, reference, base)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def with_own_projections(transformer: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """A transformer that shares all blocks with this one, but has its own copies of the projections and of norm_out."""
    with torch.device("meta"):
        other = Flux2Transformer2DModel.from_config(transformer.config)
    for name, module in transformer.named_children():
        setattr(other, name, copy.deepcopy(module) if name in ("x_embedder", "proj_out", "norm_out") else module)
    return other


def load_transformer(base: Path, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """The transformer in a FLUX.2 klein folder. Downloads nothing, and reads only safetensors. Raises InputError."""
    transformer_config(base)
    folder = base / TRANSFORMER
    options = dict(torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True)
    try:
        with opening.no_larger_than(opening.counted_tensors(folder), folder):
            limit_loading_bars()
            transformer, found = Flux2Transformer2DModel.from_pretrained(folder, **options)
    except InputError:
        raise
    except Exception as e:  # diffusers and torch raise many types of errors for what does not fit together
        reason = " ".join(str(e).split())[:300]
        raise InputError(f"{folder} cannot be loaded ({type(e).__name__}: {reason})") from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{folder} lacks {len(missing)} of its tensors, the first {missing[0]}: download it again")
    return transformer


def transformer_config(base: Path) -> dict:
    """The transformer's config.json in a FLUX.2 klein folder. InputError if it is missing, or the model distilled."""
    try:
        config = opening.read_json(base / TRANSFORMER / "config.json")
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"finetune.base {base} is not a folder of FLUX.2 klein: it has no {TRANSFORMER}/config.json of diffusers"
        ) from None
    if name != Flux2Transformer2DModel.__name__:
        raise InputError(f"finetune.base {base} has a {name}, but a {Flux2Transformer2DModel.__name__} is expected")
    if is_distilled(index := base / "model_index.json"):
        raise InputError(f"{index} says that the model is distilled: take the base one, such as FLUX.2-klein-base-9B")
    return config


def check_trained(weights: dict[str, Tensor], base: Path, config: Config, subspace: Subspace) -> None:
    """InputError unless the training of the model in the folder `base` is one of just these weights."""
    c = transformer_config(base)
    try:
        with torch.device("meta"), opening.no_larger_than(0, base):
            latent = Flux2Transformer2DModel.from_config(c)
    except InputError:
        raise
    except Exception as e:  # diffusers and torch raise many types of errors for what does not fit together
        reason = " ".join(str(e).split())[:300]
        raise InputError(f"{base}/{TRANSFORMER}/config.json describes no transformer ({reason})") from None
    model = finetuned(latent, config, copy.deepcopy(subspace), base="")  # moves it to the meta device
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    opening.check_tensors(weights, shapes, f"{base}, as the base of what was trained,")


def is_distilled(index: Path) -> bool:
    """Whether model_index.json says so. The weights cannot tell: a distilled model has the shapes of its base model."""
    try:
        return bool(opening.read_json(index).get("is_distilled"))
    except InputError:  # the folder may hold nothing but a transformer
        return False


def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of the published layout."""
    return published_names({name.removeprefix(PREFIX): value for name, value in weights.items()})
