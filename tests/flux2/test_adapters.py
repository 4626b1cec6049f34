"""Adapter files: what is written comes back, changes what it should and nothing else, and fits only its base."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from asymflow import InputError, Subspace, files, opening
from asymflow.backbones.flux2 import PROMPT_LENGTH, latent_flow, latent_to_pixel
from asymflow.backbones.flux2.adapter import (
    ADAPTER,
    ALWAYS,
    WEIGHTS,
    add_lora,
    fingerprint,
    load_adapter,
    lora_modules,
    published_names,
    write_adapter,
)
from toy.tiny_flux2 import make_base

RANK = 3


@pytest.fixture(scope="module")
def latent():
    """The transformer of a tiny latent model. Loading uses it up: take a copy."""
    return make_base(["a red square"]).transformer


@pytest.fixture(scope="module")
def subspace():
    return Subspace.random(768, 16, scale=1.7, token_order="channel_first", color_space="oklab", patch_size=16)


def trained(latent, subspace):
    """A pixel model as training leaves it: LoRA layers and full layers that have moved."""
    flow = latent_to_pixel(copy.deepcopy(latent), subspace)
    add_lora(flow.backbone.transformer, RANK)
    torch.manual_seed(1)
    for name, weight in flow.named_parameters():
        if "lora_" in name or any(f".{full}." in name for full in ("x_embedder", "proj_out", "norm_out")):
            weight.data += 0.1 * torch.randn_like(weight)
    return flow.eval()


def changed(flow):
    """The tensors of its adapter, by published names."""
    full = ("x_embedder", "proj_out", "norm_out")
    state = dict(flow.backbone.transformer.named_parameters())
    return published_names({n: p for n, p in state.items() if "lora_" in n or n.startswith(full)})


@pytest.fixture(scope="module")
def flow(latent, subspace):
    return trained(latent, subspace)


@pytest.fixture(scope="module")
def adapter(flow, latent, subspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, changed(flow), subspace, latent.config, fingerprint(latent), base_name="models/right-base")
    return folder


@pytest.fixture(scope="module")
def adapters(adapter, latent, subspace, tmp_path_factory):
    """One of each kind: with LoRA, a mere lift, and of a full finetuning."""
    folder, lifted = tmp_path_factory.mktemp("adapters"), latent_to_pixel(copy.deepcopy(latent), subspace)
    state = published_names(dict(lifted.named_parameters()))
    for name, tensors in (("lift", {key: state[key] for key in ALWAYS}), ("full", state)):
        write_adapter(folder / name, tensors, subspace, latent.config, fingerprint(latent))
    return {"lora": adapter, "lift": folder / "lift", "full": folder / "full"}


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 48), torch.tensor([0.9, 0.2]), torch.randn(2, 5, 96)


def velocity(flow, inputs):
    x, sigma, text = inputs
    with torch.no_grad():
        return flow(x, sigma, encoder_hidden_states=text)


# ---- LoRA layers -----------------------------------------------------------------------------------------------------
def test_the_9b_model_has_58_lora_layers():
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        )
    names = lora_modules(transformer)
    assert len(names) == 8 * 4 + 2 + 24
    assert not any("to_out.0" in name for name in names)


def test_lora_begins_by_changing_nothing(latent, subspace, inputs):
    flow = latent_to_pixel(copy.deepcopy(latent), subspace).eval()
    before = velocity(flow, inputs)
    add_lora(flow.backbone.transformer, RANK, dropout=0.5)
    assert torch.equal(velocity(flow.eval(), inputs), before)
    trainable = {name for name, p in flow.named_parameters() if p.requires_grad}
    assert trainable
    assert all(f".{ADAPTER}.weight" in name for name in trainable)


def test_lora_names_what_it_does_not_find(latent):
    with pytest.raises(InputError, match=r"attn\.to_nowhere"):
        add_lora(copy.deepcopy(latent), RANK, targets=("ff.linear_in", "attn.to_nowhere"))
    with pytest.raises(InputError, match="at least 1"):
        add_lora(copy.deepcopy(latent), 0)


def test_names_are_the_same_in_the_flow_and_in_the_transformer(flow):
    inner = published_names(dict(flow.backbone.transformer.named_parameters()))
    outer = published_names(dict(flow.backbone.named_parameters()))
    assert inner.keys() == outer.keys() == published_names(dict(flow.named_parameters())).keys()
    assert "single_transformer_blocks.0.attn.to_out.lora_A.weight" in inner
    assert "single_transformer_blocks.0.attn.to_out.weight" in inner
    assert not any(ADAPTER in name or "base_layer" in name for name in inner)


# ---- There and back --------------------------------------------------------------------------------------------------
def test_a_trained_model_comes_back_to_the_last_bit(flow, adapter, latent, inputs):
    loaded = load_adapter(copy.deepcopy(latent), adapter)
    assert torch.equal(velocity(loaded, inputs), velocity(flow, inputs))
    assert loaded.subspace.scale == 1.7
    assert torch.equal(loaded.subspace.basis, flow.subspace.basis)
    assert (loaded.patch_size, loaded.token_order, loaded.subspace.color_space) == (16, "channel_first", "oklab")
    assert not loaded.training
    again = changed(loaded)
    written = opening.read_tensors(adapter / WEIGHTS)[0]
    assert again.keys() | {"proj_buffer", "scale_buffer"} == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in again.items())


def test_alpha_is_the_rank(adapter, latent):
    loaded = load_adapter(copy.deepcopy(latent), adapter)
    scalings = [m.scaling[ADAPTER] for m in loaded.modules() if hasattr(m, "scaling")]
    assert len(scalings) == 4 + 2 + 2
    assert set(scalings) == {1.0}


def test_alpha_is_the_rank_when_ranks_differ(adapter, latent, flow, inputs, tmp_path):
    tensors, _ = opening.read_tensors(adapter / WEIGHTS)
    key = "single_transformer_blocks.1.attn.to_out.lora_{}.weight"
    a, b = tensors[key.format("A")], tensors[key.format("B")]
    tensors[key.format("A")], tensors[key.format("B")] = torch.cat([a, a]), torch.cat([b / 2, b / 2], dim=1)
    files.write_tensors(tmp_path / WEIGHTS, tensors)
    loaded = load_adapter(copy.deepcopy(latent), tmp_path)
    torch.testing.assert_close(velocity(loaded, inputs), velocity(flow, inputs), rtol=1e-5, atol=1e-5)


def test_without_the_adapter_it_is_the_latent_model_to_the_last_bit(adapter, latent, inputs):
    base = copy.deepcopy(latent)
    loaded = load_adapter(base, adapter)
    loaded.backbone.transformer.disable_adapters()
    z, (_, sigma, text) = torch.randn(2, 16, 2, 3), inputs
    with torch.no_grad():
        expected = latent_flow(latent)(z, sigma, encoder_hidden_states=text)
        assert torch.equal(latent_flow(base)(z, sigma, encoder_hidden_states=text), expected)


def test_the_layout_is_the_published_one(adapter):
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        scale, basis = file.get_tensor("scale_buffer"), file.get_tensor("proj_buffer")
    pairs = {name for name in names if ".lora_" in name}
    assert {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"} < names
    assert len(pairs) == 2 * (4 + 2 + 2)
    assert names - pairs == {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight", *BUFFERS}
    assert scale.shape == ()
    assert scale.dtype == basis.dtype == torch.float32
    config = json.loads((adapter / "config.json").read_text())
    assert config["_class_name"] == "AsymFlux2Transformer2DModel"
    assert (config["patch_size"], config["in_channels"], config["base_rank"]) == (16, 3, 16)
    assert (config["num_layers"], config["num_single_layers"], config["axes_dims_rope"]) == (1, 2, [8, 8, 8, 8])


BUFFERS = ("proj_buffer", "scale_buffer")


def test_a_config_that_holds_only_what_is_unusual_is_enough(adapter, flow, latent, subspace, tmp_path):
    few = {key: latent.config[key] for key in ("in_channels", "num_layers", "num_single_layers", "axes_dims_rope")}
    few |= {key: latent.config[key] for key in ("attention_head_dim", "num_attention_heads", "joint_attention_dim")}
    write_adapter(tmp_path / "few", changed(flow), subspace, {**few, "guidance_embeds": False}, fingerprint(latent))
    assert (tmp_path / "few" / "config.json").read_text() == (adapter / "config.json").read_text()


def test_rounded_as_the_published_file_is_it_fits_too(adapter, latent, flow, inputs, tmp_path):
    """Its buffers are in bfloat16, the rest in float16."""
    tensors, _ = opening.read_tensors(adapter / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.bfloat16 if name in BUFFERS else torch.float16)
    files.write_tensors(tmp_path / WEIGHTS, tensors)
    loaded = load_adapter(copy.deepcopy(latent), tmp_path)
    expected = velocity(flow, inputs)
    assert (velocity(loaded, inputs) - expected).abs().max() < 0.02 * expected.abs().max()


def test_it_reads_the_published_file(adapter, latent, flow, inputs, tmp_path):
    """A prefix, no metadata, no config.json, and the file by itself."""
    tensors, _ = opening.read_tensors(adapter / WEIGHTS)
    named = {name if name in BUFFERS else f"transformer.{name}": tensor for name, tensor in tensors.items()}
    files.write_tensors(tmp_path / "downloaded.safetensors", named)
    loaded = load_adapter(copy.deepcopy(latent), tmp_path / "downloaded.safetensors")
    torch.testing.assert_close(velocity(loaded, inputs), velocity(flow, inputs), rtol=1e-5, atol=1e-5)


def test_a_lifted_model_needs_no_lora_and_full_finetuning_none_either(latent, subspace, inputs, tmp_path):
    lifted = latent_to_pixel(copy.deepcopy(latent), subspace).eval()
    mere = {n: p for n, p in lifted.named_parameters() if "x_embedder" in n or "proj_out" in n or "norm_out" in n}
    write_adapter(tmp_path / "lift", published_names(mere), subspace, latent.config, fingerprint(latent))
    loaded = load_adapter(copy.deepcopy(latent), tmp_path / "lift")
    assert torch.equal(velocity(loaded, inputs), velocity(lifted, inputs))
    torch.manual_seed(3)
    for weight in lifted.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    state = published_names(dict(lifted.named_parameters()))
    write_adapter(tmp_path / "full", state, subspace, latent.config, fingerprint(latent))
    loaded = load_adapter(copy.deepcopy(latent), tmp_path / "full")
    assert torch.equal(velocity(loaded, inputs), velocity(lifted, inputs))


@pytest.mark.parametrize(("known", "found"), [(32, 32), (None, PROMPT_LENGTH)])
def test_the_length_of_the_prompts_comes_back(flow, latent, subspace, tmp_path, known, found):
    write_adapter(tmp_path / "a", changed(flow), subspace, latent.config, fingerprint(latent), prompt_length=known)
    assert load_adapter(copy.deepcopy(latent), tmp_path / "a").backbone.prompt_length == found
    tensors, metadata = opening.read_tensors(tmp_path / "a" / WEIGHTS)
    for wrong in ("0", "-3", "", "many", "1" * 9):
        files.write_tensors(tmp_path / WEIGHTS, tensors, {**metadata, "prompt_length": wrong})
        with pytest.raises(InputError, match=f"its metadata say that prompts have '{wrong}' positions"):
            load_adapter(copy.deepcopy(latent), tmp_path)


def test_in_bfloat16_the_base_decides(adapter, latent, inputs):
    loaded = load_adapter(copy.deepcopy(latent).bfloat16(), adapter)  # its fingerprint is that of float32
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.subspace.basis.dtype == torch.float32
    assert velocity(loaded, inputs).isfinite().all()


def test_nothing_is_overwritten(flow, adapter, subspace, latent):
    with pytest.raises(InputError, match="exists already"):
        write_adapter(adapter, changed(flow), subspace, latent.config, fingerprint(latent))


# ---- What does not fit -----------------------------------------------------------------------------------------------
LORA = "transformer_blocks.0.ff.linear_in.lora_"


def without(name):
    return lambda t: t.pop(name)


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


def of_rank(rank):
    a, b = f"{LORA}A.weight", f"{LORA}B.weight"
    return lambda t: t.update({a: t[a][:rank], b: t[b][:, :rank]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("x_embedder.weight"), "missing tensors: x_embedder.weight"),
        (without("norm_out.linear.weight"), "missing tensors: norm_out.linear.weight"),
        (without("proj_buffer"), "missing tensors: proj_buffer"),
        (without("scale_buffer"), "missing tensors: scale_buffer"),
        (lambda t: t.update({"vae.weight": torch.ones(2)}), r"unexpected tensors: vae.weight"),
        (lambda t: t.update({f"{LORA}A.alpha": torch.ones(1)}), r"unexpected tensors: .*alpha"),
        (without(f"{LORA}B.weight"), "not transformer_blocks.0.ff.linear_in.lora_B.weight, its other half"),
        (without(f"{LORA}A.weight"), "not transformer_blocks.0.ff.linear_in.lora_A.weight, its other half"),
        (replaced(f"{LORA}A.weight", lambda a: a[:2]), r"with one rank, but it is \(2, 64\)"),
        (replaced(f"{LORA}A.weight", lambda a: a[:, :32]), "another base model: its LoRA for .* 32 features in"),
        (replaced("x_embedder.weight", lambda w: w[:32]), r"another base model: x_embedder.weight is \(32, 768\)"),
        (replaced("proj_buffer", lambda a: a[:, :8]), r"another base model: proj_buffer is \(768, 8\)"),
        (replaced("proj_buffer", lambda a: 2 * a), "not orthonormal"),
        (replaced("scale_buffer", lambda s: s[None]), "scale_buffer"),
        (replaced("scale_buffer", lambda s: 2 * s), "scale_buffer is 3.4, its metadata say 1.7"),
        (
            replaced(f"{LORA}A.weight", lambda a: (a * torch.nan).to(torch.float8_e4m3fn)),
            "A.weight has entries that are not",
        ),
        (of_rank(0), "with one rank"),
        (of_rank(1), r"wrong shapes: .*lora_A.weight has \(1, 64\), expected \(3, 64\)"),
        (
            lambda t: [t.pop(f"{LORA}{x}.weight") for x in "AB"],
            "missing tensors: transformer_blocks.0.ff.linear_in.lora_A",
        ),
        (lambda t: [t.pop(name) for name in list(t) if ".lora_" in name], "missing tensors: .* and 11 more"),
        (replaced("proj_out.weight", lambda w: w * float("nan")), "proj_out.weight has entries that are not finite"),
        (replaced("x_embedder.weight", lambda w: w.long()), "x_embedder.weight has entries that are not finite"),
        (
            lambda t: t.update({n.replace("ff.", "gg."): t.pop(n) for n in list(t) if n.startswith(LORA)}),
            "LoRA for transformer_blocks.0.gg.linear_in, which is no linear layer",
        ),
        (
            lambda t: t.update({f"norm_out.lora_{x}.weight": t[f"{LORA}{x}.weight"] for x in "AB"}),
            "LoRA for norm_out, which is no linear layer",
        ),
    ],
)
def test_what_does_not_fit_is_named(adapter, latent, tmp_path, damage, message):
    tensors, metadata = opening.read_tensors(adapter / WEIGHTS)
    damage(tensors)
    files.write_tensors(tmp_path / WEIGHTS, tensors, metadata)
    base = copy.deepcopy(latent)
    with pytest.raises(InputError, match=message) as e:
        load_adapter(base, tmp_path)
    assert "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)
    load_adapter(base, adapter)  # the base is as it was


def test_blocks_that_a_file_of_others_leaves_out_are_named(adapter, latent, tmp_path):
    """Without our list of tensors: what one single block has, the other must have."""
    tensors, _ = opening.read_tensors(adapter / WEIGHTS)
    gone = "single_transformer_blocks.1.attn.to_out.lora_"
    for half in "AB":
        del tensors[f"{gone}{half}.weight"]
    files.write_tensors(tmp_path / WEIGHTS, tensors, {"scale": "1"})  # a key of theirs says nothing
    with pytest.raises(InputError, match=rf"missing tensors: {gone}A.weight, which its other blocks have"):
        load_adapter(copy.deepcopy(latent), tmp_path)


def test_a_wrong_base_of_the_same_shapes_is_recognized(adapter):
    other = make_base(["a red square"], seed=1).transformer
    with pytest.raises(InputError, match=r"base model of the same shapes \(it was trained on models/right-base\)"):
        load_adapter(other, adapter)


def test_the_refusal_names_the_base_that_was_given_and_a_hint_is_nothing_but_text(adapter, latent, tmp_path):
    make_base(["a red square"], seed=1).transformer.save_pretrained(tmp_path / "wrong-base")
    given = type(latent).from_pretrained(tmp_path / "wrong-base")
    with pytest.raises(InputError, match=r"those of \S+wrong-base "):
        load_adapter(given, adapter)
    tensors, metadata = opening.read_tensors(adapter / WEIGHTS)
    files.write_tensors(tmp_path / "odd.safetensors", tensors, {**metadata, "base": "a\nb\x1b[2J" + 1000 * "c"})
    with pytest.raises(InputError, match=r"trained on ab\[2Jc+\)") as caught:
        load_adapter(given, tmp_path / "odd.safetensors")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("second", ["lora", "lift", "full"])
@pytest.mark.parametrize("first", ["lora", "lift", "full"])
def test_a_base_takes_one_adapter(adapters, latent, inputs, first, second):
    base = copy.deepcopy(latent)
    flow = load_adapter(base, adapters[first])
    before = velocity(flow, inputs)
    for used in (base, copy.deepcopy(base)):
        with pytest.raises(InputError, match=r"load it again, or give each adapter a copy\.deepcopy"):
            load_adapter(used, adapters[second])
    assert torch.equal(velocity(flow, inputs), before)


def test_other_files_are_refused_and_pickles_not_even_opened(latent, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("cut.safetensors", "not a whole safetensors file"),
        ("none.safetensors", "does not exist"),
        ("pytorch_model.bin", "is a pickle"),
        ("lora.pth", "is a pickle"),
        ("empty", f"has no {WEIGHTS}"),
    ]:
        with pytest.raises(InputError, match=message):
            load_adapter(latent, tmp_path / name)
    for name in ("nobody/no-such-adapter", "nobody/no-such.adapter/a/file.safetensors"):
        with pytest.raises(InputError, match="neither an adapter here nor one that the Hub gave"):
            load_adapter(latent, name)
