"""The FLUX.2 pipeline: the samplers agree, and diffusers' own features work."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, Flux2KleinPipeline
from PIL import Image
from tiny_pipelines import PROMPTS, SCALE, SMALL, draw, load, picture, save_adapter

from asymflow import InputError, calibration, patchify
from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline, dynamic_shift, flow_unipc, set_levels
from asymflow.color import clamp_to_gamut, oklab_to_rgb, rgb_to_oklab
from asymflow.sampling import guided, sample, sigma_grid
from toy.tiny_flux2 import TEXT_LENGTH


@pytest.fixture(scope="module")
def lift(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("lift"), 0)


def differ(a, b):
    return (a - b).abs().max().item()


# ---- The samplers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("orthogonal", "clamp"), [(1.0, True), (0.0, False)])
def test_with_euler_it_is_our_own_sampler(base, adapter, noise, orthogonal, clamp):
    pipeline = load(base, adapter, scheduler=FlowMatchEulerDiscreteScheduler())
    images = draw(pipeline, noise, guidance_scale=3.0, orthogonal_guidance=orthogonal, clamp_denoised=clamp)
    with torch.no_grad():
        text, empty = (
            {"encoder_hidden_states": pipeline.encode_prompt(p, max_sequence_length=TEXT_LENGTH)[0]}
            for p in (PROMPTS, ["", ""])
        )
    velocity = guided(pipeline.flow, text, empty, 3.0, orthogonal=orthogonal)
    hook = (lambda x0, _: clamp_to_gamut(x0)) if clamp else None
    expected = sample(velocity, noise, sigma_grid(3, dynamic_shift(32, 48)), "euler", hook)
    assert differ(images, expected) < 1e-5 * expected.abs().max()


def test_unipc_converges_to_our_heun_at_order_two(base, lift, noise):
    """Of the mere lift, and without the fast waves of the time embedding: what is smooth in sigma at these steps.

    Random layers outside of the subspace are no denoiser: x moves like a power of sigma there, and no method has its
    order. The 1e-6 that UniPC leaves out at the start comes in below 1e-4.
    """
    pipeline = load(base, lift)
    pipeline.transformer.time_guidance_embed.timestep_embedder.linear_1.weight.data.view(-1, 2, 128)[..., :81] = 0
    with torch.no_grad():
        text = {"encoder_hidden_states": pipeline.encode_prompt(PROMPTS[:1], max_sequence_length=TEXT_LENGTH)[0]}
    coarse, fine = (sample(guided(pipeline.flow, text, text), noise[:1], sigma_grid(steps)) for steps in (30, 60))
    expected = (4 * fine - coarse) / 3  # Richardson: without the error of order two
    plain = dict(prompt=PROMPTS[:1], guidance_scale=1.0, clamp_denoised=False)
    errors = [
        differ(draw(pipeline, noise[:1], sigmas=sigma_grid(steps)[:-1].tolist(), **plain), expected)
        for steps in (9, 18, 36)  # whose levels are no whole timesteps
    ]
    assert errors[0] > 3.2 * errors[1] > 3.2**2 * errors[2]
    assert errors[2] < 1e-4


def test_the_mere_lift_draws_what_the_latent_model_draws(base, lift, noise):
    """Euler: the step of z = k A^T x over tau is that of x over sigma, since z is linear in x along a straight line."""
    lifted = load(base, lift, scheduler=FlowMatchEulerDiscreteScheduler())
    subspace = lifted.flow.subspace
    sigmas = sigma_grid(6, 2.0)[:-1]
    plain = dict(orthogonal_guidance=0.0, clamp_denoised=False, sigmas=sigmas.tolist())
    x0 = draw(lifted, noise, **plain)

    def tokens(x):
        return (patchify(x, 16, "channel_first") @ subspace.basis).mT.unflatten(-1, (2, 3))

    stock = Flux2KleinPipeline.from_pretrained(base, scheduler=FlowMatchEulerDiscreteScheduler())
    stock.set_progress_bar_config(disable=True)
    tau = calibration(sigmas, subspace.scale)[1]
    z0 = stock(prompt=PROMPTS, latents=tokens(noise), sigmas=tau.tolist(), **{**SMALL, "num_inference_steps": 6}).images
    bn = stock.vae.bn
    std = (bn.running_var + stock.vae.config.batch_norm_eps).sqrt()
    z0 = (stock._patchify_latents(z0) - bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    assert differ(tokens(x0) / SCALE, z0) < 1e-4
    assert differ(z0, tokens(noise)) > 0.1


def test_the_shift_is_linear_in_the_side():
    assert dynamic_shift(1024, 1024) == 17
    assert dynamic_shift(2048, 2048) == 34
    assert dynamic_shift(512, 2048) == pytest.approx(17)
    assert dynamic_shift(256, 256) == 4.25


def test_unipc_gets_the_noise_levels_in_float32():
    scheduler, levels = flow_unipc(), sigma_grid(38, 17.0)
    timesteps = set_levels(scheduler, levels.tolist(), "cpu")
    assert torch.equal(scheduler.sigmas[1:], levels[1:].float())
    assert scheduler.sigmas[0] == torch.tensor(1 - 1e-6, dtype=torch.float32)
    assert (timesteps - 1000 * levels[:-1]).abs().max() > 0.5  # the noise level cannot be taken from these


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchHeunDiscreteScheduler(),
    ],
)
def test_a_scheduler_that_goes_its_own_way_is_refused(scheduler):
    with pytest.raises(InputError, match="does not go through the noise levels") as e:
        set_levels(scheduler, sigma_grid(4, 3.0).tolist(), "cpu")
    assert "\n" not in str(e.value)


# ---- What depends on what --------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_bits_and_neither_batch_nor_order_changes_an_image(pipeline, noise):
    images = draw(pipeline, noise)
    assert torch.equal(draw(pipeline, noise), images)
    assert differ(draw(pipeline, noise[1:], prompt=PROMPTS[1:]), images[1:]) < 1e-4
    assert differ(draw(pipeline, noise.flip(0), prompt=PROMPTS[::-1]).flip(0), images) < 1e-4
    assert differ(images[0], images[1]) > 0.1
    assert differ(draw(pipeline, noise, prompt=PROMPTS[::-1]), images) > 1e-3

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    one = draw(pipeline, None, generator=seeded(5)[0])
    assert torch.equal(draw(pipeline, None, generator=seeded(5)[0]), one)
    each = draw(pipeline, None, generator=seeded(5, 6))
    assert differ(draw(pipeline, None, generator=seeded(6), prompt=PROMPTS[1]), each[1:]) < 1e-4


def test_embeddings_several_images_and_types_of_output(pipeline, noise):
    images = draw(pipeline, noise)
    text, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=TEXT_LENGTH)
    empty, _ = pipeline.encode_prompt("", max_sequence_length=TEXT_LENGTH)
    for negative in (None, empty, empty.expand(2, -1, -1)):
        embeds = dict(prompt=None, prompt_embeds=text, negative_prompt_embeds=negative)
        assert differ(draw(pipeline, noise, **embeds), images) < 1e-4
    assert differ(draw(pipeline, noise, negative_prompt_embeds=text.flip(0)), images) > 1e-3
    pairs = draw(pipeline, noise[[0, 1, 0, 1]], num_images_per_prompt=2)
    assert differ(pairs[0], images[0]) < 1e-4
    assert differ(pairs[3], images[1]) < 1e-4
    rgb = (oklab_to_rgb(images) / 2 + 0.5).clamp(0, 1)
    assert differ(draw(pipeline, noise, output_type="pt"), rgb) < 1e-6
    arrays = draw(pipeline, noise, output_type="np")
    assert np.abs(arrays - rgb.permute(0, 2, 3, 1).numpy()).max() < 1e-6
    pil = pipeline(prompt=PROMPTS, latents=noise, **{**SMALL, "output_type": "pil"}, return_dict=False)[0]
    assert pil[1].size == (48, 32)
    assert np.abs(np.asarray(pil[1]) - 255 * arrays[1]).max() <= 0.51


def test_prompts_have_the_length_of_the_training_unless_another_is_given(pipeline, noise):
    trained = draw(pipeline, noise, max_sequence_length=None)
    assert torch.equal(trained, draw(pipeline, noise, max_sequence_length=TEXT_LENGTH))
    assert torch.equal(trained, draw(AsymFlux2KleinPipeline(**pipeline.components), noise, max_sequence_length=None))
    assert differ(trained, draw(pipeline, noise, max_sequence_length=TEXT_LENGTH + 8)) > 1e-4


def test_the_result_is_displayable(pipeline, noise):
    images = draw(pipeline, noise, guidance_scale=8.0)
    assert oklab_to_rgb(images).abs().max() < 1 + 1e-4
    assert oklab_to_rgb(draw(pipeline, noise, guidance_scale=8.0, clamp_denoised=False)).abs().max() > 1.1


def test_in_bfloat16_it_draws_about_the_same(base, adapter, pipeline, noise):
    images = draw(load(base, adapter, torch_dtype=torch.bfloat16), noise)
    assert images.dtype == torch.float32
    assert (images - draw(pipeline, noise)).square().mean().sqrt() < 0.1


def test_reference_images_count_and_so_does_their_order(pipeline, noise):
    a, b = picture(1, 64, 70), picture(2, 100, 64)
    plain, one, two, turned = (draw(pipeline, noise, image=images) for images in (None, a, [a, b], [b, a]))
    assert min(differ(plain, one), differ(one, two), differ(two, turned)) > 1e-4
    assert differ(draw(pipeline, noise[1:], prompt=PROMPTS[1:], image=[a, b]), two[1:]) < 1e-4
    assert torch.equal(draw(pipeline, noise, image=[a]), one)
    unguided = draw(pipeline, noise, image=[a, b], guidance_scale=1.0)
    assert differ(unguided, draw(pipeline, noise, image=a, guidance_scale=1.0)) > 1e-4
    drawn = pipeline(image=b, prompt="a red square", num_inference_steps=1, max_sequence_length=TEXT_LENGTH).images
    assert drawn[0].size == (96, 64)


def test_a_reference_image_is_the_middle_of_it_in_oklab(pipeline):
    image = picture(3, 70, 65)
    middle = torch.from_numpy(np.asarray(image)[:64, 3:67].copy()).permute(2, 0, 1)[None]
    assert differ(pipeline.reference(image, 16), rgb_to_oklab(middle / 127.5 - 1)) < 1e-5


# ---- As a pipeline of diffusers --------------------------------------------------------------------------------------
def test_callbacks_see_and_change_what_goes_on(pipeline, noise):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors)))
        return {}

    images = draw(pipeline, noise)
    names = ["latents", "prompt_embeds"]
    watched = draw(pipeline, noise, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(watched, images)
    assert seen == [(step, tuple(names)) for step in range(3)]

    def zeros(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    def swap(pipe, step, timestep, tensors):
        return {name: tensor.flip(0) for name, tensor in tensors.items()}

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    assert draw(pipeline, noise, callback_on_step_end=zeros).eq(0).all()
    swapped = draw(pipeline, noise, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert differ(swapped, images) > 1e-3
    assert differ(draw(pipeline, noise, callback_on_step_end=stop), images) > 0.1


def test_offloading_goes_through_the_hooks(base, adapter, pipeline, noise):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    hooked = load(base, adapter)
    add_hook_to_module(hooked.transformer, Count())
    images = draw(hooked, noise)
    assert Count.calls == 3
    hooked.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(hooked, noise), images)
    assert torch.equal(images, draw(pipeline, noise))
    assert len(hooked._all_hooks) == 2  # the text encoder and the transformer


def test_the_autoencoder_is_not_needed(base, adapter, tmp_path):
    copied(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    assert load(tmp_path / "base", adapter).vae is None


def test_what_is_said_of_the_hub_is_said_of_the_adapter_too(base, adapter, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("asymflow.hub.hf_hub_download", lambda *a, **options: asked.append(options) or adapter / a[1])
    options = {"token": "mine", "cache_dir": tmp_path, "local_files_only": True}
    load(base, "nobody/adapter", revision="v2", vae=None, **options)
    assert asked == [options]  # the revision is of the base


def copied(base, folder):
    shutil.copytree(base, folder)
    return folder


def test_a_base_that_is_not_whole_or_not_a_base_model_is_one_line(base, adapter, tmp_path):
    distilled = copied(base, tmp_path / "distilled")
    index = json.loads((base / "model_index.json").read_text())
    (distilled / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    cut = copied(base, tmp_path / "cut")
    weights = cut / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    mute = copied(base, tmp_path / "mute")
    for file in (mute / "tokenizer").glob("*"):
        if file.name != "tokenizer.json":
            file.unlink()
    for folder, message in [
        (distilled, "is a distilled model"),
        (cut, "cannot be loaded"),
        (mute, "its chat template"),
    ]:
        with pytest.raises(InputError, match=message) as e:
            load(folder, adapter)
        assert "\n" not in str(e.value)


def test_what_does_not_fit_is_one_line(base, adapter, pipeline, noise, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"transformer": ["diffusers", "SD3Transformer2DModel"]}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model_index.json").write_text((base / "model_index.json").read_text())
    for folder, options, message in [
        (base, {}, "give from_pretrained an adapter"),
        (base, {"adapter": adapter, "vae": torch.nn.Identity()}, "vae is given"),
        (tmp_path / "none", {"adapter": adapter}, "there is no folder"),
        (tmp_path, {"adapter": adapter}, "no model_index.json"),
        (tmp_path / "other", {"adapter": adapter}, "is not a FLUX.2 klein base model"),
        (tmp_path / "half", {"adapter": adapter}, "cannot be loaded as a FLUX.2 klein"),
        ("nobody/nothing", {"adapter": adapter}, "cannot be loaded as a FLUX.2 klein"),
    ]:
        with pytest.raises(InputError, match=message) as e:
            AsymFlux2KleinPipeline.from_pretrained(folder, **options)
        assert "\n" not in str(e.value)
    for options, message in [
        ({"height": 40}, "40 x 48 pixels"),
        ({"latents": noise[:1]}, "latents are the noise"),
        ({"latents": None, "generator": [torch.Generator()]}, "one for each of the 2 images"),
        ({"sigmas": [0.5, 0.8]}, "noise levels that decrease"),
        ({"negative_prompt_embeds": torch.zeros(3, 4, 96)}, "must have one shape"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(pipeline, noise, **options)
    with pytest.raises(InputError, match="keep these two"):
        pipeline.save_pretrained(tmp_path / "saved")


def test_reference_images_are_what_the_command_line_makes_of_them(pipeline, tmp_path):
    """Turned as EXIF says, white where they are transparent, and of 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    pixels[:32, :, 3] = 0
    clear, turned = Image.fromarray(pixels), Image.fromarray(pixels[..., :3])
    turned.getexif()[0x0112] = 6
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    white = np.where(pixels[..., 3:] == 0, 255, pixels[..., :3] * (pixels[..., 3:] / 255) + 255 - pixels[..., 3:])
    grey = np.repeat(pixels[..., :1], 3, 2)
    for image, expected in ((clear, white.round()), (turned, np.rot90(pixels[..., :3], -1)), (deep, grey)):
        found = oklab_to_rgb(pipeline.reference(image, 16))[0].permute(1, 2, 0)
        assert np.abs((found.numpy() + 1) * 127.5 - expected).max() < 1.5
