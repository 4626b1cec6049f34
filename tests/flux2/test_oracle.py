"""The oracle of the generated pictures: what it reads is what was drawn, and it does not see what is not there."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from asymflow.data.shapes import COLORS, SHAPES, Scene, make_scene, render
from asymflow.errors import InputError
from asymflow.evaluation.oracle import PARTS, Thing, agreement, detail, fit_scene, parse_caption, read_scene, score

SEED = 31_337  # of scenes that no training here draws


def scene(*cells, shape=0, color=0, radius=0.12, ground=240.0):
    centers = tuple(((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3) for cell in cells)
    return Scene(shape, color, cells, centers, (radius,) * len(cells), ground)


def noisy(picture, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, deviation, picture.shape)
    return torch.from_numpy((picture.numpy() + noise).clip(0, 255).round().astype(np.uint8))


def blurred(picture, radius):
    return torch.from_numpy(gaussian_filter(picture.double().numpy(), (0, radius, radius), mode="nearest")) / 127.5 - 1


def joined(left, right):
    """The left half of one picture, and the right half of another."""
    return torch.cat([left[..., : left.shape[-1] // 2], right[..., right.shape[-1] // 2 :]], dim=-1)


# ---- Captions --------------------------------------------------------------------------------------------------------
def test_a_caption_is_parsed_to_what_it_says_for_every_scene_there_is():
    seen = set()
    for shape, color, count in product(range(4), range(4), (1, 2, 3)):
        for cells in combinations(range(9), count):
            caption = scene(*cells, shape=shape, color=color).caption
            wanted = parse_caption(caption)
            assert (wanted.shape, wanted.color, wanted.cells, wanted.count) == (shape, color, cells, count)
            assert wanted.caption == caption
            seen.add(caption)
    assert len(seen) == 16 * (9 + 36 + 84)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "two red circles: top left",
        "one red circles: top left",
        "two red crosss: top left, top right",
        "two red circles: top right, top left",
        "two red circles: top left, top left",
        "four red circles: top left, top center, top right, middle left",
        "one red circle: top left\n",
        "one pink circle: top left",
        "One red circle: top left",
    ],
)
def test_a_text_that_no_scene_has_is_refused(text):
    with pytest.raises(InputError, match="is not the caption of a scene"):
        parse_caption(text)


# ---- Reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "count"),
    [(24, 50), (32, 50), (48, 30), (64, 20), (96, 5), pytest.param(128, 20, marks=pytest.mark.slow)],
)
def test_every_clean_picture_is_read_as_it_was_drawn(size, count):
    scenes = [make_scene(SEED, index) for index in range(count)]
    readings = [read_scene(render(s, size)) for s in scenes]
    assert readings == [parse_caption(s.caption) for s in scenes]
    assert [r.caption for r in readings] == [s.caption for s in scenes]


def test_the_corners_of_the_world_are_read_too():
    # The smallest and largest radius at the ends of the jitter, in the center and in a corner, on either ground.
    for shape, color, radius, ground in product(range(4), range(4), (0.11, 0.135), (225.0, 255.0)):
        for cell, (dx, dy) in product((0, 4), ((-0.03, -0.03), (0.03, 0.03))):
            at = ((cell % 3 + 0.5) / 3 + dx, (cell // 3 + 0.5) / 3 + dy)
            drawn = Scene(shape, color, (cell,), (at,), (radius,), ground)
            assert read_scene(render(drawn, 32)).caption == drawn.caption


def test_dtypes_and_conventions_agree():
    for index in range(8):
        picture = render(make_scene(SEED, index), 64)
        image = picture.float() / 127.5 - 1
        reading = read_scene(picture)
        assert read_scene(image) == read_scene(image.double()) == read_scene(image.bfloat16()) == reading
        # What is beyond the range is cut off when an image is saved: it is no part of the picture.
        assert read_scene(torch.where(image > 0.7, image + 5 * image.abs(), image)).cells == reading.cells
        assert fit_scene(image).residual == pytest.approx(fit_scene(picture).residual, abs=1e-3)


def test_small_noise_and_soft_edges_are_read_through():
    scenes = [make_scene(SEED, index) for index in range(20)]
    pictures = [render(s, 64) for s in scenes]
    everything = dict.fromkeys(PARTS, 1.0)
    assert score([noisy(p, 40, i) for i, p in enumerate(pictures)], scenes) == everything
    assert score([blurred(p, 2) for p in pictures], scenes) == everything
    assert (
        score([blurred(noisy(p, 40, i), 1) for i, p in enumerate(pictures)], [s.caption for s in scenes]) == everything
    )
    # Uniform noise has nothing in common with a scene.
    assert score(torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1, scenes)["all"] == 0


def test_things_that_differ_are_read_one_by_one():
    red, blue = render(scene(3, color=0), 64), render(scene(5, color=2), 64)
    reading = read_scene(joined(red, blue))
    assert reading.shown == (None, None, None, Thing(0, 0), None, Thing(0, 2), None, None, None)
    assert (reading.shape, reading.color, reading.cells, reading.caption) == (0, None, (3, 5), None)
    right = agreement(reading, scene(3, 5, color=0))
    assert right == {"count": True, "color": False, "shape": True, "position": True, "all": False}

    reading = read_scene(joined(red, render(scene(5, shape=3), 64)))
    assert (reading.shape, reading.color) == (None, 0)
    assert agreement(reading, "two red crosses: middle left, middle right") == {**right, "color": True, "shape": False}
    assert not agreement(reading, "one red circle: middle left")["count"]


def test_more_than_a_caption_can_count_is_still_read():
    reading = read_scene(render(scene(0, 2, 4, 6, 8), 64))
    assert (reading.count, reading.cells, reading.caption) == (5, (0, 2, 4, 6, 8), None)


def test_names_are_those_of_the_data():
    reading = read_scene(render(scene(0, shape=3, color=2), 32))
    assert (SHAPES[reading.shape], list(COLORS)[reading.color]) == ("cross", "blue")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("color", range(4))
def test_a_circle_or_square_half_drawn_is_a_thing_without_a_shape(size, color):
    for shape in (0, 1):
        whole, empty = render(scene(4, shape=shape, color=color), size), render(scene(), size)
        reading = read_scene(joined(whole, empty))
        assert reading.cells == (4,)
        assert reading.shape is None
        assert reading.caption is None
        assert not agreement(reading, scene(4, shape=shape, color=color))["all"]


def test_a_shape_of_two_colors_has_none():
    for first, second in combinations(range(4), 2):
        for shape in (0, 1):
            two = joined(
                render(scene(4, shape=shape, color=first), 64), render(scene(4, shape=shape, color=second), 64)
            )
            reading = read_scene(two)
            assert (reading.cells, reading.color, reading.caption) == ((4,), None, None)


def test_what_is_not_of_this_world_is_not_named():
    drawn, size = scene(4), 64
    picture, ground = render(drawn, size).float(), torch.full((3, 1, 1), 240.0)
    share = ((ground - picture) / (ground - torch.tensor(COLORS["red"])[:, None, None]))[1:2]

    def read(pixels):
        return read_scene(pixels.expand(3, size, size) / 127.5 - 1)

    def recolored(*color):
        return read(ground + share * (torch.tensor(color, dtype=torch.float)[:, None, None] - ground))

    assert recolored(214, 39, 40) == parse_caption(drawn.caption)
    purple = recolored(128, 0, 128)
    assert (purple.cells, purple.shape, purple.color) == ((4,), 0, None)  # a circle, of no known colour
    assert recolored(0, 0, 0).caption is None
    assert read(ground + 0.2 * (picture - ground)).count == 0  # a faint ghost
    assert read(ground + 0.4 * (picture - ground)).caption is None  # a strong one
    assert read(ground).shown == (None,) * 9
    for level in (0.0, 100.0, 127.5):  # no ground of this world
        assert {thing and thing.shape for thing in read(torch.full((3, 1, 1), level)).shown} == {None}
        assert read(torch.full((3, 1, 1), level)).count == 9
    for size_of_it in (0.07, 0.165):  # much smaller, or larger
        assert read_scene(render(scene(4, radius=size_of_it), size)).caption is None
    between = Scene(0, 0, (4,), ((0.5, 2 / 3),), (0.12,), 240.0)  # on the border of two cells
    assert read_scene(render(between, size)).caption is None


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([24, 37, 64]), st.sampled_from(["noise", "blocks", "wild", "bytes"]))
def test_rubbish_has_a_reading_always_the_same_but_no_caption(seed, size, kind):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(3, size, size, generator=g)
    if kind == "blocks":
        image = torch.nn.functional.interpolate(image[None, :, :5, :5], size)[0]
    elif kind == "wild":
        image = torch.where(image > 1, math.nan, torch.where(image < -1, -math.inf, 1e30 * image))
    elif kind == "bytes":
        image = (100 * image + 200).clamp(0, 255).to(torch.uint8)
    reading, fit = read_scene(image), fit_scene(image)
    assert len(reading.shown) == 9
    assert reading.caption is None
    assert 0 <= fit.residual <= 255
    assert read_scene(image) == reading
    assert fit_scene(image).residual == fit.residual


@given(st.integers(0, 999), st.sampled_from([24, 37, 64]), st.sampled_from([0, 10, 20]))
def test_of_a_recognized_scene_the_caption_says_all_and_edges_are_no_sharper_than_ideal(index, size, deviation):
    image = noisy(render(make_scene(SEED, index), size), deviation, index)
    reading = read_scene(image)
    assert parse_caption(reading.caption) == reading
    assert 0 < fit_scene(image).sharpness <= 1


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(64, 64),
        torch.zeros(()),
        torch.zeros(1, 64, 64),
        torch.zeros(3, 64, 48),
        torch.zeros(2, 3, 64, 64),
        torch.zeros(3, 16, 16),
        torch.zeros(3, 64, 64, dtype=torch.int64),
        torch.zeros(3, 64, 64, dtype=torch.bool),
    ],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(InputError, match="an image must be"):
        read_scene(image)


def test_a_score_is_of_pairs():
    scenes = [make_scene(SEED, index) for index in range(3)]
    images = torch.stack([render(s, 32) for s in scenes])
    with pytest.raises(InputError, match="3 images and 2 captions"):
        score(images, scenes[:2])
    with pytest.raises(InputError, match="0 images"):
        score([], [])
    swapped = score(images, [scenes[0].caption, scenes[2].caption, scenes[1]])
    assert swapped["all"] == pytest.approx(1 / 3)


# ---- Detail ----------------------------------------------------------------------------------------------------------
PICTURES = [render(make_scene(SEED, index), 64) for index in range(8)]


@pytest.mark.parametrize("size", [32, 64, pytest.param(128, marks=pytest.mark.slow)])
def test_a_rendered_picture_is_its_own_ideal(size):
    fits = [fit_scene(render(make_scene(SEED, index), size)) for index in range(10)]
    assert min(fit.sharpness for fit in fits) > 0.98
    # Ground and pixels were rounded to whole levels: 1 / sqrt(12) = 0.29 each. The search may stop where a few of the
    # 16 samples of a pixel at the edge are on the other side, 16 levels each: seldom, and in few pixels.
    residuals = [fit.residual for fit in fits]
    assert np.median(residuals) < 0.29 * 2
    assert max(residuals) < 4


@pytest.mark.parametrize("radius", [1, 1.5, 2])
def test_blur_is_measured_in_pixels(radius):
    found = detail([blurred(p, radius) for p in PICTURES])
    assert found["blur"] == pytest.approx(radius, rel=0.1)
    # The steepness of a step over one pixel, after a Gaussian: P(|radius n| < 1/2).
    assert found["sharpness"] == pytest.approx(math.erf(0.5 / (math.sqrt(2) * radius)), rel=0.1)
    assert found["measured"] == 1


def test_sharpness_falls_with_blur_and_the_residual_rises():
    found = [detail([blurred(p, radius) for p in PICTURES]) for radius in (0, 0.5, 1, 2)]
    sharpness, residual = [f["sharpness"] for f in found], [f["residual"] for f in found]
    assert sharpness == sorted(sharpness, reverse=True)
    assert residual == sorted(residual)
    assert sharpness[0] > 0.98
    assert sharpness[1] < 0.85


def test_noise_and_ringing_make_nothing_sharper():
    def with_noise(images, deviation):
        return [
            i + deviation / 127.5 * torch.from_numpy(np.random.default_rng(n).normal(size=i.shape)) for n, i in images
        ]

    soft = list(enumerate(blurred(p, 1) for p in PICTURES))
    plain, noised = detail([image for _, image in soft]), detail(with_noise(soft, 20))
    assert noised["sharpness"] == pytest.approx(plain["sharpness"], rel=0.06)
    assert 15 < noised["residual"] < math.hypot(plain["residual"], 20)  # what is brighter than white is clamped

    # The sharpest that a band limit of half the Nyquist frequency allows: it rings, and is still soft.
    def limited(picture):
        inside = torch.fft.fftfreq(64).abs() < 0.25
        return torch.fft.ifft2(torch.fft.fft2(picture.double() / 127.5 - 1) * (inside[:, None] & inside)).real

    assert detail([limited(p) for p in PICTURES])["sharpness"] < 0.75
    # Sharpened by an unsharp mask, edges overshoot: no reward, but a residual.
    overshot = detail([2 * blurred(p, 0.01) - blurred(p, 1) for p in PICTURES])
    assert overshot["sharpness"] <= 1
    assert overshot["residual"] > 3


def test_the_residual_knows_of_a_thing_that_should_not_be_there():
    clean, spot = PICTURES[0].clone(), PICTURES[0].clone()
    empty = next(cell for cell in range(9) if cell not in make_scene(SEED, 0).cells)
    y, x = (round((place + 0.5) * 64 / 3) for place in divmod(empty, 3))
    spot[:, y - 4 : y + 4, x - 4 : x + 4] = 0
    added = (clean.float() - spot.float()).square().mean().sqrt().item()
    assert fit_scene(spot).residual == pytest.approx(math.hypot(added, fit_scene(clean).residual), rel=0.02)


def test_detail_is_of_what_is_recognized():
    empty = render(scene(), 64)
    assert math.isnan(fit_scene(empty).sharpness)
    assert detail([empty, PICTURES[0]])["measured"] == 0.5
    assert detail([empty, PICTURES[0]])["residual"] == fit_scene(PICTURES[0]).residual
    assert math.isnan(detail([empty])["sharpness"])
