"""Published checkpoints, made here in each of their layouts, against the formulas that go with them."""

import argparse
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from asymflow import AsymFlow, InputError, Subspace, patchify, unpatchify
from asymflow.backbones.jit import JiT, NoiseLevelEmbedding
from asymflow.backbones.jit.published import jit_sizes, load_published, reverse_time

SIZES = dict(patch_size=4, image_size=12, channels=3, width=16, depth=3, heads=2, bottleneck=8, num_classes=5)
SIZES |= dict(in_context_start=1, in_context_tokens=2)
D, IMAGES = 48, (4, 3, 12, 12)
BETWEEN = dict(in_context_start=1)  # what the tensors do not show


def random_jit(seed=0, dtype=torch.float64, **options) -> JiT:
    torch.manual_seed(seed)
    jit = JiT(**SIZES | options).to(dtype)
    with torch.no_grad():
        for name, weight in jit.named_parameters():
            weight.normal_(std=0.2).add_(1 if "norm" in name else 0)
    return jit


def positions(grid, width, head_dim, in_context):
    """Sines and cosines of columns, then of rows; and the cosines and sines of the rotations, of no angle at first."""
    row, column = (
        axis.flatten()[:, None] for axis in torch.meshgrid(*[torch.arange(grid).double()] * 2, indexing="ij")
    )
    slow = 10000.0 ** -(torch.arange(width // 4) / (width // 4)).double()
    fixed = torch.cat([(column * slow).sin(), (column * slow).cos(), (row * slow).sin(), (row * slow).cos()], dim=-1)
    slow = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4)).double()
    angle = torch.cat([row * slow, column * slow], dim=-1).repeat_interleave(2, dim=-1)
    return fixed[None], angle, torch.cat([torch.zeros(in_context, head_dim), angle])


