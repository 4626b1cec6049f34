"""Published checkpoints that are damaged, hostile or something else: what is refused, and in what words."""

import argparse
import math
import pickle
from pathlib import Path

import pytest
import torch
from published_files import BETWEEN, SIZES, D, lth14, published, random_jit, save
from safetensors.torch import save_file

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT
from asymflow.backbones.jit.published import load_published

# ---- What is refused -------------------------------------------------------------------------------------------------
TENSORS = published(random_jit(dtype=torch.float32), Subspace.random(D, 5))
KINDS = [name for name in TENSORS if "rope" not in name and (not name.startswith("blocks") or "blocks.1." in name)]


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors = {other: tensor for other, tensor in TENSORS.items() if other != name}
    with pytest.raises(InputError, match=f"missing tensors: {name}"):
        load_published(save(tensors, tmp_path / "a.safetensors"), **BETWEEN)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["longer", "another axis"])
def test_a_misshaped_tensor_is_refused(tmp_path, name, how):
    tensor = TENSORS[name]
    along = 1 if "table" in name else 0  # a longer table has more classes, which is fine
    new = tensor.narrow(along, 0, 1) if tensor.ndim else tensor
    tensor = tensor[None] if how == "another axis" or not tensor.ndim else torch.cat([tensor, new], dim=along)
    with pytest.raises(InputError) as error:
        load_published(save(TENSORS | {name: tensor}, tmp_path / "a.safetensors"), **BETWEEN)
    assert "a.safetensors does not fit" in str(error.value)
    # The length of these decides what is expected of others: they are right, and an other is named.
    other = {
        "x_embedder.proj1.weight": "x_embedder.proj2.weight has",
        "y_embedder.embedding_table.weight": "at a width of 17",
    }
    assert (other.get(name, name) if how == "longer" else name) in str(error.value)


@pytest.mark.parametrize(
    "name", ["y_embedder.class_bias", "blocks.7.norm1.weight", "projectors.0.weight", "pos_embed_2"]
)
def test_an_unknown_tensor_is_named(tmp_path, name):
    with pytest.raises(InputError, match=rf"unexpected tensors: {name} \(3,\)"):
        load_published(save(TENSORS | {name: torch.zeros(3)}, tmp_path / "a.safetensors"), **BETWEEN)


@pytest.mark.parametrize("name", [name for name in TENSORS if "rope" in name or "pos_embed" in name])
def test_other_positions_are_refused_by_name(tmp_path, name):
    for change in (0.02, math.nan):
        tensor = TENSORS[name].clone()
        tensor.view(-1)[7] += change
        with pytest.raises(InputError, match=f"{name} differs by"):
            load_published(save(TENSORS | {name: tensor}, tmp_path / "a.safetensors"), **BETWEEN)


def test_rows_and_columns_may_not_be_exchanged(tmp_path):
    exchanged = TENSORS["x_embedder.pos_embed"].view(1, 3, 3, -1).transpose(1, 2).reshape(1, 9, -1)
    with pytest.raises(InputError, match=r"x_embedder.pos_embed differs by"):
        load_published(save(TENSORS | {"x_embedder.pos_embed": exchanged}, tmp_path / "a.safetensors"), **BETWEEN)


def test_an_unknown_size_needs_the_block_where_class_tokens_join(tmp_path):
    path = save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"width 16 and depth 3, .* give in_context_start"):
        load_published(path)
    assert load_published(path, in_context_start=0).backbone.in_context_start == 0


@pytest.mark.parametrize(
    "option",
    [
        {"weights": "ema1"},
        {"dtype": torch.bfloat16},
        {"in_context_start": 0},
        {"noise_scale": 2.0},
        {"sigma_min": 0.05},
    ],
)
def test_a_subspace_takes_no_options_of_a_model(tmp_path, option):
    path = save({"proj_mat_p2": Subspace.random(12, 3).basis}, tmp_path / "a.pt")
    assert load_published(path).rank == 3
    with pytest.raises(InputError, match=f"is a subspace, and no model: it has no {next(iter(option))} to choose"):
        load_published(path, **option)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_that_are_not_there_cannot_be_chosen(tmp_path, suffix):
    with pytest.raises(InputError, match="has no weights 'ema1' to choose: it has one set, unnamed"):
        load_published(save(TENSORS, tmp_path / f"a{suffix}"), weights="ema1", **BETWEEN)
    path = save({"model": TENSORS, "model_ema2": TENSORS}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="has no weights 'best' to choose: it has ema2, model"):
        load_published(path, weights="best", **BETWEEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_buffer": 2 * TENSORS["proj_buffer"]}, "not orthonormal"),
        ({"proj_buffer": torch.randn(D, 5)}, "not orthonormal"),
        ({"scale_buffer": torch.tensor(0.0)}, "scale .* positive"),
        ({"blocks.1.norm1.weight": torch.ones(16, dtype=torch.int32)}, "blocks.1.norm1.weight is of torch.int32"),
    ],
)
def test_values_that_make_no_model_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=f"a.safetensors.*{message}"):
        load_published(save(TENSORS | change, tmp_path / "a.safetensors"), **BETWEEN)


