"""The measures: equal to torch-fidelity's and to closed forms, from parts as from a whole; honest uncertainties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from asymflow.evaluation.frechet import Target, frechet_distance, statistics
from asymflow.evaluation.measures import (
    MEASURES,
    Reference,
    Samples,
    frechet,
    inception_score,
    kernel_distance,
    precision,
    recall,
)
from asymflow.evaluation.moments import Moments
from asymflow.evaluation.rows import Rows


def drawn(count, width, seed=0, scale=1.0, shift=0.0):
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def cut(rows, seed):
    """The rows in parts of random sizes."""
    sizes = np.random.default_rng(seed).integers(1, 40, 10_000)
    ends = [end for end in np.cumsum(sizes).tolist() if end < len(rows)]
    return Rows(list(torch.tensor_split(rows, ends)))


def sample_of(features, logits=None, seed=0):
    return Samples(cut(features, seed), None if logits is None else cut(logits, seed + 1))


def reference_of(features):
    return Reference(statistics(features), cut(features, 7))


# ---- Against others --------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**20), st.integers(1200, 1500), st.integers(1001, 1300), st.integers(2, 12))
def test_every_measure_is_torch_fidelitys_from_parts_of_any_size(seed, n, m, width):
    one, other = drawn(n, width, seed), drawn(m, width, seed + 1, 1.2, 0.2)
    logits = drawn(n, 7, seed + 2, 3.0)
    sample, reference = sample_of(one, logits, seed), reference_of(other)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one.double(), other.double())), verbose=False)
    assert frechet(sample, reference).value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    theirs = prc_features_to_metric(one, other, verbose=False)
    assert precision(sample, reference).value == pytest.approx(theirs["precision"], rel=1e-6)
    assert recall(sample, reference).value == pytest.approx(theirs["recall"], rel=1e-6)
    theirs = isc_features_to_metric(logits)
    assert inception_score(sample).value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_the_kernel_distance_is_torch_fidelitys(monkeypatch):
    monkeypatch.setattr("asymflow.evaluation.measures.SUBSETS", 12)
    one, other = drawn(1100, 5, 1), drawn(1050, 5, 2, 1.3)
    theirs = kid_features_to_metric(one, other, kid_subsets=12, verbose=False)
    found = kernel_distance(sample_of(one), reference_of(other))
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    fewer = kernel_distance(sample_of(one[:60]), reference_of(other))
    assert "subsets of 60 images" in fewer.remarks[0]


def manifold(points, balls):
    """Precision by brute force, as ADM's evaluator defines it: within the third nearest neighbour of any ball."""
    distances = lambda a, b: np.sqrt(np.square(a[:, None] - b[None]).sum(2))
    radii = np.sort(distances(balls, balls), axis=1)[:, 3]
    return float((distances(points, balls) <= radii).any(1).mean())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**20), st.integers(4, 60), st.integers(4, 60))
def test_precision_and_recall_are_those_of_adm_by_brute_force(seed, n, m):
    one, other = drawn(n, 3, seed).double(), drawn(m, 3, seed + 1, 1.5).double()
    assert precision(sample_of(one), reference_of(other)).value == pytest.approx(manifold(one.numpy(), other.numpy()))
    assert recall(sample_of(one), reference_of(other)).value == pytest.approx(manifold(other.numpy(), one.numpy()))


def test_they_are_the_known_ones_of_normal_and_of_certain_distributions():
    scales = torch.tensor([1.0, 2.0, 0.5])
    exact = lambda mean, std: {"mu": mean.numpy(), "sigma": torch.diag(std**2).numpy()}
    one, other = exact(torch.zeros(3).double(), scales.double()), exact(torch.ones(3).double(), torch.ones(3).double())
    assert frechet_distance(one, other) == pytest.approx(3 + 0 + 1 + 0.25)
    certain = torch.eye(10).repeat_interleave(300, 0) * 1000.0  # ten classes, each as often and never in doubt
    assert inception_score(sample_of(certain, certain)).value == pytest.approx(10, rel=0.05)
    doubt = torch.zeros(200, 10)
    found = inception_score(sample_of(doubt, doubt))
    assert (found.value, found.uncertainty) == pytest.approx((1, 0), abs=1e-9)
    same = drawn(300, 4)
    assert precision(sample_of(same), reference_of(same)).value == 1
    assert recall(sample_of(same), reference_of(same)).value == 1
    assert precision(sample_of(same + 100), reference_of(same)).value == 0


# ---- Uncertainties ---------------------------------------------------------------------------------------------------
def test_the_uncertainty_is_what_the_distance_varies_by_with_fresh_samples():
    reference = reference_of(drawn(2000, 8, 99, 1.1, 0.15))
    found = [frechet(sample_of(drawn(600, 8, seed)), reference) for seed in range(60)]
    spread = np.std([one.value for one in found])
    said = np.mean([one.uncertainty for one in found])
    assert said == pytest.approx(spread, rel=0.3)


