"""Moving averages: what the profiles are, that they are tracked as stated, and that any can be put together later."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.averages import (
    EARLY_SIGMA_REL,
    MISMATCH,
    Profile,
    coefficients_of,
    increments,
    power_of,
    reconstruction,
)
from asymflow.errors import InputError
from asymflow.fitting import fit_pca
from asymflow.patches import patchify
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.loader import Batches
from asymflow.training.loop import learning_rate
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.start import make_flow
from asymflow.training.zero.averages import Averages
from asymflow.training.zero.shards import Fragment

WIDTHS = st.floats(0.01, 0.28)
DECAYS = st.one_of(st.floats(0, 0.999), st.floats(1e-12, 1e-3).map(lambda rest: 1 - rest))
EPS = sys.float_info.epsilon
SNAPSHOTS = st.lists(st.tuples(st.integers(1, 60), WIDTHS), min_size=1, max_size=12)


def fragment(weight):
    return Fragment("w", tuple(weight.shape), 0, weight, {}, {})


def history(steps, seed=0):
    """Weights that wander, (steps, 5), in float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 5, generator=g, dtype=torch.float64).cumsum(0)


def track(weights, profiles, at=()):
    """Let Averages see the weights of each step; the averages at the end, and at the steps `at`.

    The initial weights are so large that any share of them would show.
    """
    weight = torch.full((5,), 1e30, dtype=torch.float64)
    averages = Averages([fragment(weight)], profiles)
    taken = {}
    for step, value in enumerate(weights, start=1):
        weight.copy_(value)
        averages.update(step)
        if step in at:
            taken |= {(step, p): averages.values[p][0].clone() for p in profiles}
    return [averages.values[p][0] for p in profiles], taken


@given(WIDTHS)
def test_the_power_has_the_width_that_it_is_named_by(sigma_rel):
    """By the moments of the density a t^(a-1) on [0, 1]: E t = a / (a + 1), E t^2 = a / (a + 2)."""
    a = power_of(sigma_rel)
    assert math.sqrt(a / (a + 2) - (a / (a + 1)) ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_powers_are_those_of_the_paper():
    """Karras et al. 2024 name gamma = 16.97 and 6.94 for the widths 0.05 and 0.10."""
    assert power_of(0.05) - 1 == pytest.approx(16.97, abs=0.005)
    assert power_of(0.10) - 1 == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.3, math.nan, math.inf])
def test_a_width_that_no_power_has_is_refused(sigma_rel):
    with pytest.raises(InputError, match="sigma_rel must be between"):
        Profile(sigma_rel=sigma_rel)


@given(WIDTHS, st.integers(1, 60))
def test_a_power_average_weighs_the_past_by_its_profile(sigma_rel, steps):
    a, weights = power_of(sigma_rel), history(steps)
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    profile = (t / steps) ** a - ((t - 1) / steps) ** a
    assert profile.sum() == pytest.approx(1)
    (average,), _ = track(weights, [Profile(sigma_rel=sigma_rel)])
    assert torch.allclose(average, profile @ weights, rtol=1e-10, atol=1e-10)


@given(DECAYS, st.integers(1, 60))
def test_an_average_of_constant_decay_has_nothing_of_the_initial_weights(decay, steps):
    """`track` begins with 1e30: whatever the decay, weights that are the same from step 1 on are their own average."""
    weights = history(1).expand(steps, 5)
    (average,), _ = track(weights, [Profile(decay=decay)])
    assert torch.allclose(average, weights[-1], rtol=1e-12, atol=0)


@given(DECAYS, st.integers(1, 10**7))
def test_a_young_average_is_a_power_function_and_an_old_one_of_constant_decay(decay, step):
    young, share = Profile(sigma_rel=EARLY_SIGMA_REL).share_at(step), Profile(decay=decay).share_at(step)
    assert share == max(young, 1 - decay)
    if step * (1 - decay) > power_of(EARLY_SIGMA_REL):  # 1 - (1 - 1/t)^a <= a / t
        assert share == 1 - decay


