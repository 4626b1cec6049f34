"""What it costs to finetune a FLUX.2 klein into a pixel model. Counted on the real modules, with empty tensors.

    step = Step(empty_transformer(KLEIN["FLUX.2-klein-9B"]))                 # allocates nothing
    training_memory(step, gpus=8, stage=2)                                   # bytes on each GPU, by kind
    activations(step, (1024, 1024), batch=1)                                 # and these on top

The training is that of the configuration asymflux2_klein_9b: its model, its loss with LPIPS in bfloat16, and the
memory that DeepSpeed uses with its section `deepspeed`.
"""

import json
import math
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
from asymflow.backbones.flux2 import check_transformer
from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.config.reading import Config, load_config
from asymflow.training.objectives.encoded_batches import EncodedBatch
from asymflow.training.objectives.finetuning import finetuned
from asymflow.training.objectives.latent_to_pixel import LatentToPixel
from asymflow.training.objectives.variance import PerceptualLoss

CONFIGURATION = "asymflux2_klein_9b"
PLACES = ("finetune.base", "finetune.subspace", "data.path")  # keys that it must have; their values do not matter here
KLEIN = {  # the base models, with 9,078,581,248 and 3,875,544,576 parameters
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
# Memory for gradients at each ZeRO stage, as DeepSpeed 0.19 keeps them when it adds them up in float32 (at stage 0 it
# cannot): bytes per trained parameter on every GPU, bytes per trained parameter divided among the GPUs, and bytes per
# number in the bucket for communication. Stages 0 and 1 have a bfloat16 and a float32 copy; stage 3 has two float32
# copies, one of them for the step.
GRADIENTS = {0: (6, 0, 0), 1: (6, 0, 0), 2: (0, 4, 2), 3: (0, 8, 2)}
BUCKET = 500_000_000  # numbers: DeepSpeed's default of zero_optimization.reduce_bucket_size


def empty_transformer(config: dict) -> Flux2Transformer2DModel:
    """The transformer of a diffusers configuration, in bfloat16, on the meta device."""
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(config).bfloat16()


# ---- The step --------------------------------------------------------------------------------------------------------
def settings(lora_rank: int | None = LORA_RANK, checkpointing: bool = True, lpips: bool = True) -> dict:
    """What differs from the shipped configuration: {key: value}. lora_rank: None trains all weights, without LoRA."""
    lora = {"finetune.lora.rank": lora_rank} if lora_rank else {"finetune.lora": None}
    perceptual = {"loss.perceptual.vgg": "random"} if lpips else {"loss.perceptual": None}
    return {**dict.fromkeys(PLACES, "none"), "finetune.checkpointing": checkpointing, **lora, **perceptual}


def random_perceptual(device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> PerceptualLoss:
    """LPIPS with a random VGG16, which costs as much as the real one. On the meta device it has no numbers at all."""
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses a deprecated argument of torchvision
        return PerceptualLoss("random", device, dtype)


class Step(nn.Module):
    """One micro-batch of the training: `forward` returns its loss. Weights have the dtypes that the engine gives them.

    latent: a transformer in bfloat16; do not use it afterwards. subspace: of rank r; by default the first r coordinates
    (any others cost as much). options: of `settings`. perceptual: by default `random_perceptual`.
    Raises InputError for a transformer that is not of a base model.
    """

    def __init__(
        self,
        latent: Flux2Transformer2DModel,
        subspace: Subspace | None = None,
        perceptual: PerceptualLoss | None = None,
        **options,
    ):
        super().__init__()
        check_transformer(latent)
        channels, dim = latent.config.in_channels, CHANNELS * PATCH**2
        if channels > dim:
            raise InputError(f"the transformer has {channels} channels, more than the {dim} of a patch of pixels")
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings(**options).items()]
        self.config: Config = load_config(CONFIGURATION, overrides)
        device, subspace = latent.device, subspace or Subspace(torch.eye(dim, channels), patch_size=PATCH)
        self.model = finetuned(latent, self.config, subspace, base="").bfloat16().train()
        perceptual = (perceptual or random_perceptual(device)) if self.config.loss.perceptual else None
        self.objective = LatentToPixel(self.config, None, device, perceptual)
        self.lpips = perceptual and perceptual.model  # a submodule, so that its weights count as weights

    def forward(self, batch: EncodedBatch) -> Tensor:
        losses = self.objective.losses(self.model, batch)
        return (losses * torch.tensor(self.objective.weights, device=losses.device)).sum(1).mean()

    @property
    def transformer(self) -> Flux2Transformer2DModel:
        return self.model.backbone.transformer


def inputs(
    step: Step, size: tuple[int, int], batch: int, text_length: int, device: str | torch.device = "cpu"
) -> EncodedBatch:
    """A batch of noise for `Step`. size: (height, width) of the images."""
    sides = [length // PATCH for length in size]
    if min(sides) < 1 or [side * PATCH for side in sides] != list(size):
        raise InputError(f"images must be multiples of {PATCH} pixels high and wide, but are {size[0]} x {size[1]}")
    image, c = (batch, CHANNELS, *size), step.transformer.config
    noise = lambda *shape, **options: torch.randn(*shape, device=device, **options)
    return EncodedBatch(
        pixels=torch.randint(256, image, dtype=torch.uint8, device=device),
        eps=noise(*image),
        labels=torch.zeros(batch, dtype=torch.long, device=device),
        normal=noise(batch),
        samples=list(range(batch)),
        problems=[],
        latents=noise(batch, step.model.subspace.rank, *sides),
        prompts=noise(batch, text_length, c.joint_attention_dim, dtype=step.transformer.dtype),
    )


# ---- Operations ------------------------------------------------------------------------------------------------------
def forward_flops(step: Step, size: tuple[int, int], text_length: int = TEXT_LENGTH) -> int:
    """FLOPs of a forward pass of the pixel model for one image, see `asymflow.cost.flops`."""
    text = torch.empty(1, text_length, step.transformer.config.joint_attention_dim, dtype=step.transformer.dtype)
    return cost.flops(step.model, (CHANNELS, *size), encoder_hidden_states=text)


def step_flops(step: Step, size: tuple[int, int], text_length: int = TEXT_LENGTH) -> int:
    """FLOPs of a training step for one image: latent model, forward, backward, recomputation and LPIPS.

    For a frozen layer, the backward pass computes the gradient of its input only, not of its weights.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step = cost.stand_in(step, "cpu")
        step(inputs(step, size, 1, text_length)).backward()
    return counter.get_total_flops()


@contextmanager
def all_kept(step: Step) -> Iterator[None]:
    """A context without activation checkpointing: all activations are kept, nothing is recomputed."""
    before, step.transformer.gradient_checkpointing = step.transformer.gradient_checkpointing, False
    try:
        yield
    finally:
        step.transformer.gradient_checkpointing = before


# ---- Memory ----------------------------------------------------------------------------------------------------------
def activations(step: Step, size: tuple[int, int], batch: int = 1, text_length: int = TEXT_LENGTH) -> tuple[int, int]:
    """`(kept, peak)` bytes of a training step with the CPU's kernels, see `asymflow.cost.activation_bytes`."""
    return cost.step_bytes(step, lambda step: step(inputs(step, size, batch, text_length)))


def parameters(step: Step) -> dict[str, int]:
    """Numbers of parameters. reference: those that the latent model has for itself. perceptual: those of LPIPS."""
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
    """The bytes on each GPU that do not depend on the batch, by kind, and under "host" those in host memory per GPU.

    weights: the frozen ones, and LPIPS (whole on every GPU). trained: the trained weights, in bfloat16. optimizer:
    Adam's moments and the float32 masters. gradients, buckets: see `GRADIENTS`. gathered: the largest layer, whose
    weights stage 3 gathers. offload: "optimizer" moves optimizer and average to the host (from stage 1 on), "weights"
    also the weights (at stage 3). Gradients are always counted on the GPU, where they are made.
    """
    if offload not in (None, *OFFLOADS):
        raise InputError(f"offload must be one of {', '.join(OFFLOADS)}, but it is {offload!r}")
    n = parameters(step)
    frozen = n["pixel_model"] + n["lora"] - n["trained"] + n["reference"]
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in step.model.modules())
    options = dict(gpus=gpus, stage=stage, precision="bfloat16")
    still = cost.training_memory(0, frozen, **options, largest_layer=largest)
    moving = cost.training_memory(n["trained"], **options)
    whole, divided, bucket = GRADIENTS[stage]
    kinds = {
        "weights": still["weights"],
        "trained": moving["weights"],
        "gradients": whole * n["trained"] + math.ceil(divided * n["trained"] / gpus),
        "buckets": bucket * BUCKET,
        "optimizer": moving["master_weights"] + moving["adam"],
        "ema": moving["ema"],
        "gathered": still["gathered_layer"],
    }
    away = ["optimizer", "ema"] if offload and stage >= 1 else []
    away += ["weights", "trained"] if offload == "weights" and stage == 3 else []
    host = sum(kinds[kind] for kind in away)
    kinds |= dict.fromkeys(away, 0)
    perceptual = sum(p.numel() * p.element_size() for p in step.lpips.parameters()) if step.lpips else 0
    return kinds | {"weights": kinds["weights"] + perceptual, "host": host}
