"""What came out of `asymflow compare`: a table, a figure, and the words that they need."""

import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from asymflow import files, opening
from asymflow.cli.common import default_device
from asymflow.cli.models import choose, model_of_run
from asymflow.cli.plot import read_journal
from asymflow.data.shards import TarShards
from asymflow.pictures import image_grid
from asymflow.text import count
from asymflow.training.config.reading import Config
from asymflow.training.evaluate import protocol_of, settings_of
from asymflow.training.loader import Batches
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.run import folder as run

DRAWS = 1024  # images with noise, for the held-out loss
FEATURES = {"inception-v3-compat": 2048, "vgg16": 4096, "dinov2": 1024, "classifier": 128}
FEW = 2000  # images, below which a network of this kind learns them by heart
TITLES = {"asymmetric": "asymmetric, rank {}", "x0": "x0-prediction", "u": "u-prediction"}
COLORS = {"asymmetric": "C0", "x0": "C1", "u": "C3"}


def report(out: Path, configs: dict[str, Config], left_out: list[str]) -> None:
    """Measure, print the table, and write compare.png and compare.json."""
    config = next(iter(configs.values()))
    images = TarShards(config.data.path, config.model.image_size)
    held_out = out / "images" / "held_out"
    unseen = TarShards(held_out, config.model.image_size) if held_out.exists() else None
    metrics, rows = {}, []
    for name, own in configs.items():
        metrics[name] = entries(out / name / run.METRICS)
        rows.append(
            {
                "run": name,
                "rank": own.subspace.rank,
                "training_loss": mean_of_last(metrics[name]),
                "held_out_loss": held_out_loss(out / name, own, unseen) if unseen else None,
                "frechet_distance": frechet(out / name, own),
                "seconds": sum(own.train.global_batch_size / entry["images_per_second"] for entry in metrics[name]),
            }
        )
    words = remarks(config, len(images), len(unseen or ()), left_out, rows)
    titles = {name: TITLES[name].format(config.subspace.rank) for name in configs}
    print("\n" + table_text(rows, titles))
    print("\n".join(words))
    grids = {"images": real_images(images, config.sample.num, config.model.num_classes)}
    grids |= {titles[name]: sample_grid(out / name, config.train.steps) for name in configs}
    with files.replacing(out / "compare.png") as beside:
        picture(grids, titles, metrics, rows, words).savefig(beside, dpi=110)
    record = opening.read_json(out / "compare.json")
    record |= {"results": rows, "remarks": words, "left_out": left_out, "images_trained_on": len(images)}
    record |= {"images_held_out": len(unseen or ()), "device": device_name(), "versions": versions()}
    with files.replacing(out / "compare.json") as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n", errors="backslashreplace")
    print(f"\nwrote {out / 'compare.png'} and {out / 'compare.json'}")


# ---- Measuring -------------------------------------------------------------------------------------------------------
def entries(path: Path) -> list[dict]:
    """The objects in a file of JSON lines. What cannot be read is said."""
    found, unreadable = read_journal(opening.existing_file(path))
    for remark in unreadable:
        print(remark, file=sys.stderr)
    return found