def test_the_uncertainty_of_a_score_is_that_of_fresh_samples():
    found = [inception_score(sample_of(logits, logits)) for logits in (drawn(500, 6, seed, 2.0) for seed in range(60))]
    assert np.mean([o.uncertainty for o in found]) == pytest.approx(np.std([o.value for o in found]), rel=0.3)


@pytest.mark.parametrize(("n", "m", "size", "shift"), [(100, 100, 1000, 0.3), (100, 100, 1000, 0), (500, 900, 50, 0.2)])
def test_the_uncertainty_of_the_kernel_distance_is_that_of_fresh_samples(monkeypatch, n, m, size, shift):
    monkeypatch.setattr("asymflow.evaluation.measures.SUBSETS", 20)
    monkeypatch.setattr("asymflow.evaluation.measures.SUBSET", size)
    reference = reference_of(drawn(m, 8, 99, 1.1))
    found = [kernel_distance(sample_of(drawn(n, 8, seed, 1, shift)), reference) for seed in range(30)]
    assert np.mean([o.uncertainty for o in found]) == pytest.approx(np.std([o.value for o in found]), rel=0.4)


@pytest.mark.parametrize("measure", [precision, recall])
@pytest.mark.parametrize(("n", "m", "width", "scale"), [(300, 1500, 8, 0.9), (400, 400, 8, 0.8), (300, 1000, 16, 0.9)])
def test_the_uncertainty_of_precision_and_recall_is_that_of_fresh_samples(measure, n, m, width, scale):
    reference = reference_of(drawn(m, width, 999))
    found = [measure(sample_of(drawn(n, width, seed, scale)), reference) for seed in range(30)]
    assert np.mean([o.uncertainty for o in found]) == pytest.approx(np.std([o.value for o in found]), rel=0.4)


def test_of_few_samples_recall_has_no_uncertainty_and_says_so():
    found = recall(sample_of(drawn(39, 4)), reference_of(drawn(100, 4)))
    assert found.uncertainty is None
    assert "39 images are too few for its uncertainty" in found.remarks


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**20), st.integers(2, 6))
def test_the_influence_is_the_derivative_of_the_distance(seed, width):
    """With a share h of the samples replaced by copies of one of them, the distance moves by h times its influence."""
    one, other = drawn(80, width, seed).double(), statistics(drawn(90, width, seed + 1, 1.3, 0.4))
    own = {"mu": one.mean(0).numpy(), "sigma": torch.cov(one.mT, correction=0).reshape(width, width).numpy()}
    distance, influence_of = Target(other).distance(own)
    assert distance == pytest.approx(frechet_distance(own, other), rel=1e-9)
    influence = influence_of(one)
    assert influence.mean().item() == pytest.approx(0, abs=1e-9)

    def tilted(h, row):
        weights = torch.full((80,), (1 - h) / 80, dtype=torch.float64)
        weights[row] += h
        mean = weights @ one
        sigma = (one - mean).mT @ (weights[:, None] * (one - mean))
        return frechet_distance({"mu": mean.numpy(), "sigma": sigma.numpy()}, other)

    for row in (0, 17):
        slope = (tilted(1e-5, row) - tilted(-1e-5, row)) / 2e-5
        assert influence[row].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


# ---- Rows, and what is too little ------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20), st.integers(1, 300), st.integers(1, 200))
def test_rows_in_parts_are_those_of_the_whole(seed, n, size):
    whole = drawn(n, 3, seed)
    rows = cut(whole, seed)
    assert len(rows) == n
    assert torch.equal(torch.cat(chunks := list(rows.chunks(size))), whole)
    assert {len(chunk) for chunk in chunks[:-1]} <= {size}  # also of one large part, so that memory is bounded
    assert len(chunks[-1]) <= size
    assert [len(chunk) for chunk in Rows([whole]).chunks(size)] == list(map(len, chunks))
    chosen = np.random.default_rng(seed).integers(0, n, 20)
    assert torch.equal(rows.take(chosen), whole[torch.from_numpy(chosen)])
    moments = Moments()
    for part in rows.chunks(size):
        moments.add(part + 1e6)  # far from zero, where naive sums lose their digits
    if n > 1:
        found = moments.statistics()
        assert np.allclose(found["mu"] - 1e6, whole.double().mean(0), atol=0.2)  # float32 at a million
        assert np.allclose(found["sigma"], np.cov((whole + 1e6).double().numpy(), rowvar=False), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_what_cannot_be_measured_says_why(name):
    alone = Reference(statistics(drawn(50, 4)))  # mean and covariance, without images
    found = MEASURES[name](sample_of(drawn(20, 4)), alone)
    if name == "frechet_distance":
        assert math.isfinite(found.value)
        assert not found.remarks
        for n in (3, 4):
            found = MEASURES[name](sample_of(drawn(n, 4)), alone)
            assert f"no more images ({n}) than features (4)" in found.remarks[0]
    else:
        assert found.value is None
        assert found.remarks[0].startswith("not measured: ")
