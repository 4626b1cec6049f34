"""From noise to images: integrate dx/dsigma = u(x, sigma) from sigma = 1 down to 0, guided or not.

A `Velocity` is any function of x (B, ...) and sigma (B,), such as `guided(...)`, or
`lambda x, sigma: flow(x, sigma, labels=labels)`. Samplers know nothing else of the model. They pass sigma on the CPU,
whatever the device of x, so that decisions which depend on its value need not wait for the GPU.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from asymflow.conditions import check_labels, unwrapped
from asymflow.errors import InputError
from asymflow.model import AsymFlow
from asymflow.numerics import at_least_float32
from asymflow.progress import progress_bar

Velocity = Callable[[Tensor, Tensor], Tensor]
Hook = Callable[[Tensor, Tensor], Tensor]


# ---- The grid of noise levels ----------------------------------------------------------------------------------------
def sigma_grid(steps: int, shift: float = 1.0) -> Tensor:
    """`steps` + 1 noise levels from 1 to 0, evenly spaced, then shifted (see `time_shift`): float64, (steps + 1,).

    Raises InputError unless steps is at least 1 and shift above 0.
    """
    if steps < 1:
        raise InputError(f"sampling takes at least 1 step, but {steps} were asked for")
    return time_shift(torch.arange(steps, -1, -1, dtype=torch.float64) / steps, shift)


def time_shift(sigma: Tensor, shift: float) -> Tensor:
    """`shift sigma / (1 + (shift - 1) sigma)`: shift > 1 moves steps to higher noise levels. 0 and 1 do not change.

    Larger images need a larger shift: at the same sigma, more pixels reveal more of the image (arXiv 2605.12964).
    sigma: of any shape, in [0, 1]. Returns its shape and dtype. Raises InputError unless shift is above 0.
    """
    if not shift > 0:
        raise InputError(f"shift must be above 0, but it is {shift}")
    return shift * sigma / (shift * sigma + (1 - sigma))  # exact at both ends


def dynamic_shift(height: int, width: int) -> float:
    """The shift of `sigma_grid` for an image of a pixel FLUX.2: 17 sqrt(height width) / 1024.

    With twice the side, four pixels show what one showed before, and their mean has half the noise. So the image is
    known as well as before only at twice the ratio of noise to signal. arXiv 2605.12964: 17 at 1024^2, 34 at 2048^2.
    """
    return 17 * math.sqrt(height * width) / 1024


# ---- Samplers --------------------------------------------------------------------------------------------------------
# A sampler is a function of a velocity, x at the noise level sigmas[0], and decreasing levels within [0, 1]. It returns
# x at the last of them. The velocity is a function of x and of one level, a number above 0.
def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler's method, of order 1."""
    for sigma, target in pairwise(sigmas):
        x = x + (target - sigma) * velocity(x, sigma)
    return x


