"""Fitting: the rank that it chooses, what it refuses, and many processes."""

import datetime
import math
import time

import numpy as np
import pytest
import scipy
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from random_tokens import cut, normal

from asymflow import InputError
from asymflow.fitting import auto_rank, energy_threshold, fit_pca, fit_procrustes


# ---- The rank that it chooses ----------------------------------------------------------------------------------------
def modelled_errors(spectrum, noise_scale, sigma, probability):
    """Error of the velocity for every rank 0, ..., D, as the docstring of `auto_rank` models it, in numpy."""
    weight = (sigma / np.maximum(sigma, 0.05)) ** 2
    inside = lambda energy: (probability * weight * (noise_scale**2 + energy)).sum()
    outside = lambda energy: (probability * weight * energy / sigma**2).sum()
    return [sum(map(inside, spectrum[:r])) + sum(map(outside, spectrum[r:])) for r in range(len(spectrum) + 1)]


def training_sigma():
    """Noise levels sigmoid(0.8 + 0.8 n) and their probabilities, by the trapezoidal rule in n."""
    n = np.linspace(-8, 8, 2001)
    probability = np.exp(-(n**2) / 2)
    return 1 / (1 + np.exp(-0.8 - 0.8 * n)), probability / probability.sum()


@given(st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=20), st.floats(0.2, 4))
def test_no_rank_has_a_smaller_modelled_error(energies, noise_scale):
    spectrum = sorted(energies, reverse=True)
    errors = modelled_errors(spectrum, noise_scale, *training_sigma())
    rank = auto_rank(torch.tensor(spectrum, dtype=torch.float64), noise_scale)
    assert auto_rank(spectrum) == auto_rank(spectrum, 1.0)
    # Both rules for the means have errors of 2e-4 at most, as large as what a direction can lose that they misplace.
    assert errors[rank] <= min(errors) * (1 + 4e-4)


def test_the_threshold_is_the_integral_that_it_claims():
    def mean(f):
        density = lambda n: math.exp(-n * n / 2) / math.sqrt(2 * math.pi) * f(1 / (1 + math.exp(-0.8 - 0.8 * n)))
        return scipy.integrate.quad(density, -9, 9, points=[(math.log(0.05 / 0.95) - 0.8) / 0.8], epsabs=1e-10)[0]

    inside, outside = mean(lambda s: min(s / 0.05, 1) ** 2), mean(lambda s: 1 / max(s, 0.05) ** 2)
    assert energy_threshold() == pytest.approx(inside / (outside - inside), rel=2e-4)
    assert energy_threshold() == pytest.approx(0.51, abs=0.005)
    # Uniform: E[w] = 0.95 + 0.05 / 3 and E[w / sigma^2] = 0.05 * 400 + (1 / 0.05 - 1), both by hand.
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert energy_threshold(sigma=uniform) == pytest.approx((0.95 + 0.05 / 3) / (39 - 0.95 - 0.05 / 3), rel=1e-4)
    assert energy_threshold(2.0) == pytest.approx(4 * energy_threshold())
    assert energy_threshold(sigma=torch.tensor([0.0, 1.0])) == pytest.approx(0.5 / 200)
    assert auto_rank(torch.tensor([1e9]), sigma=torch.ones(3)) == 0  # at pure noise, the data is never divided


def test_the_rank_for_the_gaussian_toy_is_that_of_its_strong_directions():
    """toy/closed_form.py trains with uniform noise levels; ranks 4 and 5 are the best there (docs/toys.md)."""
    from toy.closed_form import Gaussian  # here, because the processes below import this file and need no matplotlib

    data = Gaussian(0, "cpu")
    fit = fit_pca([data.sample(10_000, torch.Generator().manual_seed(0))], 32)
    uniform = (torch.arange(1000) + 0.5) / 1000
    assert auto_rank(fit.spectrum, sigma=uniform) == auto_rank(data.variance, sigma=uniform) == 4


def test_auto_is_auto_rank():
    x = normal(300, 10) * torch.logspace(1, -1, 10)
    for noise_scale in (0.01, 1, 2, 100):
        fit = fit_pca([x], "auto", noise_scale=noise_scale)
        assert fit.rank == auto_rank(fit.spectrum, noise_scale)
        assert torch.equal(fit.basis, fit_pca([x], fit.rank).basis)
    uniform = (torch.arange(1000) + 0.5) / 1000
    fit = fit_pca([x], "auto", sigma=uniform)
    assert fit.rank == auto_rank(fit.spectrum, sigma=uniform) > auto_rank(fit.spectrum)
    ranks = [fit_pca([x], "auto", noise_scale=noise_scale).rank for noise_scale in (0.01, 1, 2, 100)]
    assert ranks[0] == 10 > ranks[1] > ranks[2] > ranks[3] == 0


