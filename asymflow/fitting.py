"""Fitting a subspace to data, in one pass: PCA for training from scratch, Procrustes to start from a latent model.

Both need only sums, over all tokens, of products of coordinates: at most D x D numbers, added up in float64. Both
return a `Subspace` on the CPU, in float64, whose `spectrum` (D,) holds energies in mean square per token: first those
along the principal directions inside of the subspace, in falling order, then those outside, in falling order. So its
sum is the mean of |x|^2, and `spectrum[:rank].sum() / spectrum.sum()` is the share of the energy in the subspace.

Under torch.distributed each process reads its own share of the data, which may be empty, and all get the same result,
bit for bit. An error in one process is raised in all. All wait for the slowest, up to the group's timeout.
"""

import operator
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from asymflow.errors import InputError
from asymflow.numerics import has_float64
from asymflow.subspace import Subspace

CHUNK = 2**20  # so many numbers of a batch are converted to float64 at a time: 8 MiB


# ---- The two fits ----------------------------------------------------------------------------------------------------
def fit_pca(
    batches: Iterable[Tensor],
    rank: int | Literal["auto"],
    *,
    noise_scale: float = 1.0,
    sigma: Tensor | None = None,
    group: "dist.ProcessGroup | None" = None,
    **record,
) -> Subspace:
    """The subspace of the `rank` directions with the most energy in the data (arXiv 2605.12964).

    batches: tensors of tokens (..., D), see `patchify`; any floating point dtype, any device. Read once.
    rank: r in [0, D], or "auto": chosen by `auto_rank` for noise of standard deviation `noise_scale` at levels `sigma`.
    group: of processes, under torch.distributed (default: all). record: patch_size, token_order, color_space, fitted_on
        of the `Subspace`.

    The directions are eigenvectors of sum x x^T, largest eigenvalue first. No mean is subtracted, since the network has
    to predict the mean of the patches too. Signs: the entry of largest magnitude in each is positive (the first, if
    several are equal to 1e-6). The spectrum is that of the mean of x x^T. The scale is 1.
    If fewer than `rank` directions have any energy, as of flat images, rounding decides the others.
    Raises InputError if there are no tokens, all are 0, one is not finite, D changes, or rank or record do not fit.
    """
    threshold = energy_threshold(noise_scale, sigma)
    if rank != "auto":
        rank = as_rank(rank)

    def check(dim: int) -> None:
        Subspace.empty(dim, **record)  # raises an error about the record now, before the long pass
        if rank != "auto" and rank > dim:
            raise InputError(f"rank must be at most the dimension of the tokens, {dim}, but it is {rank}")

    def solve(count: Tensor, gram: Tensor) -> tuple[Tensor, float, Tensor]:
        if gram.trace() == 0:
            raise InputError("all tokens are 0, and have no directions: look at what is read")
        energies, directions = torch.linalg.eigh(gram / count)
        spectrum = energies.flip(0).clamp(min=0)
        r = int((spectrum > threshold).sum()) if rank == "auto" else rank
        return canonical_signs(directions.flip(-1)[:, :r]), 1.0, spectrum

    basis, scale, spectrum = solve_together(lambda: add_up(batches, read_tokens, check), solve, group)
    return Subspace(basis, scale, spectrum=spectrum, **record)


def fit_procrustes(
    pairs: Iterable[tuple[Tensor, Tensor]], *, group: "dist.ProcessGroup | None" = None, **record
) -> Subspace:
    """The subspace and the scale that lift the tokens of a latent model to pixels (arXiv 2605.12964).

    pairs: (z (..., r), x (..., D)), 1 <= r <= D: latent tokens as the network sees them and pixel tokens of the same
    squares; any floating point dtypes, any devices. Read once. group, record: as for `fit_pca`.

        C = sum z^T x = U S V^T,      A = V_r U^T,      s = sqrt( sum |A^T x|^2 / sum |z|^2 )

    Of all orthonormal A, this one minimizes sum |s A z - x|^2, whatever s > 0 is (orthogonal Procrustes). The scale
    gives the lifted latents s A z the same energy that the pixels have in the subspace, so that A^T x / s is as large
    as the latents z that the network was trained on. (The s of least squares is smaller, and A^T x / s would be too
    large.) Column i of A belongs to coordinate i of z, so the order and the signs of the columns have a meaning.
    Raises InputError as `fit_pca`, or if the leading axes differ, r is not in [1, D], or fewer than r latent directions
    are correlated with the pixels: rounding would decide the others, differently on each machine.
    """

    def solve(count: Tensor, gram: Tensor, cross: Tensor, latent_energy: Tensor) -> tuple[Tensor, float, Tensor]:
        if not (gram.trace() > 0 and latent_energy > 0):
            raise InputError("all latent or all pixel tokens are 0: look at what is read")
        u, s, vt = torch.linalg.svd(cross, full_matrices=True)  # rows r, r + 1, ... of vt (D, D) span the outside
        rounding = len(gram) * torch.finfo(s.dtype).eps * gram.trace().sqrt() * latent_energy.sqrt()  # |C| <= |z| |x|
        if s[-1] <= rounding:
            raise InputError(
                f"only {int((s > rounding).sum())} of {len(s)} latent directions are correlated with the pixels, in "
                f"{int(count)} tokens: give more images, and leave out latent channels that are always 0 or repeated"
            )
        turned = vt @ (gram / count) @ vt.mT
        inside, outside = turned[: len(s), : len(s)], turned[len(s) :, len(s) :]
        spectrum = torch.cat([torch.linalg.eigvalsh(block).flip(0).clamp(min=0) for block in (inside, outside)])
        return vt[: len(s)].mT @ u.mT, (inside.trace() * count / latent_energy).sqrt().item(), spectrum

    check = lambda dim: Subspace.empty(dim, **record)  # see fit_pca
    basis, scale, spectrum = solve_together(lambda: add_up(pairs, read_pair, check), solve, group)
    return Subspace(basis, scale, spectrum=spectrum, **record)


