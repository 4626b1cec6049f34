"""asymflow/model.py: what is refused, and what becomes of a model on disk."""

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
from model_backbones import (
    IMAGE,
    ONE_LINE,
    Oracle,
    Small,
    assert_same,
    call,
    content,
    jit_flow,
    jit_inputs,
    refused,
    small_flow,
    wrap,
)
from torch import nn

from asymflow import AsymFlow, InputError, Subspace, files, generate
from asymflow.backbones.jit import JiT
from asymflow.conditions import unwrapped
from asymflow.cost import forward_flops

# ---- Mistakes --------------------------------------------------------------------------------------------------------
PATCH_3 = Subspace.random(36, 3, patch_size=3)
MISTAKES = {
    "no patch size anywhere": (lambda: wrap(), "patch_size"),
    "a patch size of 0": (lambda: wrap(patch_size=0), "0"),
    "a patch size that does not divide": (lambda: wrap(patch_size=5), "multiple of 25"),
    "another order": (lambda: wrap(patch_size=2, token_order="hwc"), "'hwc'"),
    "a negative sigma_min": (lambda: wrap(patch_size=2, sigma_min=-0.1), "-0.1"),
    "a sigma_min that is no number": (lambda: wrap(patch_size=2, sigma_min=float("nan")), "nan"),
    "a noise scale of 0": (lambda: wrap(patch_size=2, noise_scale=0), "noise_scale"),
    "argument against subspace": (lambda: wrap(subspace=PATCH_3, patch_size=6), "6 by the argument, 3 by the subspace"),
    "subspace against backbone": (
        lambda: wrap(Small(36, patch_size=2), PATCH_3),
        "3 by the subspace, 2 by the backbone",
    ),
    "argument against backbone": (
        lambda: wrap(Small(patch_size=1), patch_size=2),
        "2 by the argument, 1 by the backbone",
    ),
    "order against order": (
        lambda: wrap(
            subspace=Subspace.random(12, 3, token_order="channel_first"), patch_size=2, token_order="channel_last"
        ),
        "channel_last by the argument, channel_first by the subspace",
    ),
    "channels": (lambda: call(torch.zeros(2, 4, 4, 6)), "4"),
    "channels of a video": (lambda: call(torch.zeros(2, 3, 4, 4, 6)), "(2, 3, 4, 4, 6)"),
    "an image without a batch": (lambda: call(IMAGE[0]), "(3, 4, 6)"),
    "an image that cannot be cut": (lambda: call(torch.zeros(2, 3, 4, 5)), "4 x 5"),
    "one noise level in a list": (lambda: call(sigma=[0.5]), "(1,)"),
    "a timestep": (lambda: call(sigma=500), "500"),
    "a noise level that is not a number": (lambda: call(sigma=float("nan")), "nan"),
    "too many noise levels": (lambda: call(sigma=torch.ones(3)), "(3,)"),
    "a noise level for every token": (lambda: call(sigma=torch.ones(2, 6)), "(2, 6)"),
    "noise levels in a column": (lambda: call(sigma=torch.ones(2, 1)), "(2, 1)"),
    "fewer tokens from the backbone": (lambda: call(answer=torch.zeros(2, 5, 12)), "(2, 5, 12)"),
    "smaller tokens from the backbone": (lambda: call(answer=torch.zeros(2, 6, 11)), "(2, 6, 11)"),
    "a label too large": (lambda: jit_flow()(*jit_inputs()[:2], labels=torch.tensor([1, 11])), "11"),
    "a negative label": (lambda: jit_flow()(*jit_inputs()[:2], labels=torch.tensor([-1, 1])), "-1"),
    "too few labels": (lambda: jit_flow()(*jit_inputs()[:2], labels=torch.tensor([1])), "2 integers"),
    "a video for an image model": (
        lambda: jit_flow()(torch.zeros(2, 2, 3, 16, 16), 0.5, labels=torch.tensor([1, 2])),
        "grid",
    ),
    "a list from the backbone": (lambda: call(answer=[torch.zeros(2, 6, 12)]), "list"),
    "a dictionary from the backbone": (lambda: call(answer={"sample": torch.zeros(2, 6, 12)}), "dict"),
    "a patch size that is no integer": (lambda: wrap(patch_size=2.0), "2.0"),
    "an infinite sigma_min": (lambda: wrap(patch_size=2, sigma_min=float("inf")), "inf"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(name):
    mistake, named = MISTAKES[name]
    with pytest.raises(InputError, match=ONE_LINE) as error:
        mistake()
    assert named in str(error.value)


def test_the_grid_reaches_a_backbone_through_wrappers():
    """As torch.compile, DistributedDataParallel and PEFT wrap: a forward that passes on whatever it gets.

    8 x 32 pixels are 2 x 8 tokens, as many as the 4 x 4 that the JiT was made for: wrong positions would be no error.
    """

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    x = x.reshape(len(x), 3, 8, 32)
    expected = flow(x, sigma, labels=labels)
    compiled = torch.compile(flow.backbone, backend="eager")
    for wrapped in (Wrapper(flow.backbone), Wrapper(Wrapper(flow.backbone)), compiled):
        assert torch.equal(AsymFlow(wrapped, flow.subspace, patch_size=4).eval()(x, sigma, labels=labels), expected)
    assert AsymFlow(compiled, flow.subspace).patch_size == 4


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda backbone: torch.compile(backbone, backend="eager"),
    "both": lambda backbone: torch.compile(nn.DataParallel(backbone), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_backbone_tells_as_much_as_one_without(wrapper):
    backbone = JiT.from_name("tiny/128", image_size=512, num_classes=3)  # its noise_scale is 2
    backbone.token_order, subspace = "channel_first", Subspace.random(backbone.dim, 2)
    flow, wrapped = AsymFlow(backbone, subspace).eval(), AsymFlow(wrapper(backbone), subspace).eval()
    assert wrapped.config == flow.config
    assert wrapped.noise_scale == 2
    assert forward_flops(wrapped, (3, 512, 512)) == forward_flops(flow, (3, 512, 512))
    images = [generate(model, [1], steps=1, guidance=2.0) for model in (flow, wrapped)]
    torch.testing.assert_close(*images)


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_backbone_is_saved_as_one_without_and_can_be_filled(saved, tmp_path, wrapper):
    flow = jit_flow()
    AsymFlow(wrapper(flow.backbone), flow.subspace, flow.patch_size).save_pretrained(tmp_path)
    assert content(tmp_path) == content(saved)
    filled = AsymFlow.from_pretrained(saved, backbone=wrapper(JiT(**flow.backbone.config)))
    assert_same(AsymFlow(unwrapped(filled.backbone), filled.subspace, filled.patch_size).eval(), flow)


@pytest.mark.parametrize("given_by", ["argument", "subspace", "backbone"])
def test_patch_size_and_order_may_come_from_anywhere(given_by):
    options = {"patch_size": 2, "token_order": "channel_first"}
    backbone, subspace = Oracle(), Subspace.random(12, 3, **(options if given_by == "subspace" else {}))
    if given_by == "backbone":
        backbone.patch_size, backbone.token_order = options.values()
    flow = AsymFlow(backbone, subspace, **(options if given_by == "argument" else {}))
    assert (flow.patch_size, flow.token_order, flow.channels) == (2, "channel_first", 3)
    assert wrap(patch_size=2).token_order == "channel_last"


# ---- Files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_to_the_last_bit(tmp_path, dtype):
    flow = jit_flow(sigma_min=0.1, noise_scale=2.0, token_order="channel_first").to(dtype)
    flow.save_pretrained(tmp_path / "new" / "folder")
    assert set(content(tmp_path / "new" / "folder")) == {"config.json", "model.safetensors", "README.md"}
    for source in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        loaded = AsymFlow.from_pretrained(source)
        assert not loaded.training
        assert_same(loaded, flow)
        assert all(w.requires_grad for w in loaded.parameters())


def test_a_loaded_model_can_be_saved_over_its_own_file_and_trained(folder):
    flow = AsymFlow.from_pretrained(folder)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    x, sigma, labels = jit_inputs()
    flow(x, sigma, labels=labels).square().mean().backward()
    optimizer.step()
    flow.save_pretrained(folder)
    assert_same(AsymFlow.from_pretrained(folder), flow)


def test_two_saves_are_the_same_bytes(saved, tmp_path):
    jit_flow().save_pretrained(tmp_path)
    assert content(tmp_path) == content(saved)


def test_a_model_can_be_loaded_in_another_dtype(saved):
    flow = AsymFlow.from_pretrained(saved, dtype=torch.bfloat16, device="cpu")
    assert {w.dtype for w in flow.parameters()} == {torch.bfloat16}
    assert flow.subspace.basis.dtype == torch.float32
    assert_same(flow, jit_flow().bfloat16())
    flow = AsymFlow.from_pretrained(saved, dtype=torch.float64)
    assert {w.dtype for w in flow.parameters()} == {torch.float64}
    assert flow.subspace.basis.dtype == torch.float32  # of the backbone's weights only


def test_a_backbone_of_ones_own_is_filled_from_the_file(tmp_path):
    flow = small_flow()
    flow.save_pretrained(tmp_path)
    refused(tmp_path, "Small", "backbone=")
    torch.manual_seed(2)
    assert_same(AsymFlow.from_pretrained(tmp_path, backbone=Small()), flow)
    refused(tmp_path, "backbone.first.weight has (8, 12), expected (8, 27)", backbone=Small(27))


def test_a_backbone_without_weights_or_configuration_can_be_saved(tmp_path):
    flow = AsymFlow(Oracle(), Subspace.random(12, 3), patch_size=2).eval()
    flow.save_pretrained(tmp_path)
    assert_same(AsymFlow.from_pretrained(tmp_path, backbone=Oracle()), flow)


def test_a_folder_within_a_folder_is_what_is_read(tmp_path):
    for rank, folder in ((3, tmp_path), (5, tmp_path / "other")):
        jit_flow(rank=rank).save_pretrained(folder)
    ranks = [AsymFlow.from_pretrained(tmp_path, subfolder=name).subspace.rank for name in (None, "", "other")]
    assert ranks == [3, 3, 5]
    refused(tmp_path, "none/config.json", subfolder="none")


@pytest.mark.parametrize("option", ["repo_id", "filename", "colour"])
def test_what_is_no_option_is_named(tmp_path, option):
    with pytest.raises(TypeError, match=f"from_pretrained has no options {option}"):
        AsymFlow.from_pretrained(tmp_path, **{option: "a"})


def test_tied_weights_of_ones_own_backbone_stay_tied(tmp_path):
    def tied():
        backbone = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
        backbone["b"].weight = backbone["a"].weight
        return backbone

    AsymFlow(tied(), Subspace.random(12, 3), patch_size=2).save_pretrained(tmp_path)
    flow = AsymFlow.from_pretrained(tmp_path, backbone=tied())
    assert flow.backbone["a"].weight is flow.backbone["b"].weight


def test_the_subspace_comes_back_with_its_record(tmp_path):
    flow = AsymFlow(Oracle(), Subspace.random(12, 3, patch_size=2, token_order="channel_first", fitted_on="nothing"))
    flow.save_pretrained(tmp_path)
    subspace = AsymFlow.from_pretrained(tmp_path, backbone=Oracle()).subspace
    assert (subspace.fitted_on, subspace.patch_size, subspace.token_order) == ("nothing", 2, "channel_first")


# ---- Saving that fails -----------------------------------------------------------------------------------------------
def disk_full_for(monkeypatch, name):
    """Half of the file of that name is written, then there is no space left."""

    def full(path):
        os.truncate(path, Path(path).stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def stream(tensors, path, metadata):
        written = write_tensors(tensors, path, metadata)
        return full(path) if name == "model.safetensors" else written

    def write_text(path, text, *args, **options):
        written = write(path, text, *args, **options)
        return full(path) if name == "config.json" and path.suffix == ".json" else written

    write, write_tensors = Path.write_text, files.stream
    monkeypatch.setattr(files, "stream", stream)
    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        pytest.param("config.json"),
    ],
)
def test_a_save_that_fails_leaves_the_earlier_model(folder, monkeypatch, name):
    before, other = content(folder), jit_flow(rank=7)
    disk_full_for(monkeypatch, name)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(folder)
    monkeypatch.undo()
    assert content(folder) == before
    assert_same(AsymFlow.from_pretrained(folder), jit_flow())


def test_a_configuration_that_json_cannot_hold_leaves_the_earlier_model(folder):
    before, other = content(folder), small_flow()
    other.backbone.config = {"dtype": torch.float32}
    with pytest.raises(InputError, match=ONE_LINE):
        other.save_pretrained(folder)
    assert content(folder) == before


def test_a_first_save_that_fails_leaves_no_model(tmp_path, monkeypatch):
    disk_full_for(monkeypatch, "model.safetensors")
    with pytest.raises(OSError, match="No space"):
        jit_flow().save_pretrained(tmp_path)
    assert content(tmp_path) == {}


def test_a_model_card_and_names_of_classes_are_kept_and_said_if_they_may_be_of_another_model(folder):
    (folder / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"README\.md: kept from an earlier model: change or remove"):
        jit_flow(rank=7).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "classes.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"README\.md and .*classes\.json: kept from an earlier model"):
        jit_flow().save_pretrained(folder)
    assert (folder / "classes.json").read_text() == "[]"
    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jit_flow().save_pretrained(folder)  # there was no model
        for _ in range(2):
            jit_flow().save_pretrained(folder / "new")  # over one's own card