# ---- Mistakes --------------------------------------------------------------------------------------------------------
X, Z = normal(6, 20, 4), normal(6, 20, 2, seed=1)
MISTAKES = {
    "no batches": (lambda: fit_pca([], 1), "no tokens"),
    "empty batches": (lambda: fit_pca([X[:0], X[:, :0]], 1), "no tokens"),
    "rank too large": (lambda: fit_pca(X, 5), "at most the dimension of the tokens, 4, but it is 5"),
    "rank negative": (lambda: fit_pca(X, -1), "0 or more.*-1"),
    "rank misspelled": (lambda: fit_pca(X, "atuo"), "'atuo'"),
    "rank a fraction": (lambda: fit_pca(X, 2.5), "2.5"),
    "noise_scale 0": (lambda: fit_pca(X, "auto", noise_scale=0), "noise_scale"),
    "noise_scale NaN": (lambda: auto_rank(X[0, 0], math.nan), "noise_scale"),
    "noise_scale infinite": (lambda: auto_rank(X[0, 0], math.inf), "noise_scale"),
    "sigma above 1": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([0.5, 1.5])), "sigma"),
    "sigma negative": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([0.5, -0.5])), "sigma"),
    "sigma NaN": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([math.nan])), "sigma"),
    "no sigma": (lambda: auto_rank(X[0, 0], sigma=torch.tensor([])), "sigma"),
    "NaN": (lambda: fit_pca([X, X.where(X.max() > X, math.nan)], 1), "batch 1.*NaN"),
    "infinity": (lambda: fit_pca([X, X, X.where(X.max() > X, -math.inf)], 1), "batch 2.*infinity"),
    "squares too large": (lambda: fit_pca([1e160 * X], 1), "batch 0.*squares"),
    "other dimension": (lambda: fit_pca([X, X[..., :3]], 1), "batch 1.*3.*4"),
    "not a tensor": (lambda: fit_pca([[X]], 1), "batch 0.*list"),
    "a pair": (lambda: fit_pca([X, (Z, X)], 1), "batch 1.*tuple"),
    "integers": (lambda: fit_pca([X.byte()], 1), "torch.uint8"),
    "a number": (lambda: fit_pca([X[0, 0, 0]], 1), "shape"),
    "dimension 0": (lambda: fit_pca([X[..., :0]], 0), "shape"),
    "zeros": (lambda: fit_pca([0 * X], 1), "all tokens are 0"),
    "no pairs": (lambda: fit_procrustes([]), "no tokens"),
    "empty pairs": (lambda: fit_procrustes([(Z[:0], X[:0])]), "no tokens"),
    "no pair": (lambda: fit_procrustes([X]), "batch 0.*pair.*Tensor"),
    "three": (lambda: fit_procrustes([(Z, X, X)]), "pair"),
    "other squares": (lambda: fit_procrustes([(Z, X), (Z[:, :19], X)]), r"batch 1.*\(6, 19, 2\).*\(6, 20, 4\)"),
    "as many squares": (lambda: fit_procrustes([(Z.mT.reshape(20, 6, 2), X)]), "same squares"),
    "swapped": (lambda: fit_procrustes([(X, Z)]), "latent tokens have 4 dimensions and pixel tokens only 2"),
    "no latent dimension": (lambda: fit_procrustes([(Z[..., :0], X)]), "latent tokens must"),
    "other latents": (lambda: fit_procrustes([(Z, X), (Z[..., :1], X)]), "batch 1"),
    "NaN in latents": (lambda: fit_procrustes([(Z, X), (Z * math.nan, X)]), "batch 1.*NaN"),
    "NaN in pixels": (lambda: fit_procrustes([(Z, X), (Z, X * math.nan)]), "batch 1.*NaN"),
    "zero latents": (lambda: fit_procrustes([(Z * 0, X)]), "are 0"),
    "zero pixels": (lambda: fit_procrustes([(Z, X * 0)]), "are 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_in_one_line(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


# ---- Many processes --------------------------------------------------------------------------------------------------
def lazily(batches):
    """As a data loader may do it: in inference mode, which lasts while the generator is suspended."""
    with torch.inference_mode():
        yield from [b.clone() for b in batches]


def broken(batches):
    yield batches[0]
    raise OSError("the disk is gone")


def scenarios(process, alone):
    """What two processes try, from the data of each: (name, call)."""
    x, z = normal(90, 6).float(), normal(90, 2, seed=1).float()
    share, mine = [x[:30], x[30:]][process], slice(0, 30) if process == 0 else slice(30, None)
    bad = share * math.nan
    return {
        "pca": lambda: fit_pca(cut(share, [7]), 3, patch_size=1),
        "auto": lambda: fit_pca([share], "auto"),
        "lazy": lambda: fit_pca(lazily([share]), 3),
        "procrustes": lambda: fit_procrustes(zip(cut(z[mine], [7]), cut(share, [7]), strict=True)),
        "0 has no data": lambda: fit_pca([x] if process == 1 else [], 3),
        "1 has no data": lambda: fit_procrustes([(z, x)] if process == 0 else []),
        "0 has NaN": lambda: fit_pca([share, bad if process == 0 else share], 3),
        "1 has NaN": lambda: fit_procrustes([(z[mine], bad if process == 1 else share)]),
        "1 has no data, 0 NaN": lambda: fit_pca([bad] if process == 0 else [], 3),
        "none has data": lambda: fit_pca([], 3),
        "all is empty": lambda: fit_pca([share[:0]], 3),
        "other dimension": lambda: fit_pca([share[:, : 5 + process]], 3),
        "1 is broken": lambda: fit_pca(broken([share]) if process == 1 else [share], 3),
        "no correlation": lambda: fit_procrustes([(0 * z[mine] + 1, share)]),
        "rank too large": lambda: fit_pca([x] if process == 0 else [], 7),
        "1 alone": lambda: fit_pca([share], 3, group=alone) if process == 1 else None,
    }


def numbers_of(fit):
    return fit.basis, torch.tensor(fit.scale, dtype=torch.float64), fit.spectrum


def run_scenarios(process, folder):
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout, world_size=2, rank=process)
    results = {}
    for name, call in scenarios(process, dist.new_group([1])).items():
        try:
            fit = call()
            results[name] = fit and numbers_of(fit)
        except Exception as e:
            results[name] = f"{type(e).__name__}: {e}"
    torch.save(results, f"{folder}/{process}.pt")
    time.sleep(0.1)  # torch 2.6 hangs if gloo's threads have not let go of the last tensors: they need the GIL
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes got in each scenario: a list of two dicts."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("fork")  # nothing here goes backwards: autograd does not survive it
    processes = [context.Process(target=run_scenarios, args=(i, str(folder)), daemon=True) for i in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout=300)
    hanging = [p.is_alive() for p in processes]
    for p in processes:
        p.kill()
    assert not any(hanging)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.parametrize("name", ["pca", "auto", "lazy", "procrustes", "0 has no data", "1 has no data"])
