"""A finetuning of a FLUX.2 klein into a pixel model, to be counted: the real modules, with or without numbers.

    step = klein_step(empty_transformer(KLEIN["FLUX.2-klein-9B"]))              # allocates nothing
    step.memory(gpus=8, stage=2)                                                # bytes on each GPU, by kind
    cost.count(step, lambda step: step(noise_batch(step, (1024, 1024))))        # and these on top

The training is that of the configuration asymflux2_klein_9b: its model, its loss with LPIPS in bfloat16, and the
memory that DeepSpeed uses with its section `deepspeed`.
"""

import json
import warnings
from collections.abc import Callable

import torch
from diffusers import Flux2Transformer2DModel

from asymflow import cost, opening
from asymflow.backbones.flux2 import check_transformer
from asymflow.cost.repeated import Repeats, shorten
from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.cost import Step
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
LORA_RANK, TEXT_LENGTH = 256, 512


def empty_transformer(config: dict) -> Flux2Transformer2DModel:
    """The transformer of a diffusers configuration, in bfloat16, on the meta device."""
    with torch.device("meta"), opening.no_larger_than(0, "the configuration"):
        return Flux2Transformer2DModel.from_config(config).bfloat16()


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


def klein_step(
    latent: Flux2Transformer2DModel,
    subspace: Subspace | None = None,
    perceptual: PerceptualLoss | None = None,
    **options,
) -> Step:
    """A step of the finetuning, whose weights have the dtypes that the engine gives them.

    latent: a transformer in bfloat16; do not use it afterwards. subspace: of rank r; by default the first r coordinates
    (any others cost as much). options: of `settings`. perceptual: by default `random_perceptual`.
    Raises InputError for a transformer that is not of a base model.
    """
    check_transformer(latent)
    channels, dim = latent.config.in_channels, CHANNELS * PATCH**2
    if channels > dim:
        raise InputError(f"the transformer has {channels} channels, more than the {dim} of a patch of pixels")
    config = load_config(CONFIGURATION, [f"{key}={json.dumps(value)}" for key, value in settings(**options).items()])
    device, subspace = latent.device, subspace or Subspace(torch.eye(dim, channels), patch_size=PATCH)
    model = finetuned(latent, config, subspace, base="").bfloat16().train()
    perceptual = (perceptual or random_perceptual(device)) if config.loss.perceptual else None
    return Step(config, LatentToPixel(config, None, perceptual), model)


def noise_batch(
    step: Step,
    size: tuple[int, int],
    images: int = 1,
    text_length: int = TEXT_LENGTH,
    device: str | torch.device = "cpu",
) -> EncodedBatch:
    """A batch of noise. size: (height, width) of the images."""
    sides = [length // PATCH for length in size]
    if min(sides) < 1 or [side * PATCH for side in sides] != list(size):
        raise InputError(f"images must be multiples of {PATCH} pixels high and wide, but are {size[0]} x {size[1]}")
    transformer, shape = step.model.backbone.transformer, (images, CHANNELS, *size)
    noise = lambda *shape, **options: torch.randn(*shape, device=device, **options)
    return EncodedBatch(
        pixels=torch.randint(256, shape, dtype=torch.uint8, device=device),
        eps=noise(*shape),
        labels=torch.zeros(images, dtype=torch.long, device=device),
        normal=noise(images),
        samples=list(range(images)),
        problems=[],
        latents=noise(images, step.model.subspace.rank, *sides),
        prompts=noise(images, text_length, transformer.config.joint_attention_dim, dtype=transformer.dtype),
    )


def few_blocks(model: torch.nn.Module) -> Repeats:
    """Take out blocks that are alike, see `asymflow.cost.count`."""
    transformers = [module for module in model.modules() if isinstance(module, Flux2Transformer2DModel)]
    return shorten(*(blocks for t in transformers for blocks in (t.transformer_blocks, t.single_transformer_blocks)))


def count(step: Step, batch: Callable[[], EncodedBatch]) -> cost.Cost:
    """The cost of a step of this batch, see `asymflow.cost.count`."""
    return cost.count(step, lambda step: step(batch()), shorten=few_blocks)


def forward_flops(step: Step, size: tuple[int, int], text_length: int = TEXT_LENGTH) -> int:
    """FLOPs of a forward pass of the pixel model for one image, see `asymflow.cost.forward_flops`."""
    transformer = step.model.backbone.transformer
    text = torch.empty(1, text_length, transformer.config.joint_attention_dim, dtype=transformer.dtype, device="meta")
    return cost.forward_flops(step.model, (CHANNELS, *size), few_blocks, encoder_hidden_states=text)


def parameters(step: Step) -> dict[str, int]:
    """Numbers of parameters. reference: those that the latent model has for itself. perceptual: those of LPIPS."""
    own = dict(step.model.backbone.transformer.named_parameters())
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
        "perceptual": count(step.beside.parameters()),
    }
