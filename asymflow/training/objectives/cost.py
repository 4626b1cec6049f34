"""What it costs to finetune a FLUX.2 klein into a pixel model, counted in the real modules, without their numbers.

    step = Step(empty_transformer(KLEIN["FLUX.2-klein-9B"]))                 # nothing is allocated
    training_memory(step, gpus=8, stage=2)                                   # bytes on each GPU, by kind
    activations(step, (1024, 1024), batch=1)                                 # and these on top

It is the training of the configuration asymflux2_klein_9b: its model, its loss, LPIPS in bfloat16, and what DeepSpeed
keeps for its section `deepspeed`.
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
PLACES = ("finetune.base", "finetune.subspace", "data.path")  # which it needs, and which cost nothing
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
# Of gradients, as DeepSpeed 0.19 keeps them where they are added up in float32 (at stage 0 it cannot): bytes for each
# trained parameter on every GPU, bytes divided among the GPUs, and bytes for each number in a bucket of those that are
# on their way. At stages 0 and 1 they are there in bfloat16 and float32; at stage 3 another time, for the step.
GRADIENTS = {0: (6, 0, 0), 1: (6, 0, 0), 2: (0, 4, 2), 3: (0, 8, 2)}
BUCKET = 500_000_000  # numbers: zero_optimization.reduce_bucket_size, which the configuration leaves as it is


def empty_transformer(config: dict) -> Flux2Transformer2DModel:
    """The transformer of a configuration of diffusers, in bfloat16, on the meta device."""
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(config).bfloat16()


# ---- The step --------------------------------------------------------------------------------------------------------
def settings(lora_rank: int | None = LORA_RANK, checkpointing: bool = True, lpips: bool = True) -> dict:
    """By keys of the configuration. lora_rank: None for no LoRA: everything is trained."""
    lora = {"finetune.lora.rank": lora_rank} if lora_rank else {"finetune.lora": None}
    perceptual = {"loss.perceptual.vgg": "random"} if lpips else {"loss.perceptual": None}
    return {**dict.fromkeys(PLACES, "none"), "finetune.checkpointing": checkpointing, **lora, **perceptual}


def random_perceptual(device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> PerceptualLoss:
    """LPIPS whose VGG16 is random, which costs as much as any other; on the meta device it is not even drawn."""
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision for VGG16 in a way of the past
        return PerceptualLoss("random", device, dtype)


class Step(nn.Module):
    """A micro-batch of the training, with the weights as the engine has them: forward is its loss.

    latent: a transformer in bfloat16, which it takes over. subspace: of rank r; by default the first r coordinates,
    which cost as much as any others. options: of `settings`. perceptual: instead of one that is drawn.
    Raises InputError for a transformer that is none of a base model.
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
        self.lpips = perceptual and perceptual.model  # so that its weights are seen to be weights

    def forward(self, batch: EncodedBatch) -> Tensor:
        losses = self.objective.losses(self.model, batch)
        return (losses * torch.tensor(self.objective.weights, device=losses.device)).sum(1).mean()

    @property
    def transformer(self) -> Flux2Transformer2DModel:
        return self.model.backbone.transformer


def inputs(
    step: Step, size: tuple[int, int], batch: int, text_length: int, device: str | torch.device = "cpu"
) -> EncodedBatch:
    """Noise for `Step`: images of `size`, (height, width)."""
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
    """FLOPs of a training step for one image: the latent model, forward and backward, what is computed twice, LPIPS.

    Through frozen layers the gradient of what goes into them is computed, but none of their weights.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step = cost.stand_in(step, "cpu")
        step(inputs(step, size, 1, text_length)).backward()
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
    return cost.step_bytes(step, lambda step: step(inputs(step, size, batch, text_length)))


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

    weights: that are frozen, with those of LPIPS (on every GPU). trained: bfloat16. optimizer: Adam's moments and the
    float32 originals. gradients, buckets: see `GRADIENTS`. gathered: what stage 3 collects for the largest layer.
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
