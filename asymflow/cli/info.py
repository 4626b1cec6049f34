"""`asymflow info`: what a model is and what it costs, without reading its weights."""

import argparse
import json
import os
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from asymflow import backbones, cost, hub, opening
from asymflow.backbones.jit import SIZES, JiT, published
from asymflow.cli import info_classes, info_flux2, info_memory, info_options
from asymflow.cli.common import at_least, image_size
from asymflow.cli.info_memory import few
from asymflow.cli.models import MODEL, Choice, add_choice, class_names, find_model, model_of_run, own_backbone
from asymflow.cli.models import about as about_run
from asymflow.conditions import forward_parameters
from asymflow.errors import InputError
from asymflow.model import CONFIG, WEIGHTS, AsymFlow, make_backbone, read_config
from asymflow.patches import token_grid
from asymflow.sampling import guided, sample, sigma_grid
from asymflow.subspace import Subspace
from asymflow.text import count

TEXT = """Say what a model is, and what it costs to run and to train. Its weights are not read, and need not even exist:
operations and memory are counted on tensors without numbers. It takes seconds, of a FLUX.2 about twenty. A model that
is on the Hugging Face Hub, and not here, is downloaded first."""

EXAMPLES = f"""\
examples:
  asymflow info runs/h16                                    a training run, or a folder of save_pretrained
  asymflow info asymflow_h_16_r8_imagenet.safetensors       a published checkpoint
  asymflow info JiT-H/16 --batch 128 --gpus 8               no file yet: what would it cost to train?
  asymflow info JiT-L/32 --image-size 512x768 --json
  asymflow info FLUX.2-klein-9B                             to finetune a latent model into a pixel model
  asymflow info FLUX.2-klein-9B --full --gpus 8             the folder of a FLUX.2 klein, or a name ending in 9B or 4B
  asymflow info config                                      all keys of the configuration of a training

The names are JiT-SIZE/PATCH, with SIZE in {", ".join(SIZES)}. A multiply-add is two operations. Memory is that of AdamW
with the averages of the configuration imagenet (three), under DeepSpeed ZeRO; stage 0 is plain data parallelism.
"gradients" has DeepSpeed's bucket for them. Activations are those of the CPU's kernels: with the fused kernels of GPUs
they are smaller, under autocast by about a sixth. Workspaces and gaps of the allocator come on top.

A FLUX.2 klein is finetuned with LoRA, in bfloat16 with float32 originals of what is trained, a pass of the frozen
latent model for each step, and LPIPS, as the configuration asymflux2_klein_9b has it. "optimizer" is Adam's two
moments and the originals, "gradients" with DeepSpeed's bucket for them. "trained" are the adapters and the layers that
are trained in full."""

