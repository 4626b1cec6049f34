"""Guidance: what is computed and what is not."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_seeds import SEEDS, normal

from asymflow import InputError
from asymflow.sampling import guided, on_device_of, parallel, sample, sigma_grid


# ---- Guidance --------------------------------------------------------------------------------------------------------
class Recorder:
    """A stand-in for a model: u = x * condition, and a list of the batch sizes that it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, *, c, extra=None):
        assert len(x) == len(sigma) == len(c)
        self.batches.append(len(x))
        return x * c[:, None]


CONDITIONS = {"c": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}, {"c": torch.zeros(3, dtype=torch.float64)}


@given(st.floats(-2, 10), st.floats(0.01, 1))
def test_guidance_extrapolates_from_without_to_with_condition(scale, sigma):
    x, level = normal(3, 4), torch.full((3,), sigma, dtype=torch.float64)
    u = guided(Recorder(), *CONDITIONS, scale)(x, level)
    assert torch.allclose(u, scale * x * CONDITIONS[0]["c"][:, None], atol=1e-12)


def test_the_unconditional_branch_is_computed_within_the_interval_only():
    model = Recorder()
    sample(guided(model, *CONDITIONS, 2.0, (0.2, 0.6)), normal(3, 4), sigma_grid(10), "euler")
    expected = [6 if 0.2 <= i / 10 <= 0.6 else 3 for i in range(10, 0, -1)]
    assert model.batches == expected
    model = Recorder()
    sample(guided(model, *CONDITIONS, 1.0), normal(3, 4), sigma_grid(10), "euler")
    assert model.batches == [3] * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", [0.1, 0.2, 0.3, 0.6, 0.7, 0.88, 0.9])
def test_the_ends_belong_to_the_interval_in_every_precision(dtype, end):
    for interval in ((end, 1.0), (0.0, end), (end, end)):
        model = Recorder()
        conditions = [{"c": c["c"].to(dtype)} for c in CONDITIONS]
        guided(model, *conditions, 2.0, interval)(torch.ones(3, 1, dtype=dtype), torch.full((3,), end, dtype=dtype))
        assert model.batches == [6]


def test_guidance_one_is_the_model_itself_bit_for_bit(flow):
    x, sigma, labels = normal(3, 3, 16, 16), torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64), torch.tensor([1, 2, 3])
    conditions, unconditional = {"labels": labels}, {"labels": torch.full_like(labels, 10)}
    for velocity in (guided(flow, conditions, unconditional, 1.0), guided(flow, conditions, unconditional)):
        assert torch.equal(velocity(x, sigma), flow(x, sigma, labels=labels))
    outside = guided(flow, conditions, unconditional, 3.0, (0.5, 1.0))
    assert torch.equal(outside(x, sigma), flow(x, sigma, labels=labels))


def test_skipped_and_computed_branches_give_the_same_images(flow):
    """Outside of the interval the unconditional branch would be weighted by zero."""
    labels = torch.tensor([1, 2, 3])
    none = torch.full_like(labels, 10)
    skipping = guided(flow, {"labels": labels}, {"labels": none}, 2.5, (0.3, 0.7))

    def computing(x, sigma):
        u = flow(torch.cat([x, x]), torch.cat([sigma, sigma]), labels=torch.cat([labels, none]))
        conditional, unconditional = u.chunk(2)
        scale = 2.5 if 0.3 <= sigma[0] <= 0.7 else 1.0
        return unconditional + scale * (conditional - unconditional)

    x = normal(3, 3, 16, 16)
    a, b = (sample(velocity, x, sigma_grid(10)) for velocity in (skipping, computing))
    assert not torch.equal(a, x)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10 * a.abs().max().item())


@given(SEEDS, st.floats(1, 8), st.floats(0.05, 1))
def test_orthogonal_guidance_does_not_push_along_the_denoised_image(seed, scale, sigma):
    x, u, other = normal(3, 2, 3, 4, 4, seed=seed)
    level = torch.full((2,), sigma, dtype=torch.float64)
    model = lambda x, sigma, which: torch.cat([u, other])[: len(x)] if len(which) == 4 else u
    which = {"which": torch.zeros(2)}
    plain = guided(model, which, which, scale)(x, level) - u
    x0 = x - sigma * u
    along = torch.einsum("bchw,bchw->b", plain, x0) / torch.einsum("bchw,bchw->b", x0, x0)
    for share in (0.0, 0.5, 1.0):
        push = guided(model, which, which, scale, orthogonal=share)(x, level) - u
        gone = share * along[:, None, None, None] * x0  # and no more than that
        assert torch.allclose(plain - push, gone, atol=1e-9 * scale)


def test_orthogonal_guidance_is_finite_for_a_black_image():
    assert torch.equal(parallel(torch.ones(1, 3), torch.zeros(1, 3)), torch.zeros(1, 3))


LEVELS = st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), min_size=1, max_size=5)


