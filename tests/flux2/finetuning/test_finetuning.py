"""Finetuning a latent model to pixels under DeepSpeed: the same curve in every stage, and nothing but what is meant."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from finetuning_runs import settings
from processes import Launched, metrics, slow_unless, tensors, train
from safetensors.torch import load_file, save_file

from asymflow import InputError, Subspace, opening
from asymflow.backbones.flux2.adapter import FULL, WEIGHTS, load_adapter
from asymflow.cli import main as asymflow
from asymflow.data.encoded import EncodedShards
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.encoded_batches import rare_buckets
from asymflow.training.objectives.finetuning import load_transformer, make_finetuned
from asymflow.training.run.checkpoint import MANIFEST, STATE, describe
from asymflow.training.start import other_encoders
from toy.tiny_flux2 import make_base


def words(made, out, *more):
    pairs = (word for setting in settings(made, *more) for word in ("--set", setting))
    return ["--config", "asymflux2_tiny", "--out", str(out), *pairs]


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
    assert asymflow([*command, "--backbone", "mine:Net"]) == 2
    assert "is a finetuning of the base model: leave it out" in capsys.readouterr().err
    assert asymflow(command) == 2
    assert "/elsewhere is not a folder of FLUX.2 klein" in capsys.readouterr().err
    assert not asymflow([*command, "--base", f"{made}/base"])
    assert (tmp_path / "adapter" / "config.json").is_file()
    metadata = opening.read_tensors(tmp_path / "adapter" / WEIGHTS)[1]
    assert metadata["base"] == "base"  # without its place
    assert metadata["prompt_length"] == "32"  # of the shards


NEW = ("base", "prompt_length")  # in the state of a snapshot


@pytest.mark.parametrize("earlier", [False, True])
def test_an_average_of_snapshots_is_an_adapter_too(runs, tmp_path, earlier):
    """Also if they are of an earlier version, and do not say of what base they are."""
    run = shutil.copytree(runs / "alone", tmp_path / "run")
    if earlier:
        snapshot = run / "snapshots" / "00000006"
        state, manifest = (json.loads((snapshot / name).read_text()) for name in (STATE, MANIFEST))
        (snapshot / STATE).write_text(
            json.dumps({key: state[key] for key in state if key not in ("base", "prompt_length")})
        )
        (snapshot / MANIFEST).write_text(json.dumps({**manifest, STATE: describe(snapshot / STATE)}))
    assert not asymflow(["ema", "--run", f"{run}", "--sigma-rel", "0.0994", "--out", f"{tmp_path}/ema"])
    assert not asymflow(["export", "--run", f"{run}", "--ema", "rel-0.099", "--out", f"{tmp_path}/tracked"])
    one, other = (opening.read_tensors(tmp_path / name / WEIGHTS) for name in ("ema", "tracked"))
    assert one[1] == other[1]
    assert all(torch.allclose(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize("name", ["alone", "full"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 2),
        ("num_layers", "two"),
        ("num_single_layers", 1),
        ("num_attention_heads", 4),
        ("attention_head_dim", 64),
        ("in_channels", 8),
        ("mlp_ratio", 2.0),
    ],
)
def test_the_base_of_an_export_has_the_shapes_of_what_was_trained(made, runs, tmp_path, capsys, name, key, value):
    (tmp_path / "base" / "transformer").mkdir(parents=True)
    config = json.loads((made / "base/transformer/config.json").read_text()) | {key: value}
    (tmp_path / "base/transformer/config.json").write_text(json.dumps(config))
    command = ["export", "--run", f"{runs}/{name}", "--out", f"{tmp_path}/adapter", "--base", f"{tmp_path}/base"]
    assert asymflow(command) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("asymflow export: error: ")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_needs_its_own_base(made, runs, tmp_path):
    assert not asymflow(["export", "--run", f"{runs}/alone", "--out", f"{tmp_path}/adapter"])
    other = Flux2Transformer2DModel.from_pretrained(made / "base/transformer")
    with torch.no_grad():
        other.x_embedder.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"another base model .*trained on base\)"):
        load_adapter(other, tmp_path / "adapter")