def heun(velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Heun's method, of order 2, with two evaluations a step. A step that ends at sigma = 0 is Euler's."""
    for sigma, target in pairwise(sigmas):
        u = velocity(x, sigma)
        if target > 0:
            u = (u + velocity(x + (target - sigma) * u, target)) / 2
        x = x + (target - sigma) * u
    return x


METHODS = {"heun": heun, "euler": euler}


@torch.no_grad()
def sample(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    method: str | Callable = "heun",
    denoised_hook: Hook | None = None,
    progress: bool = False,
) -> Tensor:
    """Integrate along `sigmas`, and return x at the last of them, in float32, or float64 if x is.

    x: (B, ...) at the noise level sigmas[0]; pure noise if that is 1.
    sigmas: any strictly decreasing levels within [0, 1], see `sigma_grid`.
    method: "euler" (order 1), "heun" (order 2, two evaluations a step), or a function `(velocity, x, sigmas) -> x` of
        your own, as those above. The velocity is never evaluated at sigma = 0.
    denoised_hook: called after every evaluation with the denoised image x0 = x - sigma u, and sigma (B,) on its device.
        It returns the image to use instead of x0, such as x0 clamped to displayable colours.
    Raises InputError if the grid or the method is not as described.
    """
    levels = checked_levels(sigmas)
    if not callable(method) and method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, or a function, but it is {method!r}")
    x = x.to(at_least_float32(x))
    bar = progress_bar(desc="sampling", unit="step", total=len(levels) - 1, silent=not progress)

    def steered(x: Tensor, sigma: float) -> Tensor:
        bar.update(sum(level > sigma for level in levels) - bar.n)  # steps done, counted by the levels above sigma
        u = velocity(x, torch.full(x.shape[:1], sigma, dtype=x.dtype)).to(x.dtype)
        if denoised_hook is None:
            return u
        x0 = x - sigma * u
        return u + (x0 - denoised_hook(x0, x.new_full(x.shape[:1], sigma))) / sigma

    with bar:
        drawn = (method if callable(method) else METHODS[method])(steered, x, levels)
    if not isinstance(drawn, Tensor) or drawn.shape != x.shape:
        found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise InputError(f"the sampler must return a tensor of the shape {tuple(x.shape)}, but it returned {found}")
    return drawn


def checked_levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or not all(1 >= a > b >= 0 for a, b in pairwise(levels)):
        raise InputError(
            f"sigmas must be two or more noise levels that decrease within [0, 1], but they are {shortened(levels)}"
        )
    return levels


def shortened(levels: list[float]) -> str:
    return ", ".join(f"{level:g}" for level in levels[:8]) + (", ..." if len(levels) > 8 else "")


# ---- Guidance --------------------------------------------------------------------------------------------------------
def guided(
    flow: Callable[..., Tensor],
    conditions: Mapping[str, object],
    unconditional: Mapping[str, object],
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    orthogonal: float = 0.0,
) -> Velocity:
    """Classifier-free guidance: `u = u_cond + (scale - 1) (u_cond - u_uncond)` for sigma within `interval`.

    Returns a function of x (B, ...) and sigma (B,), for `sample` (Ho and Salimans 2022, arXiv 2207.12598).

    flow: called as `flow(x, sigma, **conditions)`. If it returns a tuple, the velocity is the first of it.
    conditions, unconditional: with the same names. Tensors, also those in lists, have one entry for each image;
        anything else must be equal in both. Both are evaluated in one call, the unconditional one only for images whose
        sigma is within the interval, ends included, and not at all at scale 1. If sigma is on a GPU, it is evaluated
        for all images, because reading sigma would wait for the GPU.
    orthogonal: in [0, 1], the fraction to remove of that part of the guidance which is parallel to the denoised image
        x0 = x - sigma u, for each image: it only raises the contrast (arXiv 2605.12964 uses 1).
    Raises InputError if the names, the scale, the interval or `orthogonal` are not as described.
    """
    if conditions.keys() != unconditional.keys():
        raise InputError(f"conditions are {sorted(conditions)}, but without condition they are {sorted(unconditional)}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"the guidance interval must be within [0, 1], low end first, but it is {low}, {high}")
    if not 0 <= orthogonal <= 1:
        raise InputError(f"orthogonal must be within [0, 1], but it is {orthogonal}")
    if not math.isfinite(scale):
        raise InputError(f"the scale of guidance must be a finite number, but it is {scale}")
    both = {name: stacked(name, value, unconditional[name]) for name, value in conditions.items()}

    def predicted(x: Tensor, sigma: Tensor, conditions: Mapping[str, object]) -> Tensor:
        output = flow(x, sigma, **conditions)
        return output[0] if isinstance(output, tuple) else output

    def pushed(u: Tensor, u_uncond: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        guidance = u - u_uncond
        if orthogonal:
            guidance = guidance - orthogonal * parallel(guidance, x - expanded(on_device_of(x, sigma), x) * u)
        return u + (scale - 1) * guidance

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if scale == 1:
            return predicted(x, sigma, conditions)
        # Rounded like sigma, so that a sigma of 0.88 is within [0, 0.88] in float32 too.
        ends = torch.tensor([low, high], dtype=sigma.dtype).tolist()
        inside = (sigma >= ends[0]) & (sigma <= ends[1])
        if not on_host(inside):
            u, u_uncond = predicted(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return torch.where(expanded(inside, x), pushed(u, u_uncond, x, sigma), u)
        rows = inside.nonzero().squeeze(1)
        if not len(rows):
            return predicted(x, sigma, conditions)
        needed = torch.cat([torch.arange(len(x)), len(x) + rows])
        some, levels = entries(x, rows), sigma[rows]
        u, u_uncond = predicted(
            torch.cat([x, some]),
            torch.cat([sigma, levels]),
            {name: entries(value, needed) for name, value in both.items()},
        ).split([len(x), len(rows)])
        guided_rows = pushed(entries(u, rows), u_uncond, some, levels)
        dtype = torch.promote_types(u.dtype, guided_rows.dtype)  # the flow may return a narrower dtype than x has
        return u.to(dtype).index_copy(0, on_device_of(x, rows), guided_rows.to(dtype))

    return velocity


def on_host(values: Tensor) -> bool:
    return values.device.type == "cpu"


def on_device_of(x: Tensor, values: Tensor) -> Tensor:
    """Move `values` to the device of x, from the CPU to a CUDA GPU without waiting.

    Copies to the CPU must wait for the values. MPS would read the CPU's memory after it is freed (pytorch#139550).
    """
    return values.to(x.device, non_blocking=x.is_cuda and on_host(values))


def entries(values: object, rows: Tensor) -> object:
    """The `rows` of a tensor (B, ...), or of each tensor in a list; anything else unchanged."""
    if isinstance(values, list):
        return [entries(value, rows) for value in values]
    return values[on_device_of(values, rows)] if isinstance(values, Tensor) else values


def stacked(name: str, condition: object, unconditional: object) -> object:
    """Concatenate a condition and its unconditional counterpart. InputError if they are not tensors, and differ."""
    if isinstance(condition, Tensor) and isinstance(unconditional, Tensor):
        return torch.cat([condition, unconditional])
    pair, sequences = (condition, unconditional), (list, tuple)
    if all(isinstance(c, sequences) for c in pair) and len(condition) == len(unconditional):
        return [stacked(name, *entries) for entries in zip(*pair, strict=True)]
    if any(isinstance(c, (Tensor, *sequences)) for c in pair) or condition != unconditional:
        raise InputError(
            f"the condition {name} is not a tensor, and differs with and without guidance: give two tensors"
        )
    return condition


def parallel(v: Tensor, direction: Tensor) -> Tensor:
    """The part of v (B, ...) along `direction` (B, ...), for each image. Zero where `direction` is zero."""
    axes = tuple(range(1, v.ndim))
    energy = direction.square().sum(axes, keepdim=True)
    return (v * direction).sum(axes, keepdim=True) / energy.clamp(min=torch.finfo(v.dtype).tiny) * direction


def expanded(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))


# ---- Noise, and images from labels -----------------------------------------------------------------------------------
def image_noise(seed: int, indices: Iterable[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise (n, *shape) in float32. The noise of an image depends on the seed and its index alone.

    The batch, the number of processes and the device make no difference: it is drawn on the CPU, by a counter-based
    generator with the key (seed, index). Raises OverflowError unless both are within [0, 2^64).
    """
    draws = [
        np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64))).standard_normal(
            tuple(shape), dtype=np.float32
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(draws)).to(device) if draws else torch.empty(0, *shape, device=device)


