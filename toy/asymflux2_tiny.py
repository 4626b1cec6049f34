"""From a latent text-to-image model to a pixel model, from end to end, with the classes and files of FLUX.2.

On generated pictures of coloured shapes with captions (asymflow/data/shapes.py), at half their brightness: trains a
tiny autoencoder, on its latents a tiny FLUX.2 klein, aligns pixels with latents, and finetunes the lifted model in
pixel space by train_ddp.py, through the same commands as for the real one. Then four models draw the same captions from
the same noise:

    latent    the latent model and its autoencoder
    start     the pixel model before the first step
    pixel     the pixel model, finetuned
    scratch   a pixel model of the same size, trained from scratch for as many steps

What they drew is read by an oracle (asymflow/evaluation/oracle.py): how often it is what the caption says, and how
sharp it is. Everything that takes long is kept in --out, and not done again. The last two are trained at the same time.
The adapters are there as well, each with its base: pixel-adapter goes with pixel-base, scratch-adapter with
scratch-base. The folder autoencoder is a base whose transformer knows nothing yet, and no adapter's.

    asymflow sample --base runs/toy/asymflux2_tiny/pixel-base --adapter runs/toy/asymflux2_tiny/pixel-adapter \\
        --prompt "a red square" --width 32 --height 32 --max-length 32 --precision float32 --guidance 2 \\
        --out runs/square
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from asymflow.packages import importing

with importing(__name__):
    import torch
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
    from matplotlib.figure import Figure
    from torch import Tensor
    from tqdm import trange

    from asymflow.backbones.flux2 import latent_flow, latent_to_pixel
    from asymflow.backbones.flux2.adapter import load_adapter
    from asymflow.cli import main as asymflow
    from asymflow.cli.common import default_device
    from asymflow.color import oklab_to_rgb
    from asymflow.data.encoded import EncodedShards
    from asymflow.data.encoders import decode_latents, encode_image, encode_prompts
    from asymflow.data.sample import Sample
    from asymflow.data.shapes import Shapes
    from asymflow.errors import InputError
    from asymflow.evaluation.oracle import detail, score
    from asymflow.flow_matching import flow_matching_loss, noise_level, noisy
    from asymflow.model import AsymFlow
    from asymflow.patches import patchify, unpatchify
    from asymflow.pictures import image_grid
    from asymflow.pixels import tensor_to_pil
    from asymflow.sampling import guided, image_noise, sample, sigma_grid
    from asymflow.subspace import Subspace
    from asymflow.training.config.reading import load_config
    from asymflow.training.objectives.encoded_batches import EncodedBatches
    from asymflow.training.objectives.finetuning import Finetuned, make_finetuned, trained
    from asymflow.training.objectives.latent_to_pixel import LatentToPixel
    from toy.common import main
    from toy.tiny_flux2 import TEXT_LENGTH, make_base, normalize_latents

HERE = Path(__file__).resolve().parent
SIZE, PATCH = 32, 8  # pixels; 4 x 4 tokens of D = 192
VALIDATION = 2**32 + 1  # seed of scenes that no training draws
GUIDANCE, STEPS = 2.0, 25
# Oklab is normalized around a middle grey, as photographs are on average. Shapes on white paper are far from that: the
# mean of their patches would be 93 % of what the subspace has to hold. At half the brightness they are near it.
BRIGHTNESS = 0.5
MODELS = ("latent", "start", "pixel", "scratch")
# Models of latents, and their folders; "lifted": the same latents as of "latent", by the basis and not decoded.
LATENT = {"latent": "pixel-base", "latent-finetuned": "latent-finetuned", "lifted": "pixel-base"}
# All weights are trained: LoRA layers of a transformer as narrow as this one learn less than training from scratch.
EVERYTHING = {"finetune.lora": "null"}
FROM_NOTHING = {**EVERYTHING, "loss.variance_reduction": "null", "optimizer.multipliers.proj_out": 1.0}
TRAININGS = {"pixel": EVERYTHING, "scratch": FROM_NOTHING}
FULL = dict(pictures=6000, autoencoder=2000, latent=4500, asked=512, draws=200)
QUICK = dict(pictures=64, autoencoder=20, latent=20, asked=16, draws=4)
# As in FLUX.2, the autoencoder is small beside the transformer, here 60,000 weights beside 3 million, and that is not
# narrower than a token: so it is the autoencoder that details are lost to.
TINY = dict(latent_channels=4, vae_channels=(8, 16, 16), width=192, heads=6, depth=(1, 3))


def experiment(args) -> tuple[Figure, dict]:
    sizes = QUICK if args.quick else FULL
    common = prepared(args.out, args.seed, args.steps, sizes)
    variance = variance_ratio(args.out, common, sizes["draws"])
    train({args.out / k: {**common, "finetune.base": base_of(args.out, k), **TRAININGS[k]} for k in TRAININGS})
    drawn, captions = drawings(args.out, args.seed, sizes["asked"], MODELS)
    results = {name: {**score(images, captions), **detail(images)} for name, images in drawn.items()}
    print_table(results)
    print(f"\nvariance of the gradient at the start, plain / reduced: {variance['ratio']:.2f}")
    found = {"device": default_device(), "scale": Subspace.load(args.out / "subspace.safetensors").scale}
    return figure(drawn, results), found | {"gradient_variance": variance, "models": results}


def prepared(out: Path, seed: int, steps: int, sizes: dict) -> dict:
    """Make all that the trainings of a folder need, and return their settings, for so many steps."""
    begin(out, {"seed": seed, "steps": steps, "brightness": BRIGHTNESS, **sizes})
    base, pictures, shards, subspace = (out / name for name in ("autoencoder", "pictures", "shards", "subspace"))
    subspace = subspace.with_suffix(".safetensors")
    once(base, lambda beside: autoencoder(beside, seed, sizes))
    once(pictures, lambda beside: write_pictures(beside, sizes["pictures"], seed))
    encode = ["--size", SIZE, "--max-length", TEXT_LENGTH, "--dtype", "float32", "--batch", 32]
    if not (out / "pixel-base").exists():  # then the shards are there, too
        run("data", "encode", "--base", base, "--data", pictures, "--out", shards, *encode)
    once(out / "pixel-base", lambda beside: latent_model(base, beside, shards, seed, sizes["latent"]))
    once(out / "scratch-base", lambda beside: untrained(out / "pixel-base", beside, seed))
    if not subspace.exists():
        run("subspace", "procrustes", "--shards", shards, "--out", subspace)
    common = {"finetune.subspace": subspace, "data.path": shards, "train.steps": steps, "train.seed": seed}
    return common | {"loss.sigma_shift": round(Subspace.load(subspace).scale, 3), "sample.every": "null"}


def base_of(out: Path, model: str) -> Path:
    """The folder of what a model was finetuned from."""
    return out / ("scratch-base" if model == "scratch" else "pixel-base")


def dimmed(sample: Sample) -> Sample:
    return sample._replace(image=(sample.image * BRIGHTNESS).round().to(torch.uint8))


def brightened(images: Tensor) -> Tensor:
    """As the oracle knows them: images (n, 3, H, W) in [-1, 1], at full brightness."""
    return ((images + 1) / BRIGHTNESS - 1).clamp(-1, 1)


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """As a user has them: images, and beside each its caption."""
    folder.mkdir()
    pictures = Shapes(count, SIZE, seed)
    for i in trange(count, desc="pictures", unit="image", leave=False):
        sample = dimmed(pictures[i])
        tensor_to_pil(to_float(sample.image)).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(sample.caption)


# ---- The latent model ------------------------------------------------------------------------------------------------
def autoencoder(folder: Path, seed: int, sizes: dict) -> None:
    """A base whose autoencoder is trained; its transformer is not, yet.

    With it a linear decoder is trained that nobody needs later. Latents that it can read are near to linear in the
    pixels, as one knows it of those of large autoencoders; those of a small one need not be.
    """
    pictures = Shapes(sizes["pictures"], SIZE, seed)
    samples = [dimmed(pictures[i]) for i in range(len(pictures))]
    images = torch.stack([sample.image for sample in samples])
    base = make_base([sample.caption for sample in samples], seed, **TINY)
    vae, draws = base.vae.train(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    linear = torch.nn.ConvTranspose2d(TINY["latent_channels"], 3, PATCH // 2, PATCH // 2)
    weights = [*vae.parameters(), *linear.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    bar = trange(sizes["autoencoder"], desc="autoencoder", unit="step", leave=False)
    for step in bar:
        anneal(optimizer, 3e-3, step, len(bar))
        x0 = to_float(images[torch.randint(len(images), (16,), generator=draws)])
        posterior = vae.encode(x0).latent_dist
        z = posterior.sample(draws)
        difference = vae.decode(z).sample - x0
        loss = difference.square().mean() + 0.1 * difference.abs().mean() + 2e-7 * posterior.kl().mean()
        optimize(optimizer, loss + (linear(z) - x0).square().mean())
        bar.set_postfix(rms=f"{127.5 * difference.square().mean().sqrt():.1f} grey levels", refresh=False)
    normalize_latents(vae.eval(), to_float(images[:1024]))
    base.save_pretrained(folder)


def latent_model(base: Path, folder: Path, shards: Path, seed: int, steps: int) -> None:
    """A base whose transformer is trained on the latents: its exponential average."""
    pipeline = Flux2KleinPipeline.from_pretrained(base, local_files_only=True)
    data, draws = EncodedShards(shards), torch.Generator().manual_seed(seed)
    samples = [data[i] for i in range(len(data))]
    latents, prompts = torch.stack([s.latent for s in samples]), torch.stack([s.prompt for s in samples])
    flow = latent_flow(pipeline.transformer.train())
    average = {name: p.detach().clone() for name, p in flow.named_parameters()}
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    bar = trange(steps, desc="latent model", unit="step", leave=False)
    for step in bar:
        anneal(optimizer, 2e-3, step, steps)
        chosen = torch.randint(len(latents), (32,), generator=draws)
        x0, text = latents[chosen], prompts[chosen].clone()
        text[torch.rand(len(text), generator=draws) < 0.1] = data.empty_prompt
        sigma = noise_level(torch.randn(len(x0), generator=draws), 0.0, 1.0)
        eps = torch.randn(x0.shape, generator=draws)
        loss = flow_matching_loss(flow(noisy(x0, eps, sigma), sigma, encoder_hidden_states=text), x0, eps, sigma).mean()
        optimize(optimizer, loss)
        decay = min(0.998, (step + 1) / (step + 10))
        for name, p in flow.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    flow.load_state_dict(average, strict=False)
    with_transformer(base, pipeline.transformer, folder)


def untrained(base: Path, folder: Path, seed: int) -> None:
    """The same base with random weights in its transformer: to train from scratch what is otherwise finetuned."""
    config = Flux2Transformer2DModel.load_config(base / "transformer")
    torch.manual_seed(seed)
    with_transformer(base, Flux2Transformer2DModel.from_config(config), folder)


def with_transformer(base: Path, transformer: Flux2Transformer2DModel, folder: Path) -> None:
    """A copy of the base with another transformer."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer.save_pretrained(folder / "transformer")


