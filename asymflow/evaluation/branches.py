"""Images of many guidance settings from the same noise, with what their trajectories share computed once.

Above the interval of guidance a model is not guided. So for all scales and all intervals the trajectory of an image
begins the same way, and branches where the first of its steps meets the interval.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asymflow.color import oklab_to_rgb
from asymflow.evaluation.drawn import Drawn
from asymflow.precision import computing
from asymflow.sampling import guided, image_noise, sample, sigma_grid


@dataclass(frozen=True, order=True)
class Guidance:
    """A scale, and the noise levels, from low to high, where it acts."""

    scale: float
    low: float = 0.0
    high: float = 1.0


class Branches:
    """Draws the images of a `Drawn` for several settings at once.

    spent, alone: for each setting, the forward passes of an image through the network that it took so far, and how many
    it would have taken alone. The first setting of a shared part pays for it.
    """

    def __init__(self, drawn: Drawn, orthogonal: float = 0.0):
        self.drawn, self.orthogonal = drawn, orthogonal
        self.levels = sigma_grid(drawn.protocol.steps, drawn.protocol.shift).tolist()
        self.spent: Counter[Guidance] = Counter()
        self.alone: Counter[Guidance] = Counter()

    def first_step(self, high: float) -> int:
        """The first step that evaluates the velocity at a noise level of `high` or below; if there is none, steps."""
        inside = (torch.tensor(self.levels, dtype=torch.float32) <= torch.tensor(high, dtype=torch.float32)).tolist()
        reach = 1 if self.drawn.protocol.method == "heun" else 0  # which looks at the level where a step ends
        steps = len(self.levels) - 1
        return next((k for k in range(steps) if any(inside[k : k + 1 + (reach and k + 1 < steps)])), steps)

    @torch.no_grad()
    def draw(self, numbers: Sequence[int], settings: Sequence[Guidance]) -> Mapping[Guidance, Tensor]:
        """Images (n, 3, H, W) in [-1, 1] of these numbers, for each setting: as `Drawn.draw` has them, bit for bit.

        With a sampler of the user's own nothing is shared: it may keep more than x between its steps.
        """
        drawn, flow = self.drawn, self.drawn.flow
        numbers = [drawn.protocol.first + number for number in numbers]
        device = flow.subspace.basis.device
        labels = torch.as_tensor(list(map(drawn.class_of, numbers))).to(device)
        nothing = torch.full_like(labels, drawn.options["null_label"])
        shape = (flow.channels, *drawn.size)
        x = flow.noise_scale * image_noise(drawn.protocol.seed, numbers, shape, device)
        method, steps = drawn.options["method"], len(self.levels) - 1

        passes = 0

        def forward(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            nonlocal passes
            passes += len(x)
            return flow(x, sigma, labels=labels)

        def velocity(setting: Guidance):
            interval = (setting.low, setting.high)
            return guided(forward, {"labels": labels}, {"labels": nothing}, setting.scale, interval, self.orthogonal)

        shared = method in ("heun", "euler")
        start = {one: 0 if not shared else steps if one.scale == 1 else self.first_step(one.high) for one in settings}
        found, at, trunk = {}, 0, 0  # trunk: passes of the part that is shared, so far
        with computing(flow, drawn.precision):
            for setting in sorted(settings, key=start.get):
                before, shared_before = passes, trunk
                if start[setting] > at:
                    x = sample(velocity(Guidance(1.0)), x, self.levels[at : start[setting] + 1], method)
                    at, trunk = start[setting], trunk + passes - before
                found[setting] = x if at == steps else sample(velocity(setting), x, self.levels[at:], method)
                self.spent[setting] += passes - before
                self.alone[setting] += shared_before + passes - before
        return {setting: oklab_to_rgb(x) if flow.subspace.color_space == "oklab" else x for setting, x in found.items()}