@torch.no_grad()
def generate(
    flow: AsymFlow,
    labels: Tensor | Sequence[int],
    indices: Iterable[int] | None = None,
    *,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    null_label: int | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    method: str | Callable = "heun",
    shift: float = 1.0,
    orthogonal: float = 0.0,
    denoised_hook: Hook | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample images (n, C, H, W) of the given classes (n,), in the range of the training data (RGB: [-1, 1]).

    Returns float32, on the model's device.

    flow: its backbone takes the condition `labels`. indices: with `seed`, they determine the noise of each image; 0 to
    n - 1 by default. size: height and width, or one number for both; by default those of the training images, if the
    backbone has a `grid`.
    null_label: the label that means "no class"; by default the backbone's num_classes, if it has that. The rest is
    explained at `sample` and `guided`. arXiv 2605.12964 uses for ImageNet guidance 2.3 on the interval (0, 0.88) and 50
    Heun steps.
    Raises InputError for a label that is not a class, a model in training mode, a size that is not a multiple of the
    patch size, or if size or null_label is needed and neither given nor known to the backbone.
    """
    if flow.training:
        raise InputError("the model is in training mode: call flow.eval() before sampling")
    device = flow.subspace.basis.device
    labels = torch.as_tensor(labels)
    labels = labels if labels.numel() else labels.long()  # an empty list makes it float
    indices = list(range(labels.numel()) if indices is None else indices)
    if labels.ndim != 1 or len(indices) != len(labels):
        shape = tuple(labels.shape)
        raise InputError(f"give one label for each image: {len(indices)} images, but labels of the shape {shape}")
    num_classes, grid = (getattr(unwrapped(flow.backbone), name, None) for name in ("num_classes", "grid"))
    if num_classes is not None:
        check_labels(labels, num_classes)
    null_label = num_classes if null_label is None else null_label
    if null_label is None and guidance != 1:
        raise InputError("give null_label, the label that means no class: the backbone has no num_classes to tell it")
    if size is None and grid is None:
        raise InputError("give size=(height, width): the backbone has no grid to tell that of its images")
    labels = labels.to(device)
    size = size or tuple(n * flow.patch_size for n in grid)
    height, width = (size, size) if isinstance(size, int) else size
    noise = flow.noise_scale * image_noise(seed, indices, (flow.channels, height, width), device)
    unconditional = labels if null_label is None else torch.full_like(labels, null_label)
    velocity = guided(flow, {"labels": labels}, {"labels": unconditional}, guidance, interval, orthogonal)
    return sample(velocity, noise, sigma_grid(steps, shift), method, denoised_hook, progress)
