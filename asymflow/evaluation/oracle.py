"""What is in a generated picture, read back from its pixels, exactly: the oracle of `asymflow.data.shapes`.

Captions can be checked without any network, because the world is small: each shape lies within its own cell of a 3 x 3
grid. In each cell `read_scene` looks for the shape, colour, place and radius that leave the least squared error, or for
nothing. Then it looks at what they leave: where a patch of a cell is still far from the pixels (a shape half drawn, two
colours in one, a strong ghost), the cell shows something, but nothing of this world.

    read_scene(image).caption                  # "two red circles: top left, middle center", or None
    score(images, captions)                    # the share that is right: count, color, shape, position, all
    detail(images)                             # sharpness (1 is ideal), blur (pixels), residual (grey levels)

How well it reads clean pictures, and how that declines with noise and with blur: `python -m toy.shapes_oracle`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from asymflow.data.shapes import COLORS, COLUMNS, COUNTS, ROWS, SHAPES, SUPERSAMPLING, Scene, inside, points_in_pixels
from asymflow.errors import InputError

PARTS = ("count", "color", "shape", "position", "all")
SMALLEST = 24  # pixels: below, a circle and a square are too much alike
GROUNDS = (200, 255)  # grey levels that pass for the ground, which is drawn from 225 to 255
FAULT = 75  # distance in RGB that a patch may be off; red and orange, the closest two, are 119 apart
PATCH = 1 / 16  # side of that patch, in units of the picture's: a quarter of a shape
# The most blur that is taken for soft edges, in the same units: a small shape and more blur would pass for a ghost.
SOFTEST = 1 / 32


class Thing(NamedTuple):
    """What a cell shows: indices into SHAPES and COLORS, each None if it is nothing of this world."""

    shape: int | None
    color: int | None


@dataclass(frozen=True)
class Reading:
    """What is in a picture, or what a caption wants to be there. shown: for each of the nine cells, None if empty."""

    shown: tuple[Thing | None, ...]

    @property
    def cells(self) -> tuple[int, ...]:
        """Those that are not empty, in order."""
        return tuple(cell for cell, thing in enumerate(self.shown) if thing)

    @property
    def count(self) -> int:
        return len(self.cells)

    @property
    def shape(self) -> int | None:
        """The one of all things, or None: there are several, or none, or one of them is of no shape."""
        return common([thing.shape for thing in self.shown if thing])

    @property
    def color(self) -> int | None:
        """The one of all things, or None: there are several, or none, or one of them is of no colour."""
        return common([thing.color for thing in self.shown if thing])

    @property
    def caption(self) -> str | None:
        """As `Scene.caption`; None if no scene has it."""
        if self.shape is None or self.color is None or self.count > len(COUNTS):
            return None
        return Scene(self.shape, self.color, self.cells, centers=(), radii=(), ground=0).caption


def common(values: list[int | None]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def parse_caption(caption: str) -> Reading:
    """What a caption wants to be shown: `parse_caption(text).caption == text`.

    Raises InputError for any text that is not, to the letter, the caption of some scene.
    """
    kinds, places = "|".join(SHAPES), "|".join(f"{row} {column}" for row, column in product(ROWS, COLUMNS))
    pattern = f"({'|'.join(COUNTS)}) ({'|'.join(COLORS)}) ({kinds})(?:s|es)?: ((?:{places})(?:, (?:{places}))*)"
    if match := re.fullmatch(pattern, caption):
        thing = Thing(SHAPES.index(match[3]), list(COLORS).index(match[2]))
        named = {3 * ROWS.index(row) + COLUMNS.index(column) for row, column in map(str.split, match[4].split(", "))}
        wanted = Reading(tuple(thing if cell in named else None for cell in range(9)))
        if wanted.caption == caption:  # as many places as it counts, in order, each once; plural or singular
            return wanted
    raise InputError(
        f"{caption!r} is not the caption of a scene, such as 'two red circles: top left, middle center': a count to "
        f"{COUNTS[-1]}, one of {', '.join(COLORS)}, one of {', '.join(SHAPES)}, and as many places, row by row"
    )


def agreement(reading: Reading, wanted: str | Scene) -> dict[str, bool]:
    """Which PARTS of a reading are as `wanted`: a caption, or the scene that has it. Raises InputError.

    color, shape: of all things in the picture, none of them of another or of no colour or shape. position: the cells
    that are not empty (so that the count is right, too). all: the four together.
    """
    goal = parse_caption(wanted.caption if isinstance(wanted, Scene) else wanted)
    right = {
        "count": reading.count == goal.count,
        "color": reading.color == goal.color,
        "shape": reading.shape == goal.shape,
        "position": reading.cells == goal.cells,
    }
    return {**right, "all": all(right.values())}


def score(images: Iterable[Tensor], captions: Sequence[str | Scene]) -> dict[str, float]:
    """The share of images in which each of the PARTS is as the caption wants it.

    images: (n, 3, size, size), or n of (3, size, size), as `read_scene` takes them. Raises InputError if there are
    none, or not as many captions.
    """
    readings = [read_scene(image) for image in images]
    if len(readings) != len(captions) or not readings:
        raise InputError(
            f"{len(readings)} images and {len(captions)} captions: give one caption for each, at least one"
        )
    results = [agreement(*pair) for pair in zip(readings, captions, strict=True)]
    return {part: sum(result[part] for result in results) / len(results) for part in PARTS}


# ---- Reading ---------------------------------------------------------------------------------------------------------
def read_scene(image: Tensor) -> Reading:
    """What is in a picture.

    image: (3, size, size), uint8, or any floating dtype in [-1, 1]: what is beyond is clamped, as when it is saved, and
    NaN is grey. Every image has a reading, whatever it shows: an empty cell, a thing of this world, or one without a
    known shape or colour. Raises InputError if shape or dtype is another, or size below 24.
    """
    return find_shapes(levels(image))[0]


def levels(image: Tensor) -> Tensor:
    """The grey levels of an image, (3, size, size) float32 in [0, 255] on the CPU."""
    size = image.shape[-1] if image.ndim else 0
    if image.shape != (3, size, size) or size < SMALLEST:
        raise InputError(
            f"an image must be (3, size, size), of {SMALLEST} pixels or more, but it is {tuple(image.shape)}"
        )
    if image.dtype == torch.uint8:
        return image.detach().cpu().float()
    if not image.is_floating_point():
        raise InputError(f"an image must be uint8, or floating point in [-1, 1], but it is {image.dtype}")
    return (image.detach().cpu().float().nan_to_num(0).clamp(-1, 1) + 1) * 127.5


class Fitted(NamedTuple):
    """A shape that was found. x, y, radius: in pixels, from the corner of its cell's window."""

    cell: int
    shape: int
    color: int
    x: float
    y: float
    radius: float


