"""REPA: the features are DINOv2's own, they reach what they should, and distributed training keeps its promises."""

import json
import shutil
import sys

import pytest
import torch
from processes import Launched, metrics, same_bits, tensors, train, words
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asymflow import AsymFlow
from asymflow.backbones.jit import JiT
from asymflow.cli import main
from asymflow.errors import InputError
from asymflow.evaluation.features import load_extractor
from asymflow.subspace import Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.objectives.cost import Step, needed_flops
from asymflow.training.objectives.cost import images as class_0_images
from asymflow.training.objectives.repa import AT_ONCE, MEAN, STD, Aligned, Encoder, misalignment
from asymflow.training.run import checkpoint

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4)
REGISTERS = 3


def save_dinov2(folder, registers=0, **options):
    """A small DINOv2 as `transformers` saves it, with random weights and 5 x 5 positions. Returns the model."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    options = {**SIZES, **options}
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **options))
    else:
        model = Dinov2Model(Dinov2Config(**options))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2") / "plain"
    save_dinov2(folder)
    return folder


def images(count=3, side=16):
    torch.manual_seed(1)
    return 2 * torch.rand(count, 3, side, side) - 1


# ---- Features --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("registers", [0, REGISTERS])
def test_features_are_what_transformers_computes(tmp_path, registers):
    """Of images that have the right size already: 4 x 4 patches of 4 pixels, on positions made for 5 x 5."""
    model, x0 = save_dinov2(tmp_path / "model", registers), images(AT_ONCE + 2)
    features = Encoder(tmp_path / "model", (4, 4))(x0)
    pixels = ((x0 + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    assert expected.shape == (AT_ONCE + 2, 1 + registers + 16, 24)
    assert torch.allclose(features, expected[:, 1 + registers :], rtol=0, atol=1e-5)
    assert not features.requires_grad
    assert features.std(dim=(0, 1)).mean() > 0.05


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 2), (1, 0), (2, 1)])
def test_a_feature_belongs_to_the_token_of_its_place(tmp_path, row, column):
    """Without layers, DINOv2 sees each patch alone; a change in one of 3 x 3 patches of 8 pixels is in that token."""
    save_dinov2(tmp_path / "model", num_hidden_layers=0)
    encoder = Encoder(tmp_path / "model", (3, 3))
    assert encoder.size == (12, 12)  # so 24 pixels are made smaller by two
    x0 = images(1, side=24)
    changed = x0.clone()
    changed[:, :, 8 * row + 3 : 8 * row + 5, 8 * column + 3 : 8 * column + 5] *= -1  # where no neighbour's filter ends
    different = (encoder(x0) - encoder(changed)).abs().amax(-1)[0] > 1e-6
    assert different.nonzero().flatten().tolist() == [3 * row + column]


def test_resizing_keeps_colours_and_smooths_what_is_too_fine(folder):
    """Where fine lines, white on black, become dark grey, as far as the border of the image allows."""
    encoder = Encoder(folder, (2, 2))
    grey = torch.full((1, 3, 64, 64), -0.5)
    lines = torch.full_like(grey, -1)
    lines[..., 3::8] = lines[..., 4::8] = 1  # where a filter that does not widen would look
    assert encoder.size == (8, 8)
    assert torch.allclose(encoder(grey), encoder(torch.full((1, 3, 8, 8), -0.5)), rtol=0, atol=1e-5)
    assert torch.cosine_similarity(encoder(lines), encoder(grey), dim=-1).min() > 0.99


def test_features_do_not_depend_on_the_other_images_and_come_in_the_dtype_asked_for(folder):
    encoder, x0 = Encoder(folder, (4, 4)), images(5)
    assert torch.allclose(encoder(x0)[3:4], encoder(x0[3:4]), rtol=0, atol=1e-5)
    low = Encoder(folder, (4, 4), dtype=torch.bfloat16)(x0)
    assert low.dtype == torch.bfloat16
    assert torch.cosine_similarity(low.float(), encoder(x0), dim=-1).min() > 0.99


# ---- The model -------------------------------------------------------------------------------------------------------
def aligned(in_context_start, after=2):
    torch.manual_seed(0)
    sizes = dict(width=32, depth=4, heads=2, bottleneck=16, in_context_tokens=2, num_classes=5)
    jit = JiT(patch_size=4, image_size=16, in_context_start=in_context_start, **sizes)
    flow = AsymFlow(jit, Subspace.random(48, 8))
    model = Aligned(flow, after, hidden=20, features=24)
    for weight in jit.parameters():  # the gates of a new JiT are closed
        torch.nn.init.normal_(weight, std=0.2)
    return model, flow


def inputs(batch=3):
    return images(batch), torch.rand(batch), torch.arange(batch)


@pytest.mark.parametrize("in_context_start", [0, 1, 2, 3])
def test_only_image_tokens_are_projected_and_only_in_training(in_context_start):
    """Whenever the tokens of the class join: before, at, or after the block that is aligned."""
    model, flow = aligned(in_context_start)
    x, sigma, labels = inputs()
    velocity, projected = model(x, sigma, labels=labels)
    assert projected.shape == (3, 16, 24)
    assert torch.equal(velocity, flow.train()(x, sigma, labels=labels))
    assert torch.equal(model.eval()(x, sigma, labels=labels), flow.eval()(x, sigma, labels=labels))
    names = {name for name, _ in model.named_parameters() if not name.startswith("projector.")}
    assert names == {name for name, _ in flow.named_parameters()}


def test_the_alignment_teaches_the_projector_and_the_blocks_before_it_and_nothing_else(folder):
    model, _ = aligned(in_context_start=1, after=2)
    encoder = Encoder(folder, (4, 4))
    x, sigma, labels = inputs()
    velocity, projected = model(x, sigma, labels=labels)
    misalignment(projected, encoder(x)).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    before = ("projector.", "backbone.blocks.0.", "backbone.blocks.1.", "backbone.x_embedder.", "backbone.t_embedder.")
    before += ("backbone.y_embedder.", "backbone.in_context_positions")
    assert reached == {name for name, _ in model.named_parameters() if name.startswith(before)}
    assert all(not p.requires_grad and p.grad is None for p in encoder.model.parameters())
    model.zero_grad()
    velocity, _ = model(x, sigma, labels=labels)
    velocity.square().mean().backward()
    assert all(p.grad is None for p in model.projector.parameters())


def test_misalignment_is_the_negative_cosine_whatever_the_lengths():
    torch.manual_seed(0)
    features, lengths = torch.randn(2, 5, 7).double(), torch.rand(2, 5, 1) + 0.1
    assert torch.allclose(misalignment(lengths * features, features), -torch.ones(2).double())
    assert torch.allclose(misalignment(-features, lengths * features), torch.ones(2).double())
    across = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert misalignment(across, torch.tensor([[[0.0, 3.0], [-2.0, 0.0]]])).tolist() == [0.5]  # of 0 and 1
    assert misalignment(across.bfloat16(), across.bfloat16()).dtype == torch.float32


def test_the_operations_of_a_step_are_those_of_all_its_networks(folder):
    model, flow = aligned(in_context_start=1)
    config = load_config("shapes_tiny", ["loss.repa.model=none", "loss.repa.after=2"])
    batch = class_0_images(5, (3, 16, 16))
    alone = needed_flops(Step(config, ClassConditional(config, flow), flow.train()), batch)
    encoder = Encoder(folder, (4, 4))
    together = needed_flops(Step(config, ClassConditional(config, flow, encoder), model.train()), batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as dinov2:
        encoder(images())
    # Forward, and backward to its input and its weights, on 16 tokens: 32 -> 20 -> 20 -> 24.
    projector = 3 * 2 * 16 * (32 * 20 + 20 * 20 + 20 * 24)
    assert together == alone + dinov2.get_total_flops() // 3 + projector


# ---- Mistakes --------------------------------------------------------------------------------------------------------
def edited(folder, copy, **values):
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return copy


def test_a_folder_that_holds_no_dinov2_is_answered_in_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = edited(folder, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cut = edited(folder, tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-100])
    lacking = edited(folder, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    name = next(n for n in weights if n.endswith("layernorm.weight"))
    save_file({n: w for n, w in weights.items() if n != name}, lacking / "model.safetensors", {"format": "pt"})
    pickled = edited(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for wrong, message in (
        ("facebook/dinov2-base", "facebook/dinov2-base is not a folder"),
        (folder / "config.json", "is not a folder"),
        (tmp_path / "empty", "has no config.json"),
        (broken, "is not the configuration of a model"),
        (edited(folder, tmp_path / "other", model_type="vit"), "its model_type is 'vit', expected dinov2 or"),
        (edited(folder, tmp_path / "narrow", hidden_size=32), "or has them in another shape: embeddings.cls_token"),
        (edited(folder, tmp_path / "words", hidden_size="wide"), "cannot be loaded as a Dinov2Model"),
        (cut, "cannot be loaded as a Dinov2Model"),
        (lacking, f"lacks weights of a Dinov2Model, or has them in another shape: {name}"),
        (pickled, "has no weights in safetensors, and pickles are not read: convert it with transformers.Dinov2Model"),
    ):
        with pytest.raises(InputError) as caught:
            Encoder(wrong, (4, 4))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_transformers_it_is_said_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs the package transformers: pip install"):
        Encoder(folder, (4, 4))


# ---- Training --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("repa")


@pytest.fixture(scope="module")
def arguments(out, folder):
    def of(name, *settings, repa=f"loss.repa={{model: {folder}, after: 1, hidden: 16}}", steps=8):
        common = (repa, "checkpoint.every=4", "checkpoint.keep_last=9", "optimizer.lr=4e-3", "ema.snapshot_every=4")
        return words(out / name, *common, f"train.steps={steps}", *settings)

    return of


@pytest.fixture(scope="module")
def on_one_rank(arguments):
    """Trainings of 8 steps, also accumulated and interrupted."""
    train(
        1,
        arguments("alone", "sample.every=8", "sample.num=2", "sample.steps=2"),
        arguments("accumulated", "train.micro_batch_size=4"),
        arguments("resumed", steps=4),
        arguments("resumed"),
        arguments("without", repa="loss.repa=null"),
        arguments("faint", "loss.repa.weight=1e-20"),
    )


@pytest.fixture(scope="module")
def on_two_ranks(on_one_rank, arguments):
    """At ZeRO stages 0 and 3, the latter also interrupted."""
    settings = {n: ("train.micro_batch_size=2", f"deepspeed.zero_optimization.stage={n}") for n in (0, 3)}
    straight = [arguments(f"stage{n}", *settings[n]) for n in (0, 3)]
    train(2, *straight, *(arguments("resumed3", *settings[3], steps=steps) for steps in (4, 8)))


@pytest.fixture
def runs(request, out):
    """Where the runs are: those on one rank, and all if the test is slow."""
    request.getfixturevalue("on_two_ranks" if request.node.get_closest_marker("slow") else "on_one_rank")
    return out


def test_alignment_grows_when_it_is_trained(runs):
    similarity = [-entry["repa"] for entry in metrics(runs / "alone")]
    assert similarity[-1] > similarity[0] + 0.3
    assert similarity[-1] <= 1


def test_without_weight_the_alignment_changes_nothing(runs):
    """The logged loss is flow matching alone; the model begins as it does without, and sees the same noise."""
    plain, faint = metrics(runs / "without"), metrics(runs / "faint")
    assert [entry["loss"] for entry in faint] == pytest.approx([entry["loss"] for entry in plain], rel=1e-6)
    assert metrics(runs / "alone")[0]["loss"] == plain[0]["loss"]
    assert metrics(runs / "alone")[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-2)
    assert "repa" not in plain[0]


@pytest.mark.parametrize("name", ["accumulated", *(pytest.param(f"stage{n}", marks=pytest.mark.slow) for n in (0, 3))])
def test_accumulation_ranks_and_stages_do_not_change_the_curve(runs, name):
    """To the rounding of sums in another order."""
    for found, expected in zip(metrics(runs / name), metrics(runs / "alone"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["repa"] == pytest.approx(expected["repa"], rel=1e-4, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("straight", "resumed"), [("alone", "resumed"), pytest.param("stage3", "resumed3", marks=pytest.mark.slow)]
)
def test_a_resumed_training_has_the_same_bits(runs, straight, resumed):
    assert metrics(runs / straight) == metrics(runs / resumed)
    found = tensors(runs / resumed, 8)
    assert same_bits(tensors(runs / straight, 8), found)
    assert {kind for kind, name in found if name == "projector.4.bias"} == {kind for kind, _ in found}
    assert not any("dino" in name or "embeddings" in name for _, name in found)


@pytest.mark.parametrize(
    ("words", "kind"), [(["export", "--ema", "none"], "weights"), (["ema", "--sigma-rel", "0.1"], "ema-rel-0.100")]
)
def test_what_is_exported_is_a_plain_model_without_the_projector(runs, tmp_path, words, kind):
    command, *rest = words
    assert main([command, "--run", str(runs / "alone"), "--out", str(tmp_path / "model"), *rest]) == 0
    flow = AsymFlow.from_pretrained(tmp_path / "model")
    assert type(flow) is AsymFlow
    expected = checkpoint.Reader(checkpoint.folder_of(runs / "alone" / "checkpoints", 8)).full(kind)
    projector = {name for name in expected if name.startswith("projector.")}
    assert len(projector) == 6
    found = dict(flow.named_parameters())
    assert found.keys() == expected.keys() - projector
    tolerance = 0 if kind == "weights" else 1e-5
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=tolerance) for name in found)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert b"projector" not in weights


def test_a_wrong_folder_ends_the_training_before_it_begins(tmp_path):
    launched = Launched(1, tmp_path / "run", "loss.repa={model: nowhere, after: 1}")
    assert launched.wait() == [2]
    (line,) = launched.said()
    assert line.startswith("train_ddp.py: error: loss.repa.model: nowhere is not a folder")
    assert not (tmp_path / "run").exists()


def test_the_features_of_the_frechet_distance_are_a_plain_recomputation(tmp_path):
    model = save_dinov2(tmp_path / "dino")
    images = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = load_extractor("dinov2", tmp_path / "dino")(images)
    resized = torch.nn.functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model((resized / 255 - mean) / std).pooler_output  # the class token after the last norm
    assert torch.allclose(found, expected, atol=1e-5)
