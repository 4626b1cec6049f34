"""asymflow/model.py: the wrapper around any backbone, and what becomes of it on disk and on the Hub."""

import copy
import errno
import inspect
import json
import os
import pickle
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from devices import NoFloat64
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from asymflow import AsymFlow, InputError, Subspace, asymmetric_velocity, calibration, files, patchify, recover_velocity
from asymflow.backbones.jit import JiT
from asymflow.fitting import fit_pca
from asymflow.patches import TOKEN_ORDERS, token_grid

ONE_LINE = r"\A[^\n]+\Z"
SEEDS, ORDERS, SCALES = st.integers(0, 2**32 - 1), st.sampled_from(TOKEN_ORDERS), st.floats(0.05, 20)
DOUBLE = {"dtype": torch.float64}


class Oracle(nn.Module):
    """A backbone without weights that has the right answer and remembers what it was asked."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def forward(self, tokens, tau, **conditions):
        self.tokens, self.tau, self.conditions = tokens, tau, conditions
        return torch.zeros_like(tokens) if self.answer is None else self.answer


class GridOracle(Oracle):
    def forward(self, tokens, tau, grid, **conditions):
        self.grid = grid
        return super().forward(tokens, tau, **conditions)


class Small(nn.Module):
    """A backbone of somebody else: it mixes tokens, and has a buffer and a configuration of its own."""

    def __init__(self, dim=12, patch_size=None):
        super().__init__()
        self.first, self.second = nn.Linear(dim, 8), nn.Linear(8, dim)
        self.register_buffer("shift", torch.rand(8))
        self.config = {"dim": dim}
        self.patch_size = patch_size

    def forward(self, tokens, tau):
        h = self.first(tokens) + self.shift + tau[:, None, None].to(tokens.dtype)
        return self.second(torch.tanh(h + h.mean(1, keepdim=True)))


def jit_flow(rank=5, scale=0.5, **options):
    """A JiT of 16 x 16 pixels, patch 4. Its head and modulation start at zero: here they do not."""
    torch.manual_seed(0)
    backbone = JiT.from_name("tiny/4", image_size=16, num_classes=10)
    for weight in backbone.parameters():
        nn.init.normal_(weight, std=0.05)
    subspace = Subspace.random(48, rank, scale=scale, color_space="sRGB", fitted_on="nothing")
    return AsymFlow(backbone, subspace, **options).eval()


def small_flow(**options):
    torch.manual_seed(1)
    return AsymFlow(Small(), Subspace.random(12, 4, scale=2.0), patch_size=2, **options).eval()


def jit_inputs(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 16, 16, generator=generator, dtype=dtype)
    return x, torch.linspace(0.1, 1, batch, dtype=dtype), torch.arange(batch) % 11


@st.composite
def problems(draw):
    """(x0, eps) (B, C, H, W) or (B, T, C, H, W), sigma (B,), a subspace, the patch size, the order; in float64."""
    patch, h, w, batch, channels = (draw(st.integers(1, most)) for most in (3, 3, 3, 3, 4))
    lead = [batch, draw(st.integers(1, 3))] if draw(st.booleans()) else [batch]
    dim, generator = channels * patch**2, torch.Generator().manual_seed(draw(SEEDS))
    x0, eps = torch.randn(2, *lead, channels, h * patch, w * patch, generator=generator, **DOUBLE)
    sigma = 1e-3 + (1 - 1e-3) * torch.rand(batch, generator=generator, **DOUBLE)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, : draw(st.integers(0, dim))]
    return x0, eps, sigma, Subspace(basis, draw(SCALES)), patch, draw(ORDERS)


def on_path(x0, eps, sigma):
    return torch.lerp(x0, eps, sigma.view(-1, *[1] * (x0.ndim - 1)))


# ---- The velocity of images ------------------------------------------------------------------------------------------


@given(problems(), st.booleans())
def test_a_perfect_backbone_gives_the_velocity_of_images_and_videos(problem, strided):
    """1e-16 / sigma, at most 1e-13, times 36 numbers up to 5 * 20 (the scale): 1e-8 is ample. For any memory layout."""
    x0, eps, sigma, subspace, patch, order = problem
    answer = asymmetric_velocity(*(patchify(v, patch, order) for v in (x0, eps)), subspace)
    oracle = GridOracle(answer)
    flow = AsymFlow(oracle, subspace, patch, order, sigma_min=0).eval()
    x_sigma = on_path(x0, eps, sigma)
    if strided:
        x_sigma = torch.stack([x_sigma, -x_sigma], -1)[..., 0]
    u = flow(x_sigma, sigma)
    torch.testing.assert_close(u, eps - x0, rtol=0, atol=1e-8)
    assert oracle.grid == token_grid(x0, patch)
    k, tau = calibration(sigma, subspace.scale)
    assert torch.equal(oracle.tau, tau)
    expected = k[:, None, None] * patchify(x_sigma, patch, order)
    torch.testing.assert_close(oracle.tokens, expected, rtol=1e-14, atol=0)


@given(SEEDS, SCALES, st.integers(0, 12))
def test_the_order_within_tokens_is_a_change_of_coordinates(seed, scale, rank):
    """The same network and subspace in the coordinates of the other order: the same model, to 1e-10 / sigma."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, **DOUBLE)).Q[:, :rank]
    weight, x = (
        torch.randn(12, 12, generator=generator, **DOUBLE),
        torch.randn(2, 3, 4, 6, generator=generator, **DOUBLE),
    )
    number = torch.arange(12.0).view(1, 3, 2, 2)
    turn = [patchify(number, 2, order)[0, 0].long() for order in TOKEN_ORDERS]
    velocities = []
    for order, index in zip(TOKEN_ORDERS, turn, strict=True):
        backbone = nn.Linear(12, 12, bias=False, **DOUBLE)
        backbone.weight = nn.Parameter(weight[index][:, index])
        network = Oracle()
        network.forward = lambda tokens, tau, backbone=backbone: torch.tanh(backbone(tokens)) * tau[:, None, None]
        flow = AsymFlow(network, Subspace(basis[index], scale), 2, order).eval()
        velocities.append(flow(x, torch.tensor([0.1, 0.9], **DOUBLE)))
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 5, 48])
def test_the_division_is_clamped_at_1e_6_while_training_and_at_sigma_min_when_not(rank):
    flow, (x, _, labels) = jit_flow(rank, sigma_min=0.3), jit_inputs(4)
    sigma = torch.tensor([0.0, 1e-7, 0.1, 0.5])
    k, tau = calibration(sigma, 0.5)
    tokens = patchify(x, 4)
    prediction = flow.backbone(k[:, None, None] * tokens, tau, labels, grid=(4, 4))
    for mode, sigma_min in ((True, 1e-6), (False, 0.3)):
        u = patchify(flow.train(mode)(x, sigma, labels=labels), 4)
        assert torch.equal(u, recover_velocity(prediction, tokens, sigma, flow.subspace, sigma_min))
        assert u.isfinite().all()