def find_shapes(picture: Tensor) -> tuple[Reading, float, list[Fitted]]:
    """The reading of a picture in grey levels, its ground, and the best fit in each cell that has a shape."""
    size = picture.shape[-1]
    box = max(3, round(size * PATCH))
    # Boxes average the noise before the median is taken. Most do not meet a shape: three of them, widened by a box,
    # cover a third of the picture at most.
    ground = avg_pool2d(picture, box, stride=1).median().clamp(*GROUNDS)
    contrasts = torch.tensor(list(COLORS.values())) - ground  # (4, 3)
    cut = windows(picture - ground)  # (9, 3, w, w)

    # Twice: first as if the picture were sharp, then with templates as soft as it turned out to be. Soft edges are a
    # matter of detail, not of what it is.
    parameters, templates = bank(size)
    blur = 0.0
    for _ in range(2):
        present, best, color = best_match(cut, contrasts, softened(size, round(blur * 128 / size)))
        explained = present[:, None] * templates[best]
        ideal = paste(torch.einsum("np,nc->ncp", explained, contrasts[color]).view_as(cut), size)
        blur = min(closest_blur(picture - ground, ideal), size * SOFTEST)
        if blur < size / 256:
            break

    error = picture - ground - blurred(ideal, blur)
    smooth = avg_pool2d(windows(error) * inner_pixels(size), box, stride=1).flatten(2)
    along = torch.einsum("ncp,nc->np", smooth, normalize(contrasts[color]))
    across = (smooth.square().sum(1) - along**2).clamp(min=0).sqrt()
    # What pixel noise of this size (from differences between neighbours, which are twice its variance) may do to a box.
    noise = (error.diff(dim=-1).square().mean() / 2).sqrt()
    limit = max(FAULT, 6 * noise.item() / box)

    shown, found = [], []
    for cell in range(9):
        if present[cell]:
            shape, x, y, radius = parameters[best[cell]].tolist()
            # Between ground and colour, pixels say where the shape is; off that line, that they are of another colour.
            in_shape, in_color = along[cell].abs().max() < limit, across[cell].max() < limit
            shown.append(Thing(int(shape) if in_shape else None, int(color[cell]) if in_color else None))
            if in_shape and in_color:
                found.append(Fitted(cell, int(shape), int(color[cell]), x, y, radius))
        else:
            shown.append(None if smooth[cell].norm(dim=0).max() < limit else Thing(None, None))
    return Reading(tuple(shown)), ground.item(), found


