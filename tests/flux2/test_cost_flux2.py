"""What it costs to finetune a FLUX.2: closed formulas for the real sizes, and real tensors of a tiny one."""

import copy
import json
import re
from functools import cache

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asymflow import Subspace, cost
from asymflow.backbones.flux2 import latent_to_pixel
from asymflow.bench.finetuning import TINY
from asymflow.cli import main
from asymflow.cli.info_flux2 import recognized
from asymflow.cli.info_memory import fit, verdicts
from asymflow.training.objectives import klein
from asymflow.training.objectives.cost import needed_flops
from asymflow.training.objectives.klein import KLEIN, empty_transformer, klein_step, noise_batch, parameters

random_perceptual = cache(klein.random_perceptual)  # drawing it on a CPU takes a second
RANK, SIZE, TEXT = 8, (64, 96), 10


def tiny_step(device="cpu", lpips=False, full=False, **options):
    with torch.device(device):
        latent = Flux2Transformer2DModel.from_config(TINY).bfloat16()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # in which CPUs take minutes for convolutions
    perceptual = random_perceptual(device, dtype) if lpips else None
    return klein_step(latent, perceptual=perceptual, lora_rank=None if full else RANK, lpips=lpips, **options)


def count(step, size=SIZE, images=1, text_length=TEXT):
    return cost.count(step, lambda step: step(noise_batch(step, size, images, text_length)))


def total_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- Parameters and operations ---------------------------------------------------------------------------------------
def sizes_of(name):
    """(width, MLP width, text width, double, single blocks) of a base model."""
    c = KLEIN[name]
    width = c["num_attention_heads"] * 128
    return width, 3 * width, c["joint_attention_dim"], c["num_layers"], c["num_single_layers"]


@pytest.mark.parametrize(("name", "billions", "layers"), [("FLUX.2-klein-9B", 9.08, 58), ("FLUX.2-klein-4B", 3.88, 42)])
def test_parameters_of_the_published_sizes(name, billions, layers):
    d, m, text, double, single = sizes_of(name)
    latent = empty_transformer(KLEIN[name])
    block = 2 * (4 * d * d + 3 * d * m + 2 * 128), d * (3 * d + 2 * m) + (d + m) * d + 2 * 128
    modulation = 2 * 6 * d * d + 3 * d * d + 2 * d * d  # of two streams, of the single one, and of the end
    total = double * block[0] + single * block[1] + modulation + (256 + d) * d + text * d
    assert sum(p.numel() for p in latent.parameters()) == total + 2 * 128 * d
    assert round((total + 2 * 128 * d) / 1e9, 2) == billions

    found = parameters(klein_step(latent, lpips=False))
    in_and_out = double * 2 * (d + 2 * m + m + d) + single * (d + m + d) + 256 + d + d + d
    assert found["lora"] == 256 * in_and_out
    assert found["lora_layers"] == layers
    assert found["pixel_model"] == total + 2 * 768 * d
    assert found["trained_in_full"] == 2 * 768 * d + 2 * d * d
    assert found["trained"] == found["lora"] + found["trained_in_full"]
    assert found["reference"] == 2 * 128 * d + 2 * d * d


@pytest.mark.slow
def test_operations_of_a_forward_pass_of_the_9b():
    d, m, text, double, single = sizes_of("FLUX.2-klein-9B")
    n, length = 64 * 64, 512
    both = n + length
    attention = 2 * both**2 * d
    linear = both * double * (4 * d * d + 3 * d * m) + both * single * (d * (3 * d + 2 * m) + (d + m) * d)
    lora = 256 * (both * double * (2 * d + 3 * m) + both * single * (2 * d + m) + 256 + 3 * d)
    ends = n * 2 * 768 * d + length * text * d + (256 + d) * d + (2 * 6 + 3 + 2) * d * d
    subspace = 4 * n * 768 * 128
    step = klein_step(empty_transformer(KLEIN["FLUX.2-klein-9B"]), lpips=False)
    products = linear + lora + ends + (double + single) * attention + subspace
    assert klein.forward_flops(step, (1024, 1024)) == 2 * products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full", "checkpointing", "lpips"),
    [
        (False, True, False),
        (False, False, True),
        (True, True, False),
    ],
)
def test_operations_counted_without_numbers_as_with_them(full, checkpointing, lpips):
    step = tiny_step(full=full, checkpointing=checkpointing, lpips=lpips)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(noise_batch(step, SIZE, 1, TEXT)).backward()
    assert counter.get_total_flops() == count(step).flops


@pytest.mark.slow
@pytest.mark.parametrize(("full", "checkpointing"), [(False, True), (False, False), (True, True)])
def test_few_blocks_cost_what_all_cost(full, checkpointing):
    config = KLEIN["FLUX.2-klein-4B"] | dict(num_layers=6, num_single_layers=7, num_attention_heads=2, in_channels=16)
    step = klein_step(empty_transformer(config), lora_rank=None if full else RANK, checkpointing=checkpointing)
    batch = lambda: noise_batch(step, (64, 64), 2, 8)
    assert klein.count(step, batch) == cost.count(step, lambda step: step(batch()))


