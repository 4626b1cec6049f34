"""The latent model that a finetuning is held against, and its batches."""

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from finetuning_runs import config_of

from asymflow import Subspace
from asymflow.backbones.flux2 import latent_flow, latent_to_pixel
from asymflow.data.encoded import EncodedShards
from asymflow.entries import UnreadableError
from asymflow.patches import patchify, unpatchify
from asymflow.training.objectives.encoded_batches import EncodedBatches
from asymflow.training.objectives.finetuning import adapters_off, make_finetuned, trained
from asymflow.training.objectives.latent_to_pixel import LatentToPixel
from toy.asymflux2_tiny import gradient_moments


# ---- The reference ---------------------------------------------------------------------------------------------------
def test_the_reference_stays_the_latent_model_whatever_the_adapters_learn(made, model):
    latent = latent_flow(Flux2Transformer2DModel.from_pretrained(made / "base/transformer"))
    z, tau, text = torch.randn(2, 16, 3, 2), torch.tensor([0.3, 0.8]), torch.randn(2, 5, 96)
    x, sigma = torch.randn(2, 3, 48, 32), torch.tensor([0.3, 0.8])
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1)
        u, v = model.train()(x, sigma, noisy_latents=z, tau=tau, encoder_hidden_states=text)
        expected = latent(z, tau, encoder_hidden_states=text)
        assert torch.equal(v, expected)
        assert torch.equal(u, model(x, sigma, encoder_hidden_states=text))  # and adapters are on again
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_before_training_it_is_the_lifted_latent_model(made, model):
    latent = Flux2Transformer2DModel.from_pretrained(made / "base/transformer")
    lifted = latent_to_pixel(latent, Subspace.load(made / "subspace.safetensors")).eval()
    x, sigma, text = torch.randn(2, 3, 48, 32), torch.tensor([0.3, 0.8]), torch.randn(2, 5, 96)
    with torch.no_grad():
        assert torch.equal(
            model.eval()(x, sigma, encoder_hidden_states=text), lifted(x, sigma, encoder_hidden_states=text)
        )


def test_adapters_are_on_again_also_after_an_error(model):
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


def test_the_variance_of_the_gradient_is_less_and_its_mean_is_about_the_same(made, model, record_property):
    """Over micro-batches of data and noise, the same with and without, for the weights that are trained."""
    data, found = EncodedShards(made / "shards"), {}
    for name, more in (("reduced", []), ("plain", ["loss.variance_reduction=null"])):
        config = config_of(made, *more, "train.steps=100", "loss.sigma_shift=17.0", "loss.label_dropout=0")
        objective = LatentToPixel(config, data)
        found[name] = gradient_moments(model, objective, EncodedBatches(data, config, 0, 1), draws=40)
    ratio = found["plain"].variance / found["reduced"].variance
    cosine = torch.nn.functional.cosine_similarity(found["plain"].mean, found["reduced"].mean, dim=0).item()
    record_property("variance_ratio", ratio)
    print(f"variance of the gradient: plain / reduced {ratio:.2f}; cosine of the means {cosine:.3f}")
    assert ratio > 1.2
    assert cosine > 0.8


