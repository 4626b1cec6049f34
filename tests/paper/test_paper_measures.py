"""What the samples of toy.paper are judged by: each measure is what it claims to be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.backbones.jit import JiT
from asymflow.data.shapes import Shapes
from asymflow.model import AsymFlow
from asymflow.patches import unpatchify
from asymflow.subspace import Subspace
from toy.paper import measures

PATCH = 8


def pictures(count, first=0, size=32):
    return torch.stack([Shapes(10**6, size)[first + i].image for i in range(count)])


@pytest.fixture(scope="module")
def real():
    return pictures(24)


# ---- Distances -------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 99), moved=st.floats(0.02, 0.4))
def test_moving_every_patch_by_one_vector_is_as_far_as_that_vector(seed, moved):
    """But for the directions, of which there are not infinitely many."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 120, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    vector = (moved * 255 * torch.rand(3, PATCH, PATCH, generator=generator)).round().to(torch.uint8)
    found = measures.patch_distance(images + vector.repeat(1, 2, 2), images, PATCH)
    expected = (vector.double() / 255).square().mean().sqrt().item()
    assert found == pytest.approx(expected, rel=0.15)


def test_patches_in_another_order_are_as_good_and_others_are_farther(real):
    shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    assert measures.patch_distance(shuffled, real, PATCH) == 0
    floor = measures.patch_distance(pictures(24, first=100), real, PATCH)
    noisy = (real.float() + 40 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    assert 0 < floor < measures.patch_distance(noisy.to(torch.uint8), real, PATCH)


# ---- Spectrum --------------------------------------------------------------------------------------------------------
@given(octave=st.integers(0, 3), phase=st.floats(0, 6), axis=st.sampled_from([0, 1]))
def test_a_wave_has_its_power_in_the_octave_of_its_frequency(octave, phase, axis):
    wave = 100 * torch.sin(2 * math.pi * 2**octave * torch.arange(32) / 32 + phase) + 128
    image = (wave[None] if axis else wave[:, None]).expand(3, 32, 32).round().to(torch.uint8)
    power = measures.octaves(image[None])
    assert len(power) == 5
    assert power.argmax() == octave
    assert power[octave] > 0.99 * power.sum()
    assert power.sum() == pytest.approx((image.double() / 255).mean(0).sub(image.double().mean() / 255).square().sum())


def test_twice_the_contrast_is_six_decibels_in_every_octave(real):
    half = (real.float() - 128) / 2 + 128
    assert measures.spectrum_error(half, real) == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert measures.spectrum_error(real, real) == 0


# ---- Seams -----------------------------------------------------------------------------------------------------------
def test_a_step_between_patches_is_a_seam_and_steps_within_are_none():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 40, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tiles = torch.randint(0, 200, (8, 3, 4, 4), generator=generator, dtype=torch.uint8)
    tiled = noise + tiles.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    assert measures.seams(noise, PATCH) == pytest.approx(1, abs=0.05)
    assert measures.seams(tiled, PATCH) > 3
    assert measures.seams(tiled.roll((3, 3), (2, 3)), PATCH) < 1.1  # the same steps, elsewhere


# ---- The held-out loss -----------------------------------------------------------------------------------------------
def test_the_loss_is_the_flow_matching_loss_at_its_level(real):
    """A model that predicts 0 misses eps - x0 by all of it; below the floor of the weight this counts less."""
    jit = JiT.from_name("tiny/8", image_size=32, num_classes=16, width=32, depth=1, heads=2, in_context_start=0)
    flow = AsymFlow(jit, Subspace(torch.eye(192)), patch_size=8).eval()  # at full rank it predicts u
    flow.backbone.forward = lambda tokens, *_, **__: torch.zeros_like(tokens)
    found = measures.held_out_losses(flow, real, torch.zeros(len(real), dtype=torch.int64))
    expected = 1 + (real.float() / 127.5 - 1).square().mean().item()
    assert list(found) == list(measures.LEVELS)
    for loss in found.values():
        assert loss == pytest.approx(expected, rel=0.03)


def test_what_is_missed_along_some_directions_is_inside_and_the_rest_outside(real):
    """A model that is right but for a number along each of five directions misses nothing outside."""
    basis = torch.linalg.qr(torch.randn(192, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    off = torch.tensor([0.5, 1.0, 0.0, -2.0, 3.0], dtype=torch.float64) @ basis.mT

    def flow(x_t, sigma, labels):
        velocity = (x_t - (real.float() / 127.5 - 1)) / sigma.view(-1, 1, 1, 1)  # x_t = x0 + sigma (eps - x0)
        return velocity + unpatchify(off.float().expand(len(x_t), 16, 192), (4, 4), PATCH)

    inside, outside = measures.losses_by_direction(flow, real, torch.zeros(len(real)), basis, PATCH)
    assert list(inside) == list(outside) == list(measures.LEVELS)
    assert list(inside.values()) == pytest.approx([off.square().sum().item() / 192] * len(inside), rel=1e-4)
    assert max(map(abs, outside.values())) < 1e-6