@pytest.mark.slow
def test_what_is_recomputed_is_not_needed():
    recomputed, kept = (tiny_step("meta", checkpointing=checkpointing) for checkpointing in (True, False))
    needed = needed_flops(recomputed, noise_batch(recomputed, SIZE, 2, TEXT))
    assert needed == count(kept).flops < count(recomputed).flops


def test_frozen_layers_spare_a_third_of_their_work():
    """Forward, and backward to what goes in: the third product, for the gradient of the weights, is not made. What is
    behind a frozen layer is not trained either, and needs nothing: here the text, at the beginning."""
    lora, full = (tiny_step("meta", full=full, checkpointing=False) for full in (False, True))
    spared = count(full).flops - count(lora).flops
    d, m, n, length = 64, 192, 24, TEXT
    blocks = (n + length) * (4 * d * d + 3 * d * m) + 2 * (n + length) * (d * (3 * d + 2 * m) + (d + m) * d)
    text = length * TINY["joint_attention_dim"] * d
    modulation = 15 * d * d
    time = 256 * d + d * d
    in_and_out = (n + length) * (2 * d + 3 * m) + 2 * (n + length) * (2 * d + m) + 256 + 3 * d
    # Without LoRA its three products are missing; of those of its first layer one has no gradient to give.
    adapters = 3 * RANK * in_and_out - RANK * 256
    assert spared == 2 * (blocks + text + modulation + time - adapters)


# ---- Memory of a real finetuning -------------------------------------------------------------------------------------
def test_bytes_of_a_finetuning_made_by_hand():
    """bfloat16 weights, float32 originals, and torch's AdamW, after a step."""
    latent = Flux2Transformer2DModel.from_config(TINY).bfloat16()
    for_reference = [copy.deepcopy(getattr(latent, name)) for name in ("x_embedder", "proj_out", "norm_out")]
    flow = latent_to_pixel(latent, Subspace.random(768, 16)).requires_grad_(False)
    transformer = flow.backbone.transformer
    layers = r"transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)|single_transformer_blocks\.\d+\.attn\.to_out"
    targets = rf"({layers}|time_guidance_embed\.timestep_embedder\.linear_[12])"
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for name in ("x_embedder", "proj_out", "norm_out"):
        getattr(transformer, name).requires_grad_(True)
    for p in transformer.parameters():
        p.data = p.data.bfloat16()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    text = torch.randn(1, TEXT, 96, dtype=torch.bfloat16)
    flow.train()(torch.randn(1, 3, *SIZE), 0.5, encoder_hidden_states=text).square().mean().backward()
    originals = [p.detach().float().requires_grad_() for p in trained]
    for original, p in zip(originals, trained, strict=True):
        original.grad = p.grad.float()
    adam = torch.optim.AdamW(originals)
    adam.step()
    moments = [s[name] for s in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]

    counted = tiny_step("meta").memory(gpus=1, stage=0)
    assert counted == {
        "weights": total_bytes(frozen) + total_bytes(p for module in for_reference for p in module.parameters()),
        "trained": total_bytes(trained),
        "gradients": total_bytes(p.grad for p in [*trained, *originals]),
        "buckets": 0,
        "optimizer": total_bytes(originals) + total_bytes(moments),
        "ema": total_bytes(originals),
        "gathered": 0,
        "host": 0,
    }


def with_gradients(step):
    for p in step.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return step


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    ("full", "checkpointing", "lpips"),
    [
        (True, True, False),
        pytest.param(False, True, True, marks=pytest.mark.slow),
        pytest.param(False, False, False, marks=pytest.mark.slow),
    ],
)
def test_activations_counted_without_numbers_as_with_them(full, checkpointing, lpips):
    step = with_gradients(tiny_step(full=full, checkpointing=checkpointing, lpips=lpips))
    expected = count(step, images=2)
    gradients = [p.grad for p in step.parameters() if p.requires_grad]
    with cost.Counter([*step.parameters(), *step.buffers(), *gradients]) as counter:
        loss = step(noise_batch(step, SIZE, 2, TEXT))
        kept = counter.alive
        loss.backward()
    assert cost.Cost(counter.flops, kept, counter.peak) == expected


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_the_allocator(checkpointing):
    step = with_gradients(tiny_step(checkpointing=checkpointing))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(noise_batch(step, (256, 256), 4, TEXT)).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert count(step, (256, 256), 4).peak == pytest.approx(peak, rel=0.03)  # kernels have workspaces


@pytest.mark.slow
def test_of_a_checkpointed_block_only_what_goes_in_is_kept():
    """Of a single block more: the tokens of image and text, in bfloat16. Of a double one as many, in two parts."""

    def kept(**depth):
        latent = empty_transformer({**TINY, **depth})
        return count(klein_step(latent, lora_rank=RANK, lpips=False), images=3).kept

    tokens = 3 * (4 * 6 + TEXT) * 64 * 2
    assert kept(num_single_layers=3) - kept(num_single_layers=2) == tokens
    assert kept(num_layers=2) - kept(num_layers=1) == tokens


