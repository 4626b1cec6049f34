"""LoRAs on top of the pixel adapter, which is in force exactly once, at weight 1, whatever is done with the others."""

import re

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPTS, draw, load

from asymflow import InputError
from asymflow.backbones.flux2 import with_projections
from asymflow.backbones.flux2.adapter import add_lora, load_adapter, lora_modules
from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline, LowRankLinear
from toy.tiny_flux2 import make_base

STYLES = {"a": ["attn.to_q"], "b": ["attn.to_q", "ff.linear_in"]}  # b has layers of a, and one of the pixel adapter


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Folders of LoRAs, and one whose keys fit nothing."""
    folder, transformer = tmp_path_factory.mktemp("styles"), make_base(PROMPTS).transformer
    modules, g = dict(transformer.named_modules()), torch.Generator().manual_seed(4)
    for name, targets in STYLES.items():
        found = lora_modules(transformer, targets)
        tensors = {f"{n}.lora_A.weight": torch.randn(2, modules[n].in_features, generator=g) for n in found}
        tensors |= {f"{n}.lora_B.weight": torch.randn(modules[n].out_features, 2, generator=g) for n in found}
        AsymFlux2KleinPipeline.save_lora_weights(folder / name, transformer_lora_layers=tensors)
    strange = {"no.such.layer.lora_A.weight": torch.zeros(2, 8), "no.such.layer.lora_B.weight": torch.zeros(8, 2)}
    AsymFlux2KleinPipeline.save_lora_weights(folder / "strange", transformer_lora_layers=strange)
    (folder / "others").mkdir()
    others = {f"unet.mid.{name}": tensor for name, tensor in strange.items()}
    save_file(others, folder / "others" / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(5)
    return torch.randn(1, 3, 32, 48, generator=g), torch.randn(1, 12, 96, generator=g)


def velocity(pipeline, inputs):
    with torch.no_grad():
        return pipeline.flow(inputs[0], 0.5, encoder_hidden_states=inputs[1])


class ByHand:
    """The weights that are to be in force, merged by hand into a pixel model that no library has touched since."""

    def __init__(self, base, adapter, folder):
        self.pipeline = load(base, adapter)
        self.own = {n: m.weight.clone() for n, m in self.layers()}
        self.updates = {}
        for name in STYLES:
            (file,) = (folder / name).glob("*.safetensors")
            tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
            stems = {key.rpartition(".lora_A")[0] for key in tensors if ".lora_A" in key}
            self.updates[name] = {s: tensors[f"{s}.lora_B.weight"] @ tensors[f"{s}.lora_A.weight"] for s in stems}

    def layers(self):
        return [(n, m) for n, m in self.pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)]

    def velocity(self, active, inputs):
        for name, layer in self.layers():
            layer.weight.data = self.own[name].clone()
            for style, weight in active.items():
                if name in self.updates[style]:
                    layer.weight.data += weight * self.updates[style][name]
        return velocity(self.pipeline, inputs)


@pytest.fixture(scope="module")
def by_hand(base, adapter, styles):
    return ByHand(base, adapter, styles)


weights = st.sampled_from([0.0, 0.3, 1.0, -0.5])
CALLS = st.one_of(
    st.tuples(st.just("set"), st.dictionaries(st.sampled_from("ab"), weights, min_size=1)),
    st.tuples(st.sampled_from(["disable", "enable", "unload", "fuse and unfuse", "strange", "pipe"]), st.none()),
    st.tuples(st.sampled_from(["delete", "hotswap"]), st.sampled_from("ab")),
)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # to shrink a failure takes minutes
@given(st.lists(CALLS, max_size=7))
def test_whatever_is_called_the_pixel_adapter_is_in_force_once(base, adapter, styles, by_hand, inputs, calls):
    pipeline, loaded, active, on = load(base, adapter), set(), {}, True
    for call, what in calls:
        if call == "set":
            for name in what.keys() - loaded:
                pipeline.load_lora_weights(styles / name, adapter_name=name)
            pipeline.enable_lora()
            pipeline.set_adapters(list(what), list(what.values()))
            loaded, active, on = loaded | what.keys(), what, True
        elif call == "strange":
            for name in ("strange", "others"):
                with pytest.raises(InputError, match="the LoRA cannot be loaded"):
                    pipeline.load_lora_weights(styles / name, adapter_name=name)
        elif call == "unload":
            pipeline.unload_lora_weights()
            loaded, active, on = set(), {}, True
        elif call == "pipe":
            pipeline = AsymFlux2KleinPipeline(**pipeline.components)
        elif not loaded or (call in ("delete", "hotswap") and what not in loaded):
            continue  # diffusers refuses these, or does nothing
        elif call == "disable":
            pipeline.disable_lora()
            on = False
        elif call == "enable":
            pipeline.enable_lora()
            on = True
        elif call == "delete" and len(loaded) > 1:
            pipeline.delete_adapters(what)
            loaded.remove(what)
            pipeline.enable_lora()
            pipeline.set_adapters(list(loaded), [1.0])
            active, on = dict.fromkeys(loaded, 1.0), True
        elif call == "hotswap" and on and active.keys() == {what}:  # of others, diffusers changes what is in force
            pipeline.load_lora_weights(styles / what, adapter_name=what, hotswap=True)
            pipeline.set_adapters(list(active), list(active.values()))  # diffusers makes the weight 1
        elif call == "fuse and unfuse" and on:
            pipeline.fuse_lora(adapter_names=list(active), lora_scale=0.5)
            pipeline.unfuse_lora()
    expected = by_hand.velocity(active if on else {}, inputs)
    assert torch.allclose(velocity(pipeline, inputs), expected, atol=1e-4 * expected.abs().max().item())


def test_fused_it_is_the_styles_on_top_of_the_pixel_model(base, adapter, styles, by_hand, inputs):
    for scale in (1.0, 0.5):
        pipeline = load(base, adapter)
        pipeline.load_lora_weights(styles / "b", adapter_name="b")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
        expected = by_hand.velocity({"b": scale}, inputs)
        assert torch.allclose(velocity(pipeline, inputs), expected, atol=1e-4 * expected.abs().max().item())


def test_as_a_part_of_the_transformer_it_has_the_bits_of_a_lora(base, adapter, inputs):
    pipeline = load(base, adapter)
    assert any(isinstance(module, LowRankLinear) for module in pipeline.transformer.modules())
    transformer = Flux2Transformer2DModel.from_pretrained(base / "transformer")
    as_lora = load_adapter(transformer, adapter)
    with torch.no_grad():
        assert torch.equal(velocity(pipeline, inputs), as_lora(inputs[0], 0.5, encoder_hidden_states=inputs[1]))


def test_two_pipelines_do_not_share_a_base(base, adapter, inputs):
    transformer = make_base(PROMPTS).transformer
    pipeline = load(base, adapter, transformer=transformer)
    before = velocity(pipeline, inputs)
    with pytest.raises(InputError, match="load it again, or give each adapter"):
        load(base, adapter, transformer=transformer)
    assert torch.equal(velocity(pipeline, inputs), before)


@pytest.mark.parametrize("names", ["a", "b", "ab"])
def test_a_pixel_model_is_not_used_again_with_styles_on_top(base, adapter, styles, inputs, names):
    pipeline = load(base, adapter)
    alone = velocity(pipeline, inputs)
    assert torch.equal(velocity(pipeline.use(pipeline.flow), inputs), alone)
    for name in names:
        pipeline.load_lora_weights(styles / name, adapter_name=name)
    before = velocity(pipeline, inputs)
    with pytest.raises(InputError, match="has LoRAs on top"):
        pipeline.use(pipeline.flow)
    assert torch.equal(velocity(pipeline, inputs), before)
    pipeline.unload_lora_weights()
    assert torch.equal(velocity(pipeline.use(pipeline.flow), inputs), alone)


def test_an_update_is_in_a_layer_once(base, adapter, inputs):
    """Neither merged into the weight and beside it, nor instead of another one."""
    flow = load_adapter(make_base(PROMPTS).transformer, adapter)
    flow.backbone.transformer.fuse_lora()
    around = load(base, adapter).flow
    around.backbone.transformer = with_projections(
        around.backbone.transformer, *(torch.zeros(shape) for shape in ((64, 768), (768, 64)))
    )
    add_lora(around.backbone.transformer, 2)
    for wrong in (flow, around):
        layers = [*wrong.modules()]
        with pytest.raises(InputError, match="a layer has its low-rank update already"):
            load(base, adapter).use(wrong)
        assert [*wrong.modules()] == layers


def kohya(tensors):
    """The LoRA `whole` as kohya's trainer names it, with an alpha of half its rank."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    block = "transformer.transformer_blocks.0.attn.to_"
    down, ups = tensors[f"{block}q.lora_A.weight"], [tensors[f"{block}{x}.lora_B.weight"] for x in "qkv"]
    halved = torch.tensor(len(down) / 2)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups), f"{name}.alpha": halved}