def canonical_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the entry of largest magnitude in each is positive (the first, if several are, to 1e-6)."""
    size = basis.abs()
    first = (size >= (1 - 1e-6) * size.amax(0)).int().argmax(0, keepdim=True)
    return basis * basis.gather(0, first).sign()


def as_rank(rank: object) -> int:
    try:
        number = operator.index(rank)
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f'rank must be a number of dimensions, 0 or more, or "auto", but it is {rank!r}')
    return number


# ---- Which rank? -----------------------------------------------------------------------------------------------------
def auto_rank(spectrum: Tensor, noise_scale: float = 1.0, sigma: Tensor | None = None) -> int:
    """The number of directions with so much energy that the network should predict the velocity there, not the data.

    spectrum: (D,) energies lambda_i, as of `fit_pca`. noise_scale, n below: the standard deviation of the noise.
    sigma: equally likely noise levels in [0, 1] that the model is trained with; default: those of the paper for
        training from scratch, sigmoid(0.8 + 0.8 normal). Raises InputError if these make no sense.

    If direction i is inside of the subspace, the network has to predict n eps - x0, of power n^2 + lambda_i, there. If
    it is outside, the network predicts -x0, of power lambda_i, and its error is divided by sigma. Assume that its
    squared error is the same fraction of this power everywhere. With the weight w = (sigma / max(sigma, 0.05))^2 of the
    loss, the error of the velocity is smallest if i is inside exactly when

        (n^2 + lambda_i) E[w] < lambda_i E[w / sigma^2],    so    lambda_i > n^2 E[w] / (E[w / sigma^2] - E[w]),

    by default 0.51 n^2. The threshold is the same if the error is a fraction of the power of the best possible output,
    E[target | x_sigma]: the unpredictable rest is the same on both sides when counted in the velocity. Nothing is
    assumed of the data but its energies.

    Where it was tried: for toy/closed_form.py, with its uniform sigma, it gives 4; 4 and 5 are best (docs/toys.md). For
    3,781 emoji of 64 x 64 pixels at patch 16, D = 768, it gives 38, with 96 % of the energy; of the ranks 0, 8, 32 and
    768, 32 had the smallest held-out loss after a short training, and 8 one 2 % larger. But the assumption about the
    network is crude. For the emoji it predicts that rank 768 beats rank 0; measured, rank 768 was five times worse,
    because a network narrower than D is far worse at noise than at images. And the noise levels matter: uniform ones
    give 179.
    """
    return int((torch.as_tensor(spectrum) > energy_threshold(noise_scale, sigma)).sum())


def energy_threshold(noise_scale: float = 1.0, sigma: Tensor | None = None) -> float:
    """The energy above which a direction belongs inside of the subspace. See `auto_rank` for the derivation."""
    if not 0 < noise_scale < float("inf"):
        raise InputError(f"noise_scale must be a positive number, but it is {noise_scale}")
    if sigma is None:
        sigma = torch.sigmoid(0.8 + 0.8 * normal_quantiles())
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if not (sigma.numel() and ((sigma >= 0) & (sigma <= 1)).all()):
        raise InputError("sigma must be noise levels between 0 and 1, at least one")
    softened = sigma.clamp(min=0.05)
    inside, outside = (sigma / softened).square().mean(), softened.square().reciprocal().mean()
    return (noise_scale**2 * inside / (outside - inside)).item()


def normal_quantiles() -> Tensor:
    """Equally likely standard normal numbers, 100,000 in float64, which make the threshold exact to 2e-4."""
    n = 100_000
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


# ---- One pass over the data ------------------------------------------------------------------------------------------
def add_up(batches: Iterable, read: Callable[[object], list[Tensor]], check: Callable[[int], None]) -> list[Tensor]:
    """The sums of `zero_sums` over all batches, on the device of the first one; [] without batches.

    read: turns a batch into the matrices x (n, D) and, for Procrustes, z (n, r). check: called once with D, before the
    long pass.
    """
    sums, dims = [], []
    for index, batch in enumerate(batches):
        try:
            matrices = read(batch)
        except InputError as e:
            raise InputError(f"batch {index}: {e}") from None
        found = [m.shape[1] for m in matrices]
        if not sums:
            check(found[0])
            device = matrices[0].device if has_float64(matrices[0].device) else torch.device("cpu")
            sums, dims = zero_sums(found, device), found
        if found != dims:
            raise InputError(f"batch {index}: its tokens are of dimension {found}, but those before of {dims}")
        for chunks in zip(*(m.split(max(1, CHUNK // dims[0])) for m in matrices), strict=True):
            x, *latents = (c.to(device).double() for c in chunks)
            sums[0] += len(x)
            sums[1].addmm_(x.mT, x)
            for z in latents:
                sums[2].addmm_(z.mT, x)
                sums[3] += z.square().sum()
        energy = sums[1].trace() + (sums[3] if len(sums) > 2 else 0)
        if not energy.isfinite():  # cheaper than looking through the batch
            raise InputError(f"batch {index}: it has NaN, infinity, or numbers whose squares add up to infinity")
    return sums


def zero_sums(dims: list[int], device: torch.device | str) -> list[Tensor]:
    """[number of tokens (), sum x^T x (D, D)] for dims [D]; for [D, r], then sum z^T x (r, D) and sum |z|^2 ()."""
    shapes = [(), (dims[0], dims[0]), *(shape for r in dims[1:] for shape in [(r, dims[0]), ()])]
    return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]


def read_tokens(batch: object, name: str = "tokens") -> list[Tensor]:
    """[x (n, D)], or InputError if the batch is no tensor of tokens."""
    if not isinstance(batch, Tensor):
        raise InputError(f"expected a tensor of {name}, but got a {type(batch).__name__}")
    if not batch.is_floating_point() or batch.ndim == 0 or batch.shape[-1] == 0:
        raise InputError(
            f"{name} must be floating point numbers of shape (..., dimension), but they are {batch.dtype} of shape "
            f"{tuple(batch.shape)}"
        )
    return [batch.detach().reshape(-1, batch.shape[-1])]


def read_pair(pair: object) -> list[Tensor]:
    """[x (n, D), z (n, r)], or InputError."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise InputError(f"expected a pair (latent tokens, pixel tokens), but got a {type(pair).__name__}")
    (z,), (x,) = read_tokens(pair[0], "latent tokens"), read_tokens(pair[1], "pixel tokens")
    if pair[0].shape[:-1] != pair[1].shape[:-1]:
        raise InputError(
            f"latent and pixel tokens must cover the same squares, but their shapes are {tuple(pair[0].shape)} and "
            f"{tuple(pair[1].shape)}"
        )
    if z.shape[1] > x.shape[1]:
        raise InputError(
            f"latent tokens have {z.shape[1]} dimensions and pixel tokens only {x.shape[1]}: give pairs (latent, pixel)"
        )
    return [x, z]