# ---- The variance of the gradient ------------------------------------------------------------------------------------
class Moments(NamedTuple):
    """mean: (parameters,). variance: the trace of the covariance."""

    mean: Tensor
    variance: float


def gradient_moments(model: Finetuned, objective: LatentToPixel, batches: EncodedBatches, draws: int) -> Moments:
    """Of the gradient of a micro-batch, for the weights that are trained, over the first `draws` of them."""
    total, squares = 0.0, 0.0
    for k in trange(draws, desc="gradients", unit="batch", leave=False):
        losses = objective.losses(model.train(), batches[k])[:, 0]
        gradients = torch.autograd.grad(losses.mean(), trained(model))
        gradient = torch.cat([g.flatten() for g in gradients]).double()
        total, squares = total + gradient, squares + gradient.square().sum().item()
    mean = total / draws
    return Moments(mean, (squares - draws * mean.square().sum().item()) / (draws - 1))


def variance_ratio(out: Path, settings: dict, draws: int, weights: str = "start") -> dict:
    """Of the gradient for the weights of a model, plain to variance-reduced, in micro-batches of the same images."""
    data, moments = EncodedShards(settings["data.path"]), {}
    for name, shift in (("plain", "null"), ("reduced", 0.3)):
        given = {**settings, **EVERYTHING, "finetune.base": out / "pixel-base", "loss.variance_reduction": shift}
        config = load_config("asymflux2_tiny", [f"{key}={value}" for key, value in given.items()])
        torch.manual_seed(config.train.seed)
        model = make_finetuned(config, Subspace.load(settings["finetune.subspace"]))
        if weights != "start":
            model.load_state_dict(model.state_dict() | loaded(out, weights).state_dict())
        objective = LatentToPixel(config, data)
        moments[name] = gradient_moments(model, objective, EncodedBatches(data, config, 0, 1), draws)
    plain, reduced = moments["plain"], moments["reduced"]
    cosine = torch.nn.functional.cosine_similarity(plain.mean, reduced.mean, dim=0).item()
    ratio = plain.variance / reduced.variance
    return {"ratio": ratio, "cosine_of_means": cosine, "plain": plain.variance, "draws": draws}


