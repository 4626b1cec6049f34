"""Euler's method with new noise in each step."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymflow.sampling import image_noise, sample, sigma_grid
from toy.paper.ancestral import ancestral

SHAPE = (3, 4, 4)


def of_normal(scale):
    """The exact velocity for data that is normal with this standard deviation."""

    def velocity(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return (s - (1 - s) * scale**2) / ((1 - s) ** 2 * scale**2 + s**2) * x

    return velocity


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 2))
def test_what_is_drawn_is_as_wide_as_the_data_and_other_than_without_new_noise(scale):
    """As far as 100 steps and 4,800 numbers tell: both err by some 2 %."""
    x, levels, numbers = image_noise(0, range(100), SHAPE), sigma_grid(100), range(100)
    drawn = sample(of_normal(scale), x, levels, partial(ancestral, numbers))
    assert abs(drawn.std() / scale - 1) < 0.08
    assert (drawn * sample(of_normal(scale), x, levels, "euler")).mean().abs() < 0.1 * scale**2


@given(st.integers(1, 5))
def test_a_picture_does_not_depend_on_those_beside_it(cut):
    x, velocity = image_noise(0, range(6), SHAPE), of_normal(0.5)
    whole = sample(velocity, x, sigma_grid(5), partial(ancestral, range(6)))
    part = sample(velocity, x[cut:], sigma_grid(5), partial(ancestral, range(cut, 6)))
    assert torch.equal(whole[cut:], part)
