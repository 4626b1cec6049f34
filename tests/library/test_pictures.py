"""Pictures: every image in its place, patches that show what the vectors are, the same bytes every time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from asymflow import InputError, Subspace, pictures
from asymflow.patches import TOKEN_ORDERS, patchify
from asymflow.pictures import basis_patches, draw_spectrum, draw_subspace, image_grid


def flat(*levels, height=5, width=3):
    """Grey images, one for each level in 0 .. 255."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, height, width) / 127.5 - 1


@pytest.mark.parametrize(
    ("n", "columns", "size"), [(1, None, (1, 1)), (7, None, (3, 3)), (9, None, (3, 3)), (7, 2, (2, 4)), (3, 9, (3, 1))]
)
def test_each_image_of_a_grid_is_in_its_place_and_all_else_is_white(n, columns, size):
    levels = list(range(10, 10 + 20 * n, 20))
    grid = np.asarray(image_grid(flat(*levels), columns, gap=2))
    assert grid.shape == (size[1] * 7 - 2, size[0] * 5 - 2, 3)
    expected = np.full_like(grid, 255)
    for i, level in enumerate(levels):
        row, column = divmod(i, size[0])
        expected[7 * row : 7 * row + 5, 5 * column : 5 * column + 3] = level
    assert (grid == expected).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3), st.integers(0, 300))
