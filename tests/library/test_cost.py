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
from asymflow.training.objectives.cost import class_conditional_step, images

SIZES = dict(patch_size=4, width=32, depth=2, heads=2, bottleneck=16, in_context_start=1, in_context_tokens=3)
CHANNELS, DIM = 3, 48


def flow(rank=5, device="meta", **sizes):
    with torch.device(device):
        jit = JiT(**{"image_size": 16, "num_classes": 10, **SIZES, **sizes})
    return AsymFlow(jit, Subspace(torch.eye(jit.dim, rank)))


def step(model, shape, batch=1, precision="autocast"):
    """The cost of a training step of `batch` images."""
    return cost.count(class_conditional_step(model, precision), lambda step: step(images(batch, shape)))


# ---- Parameters ------------------------------------------------------------------------------------------------------
def test_a_shared_parameter_counts_once_and_a_frozen_one_is_not_trainable():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert cost.parameters(model) == (9 + 3 + 3 + 6, 9 + 3 + 3)  # the running averages are buffers


# ---- Operations ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "giga_multiply_adds"),
    [
        ("B/16", 25),
        pytest.param("L/16", 88, marks=pytest.mark.slow),
        pytest.param("H/16", 182, marks=pytest.mark.slow),
    ],
)
def test_published_figures_of_jit(name, giga_multiply_adds):
    """arXiv 2511.13720, which counts a multiply-add as one. The table gives whole numbers."""
    with torch.device("meta"):
        jit = JiT.from_name(name)
    model = AsymFlow(jit, Subspace.empty(768))
    assert round(cost.forward_flops(model, (3, 256, 256)) / 2e9) == giga_multiply_adds


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
        "in_context_start": st.integers(0, 2),
        "in_context_tokens": st.integers(0, 5),
        "bottleneck": st.integers(1, 20),
    }
).filter(lambda sizes: sizes["in_context_start"] < sizes["depth"])


@settings(max_examples=2)
@given(jits, st.integers(0, DIM), st.integers(1, 4), st.integers(1, 4))
def test_operations_are_those_of_the_closed_formula(sizes, rank, rows, columns):
    model, n = flow(rank, **sizes), rows * columns
    blocks, rest = products_of_blocks(model.backbone, n), products_of_the_rest(model.backbone, n)
    # recover_velocity projects twice, each time by two thin products. Of the full space the projection is free.
    projections = 4 * n * DIM * rank * (rank < DIM)
    shape = (CHANNELS, 4 * rows, 4 * columns)
    assert cost.forward_flops(model, shape) == 2 * (blocks + rest + projections)

    # Backwards, each product costs twice what it does forward, but where one of its factors needs no gradient: the
    # tokens, the waves of the noise level, and the basis.
    no_gradient = n * DIM * sizes["bottleneck"] + 256 * sizes["width"] + projections
    training = 2 * (3 * (blocks + rest + projections) - no_gradient)
    assert step(model, shape).flops == training

    model.backbone.checkpoint_every = 1
    assert step(model, shape).flops == training + 2 * blocks
    model.backbone.requires_grad_(False).head.requires_grad_(True)
    assert step(model, shape).flops < training


def test_any_backbone_with_the_conditions_that_it_needs():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.text = nn.Linear(DIM, DIM), nn.Linear(7, DIM)

        def forward(self, tokens, tau, text):
            return self.layer(tokens) + self.text(text).sum(1, keepdim=True)

    model = AsymFlow(Backbone(), Subspace.empty(DIM), patch_size=4)
    text = torch.zeros(1, 6, 7)
    assert cost.forward_flops(model, (2, 3, 8, 8), text=text) == 2 * (8 * DIM**2 + 6 * 7 * DIM)  # a video of two frames


# ---- Activations -----------------------------------------------------------------------------------------------------
def with_gradients(model):
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return model.train()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("checkpoint_every", [0, 2])
@pytest.mark.parametrize("precision", cost.PRECISIONS)
def test_counted_without_numbers_as_with_them(precision, checkpoint_every):
    model = flow(checkpoint_every=checkpoint_every, depth=4, dropout=0.1)
    real = with_gradients(class_conditional_step(model, precision).to_empty(device="cpu"))
    known = [*real.parameters(), *real.buffers(), *(weight.grad for weight in real.parameters())]
    with cost.Counter(known) as counter:
        loss = real(images(3, (CHANNELS, 16, 16)))
        kept = counter.alive
        loss.backward()
    assert step(model, (CHANNELS, 16, 16), 3, precision) == cost.Cost(counter.flops, kept, counter.peak)