# ---- One process or many ---------------------------------------------------------------------------------------------
def solve_together(local_sums: Callable[[], list[Tensor]], solve: Callable, group: "dist.ProcessGroup | None") -> tuple:
    """`solve(*sums)`, where the sums are added up over all processes, on the CPU.

    Only the first process solves, so that all get the same bits, even on different machines. If one process fails, all
    still make the same collective calls before they raise the error, so that none waits for another forever.
    """

    def solved(sums: list[Tensor]) -> tuple:
        if not sums or not sums[0]:
            raise InputError("there are no tokens: give at least one batch that is not empty")
        return solve(*(s.cpu() for s in sums))

    if not (dist.is_available() and dist.is_initialized()):
        return solved(local_sums())
    group = group or dist.group.WORLD
    sums, fault = [], None
    try:
        sums = local_sums()
        report = [len(s) for s in sums[1:3]]  # [D], [D, r], or [] without batches
    except Exception as e:
        fault, report = e, InputError(str(e)) if isinstance(e, InputError) else RuntimeError(repr(e))
    device = torch.device("cpu")
    if dist.get_backend(group) == "nccl":  # nccl can send only what is on a GPU
        on_gpu = bool(sums) and sums[0].is_cuda
        device = sums[0].device if on_gpu else torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        reports = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, report, group)
        dims = agreed_dims(reports, fault)
        sums = [s.to(device) for s in sums] or (zero_sums(dims, device) if dims else [])
        first = dist.get_global_rank(group, 0)
        for s in sums:
            dist.reduce(s, first, group=group)
        outcome = [None]
        if dist.get_rank() == first:
            try:
                outcome = [solved(sums)]
            except Exception as e:
                outcome = [e]
        dist.broadcast_object_list(outcome, first, group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def agreed_dims(reports: list[list[int] | Exception], fault: Exception | None) -> list[int]:
    """The dimensions that all processes with data report. If one reports an error, raise it.

    fault: the error of this process, if there is one: the cause of what is raised.
    """
    for process, report in enumerate(reports):
        if isinstance(report, Exception):
            raise type(report)(f"process {process}: {report}") from fault
    known = {process: dims for process, dims in enumerate(reports) if dims}
    if len({tuple(dims) for dims in known.values()}) > 1:
        found = ", ".join(f"{dims} in process {process}" for process, dims in known.items())
        raise InputError(f"the tokens must have one dimension in all processes, but it is {found}")
    return next(iter(known.values()), [])