@pytest.mark.parametrize(
    "content",
    [
        {"blocks.0.attn.qkv.weight": torch.zeros(2), "final_layer.linear.weight": torch.zeros(2)},  # DiT
        {"basis": torch.zeros(2), "scale": torch.zeros(())},
        {},
        {"model": {}},
        {"in_context_posemb": "text"},
        {"in_context_posemb": torch.zeros(2), 7: torch.zeros(2)},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
)
def test_any_other_file_is_answered_with_what_can_be_read(tmp_path, content):
    with pytest.raises(InputError, match=r"AsymFlow-ImageNet.*JiT.*proj_mat_p16.*from_pretrained") as error:
        load_published(save(content, tmp_path / "other.pth"))
    assert "\n" not in str(error.value)


def test_an_adapter_is_recognized_and_refused(tmp_path):
    adapter = {"x_embedder.weight": torch.zeros(8, 4), "proj_out.weight": torch.zeros(4, 8)}
    adapter["transformer_blocks.0.ff.linear_in.lora_A.weight"] = torch.zeros(2, 8)
    with pytest.raises(InputError, match=r"is an adapter, such as AsymFLUX.2's"):
        load_published(save(adapter, tmp_path / "adapter.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path, suffix, share):
    path = save(TENSORS, tmp_path / f"a{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"not a whole safetensors file|cannot be read as plain tensors"):
        load_published(path, **BETWEEN)


class Code:
    """Pickled, it is an order to make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside_options", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, inside_options):
    trace = tmp_path / "trace"
    code = argparse.Namespace(lr=Code(trace)) if inside_options else Code(trace)
    path = save({"model": lth14(random_jit()), "args": code}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="never run"):
        load_published(path, **BETWEEN)
    assert not trace.exists()
    pickle.loads(pickle.dumps(code))
    assert trace.exists()  # it would have been


def test_options_of_a_command_line_are_allowed_while_reading_only(tmp_path):
    path = save({"model": lth14(random_jit()), "args": argparse.Namespace()}, tmp_path / "a.pth")
    load_published(path, **BETWEEN)
    with pytest.raises(Exception, match=r"argparse.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"does not exist|is a folder"):
        load_published(tmp_path / name)


def test_a_block_that_is_not_there_is_refused(tmp_path):
    """The class tokens would never join: another network, without a word."""
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is not one of the 3 blocks"):
        load_published(tmp_path / "a.safetensors", in_context_start=3)


def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path):
    tensor = TENSORS["blocks.0.mlp.w3.bias"].clone()
    tensor[0] = math.inf
    save_file({**TENSORS, "blocks.0.mlp.w3.bias": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.w3\.bias has entries that are not finite"):
        load_published(tmp_path / "a.safetensors", in_context_start=1)


def test_a_file_of_asymflow_has_all_its_positions(tmp_path):
    for name in [name for name in TENSORS if "rope" in name]:
        tensors = {key: tensor for key, tensor in TENSORS.items() if key != name}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=f"missing tensors: {name}"):
            load_published(tmp_path / "a.safetensors", in_context_start=1)


def test_a_file_is_known_by_its_content_not_its_name(tmp_path):
    save_file(TENSORS, tmp_path / "weights")
    assert load_published(tmp_path / "weights", in_context_start=1).subspace.rank


def test_a_file_of_this_library_is_pointed_to_its_folder(tmp_path):
    load_published_model = AsymFlow(JiT(**SIZES), Subspace.empty(3 * SIZES["patch_size"] ** 2))
    load_published_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give the folder"):
        load_published(tmp_path / "model.safetensors")