def test_what_is_kept_is_what_autograd_saves():
    """Against the hooks of autograd, on real tensors: distinct storages, without weights and buffers."""
    real = class_conditional_step(flow(), "float32").to_empty(device="cpu")
    own = {t.untyped_storage().data_ptr() for t in [*real.parameters(), *real.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real(images(4, (CHANNELS, 16, 16)))
    expected = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    kept = step(flow(), (CHANNELS, 16, 16), 4, "float32").kept
    assert kept == expected + loss.untyped_storage().nbytes()


def test_peak_is_that_of_the_allocator():
    """Against what torch's profiler sees of real allocations, in a model large enough for them to tell."""
    model = flow(width=128, heads=4, image_size=64)
    real = with_gradients(class_conditional_step(model, "float32").to_empty(device="cpu"))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        real(images(4, (CHANNELS, 64, 64))).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    counted = step(model, (CHANNELS, 64, 64), 4, "float32").peak
    assert counted == pytest.approx(peak, rel=0.01)  # kernels may have workspaces


@cache
def kept(tokens=16, batch=1, precision="float32", **sizes):
    model = flow(image_size=16, **sizes)
    return step(model, (CHANNELS, 4, 4 * tokens), batch, precision).kept


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


@pytest.mark.slow
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
    per_block = kept(batch=batch, depth=3) - kept(batch=batch, depth=2)
    every = step(flow(**big), shape, batch, "float32")
    spared = step(flow(checkpoint_every=1, **big), shape, batch, "float32")
    assert spared.kept < every.kept
    assert spared.kept + 0.8 * per_block < spared.peak < every.peak - 2 * per_block


def test_the_model_is_left_as_it_is():
    model = flow(device="cpu").eval()
    tensors = lambda: {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors().items()}
    step(model, (CHANNELS, 16, 16))
    step(model, (CHANNELS, 16, 16), 2, "bfloat16")
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    for name, tensor in tensors().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    with pytest.raises(InputError, match="99 is not a class"):  # checks of values are on again
        model(torch.zeros(1, CHANNELS, 16, 16), 0.5, labels=torch.tensor([99]))


def test_tensors_that_are_no_parameters_are_left_out_too():
    """Those that a module of one's own holds, itself or in an object, such as the weights of a loss."""

    class Weighted(nn.Linear):
        def __init__(self, held):
            super().__init__(4, 4)
            self.own, self.held = torch.ones(1000, 4), held

        def forward(self, x):
            return (super().forward(x) * self.own[:3] * self.held.inside[:3]).sum()

    class Holder:
        inside = None

    holder = Holder()
    holder.inside = torch.ones(5000, 4)
    found = cost.count(Weighted(holder), lambda model: model(torch.ones(3, 4)))
    assert found.flops == 2 * 2 * 3 * 4 * 4  # forward, and the gradient of the weights
    assert found.peak < 1000
    assert torch.equal(holder.inside, torch.ones(5000, 4))


def test_the_dtype_of_the_weights_given_does_not_matter():
    one, other = (step(model, (CHANNELS, 16, 16), 2) for model in (flow(), flow().bfloat16()))
    assert one == other


def test_images_that_do_not_fit_are_refused():
    for count in (cost.forward_flops, step):
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
        kinds = cost.training_memory(p, gpus=n, stage=stage, precision="bfloat16", averages=0, bucket=0, **options)
        return sum(kinds.values())

    rounding = 5  # of each kind up to a whole byte
    assert 0 <= total(2) - (2 * p + 18 * p / n) < rounding + 1e-6 * p
    assert 0 <= total(3, largest_layer=1000) - (20 * p / n + 4 * 1000) < rounding + 1e-6 * p


@given(numbers, numbers, gpu_counts, st.sampled_from(cost.PRECISIONS), st.booleans(), st.integers(0, 3))
def test_what_the_stages_divide(p, frozen, n, precision, sums, averages):
    options = dict(precision=precision, float32_sums=sums, averages=averages)
    alone = [cost.training_memory(p, frozen, gpus=1, stage=s, **options) for s in range(4)]
    shared = [cost.training_memory(p, frozen, gpus=n, stage=s, **options) for s in range(4)]
    assert alone[0] == shared[0]  # plain data parallelism divides nothing
    divided = [{"optimizer", "ema"}, {"gradients"}, {"weights", "trained"}]
    for stage in range(4):
        kinds = set().union(*divided[:stage])
        for kind in alone[stage].keys() - {"gradients"}:
            number, share = alone[stage][kind], n if kind in kinds else 1
            assert number <= shared[stage][kind] * share < number + share
        assert shared[stage]["gradients"] <= alone[stage]["gradients"]
        if "gradients" in kinds:
            assert alone[stage]["gradients"] <= shared[stage]["gradients"] * n < alone[stage]["gradients"] + n
    for kind in ("weights", "trained", "ema"):
        assert len({a[kind] for a in alone}) == 1
    assert shared[0]["ema"] == 4 * averages * p
    size = 2 if precision == "bfloat16" else 4
    no_frozen = cost.training_memory(p, 0, gpus=n, stage=1, **options)
    assert shared[1] == no_frozen | {"weights": size * frozen}


@given(numbers, numbers, gpu_counts, st.integers(0, 3), st.sampled_from(cost.OFFLOADS))
def test_what_is_offloaded_is_on_the_host_and_nothing_else_changes(p, frozen, n, stage, offload):
    here, moved = (
        cost.training_memory(1 + p, 1 + frozen, gpus=n, stage=stage, offload=o, largest_layer=1)
        for o in (None, offload)
    )
    assert sum(moved.values()) == sum(here.values())
    gone = {kind for kind in here if moved[kind] < here[kind]}
    away = {"optimizer", "ema"} | ({"weights", "trained"} if offload == "weights" and stage == 3 else set())
    assert gone == (away if stage else set())


def test_float32_alone_is_sixteen_bytes_and_four_for_the_average():
    """The well-known 16 bytes a parameter of Adam in float32: weight, gradient, two moments."""
    for precision in ("float32", "autocast"):
        assert sum(cost.training_memory(10, precision=precision, averages=0).values()) == 160
        assert sum(cost.training_memory(10, precision=precision).values()) == 200
        # DeepSpeed copies its share of the weights in stages 1 and 2, though they are in float32 already.
        optimizer = [cost.training_memory(10, stage=s, precision=precision)["optimizer"] for s in range(4)]
        assert optimizer == [80, 120, 120, 80]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stage=4), "stage is 0, 1, 2 or 3"),
        (dict(precision="fp8"), "autocast, bfloat16, float32"),
        (dict(gpus=0), "at least 1 GPU"),
        (dict(frozen=-1), "negative"),
        (dict(offload="disk"), "optimizer, weights"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        cost.training_memory(1, **options)
    if "precision" in options:
        with pytest.raises(InputError, match=message):
            step(flow(), (CHANNELS, 16, 16), **options)