def best_match(cut: Tensor, contrasts: Tensor, templates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell: if anything explains it better than nothing, and which template, in which colour, does best.

    By how much template t in contrast v lessens the squared error of a cell d: 2 <t v, d> - |t v|^2.
    """
    energy = templates.square().sum(1)[:, None] * contrasts.square().sum(1)
    # By Cauchy and Schwarz, nothing is gained where |d| < |t v| / 2: most cells are empty, and need no search.
    present = cut.square().sum((1, 2, 3)) > energy.min() / 4
    colored = torch.einsum("kc,ncp->pnk", contrasts, cut[present].flatten(2))
    gain = 2 * (templates @ colored.flatten(1)).unflatten(1, (-1, len(contrasts))) - energy[:, None]
    gain, place = gain.transpose(1, 2).flatten(0, 1).max(0)
    best = torch.zeros_like(present, dtype=torch.long).masked_scatter(present, place)
    present = present.masked_scatter(present, gain > 0)
    return present, best // len(contrasts), best % len(contrasts)


def window_side(size: int) -> int:
    return math.ceil(size / 3)


def window_starts(size: int) -> list[int]:
    """Where the windows of the three rows, or columns, of cells begin: their middles are at most half a pixel off."""
    side = window_side(size)
    return [min(max(round(size * (cell + 0.5) / 3 - side / 2), 0), size - side) for cell in range(3)]


def windows(picture: Tensor) -> Tensor:
    """The nine cells of (C, size, size), whole pixels: (9, C, w, w), w = size / 3 rounded up."""
    starts, side = window_starts(picture.shape[-1]), window_side(picture.shape[-1])
    return torch.stack([picture[:, y : y + side, x : x + side] for y, x in product(starts, starts)])


def paste(cells: Tensor, size: int) -> Tensor:
    """The sum of nine windows (9, C, w, w), each in its place: (C, size, size)."""
    starts, side = window_starts(size), window_side(size)
    picture = cells.new_zeros(cells.shape[1], size, size)
    for cell, (y, x) in zip(cells, product(starts, starts), strict=True):
        picture[:, y : y + side, x : x + side] += cell
    return picture


@lru_cache(maxsize=8)
def inner_pixels(size: int) -> Tensor:
    """1 where the middle of a pixel is in the window's own cell, 0 where it is a neighbour's. (9, 1, w, w)."""
    cell = (torch.arange(size) + 0.5).mul(3 / size).long()
    cells = windows((3 * cell[:, None] + cell)[None])
    return (cells == torch.arange(9)[:, None, None, None]).float()


@lru_cache(maxsize=4)
def bank(size: int) -> tuple[Tensor, Tensor]:
    """Templates (n, w w), the shares of each pixel that a shape covers, and their (shape, x, y, radius) (n, 4).

    Steps of 1/128 of the picture: half a pixel of 64. Centers a little beyond where scenes have theirs.
    """
    side, step = window_side(size), size / 128
    reach = math.ceil((0.035 * size + 0.5) / step)
    offsets = side / 2 + step * np.arange(-reach, reach + 1)
    parameters, templates = [], []
    for shape, radius in product(range(len(SHAPES)), size * np.linspace(0.107, 0.138, 5)):
        places = np.array(list(product(offsets, offsets, [radius])))
        parameters.append(np.insert(places, 0, shape, axis=1))
        templates.append(shares(shape, places, side).reshape(len(places), -1))
    return torch.from_numpy(np.concatenate(parameters)), torch.from_numpy(np.concatenate(templates))


@lru_cache(maxsize=16)
def softened(size: int, steps: int) -> Tensor:
    """The templates of the bank, blurred by so many 128ths of the picture. (n, w w)."""
    _, templates = bank(size)
    if not steps:
        return templates
    side = window_side(size)
    return blurred(templates.view(-1, side, side), steps * size / 128).flatten(1)


def shares(shape: int, places: np.ndarray, side: int) -> np.ndarray:
    """What share of each pixel a shape covers, as `render` counts it. places (n, 3): x, y, radius. (n, side, side)."""
    axis = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    cx, cy, radius = places.T[:, :, None]
    x, y = (axis - cx) / radius, (axis - cy) / radius
    covered = inside(SHAPES[shape], x[:, None, :], y[:, :, None])
    return points_in_pixels(covered).astype(np.float32) / SUPERSAMPLING**2


# ---- Detail ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fit:
    """What is in a picture, and how it differs from the ideal one that is closest to it.

    reading: as `read_scene` gives it. residual: their root mean square difference, in grey levels: of blur, ringing,
    noise, and of whatever should not be there. blur: the radius (standard deviation), in pixels, of the Gaussian that
    makes the ideal picture most like the given one; nan if no shape was recognized.
    """

    reading: Reading
    residual: float
    blur: float

    @property
    def sharpness(self) -> float:
        """How steep edges are, against ideal ones: 1 for those; 0.68, 0.38, 0.20 for a blur of 0.5, 1, 2 pixels.

        An ideal edge rises over the width of a pixel. Blurred, its steepness is P(|blur n| < 1/2), n standard normal.
        """
        return math.erf(0.5 / (math.sqrt(2) * self.blur)) if self.blur else 1.0


def fit_scene(image: Tensor) -> Fit:
    """Fit place and radius of each recognized shape, and compare. image: as `read_scene` takes it. Raises InputError.

    Neither number needs to know what was wanted. Noise raises the residual, but leaves the blur: it is estimated by
    least squares, on which noise has no pull. Nor does ringing make an edge sharper than ideal: a blur is at least 0.
    """
    picture = levels(image)
    size = picture.shape[-1]
    reading, ground, found = find_shapes(picture)
    cut = windows(picture - ground).numpy()
    cells = np.zeros_like(cut)
    for fitted in found:
        contrast = np.array(list(COLORS.values())[fitted.color]) - ground
        share = np.tensordot(contrast, cut[fitted.cell], 1) / (contrast @ contrast)
        cells[fitted.cell] = contrast[:, None, None] * refine(fitted, share, size)
    ideal = paste(torch.from_numpy(cells), size)
    residual = (picture - (ideal + ground)).square().mean().sqrt().item()
    return Fit(reading, residual, closest_blur(picture - ground, ideal) if found else math.nan)


def refine(fitted: Fitted, share: np.ndarray, size: int) -> np.ndarray:
    """The share of each pixel covered by the shape near `fitted` that is closest to `share`, (w, w).

    Every neighbour in x, y and radius is tried, ever closer.
    """
    moves = np.array(list(product((0, -1, 1), repeat=3)))  # the first is to stay: it wins a tie
    place, step = np.array([fitted.x, fitted.y, fitted.radius]), size / 256
    while step > size / 256 / 10:
        tried = shares(fitted.shape, place + step * moves, len(share))
        best = ((tried - share) ** 2).sum((1, 2)).argmin()
        place = place + step * moves[best]
        step = step if best else step / 2
    return tried[best]


def closest_blur(picture: Tensor, ideal: Tensor) -> float:
    """The standard deviation b, in pixels, of the Gaussian for which |picture - blurred ideal|^2 is least.

    By Parseval over the spectra: |P|^2 - 2 g Re(P S*) + g^2 |S|^2, with g(f) = exp(-2 (pi b f)^2).
    """
    size = picture.shape[-1]
    p, s = torch.fft.fft2(picture.double()), torch.fft.fft2(ideal.double())
    both, own = (p * s.conj()).real.sum(0).flatten(), s.abs().square().sum(0).flatten()
    squared = frequencies(size).flatten()
    low, high = 0.0, size * PATCH
    for _ in range(5):  # each time a quarter of the range
        radii = torch.linspace(low, high, 9, dtype=torch.float64)
        g = torch.exp(-2 * (math.pi * radii[:, None]) ** 2 * squared)
        best, step = radii[(g**2 @ own - 2 * g @ both).argmin()].item(), (high - low) / 8
        low, high = max(best - step, 0), best + step
    return best


def blurred(picture: Tensor, radius: float) -> Tensor:
    """(C, size, size) after a Gaussian of that standard deviation in pixels, as if repeated to all sides."""
    g = torch.exp(-2 * (math.pi * radius) ** 2 * frequencies(picture.shape[-1]))
    return torch.fft.ifft2(torch.fft.fft2(picture.double()) * g).real.to(picture.dtype)


def frequencies(size: int) -> Tensor:
    """Squared, in cycles per pixel: (size, size), as `fft2` orders them."""
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    return f[:, None] ** 2 + f**2


def detail(images: Iterable[Tensor]) -> dict[str, float]:
    """Means of sharpness, blur and residual over those images in which a shape was recognized, and `measured`, the
    share of them: compare two sets only where both are measured about alike. nan if there is none.
    """
    fits = [fit_scene(image) for image in images]
    measured = [fit for fit in fits if not math.isnan(fit.blur)]
    means = {
        name: sum(getattr(fit, name) for fit in measured) / len(measured) if measured else math.nan
        for name in ("sharpness", "blur", "residual")
    }
    return {**means, "measured": len(measured) / len(fits) if fits else math.nan}