# ---- Many GPUs -------------------------------------------------------------------------------------------------------
def test_networks_beside_the_model_are_whole_on_every_gpu():
    with_lpips, without = (tiny_step("meta", lpips=lpips) for lpips in (True, False))
    for stage in range(4):
        one, other = (step.memory(gpus=8, stage=stage) for step in (with_lpips, without))
        assert one == other | {"weights": other["weights"] + total_bytes(with_lpips.beside.parameters())}


# ---- The command line ------------------------------------------------------------------------------------------------
def info(capsys, *argv):
    assert main(["info", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_one_step_of_the_9b_fits_a_card_of_80_gb():
    step = klein_step(empty_transformer(KLEIN["FLUX.2-klein-9B"]))
    assert sum(step.memory().values()) + count(step, (1024, 1024), 1, 512).peak < 80e9 - 30 * 2**30


@pytest.fixture
def base(tmp_path):
    Flux2Transformer2DModel.from_config(TINY).save_pretrained(tmp_path / "transformer")
    return tmp_path


@pytest.mark.slow
def test_the_folder_of_a_model_or_of_its_transformer(capsys, base):
    options = ("--image-size", "64x96", "--batch", 2, "--text-length", TEXT, "--lora-rank", RANK)
    found = info(capsys, base / "transformer", *options)
    assert recognized(str(base))
    assert not recognized(str(base / "elsewhere"))
    step = tiny_step("meta", lpips=True)
    expected, peak = count(step, images=2), count(step, images=2).peak
    assert found["training_memory"]["activations"]["recomputed"] == {"kept": expected.kept, "peak": peak}
    assert found["flops"]["training_step"] == count(step).flops
    assert found["flops"]["sampling"]["guided"] == 76 * found["flops"]["forward"]
    assert found["parameters"]["base"] == sum(p.numel() for p in empty_transformer(TINY).parameters())
    states = found["training_memory"]["on_each_gpu"]
    spare = 80 * 10**9 - states[0]["total"]
    assert found["training_memory"]["fits_80_gb"][0] == {"gpus": 1, "stage": 1, "fits": True, "to_spare": spare}
    for state in states:
        assert state["total"] == sum(n for kind, n in state.items() if kind not in ("gpus", "stage", "total", "host"))
        assert state["activations"] == peak
        expected = step.memory(state["gpus"], state["stage"])
        assert {kind: state[kind] for kind in expected} == expected


@pytest.mark.slow
def test_text_for_people(capsys, base):
    assert main(["info", str(base), "--image-size", "64", "--full", "--offload", "optimizer"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    table = [line.split() for line in text.split("recomputed\n")[1].split("\n\n")[0].splitlines()]
    assert [row[:2] for row in table[1:]] == [[gpus, stage] for gpus in ("1", "8", "64") for stage in "123"]
    assert re.search(r"A step fits 1 GPU of 80 GB \(74.5 GiB\) at ZeRO 1, with 7\d\.\d GiB to spare", text)


def test_the_verdict_names_the_first_stage_and_number_of_gpus_that_will_do():
    totals = {1: [200, 190, 180, 170], 8: [200, 90, 70, 60], 64: [200, 60, 50, 40]}
    states = [{"gpus": n, "stage": s, "total": totals[n][s] * 10**9} for n in totals for s in range(4)]
    no, yes, more = (fit(states, n) for n in totals)
    assert no == {"gpus": 1, "stage": 3, "fits": False, "to_spare": -90 * 10**9}
    assert yes == {"gpus": 8, "stage": 2, "fits": True, "to_spare": 10 * 10**9}
    lines = verdicts([no, yes, more])
    assert len(lines) == 2
    assert "ZeRO 3 takes 83.8 GiB too much" in lines[0]
    assert "8 GPUs of 80 GB (74.5 GiB) at ZeRO 2, with 9.3 GiB to spare" in lines[1]


def test_mistakes_are_answered_in_one_line(capsys, base):
    guided = base / "guided"
    Flux2Transformer2DModel.from_config({**TINY, "guidance_embeds": True}).save_pretrained(guided)
    for argv, message in [
        (["FLUX.2-klein-7B"], "FLUX.2-klein-9B, FLUX.2-klein-4B"),
        ([base, "--precision", "float32"], "--precision does not go with a FLUX.2 klein"),
        ([base, "--rank", "3"], "--rank does not go with a FLUX.2 klein"),
        ([base, "--classes"], "--classes does not go with a FLUX.2 klein"),
        ([base, "--backbone", "a:B"], "--backbone does not go with a FLUX.2 klein"),
        ([base, "--full", "--lora-rank", "3"], "--lora-rank"),
        ([base, "--image-size", "100"], "multiples of 16"),
        ([guided], "distilled"),
        (["JiT-tiny/16", "--full"], "--full does not go with a model that could be trained"),
        (["JiT-tiny/16", "--offload", "weights"], "--offload does not go with a model"),
    ]:
        assert main(["info", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
