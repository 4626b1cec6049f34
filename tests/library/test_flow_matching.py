"""The loss of flow matching."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow import InputError, flow_matching_loss


def drawn(batch, seed=0, dtype=torch.float64):
    """Velocity, x0 and eps (batch, 3, 4, 4), sigma (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, batch, 3, 4, 4, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (*images, torch.rand(batch, generator=generator, dtype=torch.float64))]


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_loss_of_a_batch_is_that_of_each_image(batch, seed):
    parts = drawn(batch, seed)
    one_by_one = torch.cat([flow_matching_loss(*(part[i : i + 1] for part in parts)) for i in range(batch)])
    torch.testing.assert_close(flow_matching_loss(*parts), one_by_one)


def test_rounded_images_are_subtracted_in_float32():
    """They are exact in float64. In float32 each of 48 errors and squares is rounded by 2^-24: by 1e-5 in all."""
    parts = drawn(4, dtype=torch.bfloat16)
    loss = flow_matching_loss(*parts)
    assert loss.dtype == torch.float32
    exact = flow_matching_loss(*(part.double() for part in parts))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1, 1), (1,), (5,), ()])
def test_any_other_number_of_noise_levels_is_refused(shape):
    """Some of these shapes would broadcast to the loss of each image at the level of each other."""
    *images, _ = drawn(4)
    with pytest.raises(InputError, match="one noise level for each of the 4 images") as error:
        flow_matching_loss(*images, torch.full(shape, 0.5))
    assert "\n" not in str(error.value)
