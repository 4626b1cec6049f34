"""The variance-reduced loss: the same expectation where it should be, and less variance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from asymflow import InputError
from asymflow.color import oklab_to_rgb
from asymflow.flow_matching import flow_matching_loss, noisy
from asymflow.training.objectives.variance import (
    PerceptualLoss,
    agreement,
    denoising_loss,
    signal_share,
    torchvision_vgg,
    variance_reduced_target,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_with_the_plain_target_it_is_the_flow_matching_loss():
    x0, eps, velocity = (drawn(4, 6, 12, seed=i) for i in range(3))
    sigma = torch.tensor([0.01, 0.05, 0.5, 1.0], dtype=torch.float64)
    x0_pred = noisy(x0, eps, sigma) - sigma.view(-1, 1, 1) * velocity
    plain = flow_matching_loss(velocity, x0, eps, sigma)
    torch.testing.assert_close(denoising_loss(x0_pred, x0, sigma), plain)


def test_agreement_is_one_for_the_same_error_and_zero_for_an_opposite_or_foreign_one():
    d = drawn(2, 3, 12)
    one = torch.ones(2, 3, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(agreement(d, d, 3), one)
    torch.testing.assert_close(agreement(0.25 * d, d, 3), 0.25 * one)
    torch.testing.assert_close(agreement(3 * d, d, 3), one)  # never more than all of it
    assert (agreement(-d, d, 3) == 0).all()
    assert (agreement(d, torch.zeros_like(d), 3) == 0).all()  # and nothing is divided by zero


def test_agreement_is_for_each_patch_and_channel_alone():
    d, d_low = drawn(1, 2, 12), drawn(1, 2, 12, seed=1)
    mixed = torch.where(torch.arange(12) < 4, d, d_low)  # the first of 3 channels agrees
    c = agreement(d, mixed, 3)
    torch.testing.assert_close(c[:, :, 0], torch.ones(1, 2, 1, dtype=torch.float64))
    torch.testing.assert_close(c[:, :, 1:], agreement(d, d_low, 3)[:, :, 1:])


def test_the_share_of_the_signal_goes_from_one_to_zero():
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    w = signal_share(sigma)
    assert w[0] == 1
    assert w[-1] == 0
    assert (w.diff() < 0).all()
    assert signal_share(torch.tensor(1 / 1.3)).item() == pytest.approx(0.5)  # 1 - sigma = 0.3 sigma


@given(seed=st.integers(0, 10_000), sigma=st.floats(0, 1))
def test_the_target_lies_between_the_data_and_the_data_without_the_error(seed, sigma):
    x0, d_low = drawn(1, 2, 12, seed=seed), drawn(1, 2, 12, seed=seed + 1)
    c = agreement(drawn(1, 2, 12, seed=seed + 2), d_low, 3)
    target = variance_reduced_target(x0, d_low, c, torch.tensor([sigma], dtype=torch.float64))
    low, high = torch.minimum(x0, x0 - d_low), torch.maximum(x0, x0 - d_low)
    assert ((low - 1e-12 <= target) & (target <= high + 1e-12)).all()


def test_near_the_data_the_target_is_the_data():
    x0, d_low = drawn(1, 2, 12), drawn(1, 2, 12, seed=1)
    c = torch.ones(1, 2, 3, 1, dtype=torch.float64)
    assert torch.equal(variance_reduced_target(x0, d_low, c, torch.tensor([0.0]).double()), x0)
    torch.testing.assert_close(variance_reduced_target(x0, d_low, c, torch.tensor([1.0]).double()), x0 - d_low)


def gaussian(n, sigma):
    """Data (n, 1, 12) in a subspace of 4 dimensions, and its mean given a noisy image at the noise level sigma."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(drawn(12, 4)).Q
    x0 = torch.randn(n, 1, 4, generator=generator, dtype=torch.float64) @ basis.mT
    x_sigma = (1 - sigma) * x0 + sigma * torch.randn(n, 1, 12, generator=generator, dtype=torch.float64)
    return x0, (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * x_sigma @ basis @ basis.mT


@pytest.mark.parametrize("factor", [1, 0, 0.8, 1.25, 3, -1])
def test_what_is_taken_away_says_nothing_of_the_noisy_image_if_the_reference_is_right(factor):
    """Else the model would learn another mean. For Gaussians the right one is linear: so regress on it.

    The reference is `factor` times the mean of the data given the noisy image; the model is off by a constant.
    """
    n, sigma = 50_000, 0.7
    x0, mean = gaussian(n, sigma)
    d_low = x0 - factor * mean
    c = agreement(x0 - (mean + 0.1), d_low, 3)
    taken = x0 - variance_reduced_target(x0, d_low, c, torch.tensor([sigma]).double().expand(n))
    products = (taken * mean).flatten(1).sum(1)
    deviations = (products.mean() / (products.std() / math.sqrt(n))).abs()
    assert deviations < 5 if factor == 1 else deviations > 20


def test_a_reference_that_is_right_takes_away_variance():
    """Of the gradient of a model that is right, too, and there all of it but for w of the deviation."""
    n, sigma = 10_000, torch.tensor([0.7], dtype=torch.float64)
    x0, mean = gaussian(n, 0.7)
    d = x0 - mean
    reduced = mean - variance_reduced_target(x0, d, agreement(d, d, 3), sigma.expand(n))
    assert reduced.var() / d.var() == pytest.approx(signal_share(sigma).item() ** 2, rel=0.01)


def test_the_shift_of_the_share_is_that_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    x0, error = torch.randn(2, 3, 4, 12, generator=generator)
    c, sigma = torch.rand(3, 4, 3, 1, generator=generator), torch.tensor([0.2, 0.5, 0.9])
    for shift in (0.5, 5.0):
        taken = (x0 - variance_reduced_target(x0, error, c, sigma, shift)).unflatten(-1, (3, 4))
        share = (1 - signal_share(sigma, shift))[:, None, None, None]
        torch.testing.assert_close(taken, share * c * error.unflatten(-1, (3, 4)))


# ---- LPIPS -----------------------------------------------------------------------------------------------------------
def test_a_random_vgg_is_always_the_same_and_draws_from_nobody(monkeypatch):
    monkeypatch.setattr("lpips.LPIPS", lambda **options: torch.nn.Linear(4, 4))  # the real one takes seconds
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights.append(PerceptualLoss("random", "cpu").model.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*weights)


def test_torchvisions_file_is_taken_from_its_cache_or_asked_for(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for offline, reason in ((True, "HF_HUB_OFFLINE is set"), (False, "no network")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(InputError, match=f"{reason}.*loss.perceptual.vgg"):
            PerceptualLoss(None, "cpu")
    file = tmp_path / "checkpoints/vgg16-397923af.pth"
    file.touch()
    assert torchvision_vgg() == file


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file_are_those_that_lpips_computes_with(tmp_path, suffix):
    """On images of which one half counts, and with the gradient that a loss wants."""
    import lpips  # takes seconds

    reference = lpips.LPIPS(net="vgg", spatial=True, pnet_rand=True, verbose=False).eval()
    vgg = {f"features.{name.split('.', 1)[1]}": value for name, value in reference.net.state_dict().items()}
    file, extra = tmp_path / f"vgg{suffix}", {"classifier.0.weight": torch.zeros(2, 2)}
    save_file(vgg | extra, file) if suffix == ".safetensors" else torch.save(vgg | extra, file)
    ours = PerceptualLoss(str(file), "cpu")
    assert not any(p.requires_grad for p in ours.model.parameters())
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    weight = torch.zeros(2, 1, 32, 32)
    weight[..., :16] = 3
    x.requires_grad_()
    found = ours(x, y, weight)
    expected = (reference(oklab_to_rgb(x), oklab_to_rgb(y)) * weight).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    assert found.min() > 0
    assert torch.autograd.grad(found.sum(), x)[0].abs().max() > 0
    half = PerceptualLoss(str(file), "cpu", torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(x, y, weight), found, rtol=0.1, atol=0.01)
    del vgg["features.0.weight"]
    save_file(vgg, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors does not hold torchvision's weights of VGG16.*features.0"):
        PerceptualLoss(str(tmp_path / "other.safetensors"), "cpu")