@given(st.floats(0.01, 0.999), st.integers(1, 30), st.integers(0, 30))
def test_an_average_that_was_begun_with_the_initial_weights_loses_them(decay, before, after):
    """As of a checkpoint of an earlier version: what is left of the share falls at least as fast as it did."""
    weight = torch.ones(1, dtype=torch.float64)
    averages, profile = Averages([fragment(weight)], [Profile(decay=decay)]), Profile(decay=decay)
    averages.values[profile][0].fill_(decay**before)  # the share of initial weights of 1, if all later ones are 0
    weight.zero_()
    for step in range(before + 1, before + after + 1):
        averages.update(step)
    assert averages.values[profile][0].item() <= decay ** (before + after) * (1 + 1e-12)


def test_any_width_is_put_together_from_snapshots_of_two():
    """Against the same average, tracked directly: the error is what is said to be unmatched, and small."""
    steps, kept = 4000, [Profile(sigma_rel=0.05), Profile(sigma_rel=0.10)]
    taken_at = range(250, steps + 1, 250)
    weights = history(steps)
    wanted = [0.03, 0.05, 0.07, 0.10, 0.15, 0.2]
    direct, taken = track(weights, [*kept, *(Profile(sigma_rel=w) for w in wanted)], at=taken_at)
    snapshots = [(step, p.sigma_rel) for step in taken_at for p in kept]
    plain = (weights[-1] - direct[2:][3]).norm()  # how far one can be off: the last weights against an average
    for width, expected in zip(wanted, direct[2:], strict=True):
        coefficients, unmatched = reconstruction(snapshots, steps, Profile(sigma_rel=width))
        found = sum(c * taken[step, Profile(sigma_rel=w)] for c, (step, w) in zip(coefficients, snapshots, strict=True))
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
        assert (found - expected).norm() < 0.02 * plain, width
        assert unmatched < (0.05 if width >= 0.05 else 0.3), width
        if width in (0.05, 0.10):  # a snapshot itself
            assert unmatched < 1e-6
            assert torch.allclose(found, expected, atol=1e-6 * expected.norm().item())


def profiles_of(snapshots, steps):
    return np.stack([increments(np.arange(1.0, steps + 1), end, power_of(width)) for end, width in snapshots])


@given(SNAPSHOTS, st.integers(0, 40), WIDTHS)
def test_weights_that_never_changed_come_back_as_themselves(snapshots, later, width):
    """From any set of snapshots, for any width and step: the coefficients sum to 1, but for how these are rounded."""
    coefficients, _ = reconstruction(snapshots, min(snapshots)[0] + later, Profile(sigma_rel=width))
    assert abs(math.fsum(coefficients) - 1) <= len(snapshots) * EPS * abs(coefficients).sum()


@given(WIDTHS, st.integers(1, 60), st.integers(1, 20))
def test_the_profile_of_an_average_is_the_share_of_each_step_in_it(width, end, more):
    (profile,), weights = profiles_of([(end, width)], end + more), history(end)
    (average,), _ = track(weights, [Profile(sigma_rel=width)])
    assert profile[:end] @ weights.numpy() == pytest.approx(average.numpy(), abs=1e-5 * weights.abs().max().item())
    assert profile.sum() == pytest.approx(1)
    assert not profile[end:].any()


@given(DECAYS, st.integers(1, 400))
def test_the_coefficients_of_a_decay_are_those_of_its_steps(decay, end):
    """By the recursion that a training follows: a young average first, then a constant decay."""
    profile, expected = Profile(decay=decay), np.zeros(end)
    for step in range(1, end + 1):
        share = profile.share_at(step)
        expected *= 1 - share
        expected[step - 1] += share
    found = coefficients_of(profile, np.arange(1.0, end + 1), end)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.sum() == pytest.approx(1)


