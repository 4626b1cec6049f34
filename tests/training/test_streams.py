"""Randomness of training: functions of (seed, sample) with the distributions they should have, and independent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from asymflow import streams

seeds = st.integers(0, 2**63 - 1)


def noise(seed, sample, shape=(3, 8, 8)):
    out = torch.empty(shape)
    streams.noise(seed, sample, out)
    return out


@given(seeds, st.integers(0, 1000), st.integers(1, 300))
def test_each_epoch_is_a_permutation(seed, epoch, images):
    samples = range(epoch * images, (epoch + 1) * images)
    assert sorted(streams.image_index(seed, g, images) for g in samples) == list(range(images))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [streams.permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # 1 expected; P(10 or more) < 1e-6


@given(seeds, st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_ranks_partition_the_batch(seed, step, each, world):
    batch = each * world
    shares = [streams.share(step, batch, rank, world) for rank in range(world)]
    assert [g for share in shares for g in share] == list(range(step * batch, (step + 1) * batch))
    assert {len(share) for share in shares} == {each}


@given(seeds, st.integers(0, 2**50))
def test_a_sample_is_drawn_the_same_again_and_at_once(seed, sample):
    first = streams.draws(seed, sample), noise(seed, sample)
    streams.draws(seed, sample + 1)
    noise(seed + 1, sample)
    assert streams.draws(seed, sample) == first[0]
    assert torch.equal(noise(seed, sample), first[1])


def test_draws_have_their_distributions_and_are_independent():
    n = 5000
    drawn = [streams.draws(3, g) for g in range(n)]
    columns = np.array([(d.normal, stats.norm.ppf(d.flip), stats.norm.ppf(d.drop)) for d in drawn])
    first = np.array([noise(3, g, (1, 1, 4)).flatten().numpy() for g in range(n)])
    everything = np.concatenate([columns, first, columns[1:].tolist() + columns[:1].tolist()], axis=1)  # and the next
    for column in everything.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    correlations = np.corrcoef(everything.T) - np.eye(everything.shape[1])
    assert abs(correlations).max() < 5 / n**0.5  # five standard deviations
    assert sum(d.flip < 0.5 for d in drawn) / n == pytest.approx(0.5, abs=4 * (0.25 / n) ** 0.5)
    assert sum(d.drop < 0.1 for d in drawn) / n == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)


def test_noise_is_normal_and_no_two_samples_share_any():
    values = torch.stack([noise(seed, g) for seed in (0, 1) for g in range(40)]).flatten(1)
    assert stats.kstest(values.flatten(), "norm").pvalue > 1e-3
    close = torch.corrcoef(values) - torch.eye(len(values))
    assert abs(close).max() < 6 / values.shape[1] ** 0.5
    # A generator that starts where another goes on would repeat it, shifted.
    assert len(values.unique()) > 0.99 * values.numel()


def test_streams_of_one_seed_share_nothing():
    parts = [streams.generator(5, stream, 7).random(1000) for stream in (0, 1, 2, 3, 4, 100)]
    assert len(np.unique(np.concatenate(parts))) == 6000


def test_dropout_differs_between_ranks_and_steps():
    seeds = {streams.dropout_seed(0, step, rank) for step in range(20) for rank in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
