"""asymflow/model.py: the wrapper around any backbone."""

import copy
import pickle

import pytest
import torch
from devices import NoFloat64
from hypothesis import given
from hypothesis import strategies as st
from model_backbones import Oracle, jit_flow, jit_inputs, small_flow
from torch import nn
from torch.utils.checkpoint import checkpoint

from asymflow import AsymFlow, Subspace, asymmetric_velocity, calibration, patchify, recover_velocity
from asymflow.fitting import fit_pca
from asymflow.patches import TOKEN_ORDERS, token_grid

SEEDS, ORDERS, SCALES = st.integers(0, 2**32 - 1), st.sampled_from(TOKEN_ORDERS), st.floats(0.05, 20)
DOUBLE = {"dtype": torch.float64}


class GridOracle(Oracle):
    def forward(self, tokens, tau, grid, **conditions):
        self.grid = grid
        return super().forward(tokens, tau, **conditions)


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
