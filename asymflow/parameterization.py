"""The asymmetric parameterization (arXiv 2605.12964) as pure functions of tokens.

On the path x_sigma = (1 - sigma) x0 + sigma eps, the velocity is u = eps - x0. With the orthonormal basis A (D, r) of a
subspace, P = A A^T and a scale s, the network predicts

    u_a = P eps - x0 / s,

the noise inside the subspace only, and the data everywhere. `recover_velocity` computes u from it in closed form.

All functions can be differentiated any number of times, and work under torch.compile(fullgraph=True) and
torch.func.vmap. They compute in float32, or float64 if an argument has it, whatever autocast says: outside of the
subspace, rounding errors are divided by sigma.
"""

import torch
from torch import Tensor

from asymflow.errors import InputError
from asymflow.numerics import at_least_float32, no_autocast
from asymflow.subspace import Subspace


def asymmetric_velocity(x0: Tensor, eps: Tensor, subspace: Subspace) -> Tensor:
    """What the network learns to predict: `u_a = P eps - x0 / s` (arXiv 2605.12964).

    x0, eps: (..., D). subspace: P, of rank r, and the scale s. Returns (..., D) in float32, or float64 if given.
    Raises InputError if D is not the subspace's.
    """
    check_dim(subspace, x0, eps)
    dtype = at_least_float32(x0, eps)
    with no_autocast(x0):
        return subspace.project(eps.to(dtype)) - x0.to(dtype) / subspace.scale


def recover_velocity(
    u_a: Tensor, x_sigma: Tensor, sigma: Tensor | float, subspace: Subspace, sigma_min: float = 0.0
) -> Tensor:
    """The velocity `u = eps - x0` from the asymmetric velocity, in closed form (arXiv 2605.12964).

        inside of the subspace      k (s u_a + (1 - s) x_sigma)        with k = 1 / (s + (1 - s) sigma)
        outside                     (x_sigma + s u_a) / max(sigma, sigma_min)

    u_a, x_sigma: (..., D).
    sigma: in [0, 1], a number, or one for each leading axis or vector: (B,), (B, 1), (B, N) and (B, N, 1) all go with
        x_sigma (B, N, D).
    sigma_min: the least divisor outside of the subspace.
    Returns (..., D) in float32, or float64 if given.

    Inside, nothing is divided by sigma, and the result is exact down to sigma = 0. Outside, rounding errors grow as
    1 / sigma. At sigma = 0 with sigma_min = 0, x_sigma no longer contains the noise, and u outside is set to its mean,
    -x0 = s u_a. Raises InputError if D is not the subspace's, or sigma has more axes than x_sigma.
    """
    check_dim(subspace, u_a, x_sigma)
    dtype = at_least_float32(u_a, x_sigma)
    with no_autocast(x_sigma):
        u_a, x_sigma, sigma = u_a.to(dtype), x_sigma.to(dtype), one_per_vector(sigma, x_sigma, dtype)
        s = subspace.scale
        k, _ = calibration(sigma, s)
        divisor = sigma.clamp(min=sigma_min)
        rest = s * u_a + x_sigma * (divisor > 0)
        outside = (rest - subspace.project(rest)) / torch.where(divisor > 0, divisor, 1)
        inside = k * (s * u_a + (1 - s) * x_sigma)
        return outside + subspace.project(inside - outside)  # also removes rounding errors of `outside` in the subspace


def calibration(sigma: Tensor | float, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """`(k, tau)` (arXiv 2605.12964): the network's input is `k x_sigma`, and its noise level `tau`, where

        k = 1 / (s + (1 - s) sigma),        tau = k sigma.

    If the data inside of the subspace is `s z`, then k x_sigma inside is the latent path (1 - tau) z + tau eps.
    sigma: any shape, in [0, 1]. scale: s > 0.
    Returns two tensors of the shape of sigma, in float32, or float64 if given. At sigma = 0 they are exactly 1 / s
    and 0, at sigma = 1 exactly 1 and 1; with s = 1, k is 1 and tau is sigma.
    """
    sigma = torch.as_tensor(sigma)
    sigma = sigma.to(at_least_float32(sigma))
    k = (1 / (scale * (1 - sigma) + sigma)).to(sigma.dtype)
    return k, k * sigma


def one_per_vector(sigma: Tensor | float, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshape sigma so that its axes are the leading axes of `vectors` (..., D), and it broadcasts against them."""
    sigma = torch.as_tensor(sigma, dtype=dtype, device=vectors.device)
    leading = vectors.shape[: sigma.ndim]
    if len(leading) < sigma.ndim or any(n not in (1, size) for n, size in zip(sigma.shape, leading, strict=True)):
        raise InputError(
            f"sigma of shape {tuple(sigma.shape)} does not go with the leading axes of vectors {tuple(vectors.shape)}"
        )
    return sigma.reshape(sigma.shape + (1,) * (vectors.ndim - sigma.ndim))


def check_dim(subspace: Subspace, *vectors: Tensor) -> None:
    for v in vectors:
        if v.shape[-1:] != (subspace.dim,):
            raise InputError(f"the subspace is for vectors of dimension {subspace.dim}, but these are {tuple(v.shape)}")
