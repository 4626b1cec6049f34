"""The best setting among many, found by drawing few images: coarse to fine, then more images for the close ones.

All settings are scored on the same images' noise, so most of the chance cancels in a difference: how far two distances
differ by chance is known from the influence of each image on both.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Point = tuple[int, ...]
"""A setting: for each axis, the number of its value."""
CLOSE = 3.0  # standard errors, within which two settings cannot be told apart
KEPT = 4  # settings around which a grid is refined
LEAST = 4  # values of an axis on the coarsest grid, if it has as many


@dataclass(frozen=True)
class Score:
    """value: the distance, less is better. influence: of each image on it, (n,); their mean is about 0."""

    value: float
    influence: np.ndarray


@dataclass(frozen=True)
class Found:
    """best: the setting. rivals: settings that cannot be told apart from it, the best one first. scores: of all
    settings that were tried, with the most images that each was given. images: how many were drawn. complete: whether
    the budget was enough."""

    best: Point
    rivals: list[Point]
    scores: Mapping[Point, Score]
    images: int
    complete: bool


def search(
    sizes: Iterable[int],
    score: Callable[[list[Point], int], dict[Point, Score]],
    start: int,
    budget: int,
    same: Callable[[Point], Point] = lambda point: point,
) -> Found:
    """The point with the least score on a grid of these sizes.

    score: the scores of points with the first n images each. start: images of each point at first. budget: images that
    may be drawn in all; the first grid is drawn whatever it is. same: one point for all that are equal to it.
    """
    sizes = tuple(sizes)
    tried = Tried(score, budget, same)
    steps = coarse_steps(sizes)
    tried.add(coarse(sizes), start, needed=True)
    while max(steps) > 1:
        steps = [max(1, step // 2) for step in steps]
        around = [near for point in tried.close(start)[:KEPT] for near in neighbours(point, steps, sizes)]
        if not tried.add(around, start):
            break
    while tried.add(neighbours(tried.close(start)[0], [1] * len(sizes), sizes), start) and tried.grew:
        pass  # downhill, until no neighbour is better
    images, rivals, left = start, tried.close(start), []
    while len(rivals) > 1:
        if not tried.add(rivals, 2 * images):  # then to the best of them, as many as can be had
            rivals, left = rivals[: tried.affordable(images)], rivals[tried.affordable(images) :] + left
            if len(rivals) < 2 or not tried.add(rivals, 2 * images):
                break
        images *= 2
        rivals = [point for point in tried.close(images) if point in set(rivals)]
    close = list(dict.fromkeys([*rivals, *left]))
    return Found(close[0], close, tried.best_known(), tried.images, not tried.refused)


def coarse(sizes: tuple[int, ...]) -> list[Point]:
    """The first grid."""
    pairs = zip(sizes, coarse_steps(sizes), strict=True)
    return list(itertools.product(*(sorted({*range(0, size, step), size - 1}) for size, step in pairs)))


def coarse_steps(sizes: tuple[int, ...]) -> list[int]:
    """How far apart the values of the first grid are along each axis: powers of 2, to be halved again and again."""
    return [2 ** max(0, math.floor(math.log2((size - 1) / (LEAST - 1)))) if size >= LEAST else 1 for size in sizes]


class Tried:
    """Scores by the number of images, and how many images they took."""

    def __init__(self, score, budget: int, same: Callable[[Point], Point]):
        self.score, self.budget, self.same = score, budget, same
        self.scores: dict[int, dict[Point, Score]] = {}
        self.given: dict[Point, int] = {}  # images of each point
        self.refused = self.grew = False

    @property
    def images(self) -> int:
        return sum(self.given.values())

    def add(self, points: Iterable[Point], images: int, needed: bool = False) -> bool:
        """Score those of the points that are not yet; False if the budget is too small for all of them."""
        known = self.scores.setdefault(images, {})
        new = [point for point in dict.fromkeys(map(self.same, points)) if point not in known]
        cost = sum(images - self.given.get(point, 0) for point in new)
        if not needed and self.images + cost > self.budget:
            self.refused = True
            return False
        known |= self.score(new, images) if new else {}
        self.given |= dict.fromkeys(new, images)
        self.grew = bool(new)
        return True

    def affordable(self, images: int) -> int:
        """How many points can have so many images more."""
        return max(0, self.budget - self.images) // images

    def close(self, images: int) -> list[Point]:
        """The best point with so many images, and all that cannot be told apart from it, the better first."""
        known = self.scores[images]
        order = sorted(known, key=lambda point: known[point].value)
        return [order[0], *(point for point in order[1:] if not worse(known[point], known[order[0]]))]

    def best_known(self) -> dict[Point, Score]:
        return {point: self.scores[images][point] for point, images in self.given.items()}


def worse(one: Score, best: Score) -> bool:
    """Whether a score is worse than the best by more than chance."""
    if not math.isfinite(one.value):
        return True
    chance = np.std(one.influence - best.influence) / math.sqrt(len(one.influence))
    return one.value - best.value > CLOSE * chance


def neighbours(point: Point, steps: list[int], sizes: tuple[int, ...]) -> list[Point]:
    """The point, and those that are a step from it along any of the axes, within the grid."""
    along = [
        sorted({min(max(at + move * step, 0), size - 1) for move in (-1, 0, 1)})
        for at, step, size in zip(point, steps, sizes, strict=True)
    ]
    return list(itertools.product(*along))