def test_a_decay_that_was_not_tracked_is_put_together_too():
    """As JiT's 0.9996 instead of 0.9999, after the training. What is said to be unmatched is what is off."""
    steps, kept = 4000, [Profile(sigma_rel=0.05), Profile(sigma_rel=0.10)]
    taken_at, wanted = range(100, steps + 1, 100), [Profile(decay=0.995), Profile(decay=0.998), Profile(decay=0.999)]
    weights = history(steps)
    direct, taken = track(weights, [*kept, *wanted], at=taken_at)
    snapshots = [(step, p.sigma_rel) for step in taken_at for p in kept]
    for profile, expected in zip(wanted, direct[2:], strict=True):
        coefficients, unmatched = reconstruction(snapshots, steps, profile)
        found = sum(c * taken[step, Profile(sigma_rel=w)] for c, (step, w) in zip(coefficients, snapshots, strict=True))
        assert unmatched < MISMATCH
        assert (found - expected).norm() < 0.1 * (weights[-1] - expected).norm(), profile


def assert_none_is_nearer(snapshots, width):
    """The difference that is left is at right angles to all ways to change it: those between the snapshots.

    Of the size of these, 1e-5 of the largest is ignored, so as not to multiply rounding.
    """
    steps = max(snapshots)[0]
    coefficients, unmatched = reconstruction(snapshots, steps, Profile(sigma_rel=width))
    profiles, (target,) = profiles_of(snapshots, steps), profiles_of([(steps, width)], steps)
    left = target - coefficients @ profiles
    assert np.linalg.norm(left) == pytest.approx(unmatched * np.linalg.norm(target), rel=1e-6, abs=1e-7)
    for profile in profiles:
        ways = profiles - profile
        assert (abs(ways @ left) <= 1e-5 * len(snapshots) * np.linalg.norm(ways, axis=1).max() + 1e-10).all()


@given(SNAPSHOTS, WIDTHS)
def test_no_other_combination_that_sums_to_one_is_nearer(snapshots, width):
    assert_none_is_nearer(snapshots, width)


def test_nor_where_the_profiles_are_looked_at_in_several_blocks():
    assert_none_is_nearer([(step, width) for step in (50_000, 100_000, 150_000) for width in (0.05, 0.1)], 0.075)


@given(SNAPSHOTS, st.integers(0, 11))
def test_what_is_among_the_snapshots_is_that_snapshot(snapshots, which):
    step, width = snapshots[which % len(snapshots)]
    coefficients, unmatched = reconstruction(snapshots, step, Profile(sigma_rel=width))
    assert unmatched == 0
    assert [snapshots[i] for i in coefficients.nonzero()[0]] == [(step, width)]
    assert coefficients.sum() == 1


@given(st.floats(0.03, 0.15), st.sampled_from([0.9, 1.1]))
def test_a_mismatch_that_is_remarked_on_is_that_of_a_width_off_by_a_tenth(width, factor):
    _, unmatched = reconstruction([(1000, factor * width)], 1000, Profile(sigma_rel=width))
    assert 0.65 * MISMATCH < unmatched < 1.2 * MISMATCH


def test_snapshots_need_not_be_evenly_spaced():
    """As where a run was lengthened, or ended between two of them: 16 of them, at odd steps, and the last."""
    steps, kept, wanted = 3000, [Profile(sigma_rel=0.05), Profile(sigma_rel=0.10)], [0.07, 0.10, 0.15]
    taken_at = sorted({*range(200, 1000, 200), 1111, *range(1300, steps, 170), steps})
    weights = history(steps)
    direct, taken = track(weights, [*kept, *(Profile(sigma_rel=w) for w in wanted)], at=taken_at)
    snapshots = [(step, p.sigma_rel) for step in taken_at for p in kept]
    for width, expected in zip(wanted, direct[2:], strict=True):
        coefficients, unmatched = reconstruction(snapshots, steps, Profile(sigma_rel=width))
        found = sum(c * taken[step, Profile(sigma_rel=w)] for c, (step, w) in zip(coefficients, snapshots, strict=True))
        assert unmatched < 0.05
        assert (found - expected).norm() < 0.02 * (weights[-1] - expected).norm()


