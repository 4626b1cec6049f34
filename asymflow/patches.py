"""Images to tokens and back. A token is one square patch, flattened in one of two orders."""

from math import prod

from torch import Tensor

from asymflow.errors import InputError

CHANNEL_LAST = "channel_last"  # row, column, channel: DiT, JiT
CHANNEL_FIRST = "channel_first"  # channel, row, column: FLUX
TOKEN_ORDERS = (CHANNEL_LAST, CHANNEL_FIRST)


def patchify(images: Tensor, patch_size: int, token_order: str = CHANNEL_LAST) -> Tensor:
    """Cut images into tokens.

    images: (B, C, H, W), or a video (B, T, C, H, W); H and W are multiples of `patch_size`. Any dtype. Returns
    (B, H / patch_size * W / patch_size, C patch_size^2), for a video with T times as many tokens, frame after frame.
    Tokens run row by row; `token_order` says how the numbers in a token are ordered.
    Raises InputError if the sizes do not fit.
    """
    grid = token_grid(images, patch_size)
    check_token_order(token_order)
    cut = images.unflatten(-2, (grid[-2], patch_size)).unflatten(-1, (grid[-1], patch_size))
    # From (..., C, h, p, w, q) to (..., h, w, p, q, C) or (..., h, w, C, p, q); the leading axes stay.
    lead, (c, h, p, w, q) = range(cut.ndim - 5), range(cut.ndim - 5, cut.ndim)
    inner = (p, q, c) if token_order == CHANNEL_LAST else (c, p, q)
    return cut.permute(*lead, h, w, *inner).flatten(-3).flatten(1, -2)


def unpatchify(tokens: Tensor, grid: tuple[int, ...], patch_size: int, token_order: str = CHANNEL_LAST) -> Tensor:
    """The inverse of `patchify`: tokens (B, N, D) to (B, C, H, W), or to (B, T, C, H, W) if grid is (T, h, w).

    grid: the number of tokens along each axis, (h, w) or (T, h, w). Raises InputError if the sizes do not fit.
    """
    check_token_order(token_order)
    check_patch_size(patch_size)
    batch, count, dim = tokens.shape if tokens.ndim == 3 else (0, -1, 0)
    if count != prod(grid) or dim % patch_size**2 or len(grid) not in (2, 3):
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} do not make a grid of {' x '.join(map(str, grid))} patches of "
            f"{patch_size} x {patch_size} pixels"
        )
    channels = dim // patch_size**2
    inner = (patch_size, patch_size, channels) if token_order == CHANNEL_LAST else (channels, patch_size, patch_size)
    cut = tokens.reshape(batch, *grid, *inner)
    last = range(cut.ndim - 5, cut.ndim)
    h, w, (p, q, c) = last[0], last[1], last[2:] if token_order == CHANNEL_LAST else (last[3], last[4], last[2])
    return cut.permute(*range(cut.ndim - 5), c, h, p, w, q).flatten(-4, -3).flatten(-2, -1)


def token_grid(images: Tensor, patch_size: int) -> tuple[int, ...]:
    """How many tokens `patchify` makes along each axis: (h, w), or (T, h, w) for a video."""
    if images.ndim not in (4, 5):
        raise InputError(
            f"images must be (B, C, H, W) or (B, T, C, H, W), but they have the shape {tuple(images.shape)}"
        )
    check_patch_size(patch_size)
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise InputError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}: crop or "
            f"resize it to multiples of {patch_size}"
        )
    return (*images.shape[1:-3], height // patch_size, width // patch_size)


def check_patch_size(patch_size: int) -> None:
    if not isinstance(patch_size, int) or patch_size < 1:
        raise InputError(f"patch_size must be a whole number of pixels, at least 1, but it is {patch_size!r}")


def check_token_order(token_order: str) -> None:
    if token_order not in TOKEN_ORDERS:
        raise InputError(f"token_order must be one of {', '.join(TOKEN_ORDERS)}, but it is {token_order!r}")
