"""Oklab: the published values, the way back for every colour, slopes that training can use."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow import color
from asymflow.color import clamp_to_gamut, oklab_to_rgb, rgb_to_oklab

MEAN = torch.tensor([0.56, 0.0, 0.01], dtype=torch.float64)[:, None, None]
channels = st.lists(st.floats(-3, 3), min_size=3, max_size=3)


def pixel(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None, None]


@pytest.mark.parametrize(
    ("rgb", "oklab"),
    [  # sRGB in [0, 1]; Oklab to the five digits that other implementations print
        ((1, 1, 1), (1, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (0.62796, 0.22486, 0.12585)),
        ((0, 1, 0), (0.86644, -0.23389, 0.17950)),
        ((0, 0, 1), (0.45201, -0.03246, -0.31153)),
        ((0.5, 0.5, 0.5), (0.59818, 0, 0)),
        ((1, 1, 0), (0.96798, -0.07137, 0.19857)),
        ((1, 165 / 255, 0), (0.79269, 0.05661, 0.16138)),  # orange
        ((0, 128 / 255, 0), (0.51975, -0.14030, 0.10768)),  # green, as the web has it
    ],
)
def test_published_colours(rgb, oklab):
    found = rgb_to_oklab(2 * pixel(rgb) - 1)
    assert torch.allclose(0.16 * found + MEAN, pixel(oklab), rtol=0, atol=6e-6)
    assert torch.allclose(oklab_to_rgb((pixel(oklab) - MEAN) / 0.16), 2 * pixel(rgb) - 1, rtol=0, atol=5e-4)


def test_the_inverse_matrices_are_those_that_are_published_with_the_colour_space():
    published_lms = [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
    published_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    assert [sum(row) for row in color.RGB_TO_LMS] == pytest.approx([1, 1, 1], abs=2e-10)  # white is white
    assert torch.allclose(torch.tensor(color.LAB_TO_LMS), torch.tensor(published_lms), rtol=0, atol=1e-7)
    assert torch.allclose(torch.tensor(color.LMS_TO_RGB), torch.tensor(published_rgb), rtol=0, atol=1e-7)


def test_every_8_bit_colour_comes_back_exactly():
    """All 16.7 million, through float32; and never further off than a fiftieth of the step between two values."""
    level = torch.arange(256.0)
    for red in level:
        colours = torch.stack([red.expand(256, 256), level[:, None].expand(256, 256), level.expand(256, 256)])
        back = (oklab_to_rgb(rgb_to_oklab(colours / 127.5 - 1)) + 1) * 127.5
        assert (back - colours).abs().max() < 0.02


@given(channels)
def test_encoding_and_decoding_are_inverse_also_for_colours_that_no_screen_shows(values):
    """A relative rounding of 1e-16 in the cube roots, magnified by 1 / 12.92 and the matrices; 1e-9 in cube_root."""
    x = pixel(values)
    assert torch.allclose(oklab_to_rgb(rgb_to_oklab(x)), x, rtol=1e-6, atol=2e-7)
    assert torch.allclose(rgb_to_oklab(oklab_to_rgb(x)), x, rtol=1e-6, atol=1e-4)


@given(channels)
def test_the_mirror_image_of_a_colour_in_black_is_that_in_oklab(values):
    """The curves are odd, so that nothing special happens at black: -linear light is -Oklab."""
    x = pixel(values)
    assert torch.allclose(0.16 * rgb_to_oklab(-x - 2) + MEAN, -(0.16 * rgb_to_oklab(x) + MEAN), rtol=1e-9, atol=1e-9)


def test_greys_have_no_hue_and_their_lightness_grows():
    lab = 0.16 * rgb_to_oklab(torch.linspace(-1, 1, 256, dtype=torch.float64).expand(3, 1, 256)) + MEAN
    assert lab[1:].abs().max() < 1e-7
    assert (lab[0].diff() > 0).all()


def test_the_curves_of_srgb_are_continuous_where_their_pieces_meet():
    """To the digits of the standard's constants, 1e-7; the slopes to 2 %, as the standard has it."""
    for curve, joint in ((color.linear_from_srgb, 0.04045), (color.srgb_from_linear, 0.0031308)):
        x = torch.tensor([joint, joint * (1 + 1e-12)], dtype=torch.float64, requires_grad=True)
        y = curve(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert (y[1] - y[0]).abs() < 1e-7
        assert slope[1] / slope[0] == pytest.approx(1, abs=0.02)
        assert (y[0] / joint).item() == pytest.approx(slope[0].item())


@pytest.mark.parametrize("function", [rgb_to_oklab, oklab_to_rgb, clamp_to_gamut])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_finite_everywhere(function, dtype):
    """Above all at black, where those of the true cube root are not."""
    special = [-1.0, 1.0, 0.0, -1 - 1e-7, -0.9999, -3.0, 5.0, -0.56 / 0.16, 0.01 / 0.16, -0.01 / 0.16, -3.5 + 1e-6]
    x = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype).mT[:, None].requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("function", [rgb_to_oklab, oklab_to_rgb])
def test_slopes_are_those_of_the_values(function):
    x = (
        torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    ).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_the_slopes_at_black_are_those_of_straight_lines():
    """|x| and sign(x) have slope 0 there, which would stop all learning of black."""
    x = torch.zeros(1, dtype=torch.float64)
    slopes = {
        f: torch.autograd.functional.jacobian(f, x).item() for f in (color.linear_from_srgb, color.srgb_from_linear)
    }
    assert slopes[color.linear_from_srgb] == pytest.approx(1 / 12.92)
    assert slopes[color.srgb_from_linear] == pytest.approx(12.92)
    assert 1e5 < torch.autograd.functional.jacobian(color.cube_root, x).item() < 1e7


def test_the_cube_root_is_one():
    x = torch.logspace(-20, 2, 5001, dtype=torch.float64)
    x = torch.cat([-x, torch.zeros(1, dtype=x.dtype), x])
    root = color.cube_root(x)
    assert (root**3 - x).abs().le(5.1e-10 + 1e-14 * x.abs()).all()
    seen = x.abs() > 1e-5  # of all 8-bit colours but black, the smallest
    assert torch.allclose(root[seen] ** 3, x[seen], rtol=2e-8, atol=0)
    assert (root.sign() == x.sign()).all()


@given(channels)
def test_what_is_clamped_can_be_shown_and_what_can_be_shown_is_left_alone(values):
    x = pixel(values)
    clamped = clamp_to_gamut(x)
    rgb = oklab_to_rgb(clamped)
    assert rgb.abs().max() <= 1 + 1e-6
    assert torch.allclose(rgb, oklab_to_rgb(x).clamp(-1, 1), rtol=0, atol=1e-6)
    assert torch.allclose(clamp_to_gamut(clamped), clamped, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 6, 3, 4, 5)])
def test_every_pixel_by_itself_in_images_and_videos(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = rgb_to_oklab(x)
    assert y.shape == x.shape
    one = x[..., 2:3, 3:4].reshape(-1, 3, 1, 1)[-1]
    # Not to the bit: a vectorized kernel rounds a single pixel otherwise than many.
    assert torch.allclose(rgb_to_oklab(one), y[..., 2:3, 3:4].reshape(-1, 3, 1, 1)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [rgb_to_oklab, oklab_to_rgb, clamp_to_gamut])
def test_never_computed_in_less_than_float32(function):
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = function(x.float())
    assert expected.dtype == torch.float32
    assert torch.equal(function(x), expected)
    assert function(x.double()).dtype == torch.float64
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(x.float()), expected)
    finally:
        torch.set_float32_matmul_precision(before)
