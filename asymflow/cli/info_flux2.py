"""`asymflow info` of a FLUX.2 klein: what it costs to make a pixel model of it."""

import argparse
from pathlib import Path

from asymflow import cost, opening
from asymflow.cli import info_memory, info_options
from asymflow.cli.common import at_least
from asymflow.cli.info_memory import many
from asymflow.errors import InputError

CLASS = "Flux2Transformer2DModel"
SIZE = (1024, 1024)
STEPS = 38  # of UniPC, each with two passes: with and without the prompt
STAGES = (1, 2, 3)  # DeepSpeed cannot add up gradients of bfloat16 weights in float32 at stage 0
PEAK, SHARE = 989e12, 0.4  # FLOPs a second of an H100 in bfloat16, and the share of them that a training may reach
KIND = "a FLUX.2 klein, to become a pixel model"


def add_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("FLUX.2 klein: a name, a folder of the model, or that of its transformer")
    group.add_argument("--lora-rank", type=at_least(1), metavar="R", help="of the adapters (default: 256)")
    group.add_argument("--full", action="store_true", help="train all weights, without adapters")
    group.add_argument("--offload", choices=cost.OFFLOADS, help="to the host: from ZeRO 1 on; weights too, in ZeRO 3")
    group.add_argument("--text-length", type=at_least(1), metavar="N", help="tokens of a prompt (default: 512)")


def recognized(model: str) -> bool:
    """Whether `model` means a FLUX.2: a folder of diffusers, or a name, if there is no file of this name."""
    path = Path(model)
    if path.is_dir():
        return config_file(path) is not None
    return not path.exists() and path.name.upper().startswith("FLUX.2")


def config_file(folder: Path) -> Path | None:
    """The config.json of a FLUX.2 transformer, in a diffusers folder or its subfolder "transformer", or None."""
    for file in (folder / "transformer" / "config.json", folder / "config.json"):
        try:
            if opening.read_json(file)["_class_name"] == CLASS:
                return file
        except (ValueError, KeyError):
            pass
    return None


def describe(args: argparse.Namespace) -> dict:
    """All there is to say. Memory is in bytes, operations in FLOPs for one image."""
    info_options.check(args, KIND)
    from asymflow.training.objectives import klein  # here, because diffusers and peft take seconds

    if args.full and args.lora_rank:
        raise InputError("--lora-rank does not go with --full, which trains all weights and has no adapters")
    size, batch, length = args.image_size or SIZE, args.batch or 1, args.text_length or klein.TEXT_LENGTH
    rank = None if args.full else args.lora_rank or klein.LORA_RANK
    latent = klein.empty_transformer(config_of(args.model, klein.KLEIN))
    base = sum(p.numel() for p in latent.parameters())
    step = klein.klein_step(latent, lora_rank=rank)
    forward = klein.forward_flops(step, size, length)
    counted = {}
    for name, blocks in (("recomputed", True), ("kept", False)):
        cost.recompute(step.model, blocks)
        counted[name] = klein.count(step, lambda: klein.noise_batch(step, size, batch, length))
    memory = info_memory.describe(
        lambda gpus, stage: step.memory(gpus, stage, args.offload), args.gpus, counted, STAGES
    )
    return {
        "model": args.model,
        "kind": KIND,
        "config": dict(latent.config),
        "image": (klein.CHANNELS, *size),
        "text_length": length,
        "parameters": {"base": base, **klein.parameters(step)},
        "flops": {
            "forward": forward,
            "training_step": counted["recomputed"].flops // batch,
            "sampling": {"steps": STEPS, "passes": 2 * STEPS, "guided": 2 * STEPS * forward},
        },
        "training_memory": {"lora_rank": rank, "offload": args.offload, "batch_on_each_gpu": batch, **memory},
    }


def config_of(model: str, known: dict[str, dict]) -> dict:
    if Path(model).is_dir():
        return opening.read_json(config_file(Path(model)))
    name = Path(model).name.replace("-base", "")
    if name not in known:
        raise InputError(f"there is no {model} here, neither a folder nor a name: the names are {', '.join(known)}")
    return known[name]


# ---- For people ------------------------------------------------------------------------------------------------------
def as_text(found: dict) -> str:
    n, flops, memory, c = found["parameters"], found["flops"], found["training_memory"], found["config"]
    height, width = found["image"][1:]
    lora = f"rank {memory['lora_rank']}, {many(n['lora'])} in {n['lora_layers']} linear layers"
    images = f"{memory['batch_on_each_gpu']} of {height} x {width} pixels"
    seconds = flops["training_step"] * memory["batch_on_each_gpu"] / PEAK / SHARE
    lines = {
        "model": f"{found['model']}, {found['kind']}",
        "backbone": f"{c['num_layers']} double and {c['num_single_layers']} single blocks, {c['num_attention_heads']} "
        f"heads x {c['attention_head_dim']}, {c['in_channels']} channels",
        "parameters": f"{many(n['base'])}; {many(n['pixel_model'])} as a pixel model",
        "LoRA": lora if memory["lora_rank"] else "none: all weights are trained",
        "trained": f"{many(n['trained'])}, of these {many(n['trained_in_full'])} in full",
        "forward pass": f"{flops['forward'] / 1e12:,.1f} TFLOPs an image, with {found['text_length']} tokens of text",
        "training step": f"{flops['training_step'] / 1e12:,.1f} TFLOPs an image: {seconds:,.2f} s for a batch at "
        f"{SHARE:.0%} of the peak of an H100",
        "sampling": f"{flops['sampling']['guided'] / 1e12:,.0f} TFLOPs an image: {STEPS} steps, "
        f"{flops['sampling']['passes']} passes",
    }
    title = f"Memory to finetune, GiB on each GPU, bfloat16, {images} on each, all blocks recomputed"
    return "\n".join([*(f"{label:15}{text}" for label, text in lines.items()), *info_memory.as_text(memory, title)])