# ---- What they draw --------------------------------------------------------------------------------------------------
@torch.no_grad()
def drawings(out: Path, seed: int, asked: int, models: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """What models draw from the same noise, (asked, 3, H, W) at full brightness, and their captions.

    With them the pictures of these captions, "data", and what the autoencoder makes of those, "autoencoder".
    """
    pictures = Shapes(asked, SIZE, VALIDATION)
    samples = [dimmed(pictures[i]) for i in range(asked)]
    truth = torch.stack([to_float(sample.image) for sample in samples])
    captions = [sample.caption for sample in samples]
    base = Flux2KleinPipeline.from_pretrained(out / "pixel-base", local_files_only=True)
    text, empty = (encode_prompts(base, words, TEXT_LENGTH) for words in (captions, [""]))
    subspace = Subspace.load(out / "subspace.safetensors")
    drawn = {"data": truth, "autoencoder": decode_latents(base.vae, encoded(base.vae, truth))}
    noise = image_noise(seed, range(asked), (3, SIZE, SIZE))
    for model in models:
        draw = of_latents if model in LATENT else of_pixels
        drawn[model] = draw(model, loaded(out, model), base.vae, subspace, noise, text, empty)
    return {name: brightened(images) for name, images in drawn.items()}, captions


def loaded(out: Path, model: str) -> AsymFlow | Flux2Transformer2DModel:
    """The transformer of latents, for `LATENT` and "start"; the finetuned pixel model otherwise."""
    folder = out / LATENT[model] if model in LATENT else base_of(out, model)
    transformer = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    if model in LATENT or model == "start":
        return transformer
    adapter = out / f"{model}-adapter"
    once(adapter, lambda beside: run("export", "--run", out / model, "--out", beside))
    return load_adapter(transformer, adapter)


def of_latents(model, transformer, vae, subspace: Subspace, noise: Tensor, text: Tensor, empty: Tensor) -> Tensor:
    """With the part of the noise that lies inside of the subspace, at uniform noise levels."""
    grid = [SIZE // subspace.patch_size] * 2
    tokens = patchify(noise, subspace.patch_size, subspace.token_order) @ subspace.basis.float()
    flow = latent_flow(transformer).eval()
    latents = [
        sample(velocity, part, sigma_grid(STEPS), "euler")
        for velocity, part in parts(model, flow, unpatchify(tokens, grid, 1), text, empty)
    ]
    if model == "lifted":
        tokens = patchify(torch.cat(latents), 1) @ (subspace.scale * subspace.basis).float().mT
        return oklab_to_rgb(unpatchify(tokens, grid, subspace.patch_size, subspace.token_order)).clamp(-1, 1)
    return torch.cat([decode_latents(vae, part) for part in latents])


def of_pixels(model, transformer, vae, subspace: Subspace, noise: Tensor, text: Tensor, empty: Tensor) -> Tensor:
    """At the noise levels at which the latent model inside is at uniform ones."""
    flow = transformer if isinstance(transformer, AsymFlow) else latent_to_pixel(transformer, subspace, PATCH).eval()
    levels = sigma_grid(STEPS, shift=subspace.scale)
    images = [sample(velocity, part, levels, "euler") for velocity, part in parts(model, flow, noise, text, empty)]
    return oklab_to_rgb(torch.cat(images)).clamp(-1, 1)


def parts(model: str, flow: AsymFlow, noise: Tensor, text: Tensor, empty: Tensor, size: int = 64):
    """Guided velocities and the noise for `size` captions at a time, with a bar. The same plain guidance for all."""
    for start in trange(0, len(noise), size, desc=f"drawing, {model}", unit="batch", leave=False):
        words = {"encoder_hidden_states": text[start : start + size]}
        nothing = {"encoder_hidden_states": empty.expand_as(words["encoder_hidden_states"])}
        yield guided(flow, words, nothing, GUIDANCE), noise[start : start + size]


def encoded(vae, images: Tensor) -> Tensor:
    return torch.cat([encode_image(vae, part) for part in images.split(64)])


def print_table(results: dict) -> None:
    columns = list(next(iter(results.values())))
    print("\n" + "".join(f"{name:>12}" for name in ("", *columns)))
    for name, values in results.items():
        print(f"{name:>12}" + "".join(f"{values[column]:12.3f}" for column in columns))


def figure(drawn: dict[str, Tensor], results: dict, columns: int = 8) -> Figure:
    picture = Figure(figsize=(8, 1.12 * len(drawn) + 0.4), layout="constrained")
    for axis, (name, images) in zip(picture.subplots(len(drawn)), drawn.items(), strict=True):
        axis.imshow(image_grid(images[:columns], columns=columns), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"{name}\n{results[name]['all']:.0%} right\nsharp {results[name]['sharpness']:.2f}", fontsize=7)
    return picture


# ---- Small things ----------------------------------------------------------------------------------------------------
def begin(out: Path, settings: dict) -> None:
    """Write the settings to a new folder, or check that what is there was made with the same."""
    path = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (known := json.loads(path.read_text())) != settings:
        raise InputError(f"{out} was made with other settings ({known}): choose another --out")
    path.write_text(json.dumps(settings))


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder, if it is not there: under another name until it is whole."""
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(beside, ignore_errors=True)
        make(beside)
        beside.rename(folder)


def run(*words) -> None:
    """Run a command of `asymflow`, and say so: what it prints is as if the user had given it."""
    words = [str(word) for word in words]
    print("\n$", shlex.join(["asymflow", *words]), flush=True)
    if asymflow(words):
        raise InputError(f"asymflow {words[0]} failed")


def train(settings: dict[Path, dict]) -> None:
    """By train_ddp.py, in a process for each folder, at the same time; where they were stopped, they go on.

    What the first says is seen; what the others say is in FOLDER.log.
    """
    processes, threads = {}, max(1, torch.get_num_threads() // len(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for out, values in settings.items():
        words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, HERE.parent / "train_ddp.py", "--config", "asymflux2_tiny", "--out", out, *words]
        with out.with_suffix(".log").open("a") as log:
            hidden = dict(stdout=log, stderr=log) if processes else {}
            processes[out] = subprocess.Popen([*map(str, command)], env=environment, **hidden)
    codes = {out: process.wait() for out, process in processes.items()}
    if failed := [str(out) for out, code in codes.items() if code]:
        raise InputError(f"the training in {' and in '.join(failed)} failed")


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def anneal(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Warm-up, then half a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


if __name__ == "__main__":
    sys.exit(main("asymflux2_tiny", experiment, __doc__, steps=4000, quick_steps=10, devices=False))