@pytest.fixture(scope="module")
def whole():
    """A LoRA for the attention of the first double block, in diffusers' names."""
    g = torch.Generator().manual_seed(6)
    down = torch.randn(3, 64, generator=g)
    prefix = "transformer.transformer_blocks.0.attn.to_"
    return {f"{prefix}{x}.lora_A.weight": down for x in "qkv"} | {
        f"{prefix}{x}.lora_B.weight": torch.randn(64, 3, generator=g) for x in "qkv"
    }


def test_a_lora_in_the_names_of_kohya_is_the_same(base, adapter, inputs, whole):
    halved = {key: value / 2 if ".lora_A." in key else value for key, value in whole.items()}
    found = []
    for style in (halved, kohya(whole)):
        pipeline = load(base, adapter)
        pipeline.load_lora_weights(style)
        found.append(velocity(pipeline, inputs))
    assert torch.allclose(*found, atol=1e-5 * found[0].abs().max().item())


PAIR = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
KOHYA = {"A": "lora_down", "B": "lora_up"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("form", "more"),
    [
        (dict, {f"text_encoder.model.layers.0.self_attn.q_proj.lora_{x}.weight": PAIR[x] for x in "AB"}),
        (dict, {f"unet.mid.lora_{x}.weight": PAIR[x] for x in "AB"}),
        (dict, {f"transformer.transformer_blocks.7.attn.to_q.lora_{x}.weight": PAIR[x] for x in "AB"}),
        (dict, {"transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": torch.ones(3, 64)}),
        (dict, {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(64)}),
        (kohya, {f"lora_te1_layers_0_q_proj.{KOHYA[x]}.weight": PAIR[x] for x in "AB"}),
        (kohya, {f"lora_unet_double_stream_modulation_img_lin.{KOHYA[x]}.weight": PAIR[x] for x in "AB"}),
        (kohya, {f"lora_unet_double_blocks_7_img_attn_proj.{KOHYA[x]}.weight": PAIR[x] for x in "AB"}),
        (kohya, {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(64)}),
    ],
    ids=["text", "unet", "block", "half", "dora", "kohya text", "kohya modulation", "kohya block", "kohya dora"],
)
def test_a_lora_of_which_something_would_be_lost_is_refused_and_changes_nothing(
    base, adapter, styles, inputs, whole, form, more, loaded, tmp_path
):
    pipeline = load(base, adapter)
    if loaded:
        pipeline.load_lora_weights(styles / "b", adapter_name="b")
        pipeline.set_adapters("b", 0.3)
    before = velocity(pipeline, inputs)
    save_file({key: value.clone() for key, value in (form(whole) | more).items()}, tmp_path / "style.safetensors")
    for source in (form(whole) | more, tmp_path / "style.safetensors"):
        with pytest.raises(InputError, match="the LoRA cannot be loaded: ") as error:
            pipeline.load_lora_weights(source, adapter_name="more")
        assert re.search(
            r"text_encoder|te1|unet.mid|modulation|blocks\.7|attn.to_out.0.lora_B|dora_scale", str(error.value)
        )
        assert "\n" not in str(error.value)
        assert torch.equal(velocity(pipeline, inputs), before)
        assert "more" not in pipeline.get_list_adapters().get("transformer", [])


