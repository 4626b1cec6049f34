"""Moving averages of the weights: of constant decay, and power-function averages of a length chosen after training.

In each step t = 1, 2, ... an average moves towards the new weights by a share of the distance. The power-function
average of Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696)
has the share 1 - (1 - 1/t)^a. After T steps it is a sum of the weights after each step t, with coefficients

    p(t) = (t^a - (t - 1)^a) / T^a,        a = gamma + 1:

its length is always the same fraction of the training. From snapshots of two such averages, saved now and then during
training, an average of any other length can be put together afterwards, by least squares.

A constant decay b has the share 1 - b. While the training is shorter than about 9 / (1 - b) steps, that would leave the
average with much of the initial weights, which are noise. So an average of constant decay takes the larger of two
shares: 1 - b, or that of a power function of width EARLY_SIGMA_REL, which is 1 in the first step and falls below 1 - b
later. How a long training ends does not depend on this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from asymflow.errors import InputError

EARLY_SIGMA_REL = 0.1  # width with which an average of constant decay begins
MISMATCH = 0.1  # an error of `reconstruction` that is as large as if the width were off by a tenth


@dataclass(frozen=True)
class Profile:
    """The kind of an average: either a constant `decay`, or a power function of relative width `sigma_rel`."""

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
        """Its name in checkpoints, such as "0.9999" or "rel-0.050"."""
        return f"{self.decay:.10g}" if self.sigma_rel is None else f"rel-{self.sigma_rel:.3f}"

    def share_at(self, step: int) -> float:
        """How far the average moves in step 1, 2, ... towards the weights after that step: 1 in the first."""
        power = power_of(EARLY_SIGMA_REL if self.sigma_rel is None else self.sigma_rel)
        share = 1.0 if step == 1 else -math.expm1(power * math.log1p(-1 / step))  # 1 - (1 - 1/t)^a
        return share if self.decay is None else max(share, 1 - self.decay)


@cache
def power_of(sigma_rel: float) -> float:
    """The exponent a = gamma + 1 of the power function with a standard deviation of `sigma_rel` times the training.

    The profile a t^(a - 1) on [0, 1] has the variance a / ((a + 1)^2 (a + 2)); this is solved for a by bisection.
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


def reconstruction(snapshots: Sequence[tuple[int, float]], step: int, target: Profile) -> tuple[np.ndarray, float]:
    """How to combine snapshots (step, sigma_rel) to the average `target` after `step`, a power function or a decay.

    Returns the coefficient of each snapshot, and the error: the norm of the difference between the combined profile and
    the target's, relative to the norm of the target's. It is minimized over all coefficients whose sum is 1, so weights
    that never change come out unchanged. Raises InputError if there is no snapshot up to that step.
    """
    usable = [i for i, (taken, _) in enumerate(snapshots) if taken <= step]
    if not usable:
        raise InputError(f"there is no snapshot up to step {step}: the first is of step {min(snapshots)[0]}")
    # Coefficients sum to 1, so a combination is one snapshot plus multiples of the others' differences from it.
    nearest = min(usable, key=lambda i: (step - snapshots[i][0], abs(snapshots[i][1] - (target.sigma_rel or 0))))
    others = [i for i in usable if i != nearest]
    columns = [(taken, power_of(width)) for taken, width in (snapshots[i] for i in others)]
    gram, norm = np.zeros((len(columns) + 1, len(columns) + 1)), 0.0
    block = 1 << 16
    for first in range(1, step + 1, block):  # in blocks: the profiles of a long training do not fit into memory
        t = np.arange(first, min(first + block, step + 1), dtype=np.float64)
        profiles = np.stack([*(increments(t, end, a) for end, a in columns), coefficients_of(target, t, step)])
        norm += profiles[-1] @ profiles[-1]
        profiles -= increments(t, snapshots[nearest][0], power_of(snapshots[nearest][1]))
        gram += profiles @ profiles.T
    # Large multiples of small differences would amplify the float32 rounding of the snapshots. So directions whose
    # singular value is below 1e-5 of the largest are left out (the Gram matrix has the squares: 1e-10).
    multiples = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=1e-10)[0]
    coefficients = np.zeros(len(snapshots))
    coefficients[others] = multiples
    coefficients[nearest] = 1 - multiples.sum()
    c = np.append(multiples, -1.0)
    return coefficients, math.sqrt(max(c @ gram @ c, 0) / norm)


def coefficients_of(profile: Profile, t: np.ndarray, end: int) -> np.ndarray:
    """The coefficients p(t) with which an average after step `end` holds the weights after the steps t."""
    if profile.sigma_rel is not None:
        return increments(t, end, power_of(profile.sigma_rel))
    power, decay = power_of(EARLY_SIGMA_REL), profile.decay
    early = min(max(math.floor(1 / -math.expm1(math.log(decay) / power)), 1), end) if decay else 1  # a power until then
    later = (1 - decay) * decay ** np.maximum(end - t, 0.0)
    return np.where(t > early, later, increments(t, early, power) * decay ** (end - early))


def increments(t: np.ndarray, end: int, power: float) -> np.ndarray:
    """(t^a - (t - 1)^a) / end^a, and 0 after the end, without overflow for any length of training."""
    return (np.minimum(t, end) / end) ** power - (np.minimum(t - 1, end) / end) ** power