def test_the_terms_of_the_loss_are_those_of_the_method(made):
    """arXiv 2605.12964, written out: of a model that has learnt something, and of given images, latents and noise."""
    config = config_of(made, "loss.perceptual={vgg: random}")
    model = make_finetuned(config, Subspace.load(made / "subspace.safetensors")).train()
    generator = torch.Generator().manual_seed(0)
    for p in trained(model):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    data = EncodedShards(made / "shards")
    seen = {}

    def perceptual(x0_pred, x0, weight):
        seen.update(x0_pred=x0_pred, x0=x0, weight=weight)
        return weight.flatten(1).mean(1)

    batch = EncodedBatches(data, config, 0, 1)[0]
    text, basis, s = batch.prompts, model.subspace.basis.float(), model.subspace.scale
    tokens = lambda images: patchify(images, 16, "channel_first")
    column = lambda values: values.view(-1, 1, 1)
    sigma = torch.sigmoid(batch.normal)
    sigma = 2 * sigma / (1 + sigma)  # loss.sigma_shift
    tau = sigma / (s + (1 - s) * sigma)
    x0, eps, z = tokens(batch.x0), tokens(batch.eps), patchify(batch.latents, 1)
    z_tau = (1 - column(tau)) * z + column(tau) * eps @ basis
    x_sigma = (1 - column(sigma)) * x0 + column(sigma) * eps
    image = lambda v, patch: unpatchify(v, tuple(batch.latents.shape[-2:]), patch, "channel_first")
    latent = latent_flow(Flux2Transformer2DModel.from_pretrained(made / "base/transformer"))
    with torch.no_grad():
        v = patchify(latent(image(z_tau, 1), tau, encoder_hidden_states=text), 1)
        x0_pred = x_sigma - column(sigma) * tokens(model(image(x_sigma, 16), sigma, encoder_hidden_states=text))
        losses = LatentToPixel(config, data, perceptual).losses(model, batch)
    d_low = s * (z - (z_tau - column(tau) * v)) @ basis.mT
    d, low = ((x0 - x0_pred).unflatten(2, (3, 256)), d_low.unflatten(2, (3, 256)))
    c = ((d * low).mean(3, keepdim=True) / low.square().mean(3, keepdim=True).clamp(min=1e-4)).clamp(0, 1)
    w = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + (0.3 * sigma) ** 2)
    target = x0 - ((1 - w).view(-1, 1, 1, 1) * c * low).flatten(2)
    floor = sigma.clamp(min=0.05).square()
    torch.testing.assert_close(losses[:, 0], (x0_pred - target).square().mean((1, 2)) / floor, rtol=1e-3, atol=0)
    share = c.square().mean((2, 3), keepdim=True).sqrt()[..., 0] * column(w)  # of each patch, in [0, 1]
    torch.testing.assert_close(tokens(seen["weight"]) * column(floor), share.expand(-1, -1, 256), rtol=0, atol=1e-3)
    torch.testing.assert_close(tokens(seen["x0_pred"]), x0_pred, rtol=0, atol=1e-4)
    assert torch.equal(seen["x0"], batch.x0)


# ---- Batches ---------------------------------------------------------------------------------------------------------
def test_a_step_is_of_one_bucket_on_all_ranks_and_epochs_are_whole(made):
    data, config = EncodedShards(made / "shards"), config_of(made, "train.steps=400", "loss.label_dropout=0")
    whole, halves = EncodedBatches(data, config, 0, 1), [EncodedBatches(data, config, rank, 2) for rank in (0, 1)]
    for step in (0, 1, 2, 3, 57):
        batch, parts = whole[step], [half[step] for half in halves]
        assert len({tuple(part.pixels.shape[2:]) for part in parts}) == 1
        for field in ("pixels", "eps", "latents", "prompts", "normal"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(part, field) for part in parts])), field
    buckets, before = whole.plan
    share = np.bincount(data.bucket)[0] / len(data)
    assert (buckets == 0).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5)
    steps = np.flatnonzero(buckets == 1)[:2]  # its 16 images in two steps of 8: each once
    seen = {tuple(latent.flatten().tolist()) for step in steps for latent in whole[int(step)].latents}
    assert len(seen) == 16
    assert before[steps].tolist() == [0, 1]


def test_latents_and_images_of_a_batch_belong_together(made):
    data, rate, steps = EncodedShards(made / "shards"), 0.3, 100
    batches = EncodedBatches(data, config_of(made, f"train.steps={steps}", f"loss.label_dropout={rate}"), 0, 1)
    known = {tuple(s.latent.flatten().tolist()): s for s in (data[i] for i in range(len(data)))}
    dropped = []
    for batch in (batches[step] for step in range(steps)):
        for pixels, latent, prompt in zip(batch.pixels, batch.latents, batch.prompts, strict=True):
            sample = known[tuple(latent.flatten().tolist())]
            assert torch.equal(pixels, sample.image)
            dropped.append(torch.equal(prompt, data.empty_prompt))
            assert torch.equal(prompt, data.empty_prompt if dropped[-1] else sample.prompt)
    assert np.mean(dropped) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(dropped)) ** 0.5)


def test_a_damaged_sample_is_drawn_without_its_prompt(made, model):
    class Damaged(EncodedShards):
        def __getitem__(self, index):
            raise UnreadableError("damaged")

    class Unsaid(EncodedShards):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(prompt=self.empty_prompt)

    def drawn(kind):
        config, data = config_of(made, "sample.steps=1"), kind(made / "shards")
        return LatentToPixel(config, data).draw(model, range(2))

    with torch.no_grad():
        assert torch.equal(drawn(Damaged), drawn(Unsaid))
        assert not torch.equal(drawn(Damaged), drawn(EncodedShards))


def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(made, model):
    """To the rounding of sums in another order, which a step of the sampler may amplify a hundred times."""
    objective = LatentToPixel(config_of(made, "sample.steps=1"), EncodedShards(made / "shards"))
    with torch.no_grad():
        parts = [objective.draw(model, part) for part in (range(3), range(3, 4))]
        assert torch.allclose(objective.draw(model, range(4)), torch.cat(parts), rtol=0, atol=1e-4)
