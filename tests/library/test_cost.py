"""What a model costs: closed formulas, published figures, real memory, and DeepSpeed's own accounting."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from asymflow import AsymFlow, InputError, Subspace, cost
from asymflow.backbones.jit import JiT, swiglu_width

SIZES = dict(patch_size=4, width=32, depth=2, heads=2, bottleneck=16, in_context_start=1, in_context_tokens=3)
CHANNELS, DIM = 3, 48


def flow(rank=5, device="meta", **sizes):
    with torch.device(device):
        jit = JiT(**{"image_size": 16, "num_classes": 10, **SIZES, **sizes})
    return AsymFlow(jit, Subspace(torch.eye(jit.dim, rank)))


# ---- Parameters ------------------------------------------------------------------------------------------------------
def test_a_shared_parameter_counts_once_and_a_frozen_one_is_not_trainable():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert cost.parameters(model) == (9 + 3 + 3 + 6, 9 + 3 + 3)  # the running averages are buffers


@pytest.mark.parametrize(
    ("name", "millions", "giga_multiply_adds"),
    [
        ("B/16", 131, 25),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("L/16", 459, 88), ("H/16", 953, 182))),
    ],
)
def test_published_figures_of_jit(name, millions, giga_multiply_adds):
    """arXiv 2511.13720, which counts a multiply-add as one. The table gives whole numbers."""
    with torch.device("meta"):
        jit = JiT.from_name(name)
    model = AsymFlow(jit, Subspace.empty(768))
    assert round(cost.parameters(model)[0] / 1e6) == millions
    assert round(cost.flops(model, (3, 256, 256)) / 2e9) == giga_multiply_adds


# ---- Operations ------------------------------------------------------------------------------------------------------
def products_of_blocks(jit, tokens):
    """Multiply-adds of all blocks: linear layers on every token, the modulation once, scores and sums of attention."""
    width, total = jit.config["width"], 0
    hidden = swiglu_width(width, jit.config["mlp_ratio"])
    for i in range(len(jit.blocks)):
        n = tokens + (jit.config["in_context_tokens"] if i >= jit.in_context_start else 0)
        total += n * (4 * width**2 + 3 * width * hidden) + 6 * width**2 + 2 * n**2 * width
    return total


def products_of_the_rest(jit, tokens):
    width, bottleneck = jit.config["width"], jit.config["bottleneck"]
    time = 256 * width + width**2
    return tokens * (jit.dim * bottleneck + bottleneck * width + width * jit.dim) + time + 2 * width**2


jits = st.fixed_dictionaries(
    {
        "width": st.sampled_from([16, 48]),
        "depth": st.integers(1, 3),
        "in_context_start": st.integers(0, 4),
        "in_context_tokens": st.integers(0, 5),
        "bottleneck": st.integers(1, 20),
    }
)


@settings(max_examples=3)
@given(jits, st.integers(0, DIM), st.integers(1, 4), st.integers(1, 4))
def test_operations_are_those_of_the_closed_formula(sizes, rank, rows, columns):
    model, n = flow(rank, **sizes), rows * columns
    blocks, rest = products_of_blocks(model.backbone, n), products_of_the_rest(model.backbone, n)
    # recover_velocity projects twice, each time by two thin products. Of the full space the projection is free.
    projections = 4 * n * DIM * rank * (rank < DIM)
    shape = (CHANNELS, 4 * rows, 4 * columns)
    assert cost.flops(model, shape) == 2 * (blocks + rest + projections)

    # Backwards, each product costs twice what it does forward, but where one of its factors needs no gradient: the
    # tokens, the waves of the noise level, and the basis.
    no_gradient = n * DIM * sizes["bottleneck"] + 256 * sizes["width"] + projections
    training = 2 * (3 * (blocks + rest + projections) - no_gradient)
    assert cost.flops(model, shape, training=True) == training

    model.backbone.checkpoint_every = 1
    assert cost.flops(model, shape, training=True) == training + 2 * blocks
    model.backbone.requires_grad_(False).head.requires_grad_(True)
    assert cost.flops(model, shape, training=True) < training


def test_any_backbone_with_the_conditions_that_it_needs():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.text = nn.Linear(DIM, DIM), nn.Linear(7, DIM)

        def forward(self, tokens, tau, text):
            return self.layer(tokens) + self.text(text).sum(1, keepdim=True)

    model = AsymFlow(Backbone(), Subspace.empty(DIM), patch_size=4)
    text = torch.zeros(1, 6, 7)
    assert cost.flops(model, (2, 3, 8, 8), text=text) == 2 * (8 * DIM**2 + 6 * 7 * DIM)  # a video of two frames
    kept = [cost.activation_bytes(model, (2, 3, 8, 8), b, "float32", text=text)[0] for b in (1, 2, 3)]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 4 * 6 * 7


# ---- Activations -----------------------------------------------------------------------------------------------------
def real_loss(model, batch, size, autocast=False):
    """The loss of a training step on the CPU."""
    x_sigma, u = torch.randn(2, batch, CHANNELS, size, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return (model(x_sigma, torch.rand(batch), labels=torch.zeros(batch, dtype=torch.long)) - u).square().mean()


def with_gradients(model):
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return model.train()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("checkpoint_every", [0, 2])
@pytest.mark.parametrize("precision", cost.PRECISIONS)
def test_counted_without_numbers_as_with_them(precision, checkpoint_every):
    model = with_gradients(flow(device="cpu", checkpoint_every=checkpoint_every, dropout=0.1))
    expected = cost.activation_bytes(model, (CHANNELS, 16, 16), 3, precision)
    if precision == "bfloat16":
        model = with_gradients(model.bfloat16())
    known = [*model.parameters(), *model.buffers(), *(weight.grad for weight in model.parameters())]
    with cost.LiveBytes(known) as live:
        loss = real_loss(model, 3, 16, precision == "autocast")
        kept = live.now
        loss.backward()
    assert kept == expected[0]
    assert live.peak == expected[1]


def test_what_is_kept_is_what_autograd_saves():
    """Against the hooks of autograd, on real tensors: distinct storages, without weights and buffers."""
    model = with_gradients(flow(device="cpu"))
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real_loss(model, 4, 16)
    expected = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    kept, _ = cost.activation_bytes(model, (CHANNELS, 16, 16), 4, "float32")
    assert kept == expected + loss.untyped_storage().nbytes()


def test_peak_is_that_of_the_allocator():
    """Against what torch's profiler sees of real allocations, in a model large enough for them to tell."""
    model = with_gradients(flow(device="cpu", width=128, heads=4, image_size=64))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        real_loss(model, 4, 64).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    _, counted = cost.activation_bytes(model, (CHANNELS, 64, 64), 4, "float32")
    assert counted == pytest.approx(peak, rel=0.01)  # kernels may have workspaces