def test_rank_0_is_an_x0_model_and_full_rank_a_u_model():
    """Written by hand, without a scale: bit for bit."""
    (x, sigma, labels), level = jit_inputs(), jit_inputs()[1][:, None, None]
    for rank in (0, 48):
        flow = jit_flow(rank, scale=1.0)
        output = flow.backbone(patchify(x, 4), sigma, labels)
        expected = output if rank else (patchify(x, 4) - -output) / level.clamp(min=0.04)
        assert torch.equal(patchify(flow(x, sigma, labels=labels), 4), expected)


@pytest.mark.parametrize("level", [0.5, 1, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_one_noise_level_for_all_images_is_that_level_for_each(level):
    flow, (x, _, labels) = jit_flow(), jit_inputs()
    u = flow(x, level, labels=labels)
    assert u.dtype == torch.float32
    assert torch.equal(u, flow(x, torch.full((2,), float(level)), labels=labels))


def test_noise_levels_in_float64_make_all_of_it_float64():
    flow, (x, sigma, labels) = jit_flow().double(), jit_inputs()
    u = flow(x, sigma.double(), labels=labels)
    assert u.dtype == torch.float64
    assert torch.equal(u, flow(x.double(), sigma.double(), labels=labels))


def test_a_number_is_a_noise_level_of_the_precision_of_the_images():
    flow, (x, _, labels) = jit_flow().double(), jit_inputs(dtype=torch.float64)
    assert torch.equal(flow(x, 0.3, labels=labels), flow(x, torch.full((2,), 0.3, **DOUBLE), labels=labels))


def test_a_batch_is_its_images_in_any_order():
    """In float64, to 1e-10: kernels may sum in another order for another batch."""
    flow, (x, sigma, labels) = jit_flow().double(), jit_inputs(5, torch.float64)
    u, turn = flow(x, sigma, labels=labels), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(flow(x[turn], sigma[turn], labels=labels[turn]), u[turn], rtol=0, atol=1e-10)
    for i in range(5):
        one = slice(i, i + 1)
        torch.testing.assert_close(flow(x[one], sigma[one], labels=labels[one]), u[one], rtol=0, atol=1e-10)


def test_no_images_have_no_velocity():
    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    assert flow(x[:0], sigma[:0], labels=labels[:0]).shape == (0, 3, 16, 16)


# ---- What passes between wrapper and backbone ------------------------------------------------------------------------


def test_conditions_and_further_outputs_pass_untouched():
    condition, other = object(), object()

    class Talker(Oracle):
        def forward(self, tokens, tau, **conditions):
            return super().forward(tokens, tau, **conditions), other, "more"

    backbone = Talker()
    flow = AsymFlow(backbone, Subspace.random(12, 3), patch_size=2)
    x = torch.randn(2, 3, 4, 6)
    velocity, *others = flow(x, 0.5, text=condition, mask=None)
    assert velocity.shape == x.shape
    assert others[0] is other
    assert others[1] == "more"
    assert backbone.conditions.keys() == {"text", "mask"}  # and no grid: its forward does not name one
    assert backbone.conditions["text"] is condition


def test_only_a_backbone_that_names_the_grid_gets_it():
    x = torch.randn(2, 3, 4, 6)
    for shape, grid in (((2, 3, 4, 6), (2, 3)), ((2, 5, 3, 4, 6), (5, 2, 3))):
        backbone = GridOracle()
        AsymFlow(backbone, Subspace.random(12, 3), patch_size=2)(torch.randn(shape), 0.5)
        assert backbone.grid == grid
    backbone = Oracle()
    AsymFlow(backbone, Subspace.random(12, 3), patch_size=2)(x, 0.5)
    assert backbone.conditions == {}


@pytest.mark.slow
def test_a_compiled_backbone_gets_the_grid_too():
    """8 x 32 pixels are 2 x 8 tokens, as many as the 4 x 4 that the JiT was made for: wrong positions, no error."""
    flow, x = jit_flow(), torch.randn(2, 3, 8, 32)
    expected = flow(x, 0.5, labels=torch.tensor([1, 2]))
    flow = AsymFlow(torch.compile(flow.backbone, backend="eager"), flow.subspace).eval()
    torch.testing.assert_close(flow(x, 0.5, labels=torch.tensor([1, 2])), expected)


def test_gradients_reach_the_backbone_and_the_image_only():
    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    assert list(flow.subspace.parameters()) == []
    assert {name.split(".")[0] for name, _ in flow.named_parameters()} == {"backbone"}
    flow.train()(x.requires_grad_(), sigma, labels=labels).square().mean().backward()
    assert all(w.grad.isfinite().all() and w.grad.any() for w in flow.backbone.parameters() if w.shape[0] != 11)
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert not any(buffer.requires_grad for buffer in flow.buffers())


def test_a_checkpointed_flow_has_the_same_gradients():
    flow, (x, sigma, labels) = jit_flow().train(), jit_inputs()
    gradients = []
    for call in (flow, lambda *a, **k: checkpoint(flow, *a, use_reentrant=False, **k)):
        loss = call(x, sigma, labels=labels).square().mean()
        gradients.append(torch.autograd.grad(loss, list(flow.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_can_be_mapped_over_images_and_noise_levels():
    """In float64, to 1e-10: batched kernels may sum in another order."""
    flow, x = small_flow().double(), torch.randn(3, 3, 4, 6, **DOUBLE)
    sigma = torch.tensor([0.0, 0.5, 1.0], **DOUBLE)
    images = torch.func.vmap(lambda x, sigma: flow(x[None], sigma[None])[0])(x, sigma)
    torch.testing.assert_close(images, flow(x, sigma), rtol=0, atol=1e-10)
    levels = torch.func.vmap(lambda sigma: flow(x, sigma))(sigma)
    torch.testing.assert_close(levels, torch.stack([flow(x, level) for level in sigma]), rtol=0, atol=1e-10)
    _, tangent = torch.func.jvp(flow, (x, sigma), (torch.ones_like(x), torch.ones_like(sigma)))
    h = 1e-6
    numeric = (flow(x + h, sigma[1] + h) - flow(x - h, sigma[1] - h)) / (2 * h)
    torch.testing.assert_close(tangent[1], numeric[1], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_break(training):
    """To 1e-4 / sigma: compilers may fuse."""
    flow, (x, sigma, labels) = jit_flow().train(training), jit_inputs()
    flow.backbone.blocks = flow.backbone.blocks[:2]  # one of each kind: without and with class tokens
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, sigma, labels=labels), flow(x, sigma, labels=labels), rtol=0, atol=1e-3)


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["to", "named"])
def test_a_backbone_in_low_precision_is_recovered_in_float32(dtype, method):
    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    basis = flow.subspace.basis.clone()
    flow = flow.to(dtype) if method == "to" else flow.bfloat16() if dtype == torch.bfloat16 else flow.half()
    assert {w.dtype for w in flow.parameters()} == {dtype}
    assert flow.subspace.basis.dtype == torch.float32
    assert torch.equal(flow.subspace.basis, basis)
    k, tau = calibration(sigma, 0.5)
    prediction = flow.backbone((k[:, None, None] * patchify(x, 4)).to(dtype), tau, labels)
    assert prediction.dtype == dtype
    u = flow(x, sigma, labels=labels)
    assert u.dtype == torch.float32
    assert torch.equal(patchify(u, 4), recover_velocity(prediction.float(), patchify(x, 4), sigma, flow.subspace, 0.04))


def test_the_backbone_gets_tokens_in_its_own_dtype_and_the_noise_level_in_the_precision_of_the_images():
    for weights in (torch.bfloat16, torch.float32, torch.float64):
        for images in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            backbone = Oracle()
            backbone.weight = nn.Parameter(torch.ones(1, dtype=weights))
            flow = AsymFlow(backbone, Subspace.random(12, 3), patch_size=2)
            exact = torch.float64 if images == torch.float64 else torch.float32
            assert flow(torch.ones(1, 3, 4, 4, dtype=images), 0.5).dtype == exact
            assert (backbone.tokens.dtype, backbone.tau.dtype) == (weights, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_for_the_backbone_only(dtype):
    """A backbone without products has the same velocity bit for bit; inside of it autocast is on."""
    x0, eps = torch.randn(2, 2, 3, 4, 6)
    sigma, subspace = torch.tensor([0.01, 0.7]), Subspace.random(12, 3, scale=0.5)
    oracle = Oracle(asymmetric_velocity(patchify(x0, 2), patchify(eps, 2), subspace))
    oracle.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    flow, seen = AsymFlow(oracle, subspace, patch_size=2), []
    expected = flow(on_path(x0, eps, sigma), sigma)
    with torch.autocast("cpu", dtype):
        actual = flow(on_path(x0, eps, sigma), sigma)
    assert torch.equal(actual, expected)
    assert seen == [False, True]
    with torch.autocast("cpu", dtype):
        assert jit_flow()(*jit_inputs()[:2], labels=jit_inputs()[2]).dtype == torch.float32


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_device_without_float64_never_sees_it(precision, monkeypatch):
    """Though the subspace is fitted in float64, and positions and, under TF32, projections are computed in it."""
    backbone, subspace = jit_flow().backbone, fit_pca([torch.randn(99, 48, **DOUBLE)], 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with NoFloat64(monkeypatch):
            flow = AsymFlow(backbone, subspace).to("meta")
            assert all(t.is_meta for t in (*flow.parameters(), *flow.buffers()))
            x, labels = torch.empty(2, 3, 16, 16, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
            for sigma in (torch.ones(2), torch.ones(2, **DOUBLE)):
                u = flow(x, sigma, labels=labels)
                assert (u.is_meta, u.dtype) == (True, torch.float32)
            u.mean().backward()
    finally:
        torch.set_float32_matmul_precision(before)


# ---- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_a_copy_is_a_model_of_its_own_with_the_same_velocity(make):
    flow, (x, sigma, labels) = jit_flow(sigma_min=0.1, noise_scale=2.0), jit_inputs()
    twin = make(flow)
    assert twin.config == flow.config
    expected = flow(x, sigma, labels=labels)
    assert torch.equal(twin(x, sigma, labels=labels), expected)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert torch.equal(flow(x, sigma, labels=labels), expected)


def test_a_state_dict_carries_the_subspace():
    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    other = jit_flow(scale=3.0)
    other.subspace.basis.copy_(Subspace.random(48, 5, seed=1).basis)
    for weight in other.parameters():
        nn.init.zeros_(weight)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x, sigma, labels=labels), flow(x, sigma, labels=labels))


def test_it_can_be_made_without_memory_and_filled_later():
    flow, (x, sigma, labels) = jit_flow(), jit_inputs()
    empty = copy.deepcopy(flow).to("meta").to_empty(device="cpu")
    empty.load_state_dict(flow.state_dict())
    assert torch.equal(empty(x, sigma, labels=labels), flow(x, sigma, labels=labels))


# ---- Mistakes --------------------------------------------------------------------------------------------------------

IMAGE, SPACE = torch.zeros(2, 3, 4, 6), Subspace.random(12, 3)
PATCH_3 = Subspace.random(36, 3, patch_size=3)
wrap = lambda backbone=None, subspace=SPACE, **options: AsymFlow(backbone or Oracle(), subspace, **options)
call = lambda image=IMAGE, sigma=0.5, answer=None: wrap(Oracle(answer), patch_size=2)(image, sigma)
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
    """As torch.compile, DistributedDataParallel and PEFT wrap: a forward that passes on whatever it gets."""

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


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_same(a, b):
    """Configuration, weights, subspace and velocity, to the last bit."""
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert b.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(b.state_dict()[name], tensor)
    x, sigma, labels = jit_inputs()
    inputs = {"labels": labels} if isinstance(a.backbone, JiT) else {}
    assert torch.equal(a(x, sigma, **inputs), b(x, sigma, **inputs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model in it, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    jit_flow().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be changed."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(source, *named, **options):
    with pytest.raises(InputError, match=ONE_LINE) as error:
        AsymFlow.from_pretrained(source, **options)
    assert [word for word in named if word not in str(error.value)] == []


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


def test_a_reader_never_sees_a_folder_without_a_model(folder, monkeypatch):
    """Nor, then, does a power cut leave one."""

    def stream(tensors, path, metadata):
        assert (folder / "config.json").exists()
        return write_tensors(tensors, path, metadata)

    write_tensors = files.stream
    monkeypatch.setattr(files, "stream", stream)
    jit_flow().save_pretrained(folder)


def test_a_model_card_that_somebody_wrote_is_kept(folder):
    (folder / "README.md").write_text("mine")
    jit_flow().save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


# ---- Files that are damaged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, str(folder / name), "does not exist")
    (folder / name).mkdir()
    refused(folder, str(folder / name), "folder")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_weights_that_are_cut_off_are_refused_by_name(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, str(path), "not a whole safetensors file")


def test_missing_unexpected_and_misshaped_weights_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.more"] = tensors.pop("backbone.head.linear.bias")
    tensors["backbone.head.linear.weight"] = tensors["backbone.head.linear.weight"][1:].clone()
    save_file(tensors, path)
    refused(
        folder,
        str(path),
        "missing tensors: backbone.head.linear.bias (48,)",
        "unexpected tensors: backbone.more (48,)",
        "wrong shapes: backbone.head.linear.weight has (47, 64), expected (48, 64)",
    )


def test_a_basis_that_is_damaged_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in [("basis", 2 * tensors["subspace.basis"]), ("scale", -tensors["subspace.scale"])]:
        save_file({**tensors, f"subspace.{name}": value}, path)
        refused(folder, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"format": "asymflow 2"}',
        '{"format": ["asymflow 1"]}',
        "\x00",
        "\ufeff{}",
    ],
)
def test_what_is_no_configuration_is_refused_by_name(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, str(folder / "config.json"))


def test_a_configuration_that_is_no_text_is_refused_by_name(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    refused(folder, str(folder / "config.json"), "not JSON")


def test_a_configuration_that_is_too_deep_is_refused(folder):
    (folder / "config.json").write_text("[" * 200_000)
    refused(folder, str(folder / "config.json"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)
PLACES = [("flow",), ("tokens",), ("network",), ("network", "class"), ("network", "config")]
PLACES += [("flow", name) for name in ("patch_size", "token_order", "sigma_min", "noise_scale")]
PLACES += [("tokens", name) for name in ("dim", "rank", "color_space", "fitted_on")]
PLACES += [("network", "config", name) for name in inspect.signature(JiT).parameters if name != "checkpoint_every"]


@settings(max_examples=50)
@given(st.sampled_from(PLACES), JSON, st.booleans())
def test_a_configuration_with_one_changed_value_is_refused_or_runs(saved, place, value, remove):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
        config = json.loads((saved / "config.json").read_text())
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        if remove:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))
        try:
            flow = AsymFlow.from_pretrained(folder)
        except InputError:
            refused(folder)
        else:
            x, sigma, labels = jit_inputs()
            assert flow(x, sigma, labels=labels).shape == x.shape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_ratio", 1e400),
        ("mlp_ratio", -4.0),
        ("dropout", 5.0),
        pytest.param("width", 2**62),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(folder, name, value):
    change_config(folder, lambda config: config["network"]["config"].update({name: value}))
    refused(folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("flow", "sigma_min", -1), ("flow", "token_order", "hwc"), ("flow", "patch_size", 5)],
)
def test_a_value_that_does_not_fit_is_refused_with_the_name_of_the_file(folder, part, name, value):
    change_config(folder, lambda config: config[part].update({name: value}))
    refused(folder, str(folder))


@pytest.mark.parametrize("key", ["flow", "tokens", "network"])
def test_a_key_that_is_missing_is_named(folder, key):
    change_config(folder, lambda config: config.pop(key))
    refused(folder, key)


def test_an_unknown_option_of_the_backbone_is_named(folder):
    change_config(folder, lambda config: config["network"]["config"].update(wings=2))
    refused(folder, "wings")


@pytest.mark.parametrize("name", ["evil.Evil", "evil", "os.system", "__import__", "Subspace", "torch.nn.Linear"])
def test_a_class_named_in_a_file_is_never_imported(folder, monkeypatch, name):
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it ran').touch()\nclass Evil: ..."
    )
    monkeypatch.syspath_prepend(str(folder))
    change_config(folder, lambda config: config["network"].update({"class": name}))
    refused(folder, name, "backbone=")
    assert "evil" not in sys.modules
    assert not (folder / "it ran").exists()


def test_a_pickle_in_the_place_of_the_weights_is_not_run(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "it ran"),)

    torch.save({"weights": Bomb()}, folder / "model.safetensors")
    refused(folder, "model.safetensors")
    assert not (folder / "it ran").exists()


# ---- The Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nobody/no-such-model", "no-such-model", "no/such/folder", "/no/such/folder", "not a name"]
)
def test_a_model_that_is_nowhere_is_refused_in_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(name, name, "Hub", cache_dir=tmp_path)


