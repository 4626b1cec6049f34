"""A latent FLUX.2 lifted to pixels begins as exactly what it was."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asymflow import InputError, Subspace, calibration, patchify, sample, sigma_grid, unpatchify
from asymflow.backbones.flux2 import Flux2, latent_flow, latent_to_pixel, positions
from asymflow.data.shapes import Shapes
from toy.tiny_flux2 import make_base

RECORD = dict(patch_size=16, token_order="channel_first", color_space="oklab")


@pytest.fixture(scope="module")
def transformer():
    shapes = Shapes(50, 32)
    return make_base([shapes[i].caption for i in range(50)]).transformer


def subspace_of(dtype, rank=16, scale=0.4, dim=768):
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=g, dtype=torch.float64)).Q
    return Subspace(basis.to(dtype), scale, **RECORD)


def drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inside(images, subspace):
    """The coordinates (B, r, h, w) of images within the subspace, in latent units at the scale 1."""
    grid = [n // 16 for n in images.shape[-2:]]
    return unpatchify(patchify(images, 16, "channel_first") @ subspace.basis.to(images), grid, 1, "channel_first")


@pytest.fixture(params=[(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"])
def precision(request, transformer):
    dtype, tolerance = request.param
    other = Flux2Transformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict())
    other = other.eval().requires_grad_(False)
    for p in other.parameters():
        p.data = p.data.to(dtype)
    return other, dtype, tolerance


def test_before_training_its_velocity_inside_is_that_of_the_lifted_latent_model(precision):
    """u = k s u_latent + k (1 - s) x inside of the subspace (method, section 3), at every noise level, down to 0.

    The velocity outside, x / sigma, is rounded together with it: in float32, near sigma = 0, to more than 1e-4.
    """
    transformer, dtype, tolerance = precision
    levels = [0.02, 0.1, 0.4, 0.999, 1.0] if dtype == torch.float32 else [0.0, 1e-3, 0.4, 0.999, 1.0]
    subspace, sigma = subspace_of(dtype), torch.tensor(levels, dtype=dtype)
    latent, pixel = latent_flow(transformer), latent_to_pixel(transformer, subspace).eval()
    x, text = drawn(5, 3, 32, 48, dtype=dtype), drawn(5, 7, 96, dtype=dtype, seed=1)
    u = pixel(x, sigma, encoder_hidden_states=text)
    k, tau = (v.view(-1, 1, 1, 1) for v in calibration(sigma, subspace.scale))
    s, z = subspace.scale, inside(x, subspace)
    of_latents = latent(k * z, tau.flatten(), encoder_hidden_states=text)
    expected = k * (s * of_latents + (1 - s) * z)
    assert (inside(u, subspace) - expected).abs().max() < tolerance
    assert expected.abs().amax((1, 2, 3)).min() > 0.5


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_a_whole_euler_run_is_that_of_the_latent_model(precision, scale):
    """At the calibrated times, with the noise that lies inside.

    Exact for Euler: between two levels the pixel step is, inside of the subspace, k x -> k' x' with
    k' x' = k x + (tau' - tau) u_latent, whatever the step. Heun's average of two velocities would weigh them by k.
    """
    transformer, dtype, tolerance = precision
    subspace = subspace_of(dtype, scale=scale)
    latent, pixel = latent_flow(transformer).eval(), latent_to_pixel(transformer, subspace).eval()
    noise, text = drawn(2, 3, 48, 32, dtype=dtype), drawn(2, 5, 96, dtype=dtype, seed=1)
    levels = sigma_grid(25, shift=5.0)
    times = calibration(levels, subspace.scale)[1]
    x = sample(lambda x, sigma: pixel(x, sigma, encoder_hidden_states=text), noise, levels, "euler")
    z = sample(lambda z, tau: latent(z, tau, encoder_hidden_states=text), inside(noise, subspace), times, "euler")
    torch.testing.assert_close(inside(x, subspace) / scale, z, rtol=0, atol=tolerance * z.abs().max().item())


def test_outside_it_begins_with_nothing(precision):
    """The prediction lies inside: outside, the denoised image is 0."""
    transformer, dtype, tolerance = precision
    subspace, sigma = subspace_of(dtype), torch.tensor([0.3, 0.9], dtype=dtype)
    pixel = latent_to_pixel(transformer, subspace).eval()
    x = drawn(2, 3, 32, 32, dtype=dtype)
    u = pixel(x, sigma, encoder_hidden_states=drawn(2, 5, 96, dtype=dtype))
    x0 = patchify(x - sigma.view(-1, 1, 1, 1) * u, 16, "channel_first")
    torch.testing.assert_close(x0, subspace.project(x0), rtol=0, atol=tolerance)


def test_reference_images_inside_are_reference_latents(precision):
    """Divided by the scale, a lifted latent enters as that latent; each has its own time, so their order counts."""
    transformer, dtype, tolerance = precision
    subspace, sigma = subspace_of(dtype), torch.tensor([0.5], dtype=dtype)
    pixel, latent = latent_to_pixel(transformer, subspace).eval(), latent_flow(transformer).eval()
    x, text = drawn(1, 3, 32, 32, dtype=dtype), drawn(1, 5, 96, dtype=dtype, seed=1)
    latents = [drawn(1, 16, 2, 2, dtype=dtype, seed=2), drawn(1, 16, 1, 3, dtype=dtype, seed=3)]
    lift = lambda z: unpatchify(
        patchify(z, 1) @ (subspace.scale * subspace.basis).to(dtype).mT, z.shape[-2:], 16, "channel_first"
    )
    lifted = [lift(z) for z in latents]
    run = lambda images: pixel(x, sigma, encoder_hidden_states=text, condition_images=images)
    k, tau = (v.view(-1, 1, 1, 1) for v in calibration(sigma, subspace.scale))
    z, s = inside(x, subspace), subspace.scale
    expected = latent(k * z, tau.flatten(), encoder_hidden_states=text, condition_images=latents)
    torch.testing.assert_close(
        inside(run(lifted), subspace), k * (s * expected + (1 - s) * z), rtol=tolerance, atol=tolerance
    )
    assert not torch.allclose(run(lifted), run(lifted[::-1]))
    assert not torch.allclose(run(lifted), run(lifted[:1]))
    assert torch.equal(run([]), pixel(x, sigma, encoder_hidden_states=text))


class NothingFromTheCpu(TorchDispatchMode):
    """Within it no tensor goes to another device: what is not in pinned memory is waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, func
        return result


def test_a_gpu_is_not_waited_for(transformer, monkeypatch):
    with torch.device("meta"):
        there = Flux2Transformer2DModel.from_config(transformer.config)
    flow = latent_to_pixel(there, subspace_of(torch.float32))
    monkeypatch.setattr(flow.backbone.transformer, "forward", lambda hidden_states, **rest: [hidden_states])
    prompt = torch.zeros(2, 5, transformer.config.joint_attention_dim, device="meta")
    x, tau = torch.zeros(2, 12, 768, device="meta"), torch.ones(2, device="meta")
    reference = torch.zeros(2, 3, 32, 16, device="meta")
    with NothingFromTheCpu():
        assert flow.backbone(x, tau, prompt, (3, 4), [reference]).shape == x.shape


def test_positions_are_those_of_the_stock_pipeline():
    from diffusers import Flux2KleinPipeline

    images = [torch.zeros(1, 16, 2, 3), torch.zeros(1, 16, 1, 2)]
    theirs = Flux2KleinPipeline._prepare_image_ids(images)[0]
    ours = torch.cat([positions((2, 3), "cpu", 10), positions((1, 2), "cpu", 20)])
    assert torch.equal(theirs, ours)
    assert torch.equal(Flux2KleinPipeline._prepare_latent_ids(images[0])[0], positions((2, 3), "cpu"))


def test_the_stock_transformer_stays_as_it_is_and_shares_its_weights(transformer):
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    lifted = latent_to_pixel(transformer, subspace_of(torch.float32)).backbone.transformer
    assert type(lifted) is Flux2Transformer2DModel
    assert (lifted.config.in_channels, lifted.config.out_channels) == (768, 768)
    own = dict(lifted.named_parameters())
    for name, p in transformer.named_parameters():
        assert torch.equal(p, before[name])
        assert (own[name] is p) == (name not in ("x_embedder.weight", "proj_out.weight"))


def test_it_computes_in_the_dtype_that_it_is_told_whatever_weights_are_stored_in(transformer):
    """Else the noisy image would be rounded to float8 before it enters."""
    other = Flux2Transformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict())
    other.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert latent_flow(other).backbone_dtype == torch.float32


@pytest.mark.parametrize(
    ("subspace", "patch_size", "words"),
    [
        (dict(rank=8), 16, "16 channels, but the subspace has the rank 8"),
        (dict(), 8, "patch_size differs"),
        (dict(dim=192), 16, "a basis for tokens of dimension 192"),
    ],
)
def test_what_does_not_fit_is_said(transformer, subspace, patch_size, words):
    with pytest.raises(InputError, match=words):
        latent_to_pixel(transformer, subspace_of(torch.float32, **subspace), patch_size)


def test_a_distilled_model_is_refused(transformer):
    config = {**transformer.config, "guidance_embeds": True}
    with pytest.raises(InputError, match="guidance embedding"):
        Flux2(Flux2Transformer2DModel.from_config(config), 1)
