"""Generated pictures: one to three coloured shapes on a light background, with a class and a caption.

Seed and index determine a picture, at any resolution, and its content can be read back from its pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch

from asymflow.data.sample import Sample
from asymflow.streams import generator

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "orange": (255, 150, 30)}
COUNTS = ("one", "two", "three")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SUPERSAMPLING = 4  # points along each axis of a pixel
STREAM = 100  # the random stream of these pictures; see streams.py for the others


@dataclass(frozen=True)
class Scene:
    """The content of a picture: n shapes of one kind and colour.

    cells: the cell of each shape in a 3 x 3 grid, counted row by row. centers (n, 2) as (x, y), and radii (n,), are in
    units of the picture's side. ground: the grey level of the background, 0 to 255.
    """

    shape: int
    color: int
    cells: tuple[int, ...]
    centers: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]
    ground: float

    @property
    def label(self) -> int:
        return self.shape * len(COLORS) + self.color

    @property
    def caption(self) -> str:
        """Such as "two red circles: top left, middle center"."""
        places = ", ".join(f"{ROWS[cell // 3]} {COLUMNS[cell % 3]}" for cell in self.cells)
        plural = ("es" if SHAPES[self.shape] == "cross" else "s") if len(self.cells) > 1 else ""
        return f"{COUNTS[len(self.cells) - 1]} {list(COLORS)[self.color]} {SHAPES[self.shape]}{plural}: {places}"


class Shapes:
    """`count` pictures of `size` x `size` pixels, random access by index. Class = 4 * shape + color."""

    num_classes = len(SHAPES) * len(COLORS)

    def __init__(self, count: int, size: int, seed: int = 0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    @property
    def classes(self) -> list[str]:
        return [f"{color} {shape}" for shape in SHAPES for color in COLORS]

    @property
    def digest(self) -> str:
        return f"shapes {self.count} {self.seed}"

    def check(self) -> None:
        """Does nothing: the pictures are the same on every machine."""

    def label(self, index: int) -> int:
        return make_scene(self.seed, index).label

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = make_scene(self.seed, index)
        return Sample(render(scene, self.size), scene.label, f"shapes/{index}", scene.caption)


def make_scene(seed: int, index: int) -> Scene:
    """What is in picture `index`: one to three shapes, the same for the same seed and index."""
    g = generator(seed, STREAM, index)
    shape, color, count = int(g.integers(len(SHAPES))), int(g.integers(len(COLORS))), int(g.integers(1, 4))
    cells = sorted(g.choice(9, size=count, replace=False).tolist())
    jitter, radii = g.uniform(-0.03, 0.03, (count, 2)), g.uniform(0.11, 0.135, count)
    middles = [((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3) for cell in cells]
    centers = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(middles, jitter.tolist(), strict=True)]
    return Scene(shape, color, tuple(cells), tuple(centers), tuple(radii.tolist()), float(g.uniform(225, 255)))


def render(scene: Scene, size: int) -> torch.Tensor:
    """The picture, (3, size, size) uint8, smooth at the edges."""
    axis = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING)
    covered = np.zeros((len(axis), len(axis)), dtype=bool)
    for (cx, cy), radius in zip(scene.centers, scene.radii, strict=True):
        x, y = (axis - cx) / radius, (axis - cy) / radius
        columns, rows = abs(x) < 1, abs(y) < 1  # no shape reaches farther
        covered[np.ix_(rows, columns)] |= inside(SHAPES[scene.shape], x[None, columns], y[rows, None])
    share = np.arange(SUPERSAMPLING**2 + 1) / SUPERSAMPLING**2
    color = np.array(list(COLORS.values())[scene.color])[:, None]
    palette = (share * color + (1 - share) * scene.ground).round().astype(np.uint8)
    return torch.from_numpy(palette.take(points_in_pixels(covered), axis=1))


def points_in_pixels(covered: np.ndarray) -> np.ndarray:
    """How many of the points of each pixel are covered: (..., H, W), uint8, of (..., H * S, W * S), bool."""
    *batch, height, width = covered.shape
    rows = covered.reshape(*batch, -1, SUPERSAMPLING, width).sum(-2, dtype=np.uint8)
    return rows.reshape(*batch, height // SUPERSAMPLING, -1, SUPERSAMPLING).sum(-1, dtype=np.uint8)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points belong to the shape. x, y: relative to its center, in units of its radius; y points down."""
    if shape == "circle":
        return x**2 + y**2 < 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "triangle":
        return (y < 0.8) & (y > 1.8 * abs(x) - 1)
    return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
