"""What it costs to finetune a FLUX.2 klein into a pixel model, counted in the real modules, without their numbers.

    step = Step(finetuned(empty_transformer(KLEIN["FLUX.2-klein-9B"])))      # nothing is allocated
    training_memory(step, gpus=8, stage=2)                                   # bytes on each GPU, by kind
    activations(step, (1024, 1024), batch=1)                                 # and these on top

The count follows what DeepSpeed's bf16 keeps: see `asymflow.cost.training_memory`.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asymflow import cost
from asymflow.adapters import FULL, add_lora
from asymflow.backbones.flux2 import check_transformer, latent_flow, latent_to_pixel
from asymflow.errors import InputError
from asymflow.parameterization import calibration
from asymflow.patches import patchify, unpatchify
from asymflow.subspace import Subspace
from asymflow.training.finetuning import Finetuned, own_ends
from asymflow.training.loss import flow_matching_loss, noisy
from asymflow.training.variance import Perceptual

KLEIN = {  # the base models; 9,078,581,248 and 3,875,544,576 parameters
    "FLUX.2-klein-9B": dict(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
    ),
    "FLUX.2-klein-4B": dict(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    ),
}
CHANNELS, PATCH = 3, 16
LORA_RANK, LORA_DROPOUT, TEXT_LENGTH = 256, 0.05, 512
OFFLOADS = ("optimizer", "weights")


def empty_transformer(config: dict) -> Flux2Transformer2DModel:
    """The transformer of a configuration of diffusers, in bfloat16, on the meta device."""
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(config).bfloat16()


# ---- The model and its step ------------------------------------------------------------------------------------------
def finetuned(
    latent: Flux2Transformer2DModel,
    subspace: Subspace | None = None,
    lora_rank: int = LORA_RANK,
    full: bool = False,
    checkpointing: bool = True,
) -> Finetuned:
    """The model of a training, with the weights as an engine has them: all in the dtype of the transformer.

    subspace: of rank r; by default the first r coordinates, which cost as much as any others. full: no LoRA; everything
    is trained, and the latent model is a copy. Raises InputError for a transformer that is none of a base model.
    """
    check_transformer(latent)
    channels, dim = latent.config.in_channels, CHANNELS * PATCH**2
    if channels > dim:
        raise InputError(f"the transformer has {channels} channels, more than the {dim} of a patch of pixels")
    reference = latent_flow(copy.deepcopy(latent) if full else own_ends(latent)).requires_grad_(False)
    flow = latent_to_pixel(latent, subspace or Subspace(torch.eye(dim, channels)), PATCH)
    transformer = flow.backbone.transformer
    flow.requires_grad_(full)
    if not full:
        with latent.device:
            add_lora(transformer, lora_rank, LORA_DROPOUT)
        for name in FULL:
            getattr(transformer, name).requires_grad_(True)
    for weight in transformer.parameters():  # peft makes its own in float32
        weight.data = weight.data.to(latent.dtype)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return Finetuned(flow, reference, base="")


def random_perceptual(device: str | torch.device) -> Perceptual:
    """LPIPS whose VGG16 is random, which costs as much as any other; on the meta device it is not even drawn."""
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision for VGG16 in a way of the past
        return Perceptual("random", device)


class Step(nn.Module):
    """A training step on noise: forward is its loss, of the pixel model, the latent model and, if given, LPIPS.

    The loss is flow matching, without the thin arithmetic by which its variance is reduced.
    """

    def __init__(self, model: Finetuned, perceptual: Perceptual | None = None):
        super().__init__()
        self.model, self.perceptual = model.train(), perceptual
        self.lpips = perceptual and perceptual.model  # so that its weights are seen to be weights

    def forward(self, x0: Tensor, latents: Tensor, text: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """x0, eps: (B, 3, H, W). latents: (B, r, H/16, W/16). text: (B, L, joint_attention_dim). sigma: (B,)."""
        model, grid = self.model, tuple(latents.shape[-2:])
        tau = calibration(sigma, model.subspace.scale)[1]
        latent_eps = unpatchify(patchify(eps, model.patch_size, model.token_order) @ model.subspace.basis, grid, 1)
        noisy_latents, x_sigma = noisy(latents, latent_eps, tau.float()), noisy(x0, eps, sigma)
        velocity, _ = model(x_sigma, sigma, noisy_latents=noisy_latents, tau=tau, encoder_hidden_states=text)
        loss = flow_matching_loss(velocity, x0, eps, sigma)
        if self.perceptual:
            x0_pred = x_sigma - sigma.view(-1, 1, 1, 1) * velocity
            loss = loss + self.perceptual(x0_pred, x0, torch.ones_like(x0[:, :1]))
        return loss.mean()

    @property
    def transformer(self) -> Flux2Transformer2DModel:
        return self.model.backbone.transformer


def inputs(
    step: Step, size: tuple[int, int], batch: int, text_length: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Noise for `Step`: images of `size`, (height, width)."""
    sides = [length // PATCH for length in size]
    if min(sides) < 1 or [side * PATCH for side in sides] != list(size):
        raise InputError(f"images must be multiples of {PATCH} pixels high and wide, but are {size[0]} x {size[1]}")
    c = step.transformer.config
    x0, eps = torch.randn(2, batch, CHANNELS, *size, device=device)
    return {
        "x0": x0,
        "latents": torch.randn(batch, step.model.subspace.rank, *sides, device=device),
        "text": torch.randn(batch, text_length, c.joint_attention_dim, device=device, dtype=step.transformer.dtype),
        "sigma": torch.rand(batch, device=device),
        "eps": eps,
    }


# ---- Operations ------------------------------------------------------------------------------------------------------
def forward_flops(step: Step, size: tuple[int, int], text_length: int = TEXT_LENGTH) -> int:
    """FLOPs of a forward pass of the pixel model for one image, see `asymflow.cost.flops`."""
    text = torch.empty(1, text_length, step.transformer.config.joint_attention_dim, dtype=step.transformer.dtype)
    return cost.flops(step.model, (CHANNELS, *size), encoder_hidden_states=text)


def step_flops(step: Step, size: tuple[int, int], text_length: int = TEXT_LENGTH) -> int:
    """FLOPs of a training step for one image: the latent model, forward and backward, what is computed twice, LPIPS.

    Through frozen layers the gradient of what goes into them is computed, but none of their weights.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step = cost.stand_in(step, "cpu")
        step(**inputs(step, size, 1, text_length)).backward()
    return counter.get_total_flops()


@contextmanager
def all_kept(step: Step) -> Iterator[None]:
    """Within it, nothing is computed twice."""
    before, step.transformer.gradient_checkpointing = step.transformer.gradient_checkpointing, False
    try:
        yield
    finally:
        step.transformer.gradient_checkpointing = before


# ---- Memory ----------------------------------------------------------------------------------------------------------
def activations(step: Step, size: tuple[int, int], batch: int = 1, text_length: int = TEXT_LENGTH) -> tuple[int, int]:
    """`(kept, peak)` bytes of a training step, see `asymflow.cost.activation_bytes`: those of the CPU's kernels."""
    return cost.step_bytes(step, lambda step: step(**inputs(step, size, batch, text_length)))


def parameters(step: Step) -> dict[str, int]:
    """Numbers of parameters, all of the base but `reference` (copies for the latent model) and `perceptual` (LPIPS)."""
    own = dict(step.transformer.named_parameters())
    lora = {name for name in own if ".lora_" in name}
    known = {id(p) for p in own.values()}
    count = lambda weights: sum(p.numel() for p in weights)
    return {
        "pixel_model": count(p for name, p in own.items() if name not in lora),
        "lora": count(own[name] for name in lora),
        "lora_layers": len({name.split(".lora_")[0] for name in lora}),
        "trained_in_full": count(p for name, p in own.items() if name not in lora and p.requires_grad),
        "trained": count(p for p in own.values() if p.requires_grad),
        "reference": count(p for p in step.model.reference.parameters() if id(p) not in known),
        "perceptual": count(step.lpips.parameters()) if step.lpips else 0,
    }


def training_memory(step: Step, gpus: int = 1, stage: int = 0, offload: str | None = None) -> dict[str, int]:
    """The bytes on each GPU that do not depend on the batch, by kind; "host": in the memory of the machine, for each.

    weights: that are frozen, with those of LPIPS (float32, on every GPU). trained, gradients: bfloat16. optimizer:
    Adam's moments, the float32 originals and gradients. gathered: what stage 3 collects for the largest layer.
    offload: "optimizer" moves the optimizer and the average to the host (from stage 1 on), "weights" the weights too
    (stage 3). Gradients are counted on the GPU all the same, where they are made.
    """
    if offload not in (None, *OFFLOADS):
        raise InputError(f"offload must be one of {', '.join(OFFLOADS)}, but it is {offload!r}")
    n = parameters(step)
    frozen = n["pixel_model"] + n["lora"] - n["trained"] + n["reference"]
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in step.model.modules())
    options = dict(gpus=gpus, stage=stage, precision="bfloat16")
    still = cost.training_memory(0, frozen, **options, largest_layer=largest)
    moving = cost.training_memory(n["trained"], **options)
    kinds = {
        "weights": still["weights"],
        "trained": moving["weights"],
        "gradients": moving["gradients"],
        "optimizer": sum(moving[kind] for kind in ("step_gradients", "master_weights", "adam")),
        "ema": moving["ema"],
        "gathered": still["gathered_layer"],
    }
    away = ["optimizer", "ema"] if offload and stage >= 1 else []
    away += ["weights", "trained"] if offload == "weights" and stage == 3 else []
    host = sum(kinds[kind] for kind in away)
    kinds |= dict.fromkeys(away, 0)
    return kinds | {"weights": kinds["weights"] + 4 * n["perceptual"], "host": host}