@cache
def kept(tokens=16, batch=1, precision="float32", **sizes):
    model = flow(image_size=16, **sizes)
    return cost.activation_bytes(model, (CHANNELS, 4, 4 * tokens), batch, precision)[0]


@pytest.mark.slow
def test_grows_with_the_batch_but_for_the_copies_of_weights():
    fixed = {}
    for precision in cost.PRECISIONS:
        one, two, three = (kept(batch=b, precision=precision) for b in (1, 2, 3))
        assert three - two == two - one
        fixed[precision] = 2 * one - two
    # A copy is kept where the gradient travels on to the input. It does not to the tokens, nor to the noise level.
    jit = flow().backbone
    ends = (jit.x_embedder.proj1, jit.t_embedder.mlp[0])
    copied = sum(m.weight.numel() for m in jit.modules() if isinstance(m, nn.Linear) and m not in ends)
    assert fixed["autocast"] - fixed["float32"] == 2 * copied


def test_grows_with_the_tokens_and_not_with_their_square():
    n16, n32, n48 = (kept(tokens=n) for n in (16, 32, 48))
    assert n48 - n32 == n32 - n16


def test_of_a_checkpointed_block_only_the_input_is_kept():
    sizes = dict(in_context_start=0, checkpoint_every=1)
    per_block = kept(depth=3, batch=2, **sizes) - kept(depth=2, batch=2, **sizes)
    assert per_block == 2 * (16 + 3) * 32 * 4  # images, tokens with those of the class, width, bytes
    assert kept(depth=3, batch=2) - kept(depth=2, batch=2) > 10 * per_block


def test_recomputing_one_block_is_part_of_the_peak():
    """With n blocks checkpointed, all but one block's activations are spared at the peak."""
    big = dict(depth=5, in_context_start=0)
    shape, batch = (CHANNELS, 16, 16), 8
    per_block = kept(batch=batch, depth=2) - kept(batch=batch, depth=1)
    every = cost.activation_bytes(flow(**big), shape, batch, "float32")
    spared = cost.activation_bytes(flow(checkpoint_every=1, **big), shape, batch, "float32")
    assert spared[0] < every[0]
    assert spared[0] + 0.8 * per_block < spared[1] < every[1] - 2 * per_block


