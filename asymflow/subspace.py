"""The low-rank subspace in which the noise is predicted: an orthonormal basis, a scale, and how they were made."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.numerics import at_least_float32, float32_products_are_exact, has_float64, no_autocast
from asymflow.patches import check_patch_size, check_token_order

TOLERANCE = 1e-4  # how far basis.T @ basis may be from the identity


class Subspace(nn.Module):
    """An r-dimensional subspace of token space, `P = A A^T`, and the scale s (arXiv 2605.12964).

    basis: A, (D, r) with orthonormal columns, 0 <= r <= D; float32 or float64. With rank 0 an asymmetric flow is
        x0-prediction, with rank D u-prediction.
    scale: s > 0, the ratio of pixel units to the units in which the network works inside the subspace.
    The rest is a record, used for checks against the model: patch_size and token_order (see `patchify`), color_space,
    fitted_on (a description of the data), and spectrum (n,), the energy along the principal directions.

    It is a module so that it moves between devices, and is saved, together with its model. It has no weights. Casts to
    less than float32 do not change it, because a basis rounded to bfloat16 would not be orthonormal. On a device
    without float64 (MPS) it is in float32. The scale is a Python number; in a state dict it is a tensor ().
    Raises InputError if the basis is not (D, r), not finite or not orthonormal to 1e-4, or the scale not positive.
    """

    def __init__(
        self,
        basis: Tensor,
        scale: float | Tensor = 1.0,
        *,
        patch_size: int | None = None,
        token_order: str | None = None,
        color_space: str | None = None,
        fitted_on: str | None = None,
        spectrum: Tensor | None = None,
    ):
        super().__init__()
        basis = torch.as_tensor(basis).detach().clone(memory_format=torch.contiguous_format)
        check_basis(basis)
        scale = float(scale)
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"the scale of a subspace must be a positive number, but it is {scale}")
        if token_order is not None:
            check_token_order(token_order)
        if patch_size is not None:
            check_patch_size(patch_size)
        if patch_size is not None and basis.shape[0] % patch_size**2:
            raise InputError(
                f"a basis for tokens of dimension {basis.shape[0]} cannot be for patches of {patch_size} x {patch_size}"
            )
        self.register_buffer("basis", basis if basis.dtype == torch.float64 else basis.float())
        # Not in the state dict: the model is the same with and without it.
        self.register_buffer("spectrum", None if spectrum is None else spectrum.detach(), persistent=False)
        self.scale, self.patch_size, self.token_order = scale, patch_size, token_order
        self.color_space, self.fitted_on = color_space, fitted_on

    @property
    def dim(self) -> int:
        """D, the dimension of a token."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """r, the dimension of the subspace."""
        return self.basis.shape[1]

    def project(self, v: Tensor) -> Tensor:
        """`P v` for v (..., D), in float32 or better, by two thin products instead of one with a D x D matrix."""
        if self.rank == self.dim:
            return v.to(at_least_float32(v))
        # The rounding errors of these products will be divided by sigma. Training scripts often allow float32 products
        # to be rounded to TF32 or bfloat16, for the backbone; then these are computed in float64.
        exact = torch.float64 if has_float64(v.device) and not float32_products_are_exact() else at_least_float32(v)
        basis = self.basis.to(exact)
        with no_autocast(v):
            return ((v.to(exact) @ basis) @ basis.mT).to(at_least_float32(v))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the tensors `basis`, `scale`, `spectrum`, and the rest as metadata.

        An existing file is replaced only by a whole new one.
        """
        tensors = self.state_dict() | ({} if self.spectrum is None else {"spectrum": self.spectrum})
        record = {name: getattr(self, name) for name in ("patch_size", "token_order", "color_space", "fitted_on")}
        files.write_tensors(path, tensors, {name: str(value) for name, value in record.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path) -> "Subspace":
        """Read what `save` wrote, bit for bit. Raises InputError, naming the file, if it is something else."""
        tensors, metadata = opening.read_tensors(path)
        if not {"basis", "scale"} <= tensors.keys() <= {"basis", "scale", "spectrum"}:
            names = ", ".join(sorted(tensors)[:4]) or "none"
            raise InputError(f"{path} is not a subspace file, with basis and scale: its tensors begin with {names}")
        try:
            patch_size = int(metadata["patch_size"]) if "patch_size" in metadata else None
            record = {name: metadata.get(name) for name in ("token_order", "color_space", "fitted_on")}
            return cls(**tensors, patch_size=patch_size, **record)
        except (ValueError, RuntimeError) as e:
            raise InputError(f"{path}: {e}") from None

    @classmethod
    def random(cls, dim: int, rank: int, seed: int = 0, scale: float = 1.0, **record) -> "Subspace":
        """A uniformly random subspace. The same seed gives the same bits."""
        if not 0 <= rank <= dim:
            raise InputError(f"rank must be between 0 and the dimension {dim}, but it is {rank}")
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64)).Q
        return cls(basis.float(), scale, **record)

    @classmethod
    def full(cls, dim: int, scale: float = 1.0, **record) -> "Subspace":
        """The subspace of rank D, all of token space: u-prediction."""
        return cls(torch.eye(dim), scale, **record)

    @classmethod
    def empty(cls, dim: int, scale: float = 1.0, **record) -> "Subspace":
        """The subspace of rank 0: x0-prediction."""
        return cls(torch.empty(dim, 0), scale, **record)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, dim={self.dim}, scale={self.scale:.6g}"

    def _apply(self, fn, recurse=True):
        """Called by `to`, `float`, `bfloat16`, ... Never casts the basis below float32, nor the spectrum at all."""

        def no_narrower(buffer: Tensor) -> Tensor:
            device = fn(buffer.new_empty(0, dtype=torch.float32)).device
            fitting = buffer if has_float64(device) else buffer.float()
            moved = fn(fitting)
            keep = (fitting.dtype,) if buffer is self.spectrum else (torch.float32, torch.float64)
            return moved if moved.dtype in keep else fitting.to(device)

        return super()._apply(no_narrower, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # In float64, so that a file keeps every bit of the number.
        destination[f"{prefix}scale"] = torch.tensor(self.scale, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        scale = state_dict.pop(f"{prefix}scale", None)
        if scale is not None:
            try:
                value = float(scale)
            except (RuntimeError, TypeError, ValueError):  # not one number
                value = math.nan
            if math.isfinite(value) and value > 0:
                self.scale = value
            else:
                found = value if getattr(scale, "ndim", 0) == 0 else f"of the shape {tuple(scale.shape)}"
                errors.append(f"{prefix}scale must be one finite number above 0, but it is {found}")
        elif strict:
            missing.append(f"{prefix}scale")
        basis = state_dict.get(f"{prefix}basis")
        if isinstance(basis, Tensor) and not basis.is_meta:
            try:
                check_basis(basis)
            except InputError as e:
                errors.append(f"{prefix}basis: {e}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def check_basis(basis: Tensor) -> None:
    """InputError unless `basis` is (D, r), r <= D, finite, with columns orthonormal to 1e-4."""
    if basis.ndim != 2 or basis.shape[0] == 0 or basis.shape[1] > basis.shape[0]:
        raise InputError(f"a basis must have the shape (D, r) with 0 <= r <= D, but it has {tuple(basis.shape)}")
    if not basis.is_floating_point():
        raise InputError(f"a basis must be of floating point numbers, but it has the dtype {basis.dtype}")
    if not basis.isfinite().all():
        raise InputError("the basis has entries that are not finite (NaN or infinity): fit it again")
    exact = basis.cpu().double()
    error = (exact.mT @ exact - torch.eye(basis.shape[1], dtype=exact.dtype, device=exact.device)).abs()
    if error.numel() and error.max() > TOLERANCE:
        raise InputError(
            f"the basis is not orthonormal: basis.T @ basis differs from the identity by {error.max():.2g}, more than "
            f"{TOLERANCE:g} (torch.linalg.qr(basis).Q has orthonormal columns with the same span)"
        )


def checked_subspace(path: str | Path, basis: Tensor, scale: Tensor | float = 1.0, **record) -> Subspace:
    try:
        return Subspace(orthonormal(basis), scale, **record)
    except (ValueError, TypeError, RuntimeError) as e:
        raise InputError(f"{path}: {e}") from None


def orthonormal(basis: Tensor) -> Tensor:
    """The nearest orthonormal basis, if this one looks rounded to 16 bits; else the same, which Subspace will check."""
    exact = basis.double()
    error = (exact.mT @ exact - torch.eye(basis.shape[-1])).abs()
    if not (error.numel() and TOLERANCE < error.max() < 2**-6):
        return basis
    u, _, vh = torch.linalg.svd(exact, full_matrices=False)
    return (u @ vh).float()