def test_so_it_is_where_a_user_said_offline(tmp_path):
    program = "import asymflow\ntry: asymflow.AsymFlow.from_pretrained('nobody/no-such-model')\n"
    program += "except asymflow.InputError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("nobody/no-such-model ")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that is a folder: `hub / "user" / "model"`, and remembers what it was asked for."""
    root, asked = tmp_path / "hub", []
    signature = inspect.signature(huggingface_hub.hf_hub_download)

    def download(*args, **options):
        request = signature.bind(*args, **options).arguments
        asked.append(request)
        return str(root / request["repo_id"] / request["filename"])

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **options):
            for name, data in content(folder_path).items():
                (root / repo_id).mkdir(parents=True, exist_ok=True)
                (root / repo_id / name).write_bytes(data)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("asymflow.model.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", HfApi)
    return SimpleNamespace(root=root, asked=asked)


def test_a_model_goes_to_the_hub_and_comes_back(hub):
    flow = jit_flow()
    flow.push_to_hub("user/model")
    assert set(content(hub.root / "user/model")) == {"config.json", "model.safetensors", "README.md"}
    assert_same(AsymFlow.from_pretrained("user/model", revision="v1"), flow)
    assert {request["filename"] for request in hub.asked} == {"config.json", "model.safetensors"}
    assert {request["revision"] for request in hub.asked} == {"v1"}
    card = (hub.root / "user/model/README.md").read_text()
    assert "library_name: asymflow" in card
    assert "2605.12964" in card