@given(LEVELS, st.sampled_from([0.0, 1.0]), SEEDS)
def test_each_image_of_a_batch_is_guided_by_its_own_noise_level(flow, levels, orthogonal, seed):
    """As if each were alone; and of a batch, the unconditional pass is that of the images within the interval."""
    n = len(levels)
    x, sigma, labels = normal(n, 3, 16, 16, seed=seed), torch.tensor(levels, dtype=torch.float64), torch.arange(n)
    sizes = []

    def counted(x, sigma, lists, **conditions):
        sizes.append(len(x))
        assert len(lists[0]) == len(x)
        return flow(x, sigma, **conditions)

    def velocity(rows):
        conditions = [{"labels": of[rows], "lists": [of[rows]]} for of in (labels, torch.full_like(labels, 10))]
        return guided(counted, *conditions, 2.5, (0.3, 0.7), orthogonal)(x[rows], sigma[rows])

    together = velocity(torch.arange(n))
    assert sizes == [n + sum(0.3 <= level <= 0.7 for level in levels)]
    alone = torch.cat([velocity(torch.tensor([i])) for i in range(n)])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9 * alone.abs().max().item())


def test_the_values_of_a_gpu_are_not_waited_for():
    """The device meta has no values at all: what looks at one fails. A sampler counts as if it had."""
    sizes = []
    model = lambda x, sigma, c: sizes.append(len(x)) or x * c[:, None]
    conditions = [{"c": torch.ones(3, device="meta")} for _ in range(2)]
    velocity = guided(model, *conditions, 2.0, (0.2, 0.6), orthogonal=1.0)
    x = torch.ones(3, 4, device="meta")
    sample(velocity, x, sigma_grid(10), "euler", denoised_hook=lambda x0, sigma: x0 * sigma[:, None])
    assert sizes == [6 if 0.2 <= i / 10 <= 0.6 else 3 for i in range(10, 0, -1)]
    assert velocity(x, torch.tensor([0.9, 0.5, 0.1])).shape == x.shape
    assert velocity(x, torch.ones(3, device="meta")).shape == x.shape  # a sampler of somebody else
    assert sizes[-2:] == [4, 6]


def test_a_sigma_whose_values_are_out_of_sight_is_as_good(flow, monkeypatch):
    """The way of a sigma on a GPU, walked on the CPU."""
    x, labels, sigma = normal(3, 3, 16, 16), torch.tensor([1, 2, 3]), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    velocity = guided(flow, {"labels": labels}, {"labels": torch.full_like(labels, 10)}, 2.5, (0.3, 0.7))
    seen = velocity(x, sigma)
    monkeypatch.setattr("asymflow.sampling.on_host", lambda values: False)
    assert torch.allclose(velocity(x, sigma), seen, rtol=1e-9, atol=1e-9 * seen.abs().max().item())


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_only_a_copy_to_cuda_is_not_waited_for(device, waits):
    """On MPS, what is copied without waiting may be freed before it is read."""
    host = SimpleNamespace(device=torch.device("cpu"), to=lambda device, non_blocking: non_blocking)
    x = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda")
    assert on_device_of(x, host) is not waits


@pytest.mark.parametrize("orthogonal", [0.0, 1.0])
def test_a_flow_may_compute_in_less_than_the_images_are_in(orthogonal):
    model = lambda x, sigma, c: (x * c[:, None]).bfloat16()
    conditions = [{"c": torch.full((3,), c)} for c in (0.5, 0.25)]
    velocity = guided(model, *conditions, 2.0, (0.2, 0.6), orthogonal)
    x, sigma = torch.ones(3, 4), torch.tensor([0.9, 0.5, 0.1])
    with_sigma_seen = velocity(x, sigma)
    assert with_sigma_seen.dtype == (torch.float32 if orthogonal else torch.bfloat16)
    assert torch.equal(with_sigma_seen[[0, 2]].float(), torch.full((2, 4), 0.5))


def test_conditions_that_are_not_tensors_are_passed_on_as_they_are():
    seen = []
    model = lambda x, sigma, c, mode: seen.append((len(c), mode)) or x
    velocity = guided(model, {**CONDITIONS[0], "mode": "fast"}, {**CONDITIONS[1], "mode": "fast"}, 2.0)
    velocity(torch.ones(3, 1), torch.ones(3))
    assert seen == [(6, "fast")]
    for one, other in (("fast", "slow"), (torch.ones(3), "slow"), ([torch.ones(3), "fast"], [torch.ones(3), "slow"])):
        with pytest.raises(InputError, match="the condition mode is not a tensor, and differs"):
            guided(model, {**CONDITIONS[0], "mode": one}, {**CONDITIONS[1], "mode": other}, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(interval=(0.5, 0.1)), "interval"),
        (dict(interval=(-0.1, 0.5)), "interval"),
        (dict(interval=(0.1, 1.5)), "interval"),
        (dict(interval=(math.nan, 0.5)), "interval"),
        (dict(orthogonal=1.5), "orthogonal"),
        (dict(scale=math.nan), "scale"),
        (dict(scale=math.inf), "scale"),
    ],
)
def test_guidance_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        guided(Recorder(), *CONDITIONS, **dict(scale=2.0) | options)


def test_conditions_with_other_names_are_refused():
    with pytest.raises(InputError, match="without condition"):
        guided(Recorder(), {"c": torch.ones(1)}, {"d": torch.ones(1)}, 2.0)
