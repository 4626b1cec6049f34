"""JiT: the whole network against one written by hand, its sizes and what it begins with."""

import inspect
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_jits import TINY, random_inputs, random_jit

from asymflow import Subspace
from asymflow.backbones.jit import SIZES, JiT, filled_up, rope, rotate, sincos_positions


# ---- By hand, one image at a time, with complex numbers for the rotations and a loop over everything -----------------
def silu(x):
    return x / (1 + np.exp(-x))


def jit_by_hand(weights, heads, in_context_start, tokens, tau, label, grid):
    """The prediction (N, D) for one image. weights: the state dict of a JiT, as float64 arrays."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rms_norm(name, x):
        return weights[f"{name}.weight"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    width = weights["in_context_positions"].shape[-1]
    d = width // heads
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    x = linear("x_embedder.proj2", linear("x_embedder.proj1", tokens))
    for n, (row, column) in enumerate(places):
        for i in range(width // 4):
            omega = 10000 ** (-i / (width // 4))
            x[n, i] += math.sin(column * omega)
            x[n, i + width // 4] += math.cos(column * omega)
            x[n, i + width // 2] += math.sin(row * omega)
            x[n, i + width // 2 + width // 4] += math.cos(row * omega)

    frequencies = [10000 ** (-k / 128) for k in range(128)]
    waves = np.array([math.cos(f * tau) for f in frequencies] + [math.sin(f * tau) for f in frequencies])
    label = weights["y_embedder.weight"][label]
    condition = silu(linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves))) + label)

    def attention(block, x):
        q, k, v = np.split(linear(f"{block}.qkv", x), 3, axis=-1)
        out = np.zeros_like(x)
        for head in range(heads):
            mine = slice(head * d, head * d + d)
            rotated = []
            for name, y in (("q_norm", q), ("k_norm", k)):
                y = rms_norm(f"{block}.{name}", y[:, mine])
                pairs = y[:, 0::2] + 1j * y[:, 1::2]
                for n, place in enumerate(places, start=len(x) - len(places)):
                    for i in range(d // 4):
                        for axis in range(2):
                            pairs[n, i + axis * (d // 4)] *= np.exp(1j * place[axis] * 10000 ** (-i / (d // 4)))
                rotated.append(pairs)
            scores = np.real(rotated[0] @ rotated[1].conj().T) / math.sqrt(d)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, mine] = scores / scores.sum(axis=-1, keepdims=True) @ v[:, mine]
        return linear(f"{block}.proj", out)

    for i in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        if i == in_context_start:
            x = np.concatenate([label + weights["in_context_positions"], x])
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(f"{block}.modulation", condition), 6)
        x = x + gate1 * attention(f"{block}.attention", rms_norm(f"{block}.norm1", x) * (1 + scale1) + shift1)
        gate, value = np.split(linear(f"{block}.mlp.w12", rms_norm(f"{block}.norm2", x) * (1 + scale2) + shift2), 2, -1)
        x = x + gate2 * linear(f"{block}.mlp.w3", silu(gate) * value)
    shift, scale = np.split(linear("head.modulation", condition), 2)
    return linear("head.linear", rms_norm("head.norm", x[len(x) - len(places) :]) * (1 + scale) + shift)


@given(st.data())
def test_the_network_is_the_one_written_by_hand(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    heads, depth = draw(1, 3), draw(1, 4)
    start, grid = draw(0, depth - 1), (draw(1, 4), draw(1, 4))
    sizes = dict(width=heads * 4 * draw(1, 3), depth=depth, heads=heads, bottleneck=draw(1, 5), in_context_start=start)
    sizes |= dict(channels=draw(1, 3), patch_size=draw(1, 3), num_classes=draw(1, 3), in_context_tokens=draw(0, 3))
    sizes |= dict(mlp_ratio=data.draw(st.sampled_from([1.0, 2.5, 4.0])))
    sizes |= dict(dropout=0.5, attention_dropout=0.5) if depth == 4 else {}
    jit = random_jit(draw(0, 999), **sizes, image_size=sizes["patch_size"]).eval()
    tokens, tau, labels = random_inputs(jit, batch=draw(1, 2), grid=grid)
    weights = {name: weight.numpy() for name, weight in jit.state_dict().items()}
    expected = [
        jit_by_hand(weights, heads, start, x.numpy(), t.item(), label.item(), grid)
        for x, t, label in zip(tokens, tau, labels, strict=True)
    ]
    with torch.no_grad():
        error = jit(tokens, tau, labels, grid=grid).numpy() - np.array(expected)
    # Sums of at most some 100 terms in some 10 layers after each other, each rounded to 2^-53.
    assert np.abs(error).max() < 1000 * 2**-53 * max(1, np.abs(expected).max())


# ---- Sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "millions", "start"), [("B/16", 131, 4), ("L/16", 459, 8), ("H/16", 953, 10)])
def test_published_sizes_have_the_published_numbers_of_weights(name, millions, start):
    with torch.device("meta"):
        jit = JiT.from_name(name)
    assert round(sum(weight.numel() for weight in jit.parameters()) / 1e6) == millions
    assert (jit.in_context_start, len(jit.in_context_positions), jit.num_classes) == (start, 32, 1000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("patch", "pixels"), [(16, 256), (32, 512)])
def test_every_size_takes_16_by_16_patches_and_is_rebuilt_from_its_config(size, patch, pixels):
    with torch.device("meta"):
        jit = JiT.from_name(f"{size}/{patch}")
        again = JiT(**json.loads(json.dumps(jit.config)))
    assert (jit.grid, jit.dim, jit.config["image_size"]) == ((16, 16), 3 * patch**2, pixels)
    assert jit.config["dropout"] == (0.2 if size == "H" else 0.0)
    assert again.config == jit.config
    assert {n: w.shape for n, w in again.state_dict().items()} == {n: w.shape for n, w in jit.state_dict().items()}


def test_the_config_is_all_that_the_constructor_takes():
    assert JiT(**TINY).config.keys() == inspect.signature(JiT).parameters.keys()


def test_options_of_a_named_size_can_be_overridden():
    jit = JiT.from_name("tiny/4", image_size=8, in_context_start=3, num_classes=2)
    assert (jit.grid, jit.in_context_start, jit.num_classes) == ((2, 2), 3, 2)


# ---- Initialization --------------------------------------------------------------------------------------------------
def test_an_untrained_network_predicts_zero():
    jit = JiT(**TINY)
    assert (jit(*random_inputs(jit, dtype=torch.float32)) == 0).all()


def test_initialization_has_the_published_spreads():
    torch.manual_seed(0)
    jit = JiT(
        **TINY | dict(width=128, num_classes=500, bottleneck=64, patch_size=8, image_size=64, in_context_tokens=64)
    )
    normal = [
        jit.y_embedder.weight,
        jit.in_context_positions,
        jit.t_embedder.mlp[0].weight,
        jit.t_embedder.mlp[2].weight,
    ]
    layers = [jit.x_embedder.proj1, jit.x_embedder.proj2, jit.blocks[0].attention.qkv, jit.blocks[3].mlp.w3]
    xavier = [(layer.weight, math.sqrt(2 / sum(layer.weight.shape))) for layer in layers]
    for weight, std in [(w, 0.02) for w in normal] + xavier:
        # The standard deviation of n normal numbers is known to 1 / sqrt(2 n); 5 of those. Uniform ones have less.
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    for weight, std in xavier:
        assert weight.abs().max() <= math.sqrt(3) * std  # uniform, not normal
    zero = [jit.head.linear, jit.head.modulation, *(block.modulation for block in jit.blocks)]
    assert all((w == 0).all() for layer in zero for w in layer.parameters())
    assert all((w == 0).all() for name, w in jit.named_parameters() if name.endswith("bias"))
    assert all((w == 1).all() for name, w in jit.named_parameters() if "norm" in name)


def test_resetting_forgets_every_weight():
    networks = random_jit(0), random_jit(1)
    for jit in networks:
        torch.manual_seed(2)
        jit.reset_parameters()
    assert all(torch.equal(*weights) for weights in zip(*(jit.parameters() for jit in networks), strict=True))


@pytest.mark.parametrize("rank", [0, 2, 6, 9])
def test_seeding_starts_the_bottleneck_with_the_leading_directions(rank):
    torch.manual_seed(0)
    jit = JiT(**TINY)  # bottleneck 6, D = 12
    before = jit.x_embedder.proj1.weight.clone()
    subspace = Subspace.random(12, rank, seed=1)
    jit.seed_patch_embedding(subspace)
    weight, rows = jit.x_embedder.proj1.weight, min(rank, 6)
    torch.testing.assert_close(F.normalize(weight[:rows], dim=-1), subspace.basis.mT[:rows])
    assert torch.equal(weight[rows:], before[rows:])
    assert weight.requires_grad
    torch.testing.assert_close(weight[:rows].norm(dim=-1), torch.full((rows,), math.sqrt(2 * 12 / (12 + 6))))


def test_seeded_rows_have_the_norm_that_xavier_gives_the_others():
    torch.manual_seed(0)
    jit = JiT(**TINY | dict(patch_size=16, image_size=16, bottleneck=256))  # D = 768
    jit.seed_patch_embedding(Subspace.random(768, 8))
    squares = jit.x_embedder.proj1.weight.square().sum(dim=-1)
    # A sum of 768 squares of uniform numbers, each with the relative variance 4/5; the mean of 248 such sums.
    assert squares[:8].mean().item() == pytest.approx(squares[8:].mean().item(), rel=5 * math.sqrt(0.8 / 768 / 248))


# ---- Positions -------------------------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_positions_are_on_a_sphere_and_all_different(rows, columns, quarter):
    positions = sincos_positions((rows, columns), 4 * quarter)
    assert positions.shape == (rows * columns, 4 * quarter)
    torch.testing.assert_close(positions.square().sum(-1), torch.full((rows * columns,), 2.0 * quarter).double())
    assert (torch.pdist(positions) > 1e-3).all()


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
def test_rotated_products_depend_on_the_distance_only(rows, columns, quarter, seed):
    rotation = rope((rows, columns), 4 * quarter, "cpu", torch.float64)
    q, k = torch.randn(2, 4 * quarter, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    everywhere = [rotate(v.expand(1, 1, rows * columns, -1), rotation)[0, 0] for v in (q, k)]
    products = (everywhere[0] @ everywhere[1].mT).view(rows, columns, rows, columns)
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1])
    torch.testing.assert_close(products[0, 0, 0, 0], q @ k)
    torch.testing.assert_close(everywhere[0].norm(dim=-1), q.norm().expand(rows * columns))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 64]), st.integers(0, 99))
def test_zeros_that_fill_up_a_layer_change_nothing(wide, high, to, seed):
    """Values and gradients. A GPU gets the filled-up sizes: all of them are multiples of 8."""
    torch.manual_seed(seed)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, wide), (high, wide), (high,)))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    seen = []
    with mock.patch.object(F, "linear", lambda x, w, b, linear=F.linear: seen.append(w.shape) or linear(x, w, b)):
        found = filled_up(*inputs, to=to)
    expected = F.linear(*inputs)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert all(size % 8 == 0 for size in seen[0])
    towards = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, inputs, towards) for y in (found, expected)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_the_order_of_images_and_of_class_tokens_does_not_matter():
    jit = random_jit()
    tokens, tau, labels = random_inputs(jit, batch=5)
    expected, order = jit(tokens, tau, labels), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(jit(tokens[order], tau[order], labels[order]), expected[order])
    with torch.no_grad():
        jit.in_context_positions.copy_(jit.in_context_positions[[2, 0, 1]].clone())
    torch.testing.assert_close(jit(tokens, tau, labels), expected)  # they have no place, only a set of positions


def test_every_class_and_no_class_give_another_prediction():
    jit = random_jit()
    tokens, tau, _ = random_inputs(jit, batch=1)
    predictions = jit(tokens.expand(5, -1, -1), tau.expand(5), torch.arange(5, dtype=torch.int32))
    assert torch.pdist(predictions.flatten(1)).min() > 0.01


# ---- Tokens of the inside --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_tokens_of_the_inside_are_those_of_the_image(n, start):
    jit, outputs = random_jit(in_context_start=start), []
    for block in jit.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = random_inputs(jit)
    prediction, tokens = jit(*inputs, return_tokens_after=n)
    assert outputs[n - 1].shape[1] == 9 + (3 if n > start else 0)  # so many tokens did the block have
    assert tokens.shape == (2, 9, 16)
    assert torch.equal(tokens, outputs[n - 1][:, -9:])
    assert torch.equal(prediction, jit(*inputs))