STEPS, INTERVAL = 50, (0.0, 0.88)  # the defaults of `asymflow sample`
RANK, BATCH, PRECISION, AVERAGES = 8, 32, "autocast", 3  # the averages are those of the configuration imagenet
# Copied from asymflow.backbones.flux2.adapter, whose import needs diffusers.
ADAPTER_CLASS, ADAPTER_WEIGHTS = "AsymFlux2Transformer2DModel", "diffusion_pytorch_model.safetensors"
LABEL = 15  # characters of the first column


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("info", description=TEXT, epilog=EXAMPLES)
    p.add_argument("model", type=os.path.expanduser, metavar="MODEL", help=f"{MODEL}; a name; or config")
    add_choice(p)
    p.add_argument("--image-size", type=image_size, metavar="N|HxW", help="in pixels, if not as trained")
    p.add_argument(
        "--batch", type=at_least(1), metavar="N", help=f"images on each GPU in training (default: {BATCH}; FLUX.2: 1)"
    )
    p.add_argument("--gpus", type=at_least(1), metavar="N", help="GPUs in training (default: 1, 8 and 64)")
    p.add_argument(
        "--precision",
        choices=cost.PRECISIONS,
        help="in training: autocast to bfloat16 over float32 weights (the default), bfloat16 with float32 master "
        "weights, or float32",
    )
    p.add_argument("--rank", type=at_least(0), metavar="R", help=f"with a name: of the subspace (default: {RANK})")
    block = "of a published file: before which the tokens of the class join (default: that of the published size)"
    p.add_argument("--in-context-start", type=at_least(0), metavar="BLOCK", help=block)
    p.add_argument("--classes", action="store_true", help="only list the classes, a number and a name on each line")
    p.add_argument("--json", action="store_true", help="print one JSON object, with all numbers in full")
    info_flux2.add_options(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.model == "config" and not Path(args.model).exists():
        info_options.check(args, "config")
        print(configuration(args.json))
        return
    klein = info_flux2.recognized(args.model)
    if args.classes and not klein and not is_name(args.model):
        info_options.check(args, "--classes")
        print(info_classes.every(args.model, args.json))
        return
    found = info_flux2.describe(args) if klein else describe(args)
    text = info_flux2.as_text if klein else as_text
    print(json.dumps(found, indent=2) if args.json else text(found))


def describe(args: argparse.Namespace) -> dict:
    """All there is to say. Memory is in bytes, operations in FLOPs for one image."""
    path = place = Path(args.model)
    if is_name(args.model):
        kind, model = "a model that could be trained", from_name(args.model, RANK if args.rank is None else args.rank)
    else:
        known = adapter(path)
        if not known:
            place = find_model(path, args.step, args.ema)
            known = finetuning(place) if isinstance(place, Choice) else None
        if known:
            info_options.check(args, known["kind"])
            return {"model": args.model} | known
        kind, model = from_run(place, args) if isinstance(place, Choice) else from_place(place, args)
    info_options.check(args, kind)
    args.batch, args.precision = args.batch or BATCH, args.precision or PRECISION
    found = {"model": args.model, "kind": kind}
    if isinstance(model, Subspace):
        return found | {"rank": model.rank, "dim": model.dim, "scale": model.scale}
    if isinstance(model, dict):  # the backbone is not in this library
        if args.image_size:
            raise InputError("--image-size needs --backbone: else the operations of this backbone are not counted")
        return found | model | {"training_memory": memory_of_weights(args, **model["parameters"])}
    if not args.image_size and not hasattr(model.backbone, "grid"):
        raise InputError(f"give --image-size: {type(model.backbone).__name__} has no grid to tell that of its images")
    image = (model.channels, *(args.image_size or [n * model.patch_size for n in model.backbone.grid]))
    grid = token_grid(torch.empty(1, *image, device="meta"), model.patch_size)
    forward = cost.forward_flops(model, image)
    if "labels" in forward_parameters(model.backbone):
        training, memory = training_step(model, image, args)
    else:  # train_ddp.py trains none of these
        training, memory = None, memory_of_weights(args, *cost.parameters(model))
    work = {"forward": forward, "training_step": training, "sampling": sampling(forward)}
    names = class_names(place.run if isinstance(place, Choice) else place)
    found |= about(model) | {"image": image, "grid": grid, "flops": work, "training_memory": memory}
    return found | ({"classes": names} if names else {})


# ---- Finding the model -----------------------------------------------------------------------------------------------
def is_name(model: str) -> bool:
    return model.startswith("JiT-") and not Path(model).exists()


def from_name(name: str, rank: int) -> AsymFlow:
    with torch.device("meta"):
        jit = JiT.from_name(name.removeprefix("JiT-"))
    if rank > jit.dim:
        raise InputError(f"--rank {rank} is more than the {jit.dim} dimensions of a token of {name}")
    return AsymFlow(jit, Subspace(torch.eye(jit.dim, rank)))


def from_run(choice: Choice, args: argparse.Namespace) -> tuple[str, AsymFlow]:
    kind = f"a training run, step {choice.step}, average {choice.average}"
    return kind, model_of_run(choice, args.backbone, read=False)


def finetuning(choice: Choice) -> dict | None:
    """What there is to say of a run that finetunes a latent model; None if the run is another."""
    config, subspace, _ = about_run(choice.run, choice.folder)
    if not config.finetune:
        return None
    kind = f"a finetuning of a FLUX.2 klein, step {choice.step}, average {choice.average}"
    lora = config.finetune.lora and config.finetune.lora.rank
    about = {"rank": subspace.rank, "scale": subspace.scale, "lora_rank": lora, "base": config.finetune.base}
    return {"kind": kind} | about


def adapter(path: Path) -> dict | None:
    """What the file of an adapter says of it; None if `path` is no adapter. InputError if it is damaged."""
    path = path.parent if path.name == ADAPTER_WEIGHTS and path.is_file() else path
    folder = hub.locate(path, CONFIG, what="a model")
    try:
        if opening.read_json(folder / CONFIG)["_class_name"] != ADAPTER_CLASS:
            return None
    except (ValueError, KeyError):
        return None
    file = hub.locate(path, ADAPTER_WEIGHTS, what="an adapter") / ADAPTER_WEIGHTS
    tensors, metadata = opening.read_tensors(file)
    try:
        rank, scale = tensors["proj_buffer"].shape[1], float(metadata.get("scale") or tensors["scale_buffer"])
    except (KeyError, IndexError, ValueError, RuntimeError):
        raise InputError(
            f"{file} does not fit: an adapter has proj_buffer (D, r), scale_buffer () and a scale"
        ) from None
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim]
    base = "".join(filter(str.isprintable, metadata.get("base", "")))[:200]  # printed, and written by a stranger
    about = {"rank": rank, "scale": scale, "lora_rank": max(ranks, default=None), "base": base or None}
    return {"kind": "an adapter of a FLUX.2 klein"} | about


