"""JiT: the whole network against one written by hand, and what must hold of its parts, sizes, dtypes and errors."""

import inspect
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import SIZES, JiT, rope, rotate, sincos_positions
from asymflow.precision import computing, usual_precision

TINY = dict(patch_size=2, width=16, depth=4, heads=2, bottleneck=6, in_context_start=1, in_context_tokens=3)
TINY |= dict(image_size=6, num_classes=4)


def random_jit(seed=0, dtype=torch.float64, **options) -> JiT:
    """A JiT whose every weight is random: at initialization the head and the modulations are zero."""
    torch.manual_seed(seed)
    jit = JiT(**TINY | options).to(dtype)
    with torch.no_grad():
        for name, weight in jit.named_parameters():
            weight.normal_(std=0.2).add_(1 if "norm" in name else 0)
    return jit


def random_inputs(jit, batch=2, grid=None, dtype=torch.float64):
    h, w = grid or jit.grid
    return (
        torch.randn(batch, h * w, jit.dim, dtype=dtype),
        torch.rand(batch, dtype=dtype),
        torch.randint(jit.num_classes + 1, (batch,)),
    )


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
    start, grid = draw(0, depth), (draw(1, 4), draw(1, 4))
    sizes = dict(width=heads * 4 * draw(1, 3), depth=depth, heads=heads, bottleneck=draw(1, 5), in_context_start=start)
    sizes |= dict(channels=draw(1, 3), patch_size=draw(1, 3), num_classes=draw(1, 3), in_context_tokens=draw(0, 3))
    sizes |= dict(mlp_ratio=data.draw(st.sampled_from([1.0, 2.5, 4.0])), dropout=0.5, attention_dropout=0.5)
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
@pytest.mark.parametrize("start", [0, 2, 4])
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


# ---- Dropout and activation checkpointing ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_acts_in_the_middle_half_in_training_only(kind):
    jit = random_jit(depth=11, **{kind: 0.5})  # a quarter of 11 blocks is 2: the middle are 2 to 5
    inputs, condition = torch.randn(1, 9, 16).double(), torch.randn(1, 16).double()
    rotation = rope((3, 3), 8, "cpu", torch.float64)
    for training in (True, False):
        jit.train(training)
        random = [not torch.equal(*(block(inputs, condition, rotation) for _ in range(2))) for block in jit.blocks]
        assert random == [training and 2 <= i < 6 for i in range(11)]