@pytest.mark.parametrize("layer", ["x_embedder", "proj_out"])
def test_a_lora_for_a_projection_of_the_latent_model_is_one_line(base, adapter, inputs, layer):
    pipeline = load(base, adapter)
    before, latent = velocity(pipeline, inputs), make_base(PROMPTS).transformer.get_submodule(layer)
    shapes = {"A": (2, latent.in_features), "B": (latent.out_features, 2)}
    style = {f"transformer.{layer}.lora_{x}.weight": torch.ones(shape) for x, shape in shapes.items()}
    with pytest.raises(InputError, match=r"the LoRA cannot be loaded: .*size mismatch") as error:
        pipeline.load_lora_weights(style)
    assert "\n" not in str(error.value)
    assert torch.equal(velocity(pipeline, inputs), before)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_is_of_the_further_loras_and_never_of_the_adapter(base, adapter, styles, by_hand, inputs, scale):
    pipeline = load(base, adapter)
    scaled = lambda: pipeline.flow(
        inputs[0], 0.5, encoder_hidden_states=inputs[1], joint_attention_kwargs={"scale": scale}
    )
    with torch.no_grad():
        assert torch.equal(scaled(), velocity(pipeline, inputs))
        pipeline.load_lora_weights(styles / "b", adapter_name="b")
        found, expected = scaled(), by_hand.velocity({"b": scale}, inputs)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_components_make_the_same_pipeline_and_those_of_a_latent_model_none(base, adapter, noise):
    pipeline = load(base, adapter)
    images = draw(pipeline, noise)
    for other in (AsymFlux2KleinPipeline(**pipeline.components), AsymFlux2KleinPipeline.from_pipe(pipeline)):
        other.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(other, noise), images)
    latent = AsymFlux2KleinPipeline(**{**pipeline.components, "transformer": make_base(PROMPTS).transformer})
    with pytest.raises(InputError, match="the transformer is a model of latents"):
        draw(latent, noise)