def mean_of_last(metrics: list[dict]) -> float | None:
    """The mean loss of the last tenth of the steps. None if all of these were skipped."""
    last = [entry["loss"] for entry in metrics[-max(1, len(metrics) // 10) :] if entry["loss"] is not None]
    return float(np.mean(last)) if last else None


@torch.no_grad()
def held_out_loss(folder: Path, config: Config, unseen: TarShards) -> float | None:
    """The loss of the first average on images that it was not trained on, always with the same noise.

    None if it is not finite.
    """
    flow = model_of_run(choose(folder, None, None), None).to(default_device())
    objective, batches = ClassConditional(config, flow), Batches(unseen, config, 0, 1)
    numbers = tqdm(
        range(math.ceil(DRAWS / batches.micro)), desc="held-out images", unit="batch", leave=False, disable=None
    )
    loss = torch.cat([objective.losses(flow, batches[k].to(default_device())) for k in numbers]).mean().item()
    return loss if math.isfinite(loss) else None


def frechet(folder: Path, config: Config) -> float | None:
    """Of the last step, if it was measured (evaluate.every) with the settings of `config`, in whatever precision."""
    asked = settings_of(config, protocol_of(config))
    found = [
        entry.get("frechet_distance")
        for entry in entries(folder / run.EVALUATIONS)
        if entry["step"] == config.train.steps
        and all(values.items() <= entry.get(name, {}).items() for name, values in asked.items())
    ]
    return found[-1] if found else None


# ---- Words -----------------------------------------------------------------------------------------------------------
def remarks(config: Config, images: int, unseen: int, left_out: list[str], rows: list[dict]) -> list[str]:
    """What a reader has to know to take the figure for what it is."""
    drawn = config.train.steps * config.train.global_batch_size
    seen = f"each of the {images:,} images was seen {drawn / images:,.1f} times"
    if drawn < images:
        seen = f"only {drawn:,} of the {images:,} images were seen"
    found = [
        f"{config.train.steps:,} steps of {config.train.global_batch_size} images: {seen}. The figure shows which "
        "prediction learns faster in so many steps, not which ends better.",
        "One seed: a difference means something only if --seed 1 and --seed 2, each in its own --out, show it too.",
    ]
    if images < FEW:
        found.append(
            f"{images:,} images can be learnt by heart: a low training loss, or samples like the images, prove little."
        )
    if not unseen:
        found.append("Too few images to hold any out.")
    elif unseen < 100:
        found.append(f"Held out: only {count(unseen, 'image')}, so the held-out loss is rough.")
    if left_out:
        found.append(f"Left out, because unreadable: {count(len(left_out), 'image')}.")
    return [*found, frechet_words(config, images, rows)]


def frechet_words(config: Config, images: int, rows: list[dict]) -> str:
    c = protocol_of(config)
    features = FEATURES.get(c.extractor, 2048)
    than = f"are fewer than the {features:,} features of {c.extractor}"
    if any(row["frechet_distance"] is not None for row in rows):
        few = [f"{n:,} {what}" for n, what in ((c.num, "samples"), (images, "images")) if n < features]
        less = f": {few[0]} {than}, so it says nothing" if few else ""
        return f"Fréchet distance of {c.num:,} samples from the images, by {c.extractor}{less}."
    if images < features:
        return f"The Fréchet distance is not measured, because it would say nothing: {images:,} images {than}."
    return f"The Fréchet distance is not measured; --set evaluate.every={config.train.steps} does it, in another --out."


def table_of(rows: list[dict], titles: dict[str, str]) -> list[list[str]]:
    number = lambda value, form: "-" if value is None else format(value, form)
    head = ["", "training loss", "held-out loss", "Fréchet distance", "seconds"]
    return [head] + [
        [titles[row["run"]]]
        + [number(row[key], ".4f") for key in ("training_loss", "held_out_loss")]
        + [number(row["frechet_distance"], ".4g"), number(row["seconds"], ",.0f")]
        for row in rows
    ]


def table_text(rows: list[dict], titles: dict[str, str]) -> str:
    cells = table_of(rows, titles)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


# ---- The figure ------------------------------------------------------------------------------------------------------
def real_images(images: TarShards, count: int, classes: int) -> np.ndarray:
    """A grid of images, of the same classes as the samples: 0, 1, ... in turn. White, if a class has no image."""
    chosen = []
    for i in range(count):
        members = np.flatnonzero(images.labels == i % classes)
        found = images[int(members[i // classes % len(members)])].image if len(members) else None
        chosen.append(torch.full((3, images.size, images.size), 255) if found is None else found)
    return np.asarray(image_grid(as_floats(torch.stack(chosen))))


def as_floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def sample_grid(folder: Path, step: int) -> np.ndarray:
    """The samples that the training drew at its end, always of the same classes from the same noise."""
    from asymflow.entries import Entry
    from asymflow.pixels import read_image

    return np.asarray(read_image(Entry(str(folder / run.SAMPLES / f"{step:08d}.png"))))


def smooth(metrics: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, the mean loss of the last 2 % of the steps at each)."""
    taken = [entry for entry in metrics if entry["loss"] is not None]
    window = max(1, len(taken) // 50)
    losses = np.convolve([entry["loss"] for entry in taken], np.ones(window) / window, "valid")
    return np.array([entry["step"] for entry in taken[window - 1 :]]), losses


def picture(
    grids: dict[str, np.ndarray],
    titles: dict[str, str],
    metrics: dict[str, list[dict]],
    rows: list[dict],
    words: list[str],
) -> Figure:
    figure = Figure(figsize=(3.4 * len(grids), 8.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    for axis, (title, grid) in zip(above.subplots(1, len(grids)), grids.items(), strict=True):
        axis.imshow(grid)
        axis.set_title(title)
        axis.set_axis_off()
    loss, text = below.subplots(1, 2)
    for name, title in titles.items():
        loss.plot(*smooth(metrics[name]), color=COLORS[name], label=title)
    loss.set(
        yscale="log", xlabel="step", title="training loss: flow matching of the velocity (mean of 2 % of the steps)"
    )
    loss.legend()
    text.set_axis_off()
    cells = table_of(rows, titles)
    table = text.table(
        cells[1:], colLabels=cells[0], bbox=(0, 0.62, 1, 0.38), edges="horizontal", colWidths=[6, 4, 4, 4, 3]
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    text.text(0, 0.55, "\n".join(words), va="top", fontsize=9, wrap=True)
    return figure


# ---- Where it was made -----------------------------------------------------------------------------------------------
def device_name() -> str:
    cuda = default_device() == "cuda"
    return torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")}