def from_place(path: Path, args: argparse.Namespace) -> tuple[str, AsymFlow | Subspace | dict]:
    return from_folder(path, args.backbone) if path.is_dir() else from_file(path, args.in_context_start)


def from_folder(path: Path, backbone: str | None) -> tuple[str, AsymFlow | dict]:
    kind = "a folder of save_pretrained"
    config = read_config(path / CONFIG)
    parts = [config.get(name) for name in ("network", "tokens", "flow")]
    whole = all(isinstance(part, dict) for part in parts)
    name, sizes = (parts[0].get("class", "JiT"), parts[0].get("config", {})) if whole else (None, None)
    if whole and not (isinstance(name, str) and isinstance(sizes, dict)):
        raise InputError(f"{path / CONFIG}: in network, class must be text and config an object")
    if not whole or name in backbones.TABLE or backbone:  # safetensors are memory-mapped, so no weights are read
        return kind, AsymFlow.from_pretrained(path, backbone=own_backbone(backbone))
    tensors = opening.read_tensors(path / WEIGHTS)[0]
    count = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("backbone."))
    return kind, {"config": config, "parameters": {"total": count, "trainable": count}}


def from_file(path: Path, in_context_start: int | None) -> tuple[str, AsymFlow | Subspace]:
    if opening.existing_file(path).suffix == ".safetensors":
        content = published.read(path)
        if {"basis", "scale"} <= content.keys():
            return "a subspace", Subspace.load(path)
    else:
        with FakeTensorMode():  # makes torch.load skip the numbers
            content = published.read(path)
    if any(str(name).startswith("proj_mat_p") for name in content):
        return "a subspace of the reference", published.load_published(path)
    tensors = published.chosen_weights(content, None, path)
    jit = make_backbone(JiT.__name__, published.jit_sizes(tensors, in_context_start, path))
    positions = published.published_positions(jit)
    weights = {name: tensor for name, tensor in tensors.items() if name not in positions}
    published.check_jit(weights, jit, path, with_positions=False)
    jit.to(next(iter(tensors.values())).dtype)
    if "proj_buffer" not in tensors:
        return "a published JiT", AsymFlow(jit, Subspace.empty(jit.dim))
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is a pickle with a subspace in it: make a folder of it first, by asymflow import")
    subspace = published.checked_subspace(path, tensors["proj_buffer"], tensors["scale_buffer"])
    return "a published AsymFlow", AsymFlow(jit, subspace)


