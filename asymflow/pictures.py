"""Pictures for people: images side by side, and what a subspace looks like."""

import math
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from asymflow import files
from asymflow.color import oklab_to_rgb
from asymflow.errors import InputError
from asymflow.patches import CHANNEL_LAST, unpatchify
from asymflow.pixels import tensor_to_pil
from asymflow.subspace import Subspace

SHOWN = 64  # at most so many patches are drawn: more would be too small to see
GRID_WIDTH = 512  # of a grid for people, at least: images of 32 pixels would be too small to see
GAP = 2  # pixels between the images of a grid
INK, ACCENT = "0.25", "#d1495b"


def image_grid(images: Tensor, columns: int | None = None, gap: int = GAP, width: int = 0) -> Image.Image:
    """One image with all of the images (n, 3, H, W) in [-1, 1], row by row, with white gaps of `gap` pixels.

    columns: None makes the grid about square. width: at least so many pixels wide is the grid; for this, the pixels of
    small images are repeated, each as often. Raises InputError if the shape is another or n is 0.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InputError(f"images must be (n, 3, H, W) with n at least 1, but they are {tuple(images.shape)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    times = max(math.ceil(((width + gap) / columns - gap) / images.shape[3]), 1)
    high, wide = times * images.shape[2] + gap, times * images.shape[3] + gap
    grid = Image.new("RGB", (columns * wide - gap, rows * high - gap), "white")
    for i, image in enumerate(images):
        small = tensor_to_pil(image)
        large = small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)
        grid.paste(large, (i % columns * wide, i // columns * high))
    return grid


def draw_subspace(subspace: Subspace, file: str | Path) -> None:
    """Write a PNG: the basis vectors as patches and, if the subspace has a spectrum, the energy along its directions.

    Each patch has its own scale; grey is 0, in an Oklab subspace the mean colour. At most 64 are drawn. Without a
    `token_order`, channel_last is assumed, as `AsymFlow` does. Raises InputError if the subspace has no patch size.
    """
    patches = basis_patches(subspace, SHOWN)
    if subspace.spectrum is None:
        picture = Figure(figsize=(5.2, 5.6), dpi=110, layout="constrained")
        left = picture.subplots()
    else:
        picture = Figure(figsize=(9.8, 5.6), dpi=110, layout="constrained")
        panels = picture.subplot_mosaic([["left", "above"], ["left", "below"]], width_ratios=(1.1, 1))
        left = panels["left"]
        draw_spectrum(subspace, panels["above"], panels["below"])
    left.set_axis_off()
    shown = f"{len(patches)} of {subspace.rank}" if subspace.rank > SHOWN else subspace.rank
    left.set_title(f"{shown} direction{'s' * (subspace.rank != 1)}", fontsize=10, color=INK)
    if len(patches):
        left.imshow(image_grid(magnified(patches), gap=6), interpolation="antialiased")
    picture.suptitle(headline(subspace), fontsize=10, color=INK)
    with files.replacing(file) as beside:
        picture.savefig(beside, format="png")


def basis_patches(subspace: Subspace, count: int) -> Tensor:
    """The first `count` basis vectors as patches (n, 3, p, p) in [-1, 1], each scaled to its own range.

    Of more than three channels the first three are shown as red, green and blue; of fewer, the first as grey.
    """
    if subspace.patch_size is None:
        raise InputError("a subspace without a patch size cannot be drawn: nothing says how its vectors become patches")
    vectors = subspace.basis[:, :count].detach().float().cpu().mT[:, None]
    patches = unpatchify(vectors, (1, 1), subspace.patch_size, subspace.token_order or CHANNEL_LAST)
    if subspace.color_space == "oklab" and patches.shape[1] == 3:
        # Show the direction as colours around the mean colour (0), scaled to about the range of a screen: white is 2.75
        # above the mean in lightness, and at the mean's lightness every hue can be shown up to 0.6.
        reach = torch.tensor([2.5, 0.6, 0.6])[:, None, None]
        return oklab_to_rgb(patches / (patches / reach).abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12))
    patches = patches[:, :3] if patches.shape[1] >= 3 else patches[:, :1].expand(-1, 3, -1, -1)
    return patches / patches.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def magnified(patches: Tensor) -> Tensor:
    """Enlarge small patches, by repeating pixels, so that the gaps between them look thin at any patch size."""
    times = max(1, 96 // patches.shape[-1])
    return patches.repeat_interleave(times, -1).repeat_interleave(times, -2)


def draw_spectrum(subspace: Subspace, above, below) -> None:
    """Draw the share of energy along each principal direction, and below that the share of the first n together."""
    energy = subspace.spectrum.cpu().double()
    share = energy / energy.sum()
    together, number = share.cumsum(0), torch.arange(1, len(share) + 1)
    seen = share > 1e-12 * share.max()  # smaller values are rounding errors
    above.loglog(number[seen], share[seen], color=INK, linewidth=1.5)
    below.semilogx(number, together, color=INK, linewidth=1.5)
    above.set_title("energy along each direction", fontsize=10, color=INK)
    below.set_title("energy along the first directions together", fontsize=10, color=INK)
    below.set_xlabel("direction", fontsize=9, color=INK)
    lowest = below.get_ylim()[0]
    below.set_ylim(top=1 + 0.03 * (1 - lowest))  # so that a line at 1 is seen in full
    below.set_yticks([tick for tick in below.get_yticks() if lowest <= tick < 1 + 1e-9])
    if 1 <= subspace.rank <= len(share):
        for panel, values in ((above, share), (below, together)):
            panel.axvline(subspace.rank, color=ACCENT, linewidth=1, linestyle="--")
            (mark,) = panel.plot(subspace.rank, values[subspace.rank - 1], "o", color=ACCENT, markersize=5)
        mark.set_label(f"rank {subspace.rank}: {100 * together[subspace.rank - 1]:.1f} %")
        # The curve rises ever more slowly, and so leaves this corner free.
        below.legend(loc="lower right", fontsize=9, framealpha=1, edgecolor="white", labelcolor=ACCENT)
    for panel in (above, below):
        panel.grid(color="0.92", which="major")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=8)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.6g} %")


def headline(subspace: Subspace) -> str:
    facts = [
        f"rank {subspace.rank} of {subspace.dim}",
        f"patches of {subspace.patch_size} x {subspace.patch_size} pixels",
        subspace.color_space,
    ]
    lines = [", ".join(fact for fact in facts if fact), *textwrap.wrap(subspace.fitted_on or "", 80)]
    return "\n".join(lines)
