"""asymflow/patches.py: held against loops that are written out by hand."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow import InputError, patchify, unpatchify
from asymflow.patches import TOKEN_ORDERS, check_token_order, token_grid

ORDERS, SEEDS = st.sampled_from(TOKEN_ORDERS), st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])


@st.composite
def pictures(draw):
    """(images (B, C, H, W) or (B, T, C, H, W), patch size): every number in them another one."""
    patch, h, w, batch, channels = (draw(st.integers(1, most)) for most in (4, 3, 3, 3, 4))
    lead = [batch, draw(st.integers(1, 3))] if draw(st.booleans()) else [batch]
    shape = [*lead, channels, h * patch, w * patch]
    return torch.arange(prod(shape), dtype=torch.float64).reshape(shape), patch


def patchify_by_hand(images, patch, order):
    videos = images if images.ndim == 5 else images[:, None]
    batch, frames, channels, height, width = videos.shape
    tokens = []
    for b in range(batch):
        tokens.append([])
        for t in range(frames):
            for top in range(0, height, patch):
                for left in range(0, width, patch):
                    rows, columns = range(top, top + patch), range(left, left + patch)
                    last = [videos[b, t, c, y, x] for y in rows for x in columns for c in range(channels)]
                    first = [videos[b, t, c, y, x] for c in range(channels) for y in rows for x in columns]
                    tokens[b].append(torch.stack(last if order == "channel_last" else first))
        tokens[b] = torch.stack(tokens[b])
    return torch.stack(tokens)


@given(pictures(), ORDERS)
def test_tokens_are_those_of_loops_over_rows_and_columns(picture, order):
    images, patch = picture
    assert torch.equal(patchify(images, patch, order), patchify_by_hand(images, patch, order))


@given(pictures(), ORDERS, DTYPES)
def test_the_inverse_gives_back_every_bit_of_every_dtype(picture, order, dtype):
    images, patch = picture
    images = images.to(dtype)
    tokens, grid = patchify(images, patch, order), token_grid(images, patch)
    assert tokens.dtype == dtype
    assert tokens.shape == (len(images), prod(grid), images.shape[-3] * patch**2)
    back = unpatchify(tokens, grid, patch, order)
    assert back.dtype == dtype
    assert torch.equal(back, images)


@given(pictures(), ORDERS)
def test_memory_layout_does_not_matter(picture, order):
    images, patch = picture
    square, expected = images.mT, patchify(images.mT.contiguous(), patch, order)
    assert torch.equal(patchify(square, patch, order), expected)
    every_other = torch.stack([images, -images], -1).flatten(-2)[..., ::2]
    assert torch.equal(patchify(every_other, patch, order), patchify(images, patch, order))
    tokens, grid = torch.stack([expected, -expected])[0].mT.contiguous().mT, token_grid(square, patch)
    assert torch.equal(unpatchify(tokens, grid, patch, order), square)


@given(pictures(), ORDERS, SEEDS)
def test_gradients_are_carried_to_their_pixels(picture, order, seed):
    """A permutation: its gradient is the inverse permutation, bit for bit, both ways."""
    images, patch = picture
    grid = token_grid(images, patch)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad((patchify(images, patch, order) * patchify(weights, patch, order)).sum(), images)
    assert torch.equal(gradient, weights)
    tokens = patchify(images.detach(), patch, order).requires_grad_()
    (gradient,) = torch.autograd.grad((unpatchify(tokens, grid, patch, order) * weights).sum(), tokens)
    assert torch.equal(gradient, patchify(weights, patch, order))


@pytest.mark.parametrize("order", TOKEN_ORDERS)
def test_one_image_at_a_time_compiled_and_mapped_are_a_batch(order):
    images = torch.randn(3, 2, 4, 6)
    there_and_back = lambda x: unpatchify(2 * patchify(x, 2, order), (2, 3), 2, order)
    assert torch.equal(torch.func.vmap(lambda x: patchify(x[None], 2, order)[0])(images), patchify(images, 2, order))
    assert torch.equal(torch.cat([patchify(x[None], 2, order) for x in images]), patchify(images, 2, order))
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), 2 * images)


@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (0, 2, 3, 4, 6), (2, 0, 3, 4, 6)])
def test_no_images_make_no_tokens(shape):
    """The last batch of a sharded data set, say."""
    images = torch.empty(shape)
    tokens = patchify(images, 2)
    assert tokens.shape == (shape[0], prod(shape[1:-3]) * 6, 12)
    assert unpatchify(tokens, token_grid(images, 2), 2).shape == shape


# ---- Mistakes --------------------------------------------------------------------------------------------------------

IMAGES, TOKENS = torch.zeros(2, 3, 4, 6), torch.zeros(2, 6, 12)
MISTAKES = {
    "one image without a batch": (lambda: patchify(IMAGES[0], 2), "shape (3, 4, 6)"),
    "six axes": (lambda: patchify(IMAGES[None, None], 2), "shape (1, 1, 2, 3, 4, 6)"),
    "height": (lambda: patchify(IMAGES[..., :3, :], 2), "3 x 6 pixels"),
    "width": (lambda: patchify(IMAGES[..., :5], 2), "4 x 5 pixels"),
    "patches larger than the image": (lambda: patchify(IMAGES, 8), "multiples of 8"),
    "an image without rows": (lambda: patchify(IMAGES[..., :0, :], 2), "0 x 6 pixels"),
    "an image without columns": (lambda: patchify(IMAGES[..., :0], 2), "4 x 0 pixels"),
    "another order": (lambda: patchify(IMAGES, 2, "channels_last"), "'channels_last'"),
    "another order back": (lambda: unpatchify(TOKENS, (2, 3), 2, "hwc"), "'hwc'"),
    "no order": (lambda: check_token_order(None), "None"),
    "another grid": (lambda: unpatchify(TOKENS, (2, 2), 2), "2 x 2 patches"),
    "another grid of a video": (lambda: unpatchify(TOKENS, (2, 2, 3), 2), "2 x 2 x 3 patches"),
    "another patch size": (lambda: unpatchify(TOKENS, (2, 3), 5), "5 x 5 pixels"),
    "patches of no pixels": (lambda: patchify(IMAGES, 0), "0"),
    "patches of fewer than no pixels": (lambda: patchify(IMAGES, -2), "-2"),
    "patches of no pixels back": (lambda: unpatchify(TOKENS, (2, 3), 0), "0"),
    "tokens without a batch": (lambda: unpatchify(TOKENS[0], (2, 3), 2), "(6, 12)"),
    "a grid of one axis": (lambda: unpatchify(TOKENS, (6,), 2), "6"),
    "a grid of four axes": (lambda: unpatchify(TOKENS, (1, 1, 2, 3), 2), "1 x 1 x 2 x 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(name):
    call, named = MISTAKES[name]
    with pytest.raises(InputError, match=r"\A[^\n]+\Z") as error:
        call()
    assert named in str(error.value)
