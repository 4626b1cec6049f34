"""Finetuning a latent model to pixels under DeepSpeed: the same curve in every stage, and nothing but what is meant."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from processes import Launched, metrics, slow_unless, tensors, train
from safetensors.torch import load_file, save_file

from asymflow import InputError, Subspace
from asymflow.backbones.flux2 import latent_flow, latent_to_pixel
from asymflow.backbones.flux2.adapter import FULL, load_adapter
from asymflow.cli import main as asymflow
from asymflow.data.encoded import EncodedShards
from asymflow.data.shapes import Shapes
from asymflow.patches import patchify, unpatchify
from asymflow.pixels import UnreadableError
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.encoded_batches import EncodedBatches, rare_buckets
from asymflow.training.objectives.finetuning import adapters_off, load_transformer, make_finetuned, trained
from asymflow.training.objectives.flow_matching import flow_matching_loss, noise_level, noisy
from asymflow.training.objectives.latent_to_pixel import LatentToPixel
from asymflow.training.start import other_encoders
from toy.asymflux2_tiny import gradient_moments
from toy.tiny_flux2 import make_base, normalize_latents

SIZES = [(48, 48)] * 48 + [(32, 64)] * 16  # of the images; two buckets


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base whose latent model has learnt a little, shards of two sizes, and a subspace."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for i, (height, width) in enumerate(SIZES):
        sample = Shapes(64, 64, 3)[i]
        picture = Image.fromarray((sample.image // 2).permute(1, 2, 0).numpy()).resize((width, height))
        picture.save(folder / f"images/{i:03d}.png")
        (folder / f"images/{i:03d}.txt").write_text(sample.caption)
    pipeline = make_base([path.read_text() for path in (folder / "images").glob("*.txt")])
    pictures = [Shapes(64, 48, 3)[i].image // 2 for i in range(64)]  # near the mean of normalized Oklab
    normalize_latents(pipeline.vae, torch.stack(pictures).float() / 127.5 - 1)
    pipeline.save_pretrained(folder / "base")
    places = {"--base": folder / "base", "--data": folder / "images", "--out": folder / "shards"}
    options = {**places, "--size": 48, "--max-length": 32, "--dtype": "float32", "--batch": 16}
    assert not asymflow(["data", "encode", *(str(word) for pair in options.items() for word in pair)])
    assert not asymflow(["subspace", "procrustes", f"--shards={folder}/shards", f"--out={folder}/subspace.safetensors"])
    learn(pipeline.transformer, EncodedShards(folder / "shards"))
    pipeline.transformer.save_pretrained(folder / "base/transformer")
    return folder


def learn(transformer, data, steps=60):
    """Some of the distribution of the latents: enough for a reference that is better than nothing."""
    torch.manual_seed(0)
    flow, optimizer = latent_flow(transformer.train()), torch.optim.Adam(transformer.parameters(), lr=3e-3)
    samples = [data[i] for i in np.flatnonzero(data.bucket == data.bucket[0])]
    latents, prompts = torch.stack([s.latent for s in samples]), torch.stack([s.prompt for s in samples])
    for _ in range(steps):
        chosen = torch.randint(len(latents), (16,))
        x0, sigma = latents[chosen], noise_level(torch.randn(16), 0.0, 1.0)
        eps = torch.randn_like(x0)
        velocity = flow(noisy(x0, eps, sigma), sigma, encoder_hidden_states=prompts[chosen])
        optimizer.zero_grad()
        flow_matching_loss(velocity, x0, eps, sigma).mean().backward()
        optimizer.step()
    transformer.eval()


def settings(made, *more):
    return [
        f"finetune.base={made}/base",
        f"finetune.subspace={made}/subspace.safetensors",
        "finetune.lora={rank: 4, dropout: 0.0}",
        f"data.path={made}/shards",
        "train.global_batch_size=8",
        "train.steps=6",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "sample.every=null",
        "optimizer.warmup_steps=2",
        "loss.sigma_shift=2.0",
        "ema.decays=[0.5]",
        *more,
    ]


def words(made, out, *more):
    pairs = (word for setting in settings(made, *more) for word in ("--set", setting))
    return ["--config", "asymflux2_tiny", "--out", str(out), *pairs]


def config_of(made, *more):
    return load_config("asymflux2_tiny", settings(made, *more))


ALONE = "alone"
VARIANTS = {
    "stage0": ["deepspeed.zero_optimization.stage=0"],
    "stage1": [],
    "stage2": ["deepspeed.zero_optimization.stage=2"],
    "stage3": ["deepspeed.zero_optimization.stage=3"],
    "offload": ["deepspeed.zero_optimization={stage: 2, offload_optimizer: {device: cpu}}"],
    "offload3": [
        "deepspeed.zero_optimization={stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}"
    ],
    "accumulated": ["train.micro_batch_size=2"],
    "checkpointing": ["finetune.checkpointing=true"],
    "checkpointing3": ["finetune.checkpointing=true", "deepspeed.zero_optimization.stage=3"],
    "workers": ["data.workers=1"],
}
OTHERS = {  # of another curve
    "bf16": [
        "train.precision=bf16",
        "train.micro_batch_size=1",
        "deepspeed.bf16.enabled=true",
        "deepspeed.data_types={grad_accum_dtype: fp32}",
        "deepspeed.zero_optimization.stage=2",
    ],
    "bf16-full": [
        "train.precision=bf16",
        "finetune.lora=null",
        "deepspeed.bf16.enabled=true",
        "deepspeed.zero_optimization.stage=3",
    ],
    "full": ["finetune.lora=null", "deepspeed.zero_optimization.stage=3"],
    "dropout": [
        "finetune.lora={rank: 4, dropout: 0.05}",
        "finetune.checkpointing=true",
        "train.precision=bf16",
        "train.global_batch_size=20",  # more than the smaller bucket has
        "train.micro_batch_size=5",
        "deepspeed.bf16.enabled=true",
        "deepspeed.data_types={grad_accum_dtype: fp32}",
        "deepspeed.zero_optimization.stage=2",
    ],
    "plain": ["loss.variance_reduction=null"],
    "perceptual": [
        "loss.perceptual={vgg: random}",
        "train.steps=2",
        "checkpoint.every=2",
        "sample.every=2",
        "sample.steps=2",
    ],
}
CASES = {ALONE: []} | VARIANTS | OTHERS
RESUMED = ("stage1", "stage3", "dropout")
QUICK = (ALONE, "stage3", "full", "plain")


@pytest.fixture(scope="module")
def train_all(made, folder):
    """On two ranks, ALONE on one; those in RESUMED once more from the checkpoint in the middle, as NAME-resumed."""

    def run(names):
        todo = [words(made, folder / name, *CASES[name]) for name in names if name != ALONE]
        for name in names:
            if name in RESUMED:
                middle = folder / name / "checkpoints" / "00000003"
                todo.append([*words(made, folder / f"{name}-resumed", *CASES[name]), "--resume", str(middle)])
        with (folder / "said").open("a") as said:
            print(*train(2, *todo), sep="\n", file=said)
        if ALONE in names:
            train(1, words(made, folder / ALONE))

    return run


@pytest.mark.parametrize("name", slow_unless(QUICK, VARIANTS))
def test_every_way_to_share_the_work_gives_the_same_curve(runs, name):
    expected, found = metrics(runs / "alone"), metrics(runs / name)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
    for m, e in zip(found, expected, strict=True):
        assert m["loss"] == pytest.approx(e["loss"], rel=1e-4)
        assert m["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-3)
        assert m["lr"] == e["lr"]


@pytest.mark.slow
@pytest.mark.parametrize(("half", "whole"), [("bf16", "alone"), ("bf16-full", "full")])
def test_in_bfloat16_it_is_about_the_same_curve(runs, half, whole):
    for m, e in zip(metrics(runs / half), metrics(runs / whole), strict=True):
        assert m["loss"] == pytest.approx(e["loss"], rel=0.05)


@pytest.mark.parametrize("name", slow_unless(QUICK, RESUMED))
def test_a_resumed_finetuning_has_the_same_bits(runs, name):
    a, b = tensors(runs / name, 6), tensors(runs / f"{name}-resumed", 6)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert metrics(runs / name)[3:] == metrics(runs / f"{name}-resumed")


def test_checkpoints_and_averages_are_of_what_is_trained_alone(runs, made):
    names = {name for _, name in tensors(runs / "alone", 6)}
    lora = {name for name in names if ".lora_" in name}
    full = {name.removeprefix("backbone.transformer.").split(".")[0] for name in names - lora}
    assert full == set(FULL)
    transformer = Flux2Transformer2DModel.from_pretrained(made / "base/transformer")
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    assert len(lora) == 2 * (4 * double + single + 2)  # the linear layers of method, section 5
    assert {kind for kind, _ in tensors(runs / "alone", 6)} == {
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "ema-0.5",
        "ema-rel-0.099",
    }


def test_full_finetuning_trains_every_weight(runs, made):
    names = {name for _, name in tensors(runs / "full", 6)}
    transformer = Flux2Transformer2DModel.from_pretrained(made / "base/transformer")
    assert names == {f"backbone.transformer.{name}" for name, _ in transformer.named_parameters()}


def test_all_begin_with_the_same_loss(runs):
    """LoRA or full, the model is the latent one before the first step."""
    assert metrics(runs / "full")[0]["loss"] == pytest.approx(metrics(runs / "alone")[0]["loss"], rel=1e-5)


def test_with_less_variance_in_the_target_the_loss_is_less(runs):
    """Of the same model, images and noise: before the first step."""
    assert metrics(runs / "alone")[0]["loss"] < 0.95 * metrics(runs / "plain")[0]["loss"]


@pytest.mark.slow
def test_the_perceptual_term_is_there_and_images_are_drawn(runs):
    assert all(0 < m["perceptual"] < 100 for m in metrics(runs / "perceptual"))
    assert (runs / "perceptual/samples/00000002.png").is_file()


def test_the_learning_rate_of_proj_out_is_multiplied(runs):
    """Adam moves what is pushed one way all the time by the learning rate in each step, whatever its gradient."""
    config = load_config(runs / "alone/config.yaml")
    start = make_finetuned(config, Subspace.load(runs / "alone/subspace.safetensors"))
    begun, after = dict(start.named_parameters()), tensors(runs / "alone", 3)
    names = {layer: f"backbone.transformer.{layer}.weight" for layer in ("x_embedder", "proj_out")}
    moved = {layer: (after["weights", name] - begun[name].detach()).abs().max() for layer, name in names.items()}
    assert moved["proj_out"] / moved["x_embedder"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    "name", ["alone", *slow_unless(QUICK, ["stage3", "accumulated", "bf16", "full", "bf16-full", "plain"])]
)
def test_every_tensor_that_is_trained_moves_as_far_as_its_learning_rate(runs, name):
    """Adam moves what is pushed one way all the time by the learning rate in each step, or a little less at first.

    No number moves further, and of each tensor there is one that moves a third as far: lora_A begins a step later,
    when lora_B is not zero any more.
    """
    config = load_config(runs / name / "config.yaml")
    torch.manual_seed(config.train.seed)
    start = dict(make_finetuned(config, Subspace.load(runs / name / "subspace.safetensors")).named_parameters())
    after = {parameter: value for (kind, parameter), value in tensors(runs / name, 3).items() if kind == "weights"}
    assert after.keys() == {parameter for parameter, p in start.items() if p.requires_grad}
    furthest = sum(m["lr"] for m in metrics(runs / name)[:3])
    for parameter, value in after.items():
        factor = 3 if ".proj_out." in f".{parameter}." else 1
        moved = (value - start[parameter].detach()).abs().max() / factor
        assert furthest / 3 < moved < 1.01 * furthest, parameter


# ---- What comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["alone", "full"])
def test_the_exported_adapter_is_the_model_that_was_trained(runs, made, name, tmp_path):
    assert not asymflow(["export", "--run", f"{runs}/{name}", "--out", f"{tmp_path}/adapter"])
    loaded = load_adapter(Flux2Transformer2DModel.from_pretrained(made / "base/transformer"), tmp_path / "adapter")
    subspace = Subspace.load(runs / name / "subspace.safetensors")
    model = make_finetuned(load_config(runs / name / "config.yaml"), subspace).eval()
    average = {n: value for (kind, n), value in tensors(runs / name, 6).items() if kind == "ema-0.5"}
    assert not model.load_state_dict(average, strict=False).unexpected_keys
    x, sigma, text = torch.randn(2, 3, 48, 32), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 96)
    with torch.no_grad():
        a, b = (flow(x, sigma, encoder_hidden_states=text) for flow in (loaded, model))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "trained"), [("alone", "LoRA of rank 4"), ("full", "all weights")])
def test_info_of_a_run_says_what_it_is(runs, made, name, trained, capsys):
    assert not asymflow(["info", str(runs / name)])
    said = capsys.readouterr().out
    assert f"a finetuning of a FLUX.2 klein, step 6, average 0.5: {trained}, subspace of rank " in said
    assert said.endswith(f", base {made / 'base'}\n")


# ---- The reference ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(made):
    config = config_of(made)
    torch.manual_seed(0)
    return make_finetuned(config, Subspace.load(made / "subspace.safetensors"))


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
        objective = LatentToPixel(config, data, torch.device("cpu"))
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
    data, device = EncodedShards(made / "shards"), torch.device("cpu")
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
        losses = LatentToPixel(config, data, device, perceptual).losses(model, batch)
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


@pytest.mark.slow
def test_buckets_with_fewer_images_than_a_batch_are_named(runs):
    sizes, counts = [(16, 16 * n) for n in range(1, 10)], [8, 7, 0, 1, 2, 3, 4, 5, 80]
    data = SimpleNamespace(buckets=sizes, bucket=np.repeat(np.arange(9), counts))
    (line,) = rare_buckets(data, 8)
    assert "(16x32: 7, 16x64: 1, 16x80: 2, 16x96: 3, 16x112: 4 and 1 more)" in line
    assert "max-aspect" in line
    assert rare_buckets(data, 1) == []
    said = [line for line in (runs / "said").read_text().splitlines() if "max-aspect" in line]
    assert len(said) == 2  # by each start of the run "dropout", and no other
    assert all("train.global_batch_size 20, so a step repeats them (32x64: 16)" in line for line in said)


def test_a_damaged_sample_is_drawn_without_its_prompt(made, model):
    class Damaged(EncodedShards):
        def __getitem__(self, index):
            raise UnreadableError("damaged")

    class Unsaid(EncodedShards):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(prompt=self.empty_prompt)

    def drawn(kind):
        config, data = config_of(made, "sample.steps=1"), kind(made / "shards")
        return LatentToPixel(config, data, torch.device("cpu")).draw(model, range(2))

    with torch.no_grad():
        assert torch.equal(drawn(Damaged), drawn(Unsaid))
        assert not torch.equal(drawn(Damaged), drawn(EncodedShards))


def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(made, model):
    """To the rounding of sums in another order, which a step of the sampler may amplify a hundred times."""
    objective = LatentToPixel(config_of(made, "sample.steps=1"), EncodedShards(made / "shards"), torch.device("cpu"))
    with torch.no_grad():
        parts = [objective.draw(model, part) for part in (range(3), range(3, 4))]
        assert torch.allclose(objective.draw(model, range(4)), torch.cat(parts), rtol=0, atol=1e-4)


# ---- Mistakes --------------------------------------------------------------------------------------------------------
def refusal(made, out, *more):
    process = Launched(1, arguments=words(made, out, *more))
    assert process.wait() == [2], process.said()
    (line,) = process.said()
    return line


def test_a_subspace_of_another_rank_is_refused(made, tmp_path):
    Subspace.random(768, 8, patch_size=16, token_order="channel_first", color_space="oklab").save(tmp_path / "s")
    line = refusal(made, tmp_path / "run", f"finetune.subspace={tmp_path}/s")
    assert "16 channels, but the subspace has the rank 8" in line
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["finetune.base=/nowhere"], "finetune.base /nowhere is not a folder of FLUX.2 klein"),
        (["optimizer.multipliers={proj_uot: 2.0}"], "no trained parameter is in a layer called proj_uot"),
        (["finetune.lora={rank: 4, targets: [attn.to_x]}"], "attn.to_x"),
        (["model={size: tiny/4, image_size: 32, num_classes: 2}"], "does not go with finetune"),
        (["data.kind=webdataset"], "must be encoded"),
        (["finetune.base=OTHER"], "has prompts of width 96, but finetune needs 48"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(made, tmp_path, more, words):
    if more == ["finetune.base=OTHER"]:
        make_base(["a"], text_width=16).transformer.save_pretrained(tmp_path / "transformer")
        more = [f"finetune.base={tmp_path}"]
    assert words in refusal(made, tmp_path / "run", *more)


def test_a_base_that_lacks_a_tensor_is_refused(made, tmp_path):
    shutil.copytree(made / "base/transformer", tmp_path / "transformer")
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["transformer_blocks.0.attn.to_q.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of its tensors, the first transformer_blocks.0.attn.to_q.weight"):
        load_transformer(tmp_path, torch.float32)


def test_a_distilled_base_is_refused(made, tmp_path):
    (tmp_path / "transformer").symlink_to(made / "base/transformer")
    load_transformer(tmp_path, torch.float32)  # a transformer alone may be the right one
    index = json.loads((made / "base/model_index.json").read_text())
    assert index["is_distilled"] is False
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(InputError, match=r"model_index.json .* FLUX.2-klein-base-9B"):
        load_transformer(tmp_path, torch.float32)


def test_shards_of_other_encoders_are_remarked_on(made, runs, tmp_path):
    data = EncodedShards(made / "shards")
    assert other_encoders(made / "base", data) == other_encoders(tmp_path, data) == []
    assert "encoded with other files" not in (runs / "said").read_text()
    shutil.copytree(made / "base/vae", tmp_path / "vae")
    (tmp_path / "tokenizer").symlink_to(made / "base/tokenizer")
    (tmp_path / "vae/config.json").write_text("{}")
    (line,) = other_encoders(tmp_path, data)
    assert "other files of vae than" in line


def test_another_base_of_the_same_shapes_is_noticed_on_resume(made, runs, tmp_path):
    shutil.copytree(runs / "alone", tmp_path / "run")
    shutil.copytree(made / "base/transformer", tmp_path / "other/transformer")
    other = Flux2Transformer2DModel.from_pretrained(tmp_path / "other/transformer")
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other/transformer")
    line = refusal(made, tmp_path / "run", f"finetune.base={tmp_path}/other", "train.steps=7")
    assert "another latent model" in line


def test_a_run_that_was_moved_is_exported_with_its_base(made, runs, tmp_path, capsys):
    """The base is where the configuration says, or where the user says that it is now."""
    shutil.copytree(runs / "alone", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made / "base"), "/elsewhere"))
    command = ["export", "--run", f"{tmp_path}/run", "--out", f"{tmp_path}/adapter"]
    assert asymflow(command) == 2
    assert "/elsewhere is not a folder of FLUX.2 klein" in capsys.readouterr().err
    assert not asymflow([*command, "--base", f"{made}/base"])
    assert (tmp_path / "adapter" / "config.json").is_file()


def test_an_adapter_needs_its_own_base(made, runs, tmp_path):
    assert not asymflow(["export", "--run", f"{runs}/alone", "--out", f"{tmp_path}/adapter"])
    other = Flux2Transformer2DModel.from_pretrained(made / "base/transformer")
    with torch.no_grad():
        other.x_embedder.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"another base model .*trained on base\)"):
        load_adapter(other, tmp_path / "adapter")