def test_it_ends_where_it_is_asked_to_and_uses_nothing_later():
    snapshots = [(step, width) for step in (100, 200, 300) for width in (0.05, 0.1)]
    coefficients, _ = reconstruction(snapshots, 200, Profile(sigma_rel=0.08))
    assert (coefficients[4:] == 0).all()
    assert (coefficients[:4] != 0).any()
    with pytest.raises(InputError, match="no snapshot up to step 99: the first is of step 100"):
        reconstruction(snapshots, 99, Profile(sigma_rel=0.08))


def test_a_long_training_is_no_problem():
    """750,000 steps, 64 snapshots: block by block, in seconds, and without overflow."""
    snapshots = [(step, width) for step in np.linspace(750_000 / 32, 750_000, 32).astype(int) for width in (0.05, 0.1)]
    coefficients, unmatched = reconstruction(snapshots, 750_000, Profile(sigma_rel=0.075))
    assert np.isfinite(coefficients).all()
    assert unmatched < 0.02


def test_names_are_those_of_checkpoints():
    assert Profile(decay=0.9999).name == "0.9999"
    assert Profile(sigma_rel=0.05).name == "rel-0.050"


@pytest.mark.parametrize("options", [{}, {"decay": 0.5, "sigma_rel": 0.1}, {"decay": 1.0}, {"decay": -0.1}])
def test_other_profiles_are_refused(options):
    with pytest.raises(InputError):
        Profile(**options)


def test_before_the_first_step_an_average_is_the_initial_weights():
    weight = torch.arange(5.0)
    averages = Averages([fragment(weight)], [Profile(decay=0.9)])
    weight.zero_()
    assert torch.equal(averages.values[Profile(decay=0.9)][0], torch.arange(5.0))


# ---- A short run -----------------------------------------------------------------------------------------------------
SMALL = [  # of the configuration shapes_tiny, what makes it quick
    "model.image_size=16",
    "model.options={width: 64, depth: 2, heads: 2, bottleneck: 16, in_context_start: 1, in_context_tokens: 2}",
    "train.global_batch_size=16",
    "sample.steps=10",
]


@pytest.mark.slow
def test_the_average_of_a_short_run_draws_as_well_as_its_weights():
    """200 steps of shapes_tiny, whose decay is 0.995: with 37 % of the initial weights the images would be noise.

    By the loss on images that were not trained on, 2.3 times as large then, and by the noise in the images that are
    drawn, 7 times as large.
    """
    config = load_config("shapes_tiny", SMALL)
    images = make_dataset(config)
    tokens = (patchify(images[i].image[None].double() / 127.5 - 1, 4) for i in range(9000, 9200))
    options = dict(patch_size=4, token_order="channel_last", noise_scale=config.model.noise_scale)
    subspace = fit_pca(tokens, config.subspace.rank, **options)
    torch.manual_seed(0)
    flow = make_flow(config, subspace).train()
    objective, batches = ClassConditional(config, flow), Batches(images, config, 0, 1)
    optimizer = torch.optim.AdamW(flow.parameters(), betas=config.optimizer.betas, weight_decay=0)
    weights = {name: p.detach().view(-1) for name, p in flow.named_parameters() if p.requires_grad}
    profile = Profile(decay=config.ema.decays[0])
    averages = Averages([Fragment(name, w.shape, 0, w, {}, {}) for name, w in weights.items()], [profile])

    @torch.no_grad()
    def quality():
        """The loss, and the energy of what varies from each pixel to the next: the less, the better."""
        flow.eval()
        loss = torch.cat([objective.losses(flow, batches[k]) for k in range(400, 416)]).mean().item()
        drawn = objective.draw(flow, range(32))
        flow.train()
        return loss, drawn.diff(dim=-1).diff(dim=-2).square().mean().item()

    for step in range(200):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        objective.losses(flow, batches[step]).mean().backward()
        optimizer.step()
        averages.update(step + 1)
    loss_of_weights, noise_of_weights = quality()
    for weight, average in zip(weights.values(), averages.values[profile], strict=True):
        weight.copy_(average)
    loss, noise = quality()
    assert loss < 1.2 * loss_of_weights
    assert noise < 1.5 * noise_of_weights