def test_two_processes_have_one_result_and_it_is_that_of_one_process(together, name):
    """Bit for bit the same in both; off by rounding from the fit of all data in one process (gaps are about 0.1)."""
    x, z = normal(90, 6).float(), normal(90, 2, seed=1).float()
    assert not isinstance(together[0][name], str), together[0][name]
    for one, other in zip(*(results[name] for results in together), strict=True):
        assert torch.equal(one, other)
    fit = fit_procrustes([(z, x)]) if name in ("procrustes", "1 has no data") else fit_pca([x], 3)
    rank = auto_rank(fit.spectrum) if name == "auto" else fit.rank
    if name == "auto":
        fit = fit_pca([x], rank)
    for one, other in zip(numbers_of(fit), together[0][name], strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0 has NaN", "InputError: process 0: batch 1: it has NaN"),
        ("1 has NaN", "InputError: process 1: batch 0: it has NaN"),
        ("1 has no data, 0 NaN", "InputError: process 0: batch 0: it has NaN"),
        ("none has data", "InputError: there are no tokens"),
        ("all is empty", "InputError: there are no tokens"),
        ("other dimension", "InputError: the tokens must have one dimension in all processes"),
        ("1 is broken", "RuntimeError: process 1: OSError('the disk is gone')"),
        ("no correlation", "InputError: only 1 of 2 latent directions"),
        ("rank too large", "InputError: process 0: rank must be at most"),
    ],
)
def test_two_processes_raise_what_fails_in_one(together, name, message):
    for results in together:
        assert results[name].startswith(message)


def test_two_processes_may_fit_each_alone(together):
    alone = fit_pca([normal(90, 6).float()[30:]], 3)
    assert together[0]["1 alone"] is None
    for one, other in zip(numbers_of(alone), together[1]["1 alone"], strict=True):
        assert torch.equal(one, other)
