"""JiT: dropout, activation checkpointing, dtypes and errors."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from random_jits import TINY, random_inputs, random_jit

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT, rope
from asymflow.precision import computing, usual_precision


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
    jit = random_jit(dtype=torch.float32, depth=1, in_context_start=0, in_context_tokens=0)
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
        *[
            ({name: 0.1, "depth": 3}, f"{name} 0.1 .* none of its 3 blocks")
            for name in ("dropout", "attention_dropout")
        ],
        ({"depth": 1}, "in_context_start 1 .* below its depth 1"),
        ({"in_context_start": 4}, "in_context_start 4 .* below its depth 4"),
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
