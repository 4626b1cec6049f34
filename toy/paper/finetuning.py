"""Table 3 and Figure 4: what each part of the loss adds when a latent model becomes a pixel model.

The models are those of toy/asymflux2_tiny.py; here their losses differ. The pixel models are trained for as many steps,
on the same pictures and noise in the same order. The latent model goes on for as many, as it was trained before: on the
same pictures in an order of its own. All draw the same captions from the same noise.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import vgg16_bn

from asymflow import opening
from asymflow.data.shapes import Shapes
from asymflow.errors import InputError
from asymflow.evaluation.drawn import quantized
from asymflow.evaluation.features import load_extractor
from asymflow.evaluation.oracle import detail, read_scene, score
from asymflow.files import replacing
from asymflow.pictures import image_grid
from asymflow.progress import progress_bar
from toy import asymflux2_tiny as tiny
from toy.emoji64 import JUDGE, judge_in, load
from toy.paper import measures
from toy.paper.blocks import FINETUNED
from toy.paper.experiments import SEEDS
from toy.paper.runs import in_words, keep, stored, training_hours

STEPS, QUICK_STEPS = 1500, 4
ASKED = 512  # captions
SHOWN = 8  # samples of each model in the picture
VGG = "vgg16.safetensors"
LOSSES = {  # what is trained, and how its configuration differs
    "reduced": tiny.EVERYTHING,
    "plain": {**tiny.EVERYTHING, "loss.variance_reduction": "null"},
    "scratch": tiny.FROM_NOTHING,
    "perceptual": tiny.EVERYTHING,
    "perceptual-weak": tiny.EVERYTHING,
}
PERCEPTUAL = {"perceptual": 1.0, "perceptual-weak": 0.2}  # weights of the term, whose network is trained first
MODELS = tuple(FINETUNED)
VARIANCE = "variance"  # of the gradient: in the place of a model, in the names of results
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels at which it is measured
DRAWS = 64  # micro-batches that it is measured over


def finetuning(args: argparse.Namespace) -> None:
    """A folder for each seed, with all its models; a result for each model and seed."""
    folders = {f"finetuning-seed-{seed}": seed for seed in (SEEDS[:1] if args.quick else SEEDS)}
    names = args.only.split(",") if args.only else list(folders)
    if strange := [name for name in names if name not in folders]:
        raise InputError(f"--only {strange[0]} is none of {', '.join(folders)}")
    for name in names:
        seed, steps = folders[name], QUICK_STEPS if args.quick else STEPS
        results = {model: args.out / f"finetuning-{model}-seed-{seed}.json" for model in (*MODELS, VARIANCE)}
        missing = {model: file for model, file in results.items() if not file.exists()}
        if missing:
            sizes = tiny.QUICK if args.quick else {**tiny.FULL, "asked": ASKED}
            one_seed(args.out, args.out / name, seed, steps, sizes, missing)
        for model, file in results.items():
            found = stored(file, about(model, seed, steps))["at the end"]
            print(f"{file.stem}: {'done' if model == VARIANCE else in_words(found)}", flush=True)


def about(model: str, seed: int, steps: int) -> dict:
    scale = {} if steps == STEPS else {"steps": steps}
    said = {"run": {"name": f"finetuning-{model}-seed-{seed}", "seed": seed}, "scale": scale}
    loss = {"loss": {**LOSSES[model], "perceptual": PERCEPTUAL.get(model)}} if model in LOSSES else {}
    return said | loss


def one_seed(out: Path, folder: Path, seed: int, steps: int, sizes: dict, results: dict[str, Path]) -> None:
    """Train all models of a seed, let them draw, and write results. sizes: as in toy/asymflux2_tiny.py."""
    pictures = Shapes(max(sizes["pictures"], 200), tiny.SIZE, seed=5)
    judge = out / "finetuning" / JUDGE
    judge_in(judge.parent, pictures, *load(pictures), epochs=6)
    vgg = out / "finetuning" / VGG
    with timed(folder, "latent"):
        common = tiny.prepared(folder, seed, steps, sizes)
    with timed(folder, "perceptual"):
        perceptual_net(vgg, min(steps, 300))
    longer = lambda beside: tiny.latent_model(folder / "pixel-base", beside, folder / "shards", seed + 100, steps)
    with timed(folder, "latent-finetuned"):
        tiny.once(folder / "latent-finetuned", longer)
    for model, settings in LOSSES.items():
        weight = PERCEPTUAL.get(model)
        term = {"loss.perceptual": f"{{vgg: {vgg}, weight: {weight}}}"} if weight else {}
        tiny.train({folder / model: {**common, "finetune.base": tiny.base_of(folder, model), **settings, **term}})
    if VARIANCE in results:
        started = time.time()
        found = variances(folder, common, *((LEVELS, DRAWS) if steps == STEPS else (LEVELS[-1:], 2)))
        hours = {"training": 0.0, "measuring": (time.time() - started) / 3600}
        keep(results[VARIANCE], about(VARIANCE, seed, steps), judge, {"hours": hours, "at the end": found})
    if any(model in results for model in MODELS):
        measure(out, folder, judge, seed, steps, sizes["asked"], results)


@contextmanager
def timed(folder: Path, model: str) -> Iterator[None]:
    """Add the hours that a block takes to those of a model in hours.json: it may be stopped, and go on."""
    started, file = time.time(), folder / "hours.json"
    try:
        yield
    finally:
        hours = opening.read_json(file) if file.exists() else {}
        hours[model] = hours.get(model, 0.0) + (time.time() - started) / 3600
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(hours))


def variances(folder: Path, common: dict, levels: Sequence[float], draws: int) -> dict[str, dict[str, dict]]:
    """Of the gradients of the plain and the reduced loss, for the weights at the start and those of the plain model.

    In micro-batches at the noise levels of the training, and in some where all images have one of `levels`.
    """
    one = {"loss.sigma_std": 0.0, "loss.sigma_shift": 1.0}
    batches = {"as trained": {}}
    batches |= {str(level): {"loss.sigma_mean": math.log(level / (1 - level)), **one} for level in levels}
    ratio = lambda settings, weights: tiny.variance_ratio(folder, common | settings, draws, weights)
    return {weights: {name: ratio(s, weights) for name, s in batches.items()} for weights in ("start", "plain")}


def measure(out: Path, folder: Path, judge: Path, seed: int, steps: int, asked: int, results: dict[str, Path]) -> None:
    """Let all models draw, and write the results asked for, and a picture of all."""
    started = time.time()
    drawn, captions = tiny.drawings(folder, seed, asked, (*MODELS, "lifted"))
    image_grid(torch.cat([images[:SHOWN] for images in drawn.values()]), columns=SHOWN).save(out / f"{folder.name}.png")
    drawing = (time.time() - started) / 3600 / len(MODELS)
    features = load_extractor("classifier", judge)
    real = quantized(drawn["data"], "round")
    reference = measures.reference_of(features, real)
    for model in filter(results.__contains__, MODELS):
        started = time.time()
        strangers = drawn[model].roll(1, 0)
        end = {
            **score(drawn[model], captions),
            **detail(drawn[model]),
            **measures.compared(quantized(drawn[model], "round"), real, features, reference, tiny.PATCH),
            "correlation": correlation(drawn[model], drawn["latent"]),
            "correlation of strangers": correlation(strangers, drawn["latent"]),
            "correlation with the lifted latents": correlation(drawn[model], drawn["lifted"]),
            "read alike": read_alike(drawn[model], drawn["latent"]),
            "strangers read alike": read_alike(strangers, drawn["latent"]),
        }
        end = {key: None if math.isnan(value) else value for key, value in end.items()}  # NaN: nothing was recognized
        made = opening.read_json(folder / "hours.json").get(model, 0.0)
        hours = {"training": made + (training_hours(folder / model) if model in LOSSES else 0.0)}
        hours["measuring"] = drawing + (time.time() - started) / 3600
        keep(results[model], about(model, seed, steps), judge, {"hours": hours, "at the end": end})


def read_alike(images: Tensor, others: Tensor) -> float:
    """The share of images in which the oracle reads a caption, and the same as in those of others."""
    readings = [[read_scene(image).caption for image in part] for part in (images, others)]
    return statistics.fmean(first is not None and first == other for first, other in zip(*readings, strict=True))


def correlation(images: Tensor, others: Tensor) -> float:
    """Of the pixels of images (n, 3, H, W) with those of others, about the mean image of each; the mean over n."""
    first, other = ((part - part.mean(0)).flatten(1) for part in (images, others))
    return F.cosine_similarity(first, other).mean().item()


def perceptual_net(file: Path, steps: int, seed: int = 0) -> None:
    """A VGG16 that has learnt the classes of shapes, in torchvision's names: for the perceptual term of the loss.

    It learns with batch normalization, without which it does not in so few steps, and which is then folded into its
    convolutions. What follows these in torchvision is made for 224 pixels; here one linear layer is enough.
    """
    about = {"steps": str(steps)}
    if file.exists():
        if opening.read_tensors(file)[1] != about:
            raise InputError(f"{file} has not learnt for {steps} steps: choose another --out")
        return
    torch.manual_seed(seed)
    features, head = vgg16_bn().features, nn.Linear(512, Shapes.num_classes)
    weights = [*features.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    pictures = Shapes(steps * 32, tiny.SIZE, seed=7)
    for step in progress_bar(range(steps), "training the perceptual network", "step"):
        samples = [tiny.dimmed(pictures[32 * step + i]) for i in range(32)]
        images, labels = torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])
        loss = F.cross_entropy(head(features(tiny.to_float(images)).mean((2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"the perceptual network's last loss is {loss:.3f}, where a guess has 2.773")
    weights = {f"features.{name}": w.contiguous() for name, w in folded(features.eval()).state_dict().items()}
    with replacing(file) as beside:
        save_file(weights, beside, metadata=about)


def folded(features: nn.Sequential) -> nn.Sequential:
    """The same function in eval mode, without batch normalization: each is folded into the convolution before it."""
    layers = list(features)
    return nn.Sequential(
        *(
            fuse_conv_bn_eval(layer, layers[i + 1]) if isinstance(layer, nn.Conv2d) else layer
            for i, layer in enumerate(layers)
            if not isinstance(layer, nn.BatchNorm2d)
        )
    )
