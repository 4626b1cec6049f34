"""How far can the oracle of the generated pictures be trusted: clean ones by size, and with noise and with blur?

    python -m toy.shapes_oracle            # minutes
    python -m toy.shapes_oracle --quick    # seconds: a look at the code path, not a result

Setup. Nothing is trained. `asymflow/evaluation/oracle.py` reads from pixels alone what is in a picture of coloured
shapes, and so tells how often a text-to-image model drew what its caption says (`toy/asymflux2_tiny.py`). Here it reads
pictures whose captions are known, and everything that it gets wrong is its own mistake: clean ones of several sizes,
then those of 64 x 64 pixels with more and more noise, or blur.

    count ... all    % of the pictures read as what was drawn
    sharpness        how steep edges are, against ideal ones: noise should leave it 1, blur should not
    residual         rms grey levels between the picture and the ideal one closest to it
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from asymflow.packages import importing

with importing(__name__):
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from asymflow.data.shapes import Scene, make_scene, render
    from asymflow.evaluation.oracle import PARTS, blurred, detail, score
    from toy.common import main

SIZE = 64  # pixels, of the pictures with noise and with blur
SIZES = (24, 32, 48, 64, 96, 128)
NOISES = (0, 5, 10, 20, 40, 60, 80, 100, 150)  # standard deviations in grey levels
BLURS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)  # of the Gaussian, in pixels
FIRST_SEED = 2**40  # of scenes that no training draws, unless its seed is this one
MEASURED = 25  # of the pictures, for sharpness and residual: they take longer than a reading
COLUMNS = (*PARTS, "sharpness", "residual")


def experiment(args: argparse.Namespace) -> tuple[Figure, dict]:
    count, sizes, every = (2, SIZES[:2], 4) if args.quick else (100, SIZES, 1)
    scenes = [make_scene(FIRST_SEED + args.seed, index) for index in range(count)]
    pictures = [render(scene, SIZE) for scene in scenes]
    print(f"{count} pictures at each level, seed {args.seed}; {', '.join(PARTS)}: % right")
    clean = table("clean: size, pixels", sizes, lambda size: [render(scene, size) for scene in scenes], scenes)
    noise = table("noise, grey levels", NOISES[::every], lambda level: with_noise(pictures, level), scenes)
    blur = table("blur, pixels", BLURS[::every], lambda radius: with_blur(pictures, radius), scenes)
    results = {"pictures": count, "size": SIZE, "clean": clean, "noise": noise, "blur": blur}
    return draw(pictures[:1], noise, blur), results


def with_noise(pictures: list[Tensor], deviation: float) -> list[Tensor]:
    """Independent normal noise in each pixel and channel: at each level the same draw, scaled."""
    normal = lambda index: torch.randn(pictures[index].shape, generator=torch.Generator().manual_seed(index))
    return [to_uint8(picture + deviation * normal(index)) for index, picture in enumerate(pictures)]


def with_blur(pictures: list[Tensor], radius: float) -> list[Tensor]:
    return [to_uint8(blurred(picture.float(), radius)) for picture in pictures]


def to_uint8(picture: Tensor) -> Tensor:
    """Clipped and rounded, as an image is."""
    return picture.clamp(0, 255).round().to(torch.uint8)


def table(title: str, levels: Sequence[float], make: Callable, scenes: list[Scene]) -> list[dict]:
    """Score and detail of `make(level)`, the pictures of the scenes at each level, printed as they come."""
    print(f"\n{title:>19}" + "".join(f"{name:>11}" for name in COLUMNS))
    rows = []
    for level in levels:
        pictures = make(level)
        row = {"level": level, **score(pictures, scenes), **detail(pictures[:MEASURED])}
        shown = [f"{100 * row[name]:11.1f}" if name in PARTS else f"{row[name]:11.2f}" for name in COLUMNS]
        print(f"{level:19g}" + "".join(shown), flush=True)
        rows.append(row)
    return rows


def draw(example: list[Tensor], noise: list[dict], blur: list[dict]) -> Figure:
    """What is read, and how sharp the edges are found, at each level; above, one picture at some of them."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    examples, panels = above.subplots(1, 10), below.subplots(1, 2, sharey=True)
    damages = ((NOISES, with_noise), (BLURS, with_blur))
    shown = [(level, *damage(example, level)) for levels, damage in damages for level in levels[::2]]
    for axis, (level, picture) in zip(examples, shown, strict=True):
        axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(f"{level:g}", fontsize=9, color="0.25")
        axis.set_axis_off()
    titles = ("pixel noise: standard deviation, in grey levels", "blur: standard deviation, in pixels")
    for axis, title, rows in zip(panels, titles, (noise, blur), strict=True):
        levels = [row["level"] for row in rows]
        for part in PARTS:
            label, width = ("all four", 2.5) if part == "all" else (part, 1.3)
            percent = [100 * row[part] for row in rows]
            axis.plot(levels, percent, linewidth=width, marker="o", markersize=3, label=label)
        sharpness = [100 * row["sharpness"] for row in rows]
        axis.plot(levels, sharpness, "--", color="0.4", label="sharpness of edges")
        axis.set_xlabel(title, fontsize=9, color="0.25")
        axis.set_ylim(0, 103)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors="0.25", labelsize=8)
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g} %")
    panels[0].legend(loc="lower left", fontsize=9, frameon=False)
    panels[0].set_title(f"pictures of {SIZE} x {SIZE}: read as what was drawn", fontsize=10, color="0.25", loc="left")
    return figure


if __name__ == "__main__":
    sys.exit(main("shapes_oracle", experiment, __doc__, devices=False))