def test_dropped_are_outputs_of_the_attention_and_hidden_units_of_the_mlp():
    block = random_jit(dropout=0.5).blocks[1]
    x, rotation = torch.randn(1, 9, 16).double(), rope((3, 3), 8, "cpu", torch.float64)
    seen = []
    block.attention.register_forward_hook(lambda module, args, output: seen.append(output))
    block.mlp.w3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for training in (True, False):
        block.train(training)
        block.attention(x, rotation)
        block.mlp(x)
    for dropped, whole in (seen[::2], seen[1::2]):
        assert ((dropped == 0) | (dropped == 2 * whole)).all()
        assert 0.2 < (dropped == 0).double().mean() < 0.8


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(every, dropout):
    results = []
    for checkpoint_every in (0, every):
        jit = random_jit(checkpoint_every=checkpoint_every, dropout=dropout, attention_dropout=dropout)
        calls = []
        for i, block in enumerate(jit.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        torch.manual_seed(1)
        inputs = random_inputs(jit)
        loss = jit(*inputs).square().mean()
        loss.backward()
        results.append((loss, *(weight.grad for weight in jit.parameters())))
        again = [i for i in range(4) if checkpoint_every and i % checkpoint_every == 0]
        assert sorted(calls) == sorted([0, 1, 2, 3, *again])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- Dtypes ----------------------------------------------------------------------------------------------------------
def dtypes_inside(jit, *inputs, **options):
    """The prediction, and the dtypes of all that the parts of the network put out."""
    seen = {}
    for name, module in jit.named_modules():
        if name:
            module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    return jit(*inputs, **options), seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_everything_inside_has_the_dtype_of_the_weights(dtype):
    jit = random_jit(dtype=dtype)
    tokens, _, labels = random_inputs(jit, dtype=dtype)
    for tau in (torch.rand(2), torch.rand(2, dtype=torch.float64)):
        prediction, seen = dtypes_inside(jit, tokens, tau, labels)
        assert {prediction.dtype, *seen.values()} == {dtype}


def test_under_autocast_tokens_between_the_blocks_stay_in_float32():
    jit = random_jit(dtype=torch.float32)
    inputs = random_inputs(jit, dtype=torch.float32)
    expected, after = jit(*inputs, return_tokens_after=4)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: a norm of bfloat16 with float32 weights is slow
        (prediction, tokens), seen = dtypes_inside(jit, *inputs, return_tokens_after=4)
    kinds = {dtype: {name for name in seen if seen[name] == dtype} for dtype in (torch.float32, torch.bfloat16)}
    assert {"blocks.0", "blocks.3", "blocks.2.norm1", "blocks.2.attention.q_norm", "head.norm"} <= kinds[torch.float32]
    assert {"x_embedder", "blocks.0.attention.qkv", "blocks.3.mlp.w3", "head.linear"} <= kinds[torch.bfloat16]
    # bfloat16 rounds by 2^-9, a dozen times after each other.
    assert (prediction - expected).norm() < 12 * 2**-8 * expected.norm()
    assert (tokens - after).norm() < 12 * 2**-8 * after.norm()
    prediction.float().square().mean().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in jit.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_places_of_a_wide_image_stay_apart_in_bfloat16(autocast):
    """bfloat16 cannot count beyond 256: rotations computed in it would be wrong by whole turns."""
    jit = random_jit(dtype=torch.float32, depth=1, in_context_start=1)
    with torch.no_grad():
        for norm in (jit.blocks[0].attention.q_norm, jit.blocks[0].attention.k_norm):
            norm.weight.fill_(3.0)  # attention that looks at few places
    inputs = random_inputs(jit, batch=1, grid=(1, 600), dtype=torch.float32)
    seen = []
    jit.blocks[0].attention.register_forward_hook(lambda module, args, output: seen.append(output.float()))
    jit(*inputs, grid=(1, 600))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not autocast:
            jit.bfloat16()
        jit(inputs[0].to(torch.float32 if autocast else torch.bfloat16), *inputs[1:], grid=(1, 600))
    assert (seen[1] - seen[0]).norm() < 0.1 * seen[0].norm()


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float64, False)],
)
def test_attention_gets_what_the_fast_kernels_take(dtype, autocast, monkeypatch):
    jit, plain = random_jit(dtype=dtype), F.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **o: (calls.append(qkv), plain(*qkv, **o))[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        jit(*random_inputs(jit, dtype=dtype))
    assert len(calls) == 4
    for qkv in calls:  # one dtype, and consecutive numbers in a head
        assert {t.dtype for t in qkv} == {torch.bfloat16 if autocast else dtype}
        assert {t.stride(-1) for t in qkv} == {1}


def test_attention_is_in_float32_in_the_published_precision(monkeypatch):
    """Where it is asked for, and nowhere else: training has the fast kernels."""
    jit, plain, seen = random_jit(dtype=torch.float32), F.scaled_dot_product_attention, []

    def attention(*qkv, **options):
        seen.append((torch.is_autocast_enabled("cpu"), {t.dtype for t in qkv}))
        return plain(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    flow, inputs = AsymFlow(jit, Subspace.random(jit.dim, 3)).eval(), random_inputs(jit, dtype=torch.float32)
    with computing(flow, "bf16"):
        published = jit(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        fast = jit(*inputs)
        with computing(flow, "float32"):
            exact = jit(*inputs)
    layers = len(jit.blocks)
    assert seen == [*[(False, {torch.float32})] * layers, *[(True, {torch.bfloat16})] * layers, *seen[:layers]]
    assert torch.equal(exact, jit(*inputs))
    errors = [(result.float() - exact).norm() / exact.norm() for result in (exact, published, fast)]
    assert 0 == errors[0] < min(errors[1:])
    assert max(errors) < 0.1
    with pytest.raises(InputError, match="bf16, float32"), computing(flow, "fp16"):
        pass
    seen.clear()
    with computing(flow.bfloat16(), "bf16"):  # as a training keeps them that has deepspeed.bf16
        assert not torch.is_autocast_enabled("cpu")
        assert jit(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16
    assert seen == [(False, {torch.float32})] * layers


@pytest.mark.parametrize(("device", "able"), [("cuda", True), ("cuda", False), ("cpu", True), ("mps", True)])
def test_bf16_is_usual_on_a_gpu_that_has_it(monkeypatch, device, able):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert usual_precision(torch.device(device)) == ("bf16" if (device, able) == ("cuda", True) else "float32")


def test_computing_in_a_precision_leaves_every_layer_as_it_was():
    """Not only by value: an attribute that moves from the class into the instance makes Dynamo compile anew."""
    jit = random_jit(dtype=torch.float32)
    before = [dict(vars(module)) for module in jit.modules()]
    with computing(AsymFlow(jit, Subspace.random(jit.dim, 3)).eval(), "bf16"):
        pass
    assert [vars(module).keys() for module in jit.modules()] == [was.keys() for was in before]
    assert all(module.float32_attention is False for module in jit.modules() if hasattr(module, "float32_attention"))


@pytest.mark.slow
def test_compiles_to_one_graph_in_training_with_checkpointing():
    jit = random_jit(depth=2, dtype=torch.float32, checkpoint_every=2)
    inputs = random_inputs(jit, dtype=torch.float32)
    torch.compiler.reset()
    prediction, tokens = torch.compile(jit, backend="aot_eager", fullgraph=True)(*inputs, return_tokens_after=1)
    expected, expected_tokens = jit(*inputs, return_tokens_after=1)
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(tokens, expected_tokens)
    grads = [torch.autograd.grad(p.square().mean(), list(jit.parameters())) for p in (prediction, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- Errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({name: 0}, f"{name} .* at least 1") for name in ("patch_size", "width", "depth", "heads", "bottleneck")],
        *[({name: 0}, f"{name} .* at least 1") for name in ("image_size", "channels")],
        *[({name: -1}, f"{name} .* at least 0") for name in ("num_classes", "in_context_start", "in_context_tokens")],
        ({"checkpoint_every": -1}, "checkpoint_every .* at least 0"),
        ({"image_size": 7}, "image_size 7 .* patch_size 2"),
        ({"width": 20}, r"width 20 .* 4 \* heads"),
        *[({"mlp_ratio": bad}, "mlp_ratio") for bad in (0.0, -1.0, math.nan, math.inf)],
        *[({"dropout": bad}, "dropout .* below 1") for bad in (-0.1, 1.0, math.nan)],
        ({"attention_dropout": 1.5}, "attention_dropout .* below 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        JiT(**TINY | options)


@pytest.mark.parametrize("name", ["B", "B/", "/16", "B/0", "B/x", "G/16", "b/16", "B/-2"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="SIZE/PATCH"):
        JiT.from_name(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 8, 12)}, r"expects tokens \(B, 9, 12\)"),
        ({"tokens": torch.zeros(2, 9, 13)}, r"expects tokens \(B, 9, 12\)"),
        ({"tokens": torch.zeros(2, 9)}, r"expects tokens \(B, 9, 12\)"),
        ({"grid": (3, 4)}, r"expects tokens \(B, 12, 12\)"),
        ({"grid": (1, 3, 3)}, "rows and columns"),
        ({"tau": torch.zeros(())}, "tau must be 2 noise levels"),
        ({"tau": torch.zeros(2, 1)}, "tau must be 2 noise levels"),
        ({"labels": torch.tensor(1)}, "labels must be 2 integers"),
        ({"labels": torch.tensor([1, 2, 3])}, "labels must be 2 integers"),
        *[({"labels": torch.ones(2, dtype=d)}, "labels must be") for d in (torch.float32, torch.bool, torch.uint8)],
        ({"labels": torch.tensor([0, 5])}, "label 5 is not a class: they run from 0 to 3, and 4 means no class"),
        ({"labels": torch.tensor([-1, 0])}, "label -1 is not a class"),
        ({"return_tokens_after": 0}, "return_tokens_after must be from 1 to 4"),
        ({"return_tokens_after": 5}, "return_tokens_after must be from 1 to 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = dict(tokens=torch.zeros(2, 9, 12), tau=torch.zeros(2), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=message):
        JiT(**TINY)(**inputs | change)


def test_a_subspace_of_other_tokens_is_refused():
    with pytest.raises(InputError, match="dimension 11, the backbone's have 12"):
        JiT(**TINY).seed_patch_embedding(Subspace.random(11, 2))