def published(jit: JiT, subspace: Subspace | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a JiT in the layout of Lakonik/AsymFlow-ImageNet; without a subspace, of its plain JiT."""
    patch, channels = jit.patch_size, jit.dim // jit.patch_size**2
    proj1, proj2 = jit.x_embedder.proj1.weight, jit.x_embedder.proj2.weight
    width, (grid, _), count = proj2.shape[0], jit.grid, len(jit.in_context_positions)
    fixed, angle, _ = positions(grid, width, jit.head_dim, 0)
    tensors = {
        "x_embedder.proj1.weight": proj1.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2),
        "x_embedder.proj2.weight": proj2[:, :, None, None],
        "x_embedder.proj2.bias": jit.x_embedder.proj2.bias,
        "x_embedder.pos_embed": fixed,
        "y_embedder.embedding_table.weight": jit.y_embedder.weight,
        "in_context_posemb": jit.in_context_positions[None],
        "final_layer.norm_final.weight": jit.head.norm.weight,
    }
    assert tensors["in_context_posemb"].shape == (1, count, width)
    layers = {"final_layer.linear": jit.head.linear, "final_layer.adaLN_modulation.1": jit.head.modulation}
    layers |= {f"t_embedder.mlp.{i}": jit.t_embedder.mlp[i] for i in (0, 2)}
    for i, block in enumerate(jit.blocks):
        for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
            tensors[f"blocks.{i}.{name}.weight"] = norm.weight
        tensors[f"blocks.{i}.attn.q_norm.weight"] = block.attention.q_norm.weight
        tensors[f"blocks.{i}.attn.k_norm.weight"] = block.attention.k_norm.weight
        layers |= {f"blocks.{i}.attn.qkv": block.attention.qkv, f"blocks.{i}.attn.proj": block.attention.proj}
        layers |= {f"blocks.{i}.mlp.w12": block.mlp.w12, f"blocks.{i}.mlp.w3": block.mlp.w3}
        layers[f"blocks.{i}.adaLN_modulation.1"] = block.modulation
    for name, layer in layers.items():
        tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    for name in ("feat_rope", "feat_rope_incontext"):
        tensors |= {f"{name}.base_rope.freqs_cos": angle.cos(), f"{name}.base_rope.freqs_sin": angle.sin()}
    if subspace is not None:
        tensors |= {"proj_buffer": subspace.basis, "scale_buffer": torch.tensor(subspace.scale, dtype=torch.float64)}
    dtype = jit.head.linear.weight.dtype
    return {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in tensors.items()}


def lth14(jit: JiT, prefix="net.") -> dict[str, torch.Tensor]:
    """The same in the layout of LTH14/JiT, which has its positions at the top, and no rotations."""
    tensors = {name: tensor for name, tensor in published(jit).items() if "rope" not in name}
    tensors["pos_embed"] = tensors.pop("x_embedder.pos_embed")
    tensors["blocks.0.mlp.w3.weight"] = tensors["blocks.0.mlp.w3.weight"].mT.contiguous().mT  # a pickle keeps strides
    return {prefix + name: tensor for name, tensor in tensors.items()}


def velocity_of_plain_jit(jit, x_sigma, sigma, labels, sigma_min=0.04):
    """u = (x_sigma - x0) / sigma, the network giving x0 at the time t = 1 - sigma."""
    tokens = patchify(x_sigma.double(), jit.patch_size)
    x0 = unpatchify(jit(tokens, 1 - sigma.double(), labels), jit.grid, jit.patch_size)
    return (x_sigma - x0) / sigma.clamp(min=sigma_min)[:, None, None, None]


def velocity_of_asymflow(jit, basis, s, x_sigma, sigma, labels, sigma_min=0.04):
    """The formulas of arXiv 2605.12964 with a scale, and P as the D x D matrix that it is."""
    tokens, p = patchify(x_sigma.double(), jit.patch_size), basis.double() @ basis.double().mT
    k = 1 / (s + (1 - s) * sigma.double())
    u_a = jit(k[:, None, None] * tokens, k * sigma, labels)
    sigma, k = sigma[:, None, None], k[:, None, None]
    inside = k * (s * u_a + (1 - s) * tokens) @ p
    outside = (tokens + s * u_a) @ (torch.eye(len(p)) - p) / sigma.clamp(min=sigma_min)
    return unpatchify(inside + outside, jit.grid, jit.patch_size)


def random_subspace(rank, scale=1.0, dtype=torch.float64) -> Subspace:
    """Orthonormal to the rounding of that dtype."""
    basis = torch.linalg.qr(torch.randn(D, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    return Subspace(basis.to(dtype), scale)


def inputs(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    sigma = torch.tensor([0.0, 1.0, *torch.rand(2)], dtype=dtype)
    return torch.randn(IMAGES, dtype=dtype), sigma, torch.randint(6, (4,))


def save(tensors, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def agree(actual, expected, dtype=torch.float64) -> bool:
    """To rounding: some ten layers after each other, each a sum of up to 100 terms."""
    return (actual - expected).abs().max().item() < 500 * torch.finfo(dtype).eps * expected.abs().max().item()


# ---- Models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_plain_jit_is_an_asymmetric_flow_of_rank_0(tmp_path, dtype, suffix):
    jit = random_jit(dtype=dtype)
    flow = load_published(save(published(jit), tmp_path / f"jit{suffix}"), dtype=dtype, **BETWEEN)
    x_sigma, sigma, labels = inputs(dtype=dtype)
    expected = velocity_of_plain_jit(jit.double(), x_sigma, sigma, labels)
    assert agree(flow(x_sigma, sigma, labels=labels), expected, dtype)
    assert (flow.subspace.rank, flow.training, flow.patch_size, flow.token_order) == (0, False, 4, "channel_last")
    assert {weight.dtype for weight in flow.backbone.parameters()} == {dtype}
    assert all(weight.requires_grad and weight.is_contiguous() for weight in flow.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (5, 1.0), (5, 0.3), (5, 2.5), (48, 1.7)])
def test_asymflow_is_the_published_formula(tmp_path, dtype, rank, scale):
    jit, subspace = random_jit(dtype=dtype), random_subspace(rank, scale, dtype)
    flow = load_published(save(published(jit, subspace), tmp_path / "a.safetensors"), dtype=dtype, **BETWEEN)
    x_sigma, sigma, labels = inputs(dtype=dtype)
    scale = torch.tensor(scale, dtype=dtype).item()  # as the file has it
    expected = velocity_of_asymflow(jit.double(), subspace.basis, scale, x_sigma, sigma, labels)
    assert agree(flow(x_sigma, sigma, labels=labels), expected, dtype)
    assert torch.equal(flow.subspace.basis, subspace.basis)
    assert flow.subspace.scale == scale


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[JiT, AsymFlow]:
    jit = random_jit()
    path = save(published(jit), tmp_path_factory.mktemp("published") / "jit.safetensors")
    return jit, load_published(path, dtype=torch.float64, sigma_min=1e-3, **BETWEEN)


@given(st.floats(0, 1), st.integers(0, 99))
def test_plain_jit_at_any_noise_level(plain, sigma, seed):
    jit, flow = plain
    x_sigma, _, labels = inputs(seed)
    sigma = torch.full((4,), sigma, dtype=torch.float64)
    expected = velocity_of_plain_jit(jit, x_sigma, sigma, labels, sigma_min=1e-3)
    assert agree(flow(x_sigma, sigma, labels=labels), expected)


@given(st.floats(0, 1), st.integers(0, 99))
def test_reversing_time_is_exact_and_its_own_inverse(sigma, seed):
    weight = torch.randn(3, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    f = NoiseLevelEmbedding.frequencies(dtype=torch.float64)
    waves = [torch.cat([(f * t).cos(), (f * t).sin()]) for t in (sigma, 1 - sigma)]
    torch.testing.assert_close(reverse_time(weight) @ waves[0], weight @ waves[1])
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight)


@pytest.mark.parametrize(("weights", "seed"), [(None, 1), ("ema1", 1), ("ema2", 2), ("model", 0)])
def test_a_checkpoint_of_lth14_has_three_sets_of_weights(tmp_path, weights, seed):
    networks = [random_jit(seed) for seed in range(3)]
    content = dict(zip(("model", "model_ema1", "model_ema2"), map(lth14, networks), strict=True))
    content |= {
        "epoch": 599,
        "args": argparse.Namespace(model="JiT-B/16", lr=None, resume=""),
        "optimizer": {"state": {}},
    }
    # A float32 average of equal numbers, as positions are, drifts off: x <- 0.9999 x + 0.0001 x makes x (1 - 1.7e-4).
    content["model_ema1"]["net.pos_embed"] *= 1 - 1.7e-4
    content["model_ema1"] = {name: torch.nn.Parameter(tensor) for name, tensor in content["model_ema1"].items()}
    flow = load_published(
        save(content, tmp_path / "checkpoint-last.pth"), weights=weights, dtype=torch.float64, **BETWEEN
    )
    x_sigma, sigma, labels = inputs()
    expected = velocity_of_plain_jit(networks[seed], x_sigma, sigma, labels)
    assert agree(flow(x_sigma, sigma, labels=labels), expected)
    assert all(weight.is_leaf and weight.requires_grad and weight.is_contiguous() for weight in flow.parameters())


@pytest.mark.parametrize("prefix", ["", "net.", "module.", "module.net."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, wrapped):
    jit = random_jit()
    tensors = lth14(jit, prefix)
    path = save({"model": tensors} if wrapped else tensors, tmp_path / "jit.pth")
    x_sigma, sigma, labels = inputs()
    flow = load_published(path, dtype=torch.float64, **BETWEEN)
    assert agree(flow(x_sigma, sigma, labels=labels), velocity_of_plain_jit(jit, x_sigma, sigma, labels))


def test_rotations_are_read_by_either_name(tmp_path):
    jit = random_jit()
    _, angle, in_context = positions(3, 16, 8, in_context=2)
    rotations = {f"feat_rope.freqs_{f.__name__}": f(angle) for f in (torch.cos, torch.sin)}
    rotations |= {f"feat_rope_incontext.freqs_{f.__name__}": f(in_context) for f in (torch.cos, torch.sin)}
    assert load_published(save(lth14(jit, "") | rotations, tmp_path / "jit.pth"), **BETWEEN).subspace.rank == 0
    for name in rotations:
        wrong = lth14(jit, "") | {name: rotations[name].flip(0)}
        with pytest.raises(InputError, match=f"{name} differs by"):
            load_published(save(wrong, tmp_path / "jit.pth"), **BETWEEN)


@pytest.mark.parametrize("name", ["B/16", "L/16", "H/16", "B/32", "L/32", "H/32"])
def test_published_sizes_are_recognized(name):
    with torch.device("meta"):
        jit = JiT.from_name(name)
        tensors = published(jit)
    assert jit_sizes(tensors, None, "file") == {n: jit.config[n] for n in jit.config if n in jit_sizes(tensors, 0, "")}
    assert jit.config.keys() - jit_sizes(tensors, None, "file") == {"attention_dropout", "checkpoint_every"}
    assert jit_sizes(tensors, 0, "file")["in_context_start"] == 0  # what is given comes first


@given(st.data())
def test_other_sizes_are_read_off_the_tensors(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    heads, patch = draw(1, 4), draw(1, 5)
    sizes = dict(heads=heads, width=heads * 4 * draw(1, 4), depth=draw(1, 12), bottleneck=draw(1, 9))
    sizes |= dict(patch_size=patch, image_size=patch * draw(1, 6), channels=draw(1, 4), num_classes=draw(0, 9))
    sizes |= dict(in_context_start=draw(0, sizes["depth"] - 1), in_context_tokens=draw(0, 5))
    sizes["mlp_ratio"] = data.draw(st.floats(0.5, 8))
    with torch.device("meta"):
        jit = JiT(**sizes)
        found = jit_sizes(published(jit), sizes["in_context_start"], "file")
        again = JiT(**found)
    assert found | {"mlp_ratio": 0} == sizes | {"mlp_ratio": 0, "dropout": 0.0}
    assert {n: w.shape for n, w in again.state_dict().items()} == {n: w.shape for n, w in jit.state_dict().items()}


@pytest.mark.parametrize(
    ("pixels", "given", "expected"), [(64, None, 1), (256, None, 1), (512, None, 2), (512, 1.5, 1.5)]
)
def test_noise_is_scaled_with_the_image_size(tmp_path, pixels, given, expected):
    path = save(published(random_jit(image_size=pixels, patch_size=pixels // 2)), tmp_path / "jit.safetensors")
    flow = load_published(path, noise_scale=given, sigma_min=0.05, **BETWEEN)
    assert (flow.noise_scale, flow.sigma_min) == (expected, 0.05)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_file_of_16_bits_gives_float32_weights_and_an_orthonormal_basis(tmp_path, half):
    jit = random_jit().to(half)
    basis = torch.linalg.qr(torch.cat([torch.ones(D, 1), torch.randn(D, 4)], dim=1).double()).Q  # grey comes first
    tensors = published(jit, Subspace(basis))
    flow = load_published(save(tensors, tmp_path / "a.safetensors"), **BETWEEN)
    assert {weight.dtype for weight in flow.backbone.parameters()} == {torch.float32}
    assert torch.equal(flow.backbone.head.linear.weight, tensors["final_layer.linear.weight"].float())
    # Of all orthonormal bases Q, the nearest to B is its polar factor: the one that makes Q^T B symmetric.
    rounded, found = tensors["proj_buffer"].double(), flow.subspace.basis.double()
    assert not torch.equal(rounded, basis)
    assert (found - rounded).norm() < (basis - rounded).norm() + 1e-6
    torch.testing.assert_close(found.mT @ rounded, rounded.mT @ found, rtol=0, atol=1e-6)
    again = load_published(tmp_path / "a.safetensors", dtype=half, **BETWEEN)
    assert all(map(torch.equal, again.backbone.parameters(), jit.parameters()))
    assert again.subspace.basis.dtype == torch.float32


@pytest.mark.parametrize("rank", [None, 5])
def test_what_was_loaded_can_be_saved_and_loaded_to_the_last_bit(tmp_path, rank):
    tensors = published(random_jit(dtype=torch.float32), None if rank is None else Subspace.random(D, rank))
    flow = load_published(save(tensors, tmp_path / "a.safetensors"), noise_scale=2, sigma_min=0.1, **BETWEEN)
    flow.save_pretrained(tmp_path / "saved")
    again = AsymFlow.from_pretrained(tmp_path / "saved")
    x_sigma, sigma, labels = inputs(dtype=torch.float32)
    assert torch.equal(again(x_sigma, sigma, labels=labels), flow(x_sigma, sigma, labels=labels))
    assert again.config == flow.config
    assert (again.noise_scale, again.sigma_min) == (2, 0.1)


def test_a_loaded_model_works_in_float64_from_end_to_end(tmp_path):
    jit = random_jit(dtype=torch.float32)
    flow = load_published(save(published(jit, Subspace.empty(D)), tmp_path / "a.safetensors"), **BETWEEN).double()
    x_sigma, sigma, labels = inputs()
    u = flow(x_sigma, sigma, labels=labels)
    assert u.dtype == torch.float64
    assert agree(u, velocity_of_asymflow(jit.double(), torch.empty(D, 0), 1.0, x_sigma, sigma, labels))


# ---- Subspaces -------------------------------------------------------------------------------------------------------
def test_a_subspace_of_pca_has_its_strongest_direction_first(tmp_path):
    basis = Subspace.random(D, 6).basis  # eigenvectors, the strongest last
    subspace = load_published(save({"proj_mat_p4": basis}, tmp_path / "pca.pth"))
    assert torch.equal(subspace.basis, basis.flip(-1))
    assert (subspace.patch_size, subspace.token_order, subspace.scale) == (4, "channel_last", 1)


def test_a_subspace_of_procrustes_has_a_scale(tmp_path):
    basis, scale = Subspace.random(3 * 16**2, 6).basis, torch.tensor(0.731)
    subspace = load_published(save({"proj_mat_p16": basis, "scale_p16": scale}, tmp_path / "procrustes.pth"))
    assert torch.equal(subspace.basis, basis)
    assert subspace.scale == scale.item()
    assert (subspace.patch_size, subspace.token_order, subspace.color_space) == (16, "channel_first", "oklab")


BASIS = Subspace.random(D, 6).basis


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"proj_mat_p4": BASIS, "more": torch.zeros(2)}, "proj_mat_p4, more"),
        ({"proj_mat_p4": BASIS, "scale_p5": torch.ones(())}, "proj_mat_p4, scale_p5"),
        ({"proj_mat_p": BASIS}, "N the patch size"),
        ({"proj_mat_p4": BASIS[0]}, "not a subspace file"),
        ({"proj_mat_p4": [1.0]}, "not a subspace file"),
        ({"proj_mat_p5": BASIS}, "patches of 5 x 5"),
        ({"proj_mat_p4": 2 * BASIS}, "not orthonormal"),
        ({"proj_mat_p4": BASIS * math.nan}, "not finite"),
        ({"proj_mat_p4": BASIS, "scale_p4": torch.tensor(-1.0)}, "scale"),
        ({"proj_mat_p4": BASIS, "scale_p4": torch.ones(2)}, "subspace.pth"),
    ],
)
def test_what_is_no_subspace_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_published(save(content, tmp_path / "subspace.pth"))
    assert "subspace.pth" in str(error.value)


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
