"""Published checkpoints, made here in each of their layouts, against the formulas that go with them."""

import argparse
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_files import BETWEEN, IMAGES, D, lth14, positions, published, random_jit, save

from asymflow import AsymFlow, InputError, Subspace, patchify, unpatchify
from asymflow.backbones.jit import JiT, NoiseLevelEmbedding
from asymflow.backbones.jit.published import jit_sizes, load_published, reverse_time


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


@pytest.mark.parametrize(
    "prefix", ["", "net.", "module.", "module.net.", "_orig_mod.", "module._orig_mod.net.", "model."]
)
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