def test_a_wider_grid_is_the_same_grid_with_every_pixel_repeated_as_often(n, columns, side, gap, width):
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n)) * 2 - 1
    plain, wide = (np.asarray(image_grid(images, columns, gap, width=w)) for w in (0, width))
    columns, rows = min(columns, n), -(-n // min(columns, n))
    times, left = divmod(wide.shape[1] + gap - columns * gap, columns * side)
    assert left == 0
    assert wide.shape[0] == rows * (times * side + gap) - gap
    assert wide.shape[1] >= width
    assert times == 1 or columns * ((times - 1) * side + gap) - gap < width  # no wider than it must be
    for i in range(n):
        (row, column), images = divmod(i, columns), []
        for grid, k in ((plain, 1), (wide, times)):
            top, start = row * (k * side + gap), column * (k * side + gap)
            images.append(grid[top : top + k * side, start : start + k * side])
        assert (images[0].repeat(times, 0).repeat(times, 1) == images[1]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(InputError, match="must be"):
        image_grid(torch.zeros(shape))


@pytest.mark.parametrize("token_order", TOKEN_ORDERS)
def test_a_vector_is_drawn_as_the_image_that_it_is(token_order):
    """An image becomes a token becomes a basis vector; drawn, it is the image again, but for its brightness."""
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    token = patchify(image[None], 4, token_order)[0, 0]
    patches = basis_patches(Subspace((token / token.norm())[:, None], patch_size=4, token_order=token_order), 1)
    assert torch.allclose(patches[0], image / image.abs().max(), atol=1e-6)


def test_without_an_order_it_is_that_of_AsymFlow():  # noqa: N802
    basis = Subspace.random(48, 2).basis
    drawn = [basis_patches(Subspace(basis, patch_size=4, token_order=order), 2) for order in (None, "channel_last")]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_can_be_seen(channels):
    subspace = Subspace.random(channels * 16, 6, patch_size=4, token_order="channel_first")
    patches = basis_patches(subspace, 64)
    assert patches.shape == (6, 3, 4, 4)
    assert patches.abs().amax((1, 2, 3)) == pytest.approx(1)
    if channels < 3:
        assert torch.equal(patches[:, 0], patches[:, 1])
        assert torch.equal(patches[:, 0], patches[:, 2])
    vectors = subspace.basis.mT.unflatten(1, (channels, 4, 4))
    assert torch.allclose(
        patches[:, 0] * vectors[:, 0].abs().amax((1, 2), keepdim=True),
        vectors[:, 0] * patches[:, 0].abs().amax((1, 2), keepdim=True),
        atol=1e-6,
    )


def test_directions_of_oklab_are_drawn_in_their_colours_and_can_be_shown():
    """Lightness is grey, a is red against green, b is yellow against blue; all around the same middle grey."""
    axes = torch.eye(3).repeat(16, 1) / 4  # channel last: each vector is one channel of all 16 pixels
    signs = torch.ones(48, 1)
    signs[:24] = -1  # the upper half of the patch is the negative of the lower
    lightness, a, b = basis_patches(
        Subspace(axes * signs, patch_size=4, token_order="channel_last", color_space="oklab"), 3
    )
    for patch in (lightness, a, b):
        assert patch.abs().max() <= 1
        assert (patch[:, 0] - patch[:, 3]).abs().max() > 0.5
    assert (lightness.amax(0) - lightness.amin(0)).max() < 0.15
    assert (lightness[:, 3] > lightness[:, 0] + 1.5).all()
    assert a[0, 3, 0] > a[1, 3, 0] + 0.5  # below, +a: more red than green
    assert a[1, 0, 0] > a[0, 0, 0] + 0.5
    assert min(b[0, 3, 0], b[1, 3, 0]) > b[2, 3, 0] + 0.5  # +b: more red and green than blue
    assert b[2, 0, 0] > max(b[0, 0, 0], b[1, 0, 0]) + 0.3


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures = []

    class Recorded(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(pictures, "Figure", Recorded)
    return figures


def spectrum(dim):
    return 0.5 ** torch.arange(dim, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rank", "title"),
    [(0, "0 directions"), (1, "1 direction"), (8, "8 directions"), (64, "64 directions"), (80, "64 of 80 directions")],
)
def test_the_picture_says_how_many_directions_it_shows(drawn, tmp_path, rank, title):
    file = tmp_path / "a" / "subspace.png"
    draw_subspace(Subspace.random(108, rank, patch_size=6, fitted_on="things " * 30), file)
    assert [axes.get_title() for axes in drawn[0].axes] == [title]
    image = np.asarray(Image.open(file).convert("RGB")).astype(int)
    colourful = (image.max(2) - image.min(2) > 40).mean()
    assert (colourful > 0.1) == (rank > 0)
    assert [f.name for f in file.parent.iterdir()] == ["subspace.png"]


@pytest.mark.parametrize("rank", [0, 1, 3, 12])
def test_the_energy_is_drawn_with_the_share_of_the_subspace(drawn, tmp_path, rank):
    """Energies 1, 1/2, 1/4, ... : r directions hold 1 - 2^-r of nearly all."""
    draw_subspace(Subspace.random(12, rank, patch_size=2, spectrum=spectrum(12)), tmp_path / "s.png")
    _, above, below = drawn[0].axes
    x, y = above.lines[0].get_data()
    assert x == pytest.approx(range(1, 13))
    assert y == pytest.approx(spectrum(12) / (2 - 2**-11))
    assert above.get_yscale() == "log"
    assert below.lines[0].get_ydata() == pytest.approx([(1 - 0.5**r) / (1 - 0.5**12) for r in range(1, 13)])
    if rank == 0:
        assert below.get_legend() is None
    else:
        (text,) = below.get_legend().get_texts()
        assert text.get_text() == f"rank {rank}: {100 * (1 - 0.5**rank) / (1 - 0.5**12):.1f} %"
        assert {float(panel.lines[1].get_xdata()[0]) for panel in (above, below)} == {rank}
        for panel in (above, below):  # the mark is on the curve
            (x, y), (curve_x, curve_y) = panel.lines[2].get_data(), panel.lines[0].get_data()
            assert (x[0], y[0]) == (curve_x[rank - 1], curve_y[rank - 1])


@given(st.lists(st.floats(1e-6, 1), min_size=12, max_size=12), st.floats(1, 1e4))
@settings(max_examples=10)
def test_no_tick_is_above_all_of_the_energy(rest, most):
    """However much of it the first direction has."""
    below = Figure(figsize=(5, 5.6)).subplots(2)
    energy = torch.tensor([most, *sorted(rest[1:], reverse=True)], dtype=torch.float64)
    draw_spectrum(Subspace.random(12, 3, patch_size=2, spectrum=energy), *below)
    ticks, (low, high) = below[1].get_yticks(), below[1].get_ylim()
    assert low <= ticks.min() <= ticks.max() <= 1 + 1e-9 < high
    assert len(ticks) >= 2
    for panel in below:
        labels = [panel.yaxis.get_major_formatter()(tick, 0) for tick in panel.get_yticks()]
        assert len(set(labels)) == len(labels)


def test_a_spectrum_with_zeros_can_be_drawn(tmp_path):
    energy = torch.cat([spectrum(3), torch.zeros(9)])
    draw_subspace(Subspace.random(12, 3, patch_size=2, spectrum=energy), tmp_path / "s.png")


def test_drawn_twice_the_bytes_are_the_same(tmp_path):
    for name in ("a.png", "b.png"):
        draw_subspace(Subspace.random(12, 5, patch_size=2, color_space="oklab", spectrum=spectrum(12)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_a_patch_size_nothing_is_drawn_and_nothing_left(tmp_path):
    with pytest.raises(InputError, match="patch size"):
        draw_subspace(Subspace.random(12, 5), tmp_path / "s.png")
    assert not list(tmp_path.iterdir())