def test_the_model_is_left_as_it_is():
    model = flow(device="cpu").eval()
    tensors = lambda: {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors().items()}
    cost.flops(model, (CHANNELS, 16, 16), training=True)
    cost.activation_bytes(model, (CHANNELS, 16, 16), 2, "bfloat16")
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    for name, tensor in tensors().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    with pytest.raises(InputError, match="99 is not a class"):  # checks of values are on again
        model(torch.zeros(1, CHANNELS, 16, 16), 0.5, labels=torch.tensor([99]))


def test_the_dtype_of_the_weights_given_does_not_matter():
    one, other = (cost.activation_bytes(model, (CHANNELS, 16, 16), 2) for model in (flow(), flow().bfloat16()))
    assert one == other


def test_images_that_do_not_fit_are_refused():
    for count in (cost.flops, cost.activation_bytes):
        with pytest.raises(InputError, match="15 x 16 pixels"):
            count(flow(), (CHANNELS, 15, 16))
        with pytest.raises(InputError, match="3 channels"):
            count(flow(), (4, 16, 16))


# ---- Everything else -------------------------------------------------------------------------------------------------
numbers = st.integers(0, 10**11)
gpu_counts = st.integers(1, 4096)


@given(numbers, gpu_counts)
def test_bfloat16_as_deepspeed_counts_it(p, n):
    """deepspeed.runtime.zero: estimate_zero2_model_states_mem_needs, without offloading, is 2 p + 18 p / n.

    Stage 3 divides the weights too. (Its own estimate there, 18 p / n, is not the sum of what its source names.)
    """

    def total(stage, **options):
        return sum(cost.training_memory(p, gpus=n, stage=stage, precision="bfloat16", ema=False, **options).values())

    rounding = 5  # of each kind up to a whole byte
    assert 0 <= total(2) - (2 * p + 18 * p / n) < rounding + 1e-6 * p
    assert 0 <= total(3, largest_layer=1000) - (20 * p / n + 4 * 1000) < rounding + 1e-6 * p


@given(numbers, numbers, gpu_counts, st.sampled_from(cost.PRECISIONS), st.booleans())
def test_what_the_stages_divide(p, frozen, n, precision, ema):
    alone = [cost.training_memory(p, frozen, gpus=1, stage=s, precision=precision, ema=ema) for s in range(4)]
    shared = [cost.training_memory(p, frozen, gpus=n, stage=s, precision=precision, ema=ema) for s in range(4)]
    assert alone[0] == shared[0]  # plain data parallelism divides nothing
    divided = [{"adam", "ema", "master_weights", "step_gradients"}, {"gradients"}, {"weights"}]
    for stage in range(4):
        kinds = set().union(*divided[:stage])
        for kind, number in alone[stage].items():
            share = n if kind in kinds else 1
            assert number <= shared[stage][kind] * share < number + share
    for kind in ("weights", "gradients", "adam", "ema", "step_gradients"):
        assert len({a[kind] for a in alone}) == 1
    no_frozen = cost.training_memory(p, 0, gpus=n, stage=1, precision=precision, ema=ema)
    size = 2 if precision == "bfloat16" else 4
    assert {k: v for k, v in shared[1].items() if v != no_frozen[k]} == (
        {"weights": size * (p + frozen)} if frozen else {}
    )


def test_float32_alone_is_sixteen_bytes_and_four_for_the_average():
    """The well-known 16 bytes a parameter of Adam in float32: weight, gradient, two moments."""
    for precision in ("float32", "autocast"):
        assert sum(cost.training_memory(10, precision=precision, ema=False).values()) == 160
        assert sum(cost.training_memory(10, precision=precision).values()) == 200
        # DeepSpeed copies its share of the weights in stages 1 and 2, though they are in float32 already.
        copies = [cost.training_memory(10, stage=s, precision=precision)["master_weights"] for s in range(4)]
        assert copies == [0, 40, 40, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stage=4), "stage is 0, 1, 2 or 3"),
        (dict(precision="fp8"), "autocast, bfloat16, float32"),
        (dict(gpus=0), "at least 1 GPU"),
        (dict(frozen=-1), "negative"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        cost.training_memory(1, **options)
    if "precision" in options:
        with pytest.raises(InputError, match=message):
            cost.activation_bytes(flow(), (CHANNELS, 16, 16), **options)