def test_a_model_can_be_saved_and_pushed_in_one_go(hub, tmp_path):
    jit_flow().save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="user/there")
    assert content(hub.root / "user/there") == content(tmp_path / "there")


HUB_CONFIGURATIONS = {
    "of another kind of model": '{"_class_name": "Flux"}',
    "of a model with a patch size": '{"patch_size": 2}',
    "that is not JSON": "{",
    "that is a list": "[]",
}


@pytest.mark.parametrize("name", HUB_CONFIGURATIONS)
def test_a_repository_of_something_else_is_refused_in_one_line(hub, name):
    (hub.root / "user/other").mkdir(parents=True)
    (hub.root / "user/other/config.json").write_text(HUB_CONFIGURATIONS[name])
    refused("user/other", "config.json")


def test_what_the_hub_lacks_is_said(monkeypatch):
    def download(*args, **options):
        message = "404 Client Error. (Request ID: abc)\n\nEntry Not Found for url: https://there/config.json."
        raise HfHubHTTPError(message, response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("asymflow.model.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    refused("user/model", "Entry Not Found", "config.json")


# ---- The record ------------------------------------------------------------------------------------------------------


def test_the_configuration_says_all_but_the_tensors():
    flow = jit_flow(sigma_min=0.1, noise_scale=2.0)
    assert json.loads(json.dumps(flow.config)) == flow.config
    assert flow.config["flow"] == {
        "patch_size": 4,
        "token_order": "channel_last",
        "sigma_min": 0.1,
        "noise_scale": 2.0,
    }
    assert flow.config["tokens"] == {"dim": 48, "rank": 5, "color_space": "sRGB", "fitted_on": "nothing"}
    assert flow.config["network"] == {"class": "JiT", "config": flow.backbone.config}
    assert prod(flow.subspace.basis.shape) == 48 * 5


def test_the_spectrum_of_its_subspace_stays_with_a_model(tmp_path):
    flow = jit_flow()
    flow.subspace.spectrum = torch.linspace(3, 0, 48, dtype=torch.float64)
    flow.save_pretrained(tmp_path)
    loaded = AsymFlow.from_pretrained(tmp_path)
    assert torch.equal(loaded.subspace.spectrum, flow.subspace.spectrum)
    assert loaded.state_dict().keys() == jit_flow().state_dict().keys()  # a model with it goes into one without
    assert_same(loaded, flow)
    assert loaded.to("meta").subspace.spectrum.is_meta


@pytest.mark.parametrize("shape", [(0,), (5,), (99,)])
def test_a_spectrum_of_any_length_comes_back(tmp_path, shape):
    flow = jit_flow()
    flow.subspace.spectrum = torch.rand(shape)
    flow.save_pretrained(tmp_path)
    assert torch.equal(AsymFlow.from_pretrained(tmp_path).subspace.spectrum, flow.subspace.spectrum)


def test_a_spectrum_that_is_no_row_of_numbers_is_refused(tmp_path):
    flow = jit_flow()
    flow.subspace.spectrum = torch.rand(4, 2)
    flow.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"subspace\.spectrum"):
        AsymFlow.from_pretrained(tmp_path)


def test_an_option_that_does_not_exist_is_not_passed_over(tmp_path):
    jit_flow().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dtpye"):
        AsymFlow.from_pretrained(tmp_path, dtpye=torch.bfloat16)


def test_the_noise_scale_is_that_of_the_backbone_unless_given():
    for size, expected in ((256, 1.0), (512, 2.0)):
        backbone = JiT.from_name("tiny/32", image_size=size)
        assert AsymFlow(backbone, Subspace.empty(backbone.dim)).noise_scale == expected
    assert AsymFlow(backbone, Subspace.empty(backbone.dim), noise_scale=1.5).noise_scale == 1.5