# ---- What it is, and what it costs -----------------------------------------------------------------------------------
def about(flow: AsymFlow) -> dict:
    total, trainable = cost.parameters(flow)
    return {
        "config": flow.config,
        "scale": flow.subspace.scale,
        "dtype": str(flow.backbone_dtype).removeprefix("torch."),
        "parameters": {"total": total, "trainable": trainable},
    }


def sampling(forward: int) -> dict:
    """FLOPs of an image, of which a forward pass has `forward`."""
    passes = {"unguided": passes_for_sampling(1.0), "guided": passes_for_sampling(2.0)}
    about = {"steps": STEPS, "guided_for_sigma": INTERVAL, "passes": passes}
    return about | {name: n * forward for name, n in passes.items()}


def passes_for_sampling(guidance: float) -> int:
    """How often an image goes through the network, counted in the sampler itself."""
    passes = 0

    def flow(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal passes
        passes += len(x)
        return x

    sample(guided(flow, {}, {}, guidance, INTERVAL), torch.zeros(1, 1), sigma_grid(STEPS))
    return passes


def training_step(flow: AsymFlow, image: tuple[int, ...], args: argparse.Namespace) -> tuple[int, dict]:
    """FLOPs for an image, if nothing is recomputed; and the memory of a batch, without and with recomputed blocks."""
    from asymflow.training.objectives.cost import class_conditional_step, images  # here: it takes a second

    step, ways = class_conditional_step(flow, args.precision), {}
    run = lambda step: step(images(args.batch, image))
    for name, blocks in (("kept", False), ("recomputed", True)):
        if cost.recompute(step.model, blocks) or not blocks:
            ways[name] = cost.count(step, run)
    memory = info_memory.describe(step.memory, args.gpus, ways)
    return ways["kept"].flops // args.batch, {"precision": args.precision, "batch_on_each_gpu": args.batch, **memory}


def memory_of_weights(args: argparse.Namespace, total: int, trainable: int) -> dict:
    """The memory of a training without activations."""

    def memory(gpus: int, stage: int) -> dict[str, int]:
        options = dict(precision=args.precision, averages=AVERAGES)
        return cost.training_memory(trainable, total - trainable, gpus=gpus, stage=stage, **options)

    return {"precision": args.precision, "batch_on_each_gpu": args.batch, **info_memory.describe(memory, args.gpus, {})}


# ---- For people ------------------------------------------------------------------------------------------------------
def as_text(found: dict) -> str:
    lines = {"model": f"{found['model']}, {found['kind']}"}
    if "lora_rank" in found:
        adapted = f"LoRA of rank {found['lora_rank']}" if found["lora_rank"] else "all weights"
        base = f"base {found['base']}" if found["base"] else "base not said"
        return f"{lines['model']}: {adapted}, subspace of rank {found['rank']}, scale {found['scale']:.6g}, {base}"
    if "dim" in found:
        lines["subspace"] = f"rank {found['rank']} of {found['dim']} dimensions, scale {found['scale']:.6g}"
        return aligned(lines | {"more": f"asymflow subspace show {found['model']}"})
    ours = found["config"]["network"]["class"] == JiT.__name__ and "image" in found
    lines |= jit(found) if ours else backbone_elsewhere(found["config"])
    if "classes" in found:
        lines["classes"] = info_classes.shown(found["classes"], found["model"], LABEL)
    lines["parameters"] = info_memory.many(found["parameters"]["total"])
    lines |= work(found["flops"]) if "flops" in found else {"operations": "not counted: the backbone is not ours"}
    memory = found["training_memory"]
    batch = f"{memory['batch_on_each_gpu']} images on each" if memory["activations"] else "without activations"
    title = f"Memory to train, GiB on each GPU, {memory['precision']}, {batch}"
    return "\n".join([aligned(lines), *info_memory.as_text(memory, title)])


def jit(found: dict) -> dict[str, str]:
    flow, tokens, network = (found["config"][name] for name in ("flow", "tokens", "network"))
    sizes, patch = network["config"], flow["patch_size"]
    known = next((f"-{name}/{patch}" for name, those in SIZES.items() if those.items() <= sizes.items()), "")
    shown = "".join(f", {name} {sizes[name]}" for name in ("width", "depth", "heads", "bottleneck", "dropout"))
    channels, height, width = found["image"]
    rows, columns = found["grid"]
    record = "".join(f", {tokens[name]}" for name in ("color_space", "fitted_on") if tokens[name])
    return {
        "backbone": f"{network['class']}{known}, {found['dtype']}{shown}",
        "images": f"{height} x {width} pixels, {count(channels, 'channel')}, {count(sizes['num_classes'], 'class')}",
        "tokens": f"{rows} x {columns} patches of {patch} x {patch} pixels, {flow['token_order']}",
        "in context": f"{sizes['in_context_tokens']} tokens of the class from block {sizes['in_context_start']} on",
        "subspace": f"rank {tokens['rank']} of {tokens['dim']} dimensions, scale {found['scale']:.6g}{record}",
        "flow": f"sigma_min {flow['sigma_min']:g}, noise_scale {flow['noise_scale']:g}",
    }


def backbone_elsewhere(config: dict) -> dict[str, str]:
    """The lines for a model whose backbone is not in this library, from its config.json."""
    network = config["network"]
    parts = {
        "backbone": {"class": network["class"], **network.get("config", {})},
        "tokens": config["tokens"],
        "flow": config["flow"],
    }
    return {part: ", ".join(f"{name} {value}" for name, value in values.items()) for part, values in parts.items()}


def work(flops: dict) -> dict[str, str]:
    forward, sampling = flops["forward"], flops["sampling"]
    low, high = sampling["guided_for_sigma"]
    plain, guided = (f"{few(sampling[n] / 1e12)} TFLOPs an image" for n in ("unguided", "guided"))
    passes = sampling["passes"]
    return {
        "forward pass": f"{few(forward / 1e9)} GFLOPs an image ({few(forward / 2e9)} billion multiply-adds)",
        "training step": f"{few(flops['training_step'] / 1e9)} GFLOPs an image"
        if flops["training_step"]
        else "not counted",
        "sampling": f"{plain}: {sampling['steps']} Heun steps, {passes['unguided']} passes",
        "guided": f"{guided}: {passes['guided']} passes, two where sigma is in [{low:g}, {high:g}]",
    }


def aligned(lines: dict[str, str]) -> str:
    return "\n".join(f"{label:{LABEL}}{text}" for label, text in lines.items())


# ---- What can be configured ------------------------------------------------------------------------------------------
def configuration(as_json: bool = False) -> str:
    """All keys of a training's configuration, as a YAML file of the defaults, or as a JSON schema for editors."""
    from asymflow.training.config.sections import Sections, file_schema, known_keys  # needs pydantic

    if as_json:
        return json.dumps(file_schema(), indent=2)
    lines = []
    for key, field in known_keys(Sections).items():
        *above, name = key.split(".")
        described = [beside.section for beside in field.metadata if hasattr(beside, "section")]
        kinds = (field.annotation, *get_args(field.annotation), *described)
        section = [kind for kind in kinds if hasattr(kind, "model_fields")]
        default = "" if section or field.is_required() or field.default_factory else json.dumps(field.default)
        about = [in_words(field.annotation, field.metadata)] if not section else []
        about += ["needed"] if field.is_required() and not section else []
        about += [field.description or section[0].__doc__.strip()]
        lines.append(f"{'  ' * len(above) + f'{name}: {default}':35} # {'; '.join(about)}")
    return "\n".join(lines)


WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", dict: "section"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def in_words(kind, limits=()) -> str:
    """A type and its limits in words, such as "whole number, at least 1"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return in_words(inner[0], inner[1].metadata)
    if origin is tuple:
        return f"list of: {in_words(inner[0])}"
    if origin is Literal:
        return " or ".join(inner)
    if inner and origin is not dict:
        return " or ".join(map(in_words, sorted(inner, key=lambda one: one is not type(None))))
    bounds = (
        f"{word} {getattr(limit, at):.4g}" for limit in limits for at, word in LIMITS.items() if hasattr(limit, at)
    )
    return ", ".join([WORDS[origin or kind], *bounds])
