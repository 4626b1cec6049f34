"""Moving averages of the weights, sharded like the weights, and of any length after training.

A constant decay b averages with the weights (1 - b) b^(T - t) over the steps t. The power function of Karras et al.
2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696) averages with

    p(t) = (t^a - (t - 1)^a) / T^a,        a = gamma + 1,

exactly, if step t decays by (1 - 1/t)^a: its length is always the same share of the training time so far. From
snapshots of two of them, taken now and then, the average of any other length is put together by least squares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asymflow.errors import InputError
from asymflow.training.shards import Fragment


@dataclass(frozen=True)
class Profile:
    """How one average weighs the past: a constant `decay`, or the power function of relative width `sigma_rel`."""

    decay: float | None = None
    sigma_rel: float | None = None

    def __post_init__(self):
        if (self.decay is None) == (self.sigma_rel is None):
            raise InputError("an average has either a decay or a sigma_rel")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise InputError(f"the decay of an average must be within [0, 1), but it is {self.decay}")
        if self.sigma_rel is not None:
            power_of(self.sigma_rel)

    @property
    def name(self) -> str:
        """As in checkpoints: "0.9999", or "rel-0.050"."""
        return f"{self.decay:.10g}" if self.sigma_rel is None else f"rel-{self.sigma_rel:.3f}"

    def decay_at(self, step: int) -> float:
        """The factor of the average in step 1, 2, ...; the new weights get the rest."""
        return self.decay if self.sigma_rel is None else (1 - 1 / step) ** power_of(self.sigma_rel)


class Averages:
    """The averages of the fragments of one rank, in float32. Before the first step they are the initial weights."""

    def __init__(self, fragments: Sequence[Fragment], profiles: Sequence[Profile]):
        self.fragments = list(fragments)
        self.values = {profile: [f.weight.clone() for f in self.fragments] for profile in profiles}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step 1, 2, ... into every average."""
        weights = [f.weight for f in self.fragments]
        for profile, values in self.values.items():
            torch._foreach_lerp_(values, weights, 1 - profile.decay_at(step))

    def named_pieces(self, profile: Profile) -> dict[str, tuple[int, Tensor]]:
        """What this rank has of an average: by parameter, where it starts and its values."""
        return {f.name: (f.start, value) for f, value in zip(self.fragments, self.values[profile], strict=True)}


def power_of(sigma_rel: float) -> float:
    """a = gamma + 1 of the power function whose standard deviation is `sigma_rel` of the training time.

    The profile a t^(a - 1) on [0, 1] has the variance a / ((a + 1)^2 (a + 2)): solved for a, by bisection.
    Raises InputError unless 0 < sigma_rel < 0.2887, the width of the plain mean over all steps (a = 1).
    """
    widest = math.sqrt(1 / 12)
    if not 0 < sigma_rel < widest:
        raise InputError(f"sigma_rel must be between 0 and {widest:.4f}, the plain mean's, but it is {sigma_rel}")
    low, high = 1.0, 2.0 / sigma_rel + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / ((middle + 1) ** 2 * (middle + 2)) > sigma_rel**2 else (low, middle)
    return (low + high) / 2


def reconstruction(snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """How to put together the average of width `sigma_rel` after `step` from snapshots (step, sigma_rel).

    Returns the coefficient of each snapshot, and what cannot be matched: the norm of the difference of the two
    profiles, relative to that of the target. Least squares over the profiles themselves, step by step.
    Raises InputError if there is no snapshot up to that step.
    """
    usable = [i for i, (taken, _) in enumerate(snapshots) if taken <= step]
    if not usable:
        raise InputError(f"there is no snapshot up to step {step}: the first is of step {min(snapshots)[0]}")
    columns = [(snapshots[i][0], power_of(snapshots[i][1])) for i in usable] + [(step, power_of(sigma_rel))]
    gram = np.zeros((len(columns), len(columns)))
    block = 1 << 16
    for first in range(1, step + 1, block):  # the profiles of a long training do not fit into memory all at once
        t = np.arange(first, min(first + block, step + 1), dtype=np.float64)
        profiles = np.stack([np.where(t <= end, increments(t, end, a), 0.0) for end, a in columns])
        gram += profiles @ profiles.T
    coefficients = np.zeros(len(snapshots))
    coefficients[usable] = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=1e-13)[0]
    c = np.append(coefficients[usable], -1.0)
    return coefficients, math.sqrt(max(c @ gram @ c, 0) / gram[-1, -1])


def increments(t: np.ndarray, end: int, power: float) -> np.ndarray:
    """(t^a - (t - 1)^a) / end^a, without overflow for any length of training."""
    return (np.minimum(t, end) / end) ** power - (np.minimum(t - 1, end) / end) ** power
