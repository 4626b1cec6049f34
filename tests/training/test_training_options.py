"""What a training may be set to, in real processes: the curve stays, and so do the bits after an interruption."""

import csv
import importlib.util
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import TINY, Launched, metrics, same_bits, slow_unless, tensors, train, words

from asymflow import cost
from asymflow.averages import Profile
from asymflow.fitting import auto_rank
from asymflow.subspace import Subspace
from asymflow.training import loop
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.loader import Batches
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.objectives.cost import class_conditional_step, images
from asymflow.training.run.folder import SUBSPACE
from asymflow.training.start import fit_subspace, make_flow

STEPS, BETWEEN = 3, 1
BF16 = ("deepspeed.bf16.enabled=true", "train.precision=bf16")
DROPOUT = ("model.dropout=0.2", "model.options.depth=4")


def stage(number, **offload):
    zero = f"deepspeed.zero_optimization.stage={number}"
    return [zero, *(f"deepspeed.zero_optimization.offload_{what}.device={device}" for what, device in offload.items())]


# In float32: all have the curve of the first.
SINGLE = {
    "plain": stage(1),
    "offload1": stage(1, optimizer="cpu"),
    "offload2-fourtimes": [*stage(2, optimizer="cpu"), "train.micro_batch_size=1"],
    "offload3": [*stage(3, optimizer="cpu"), "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"],
    "offload3-all": stage(3, optimizer="cpu", param="cpu"),
    "twice": [*stage(2), "train.micro_batch_size=2"],
}
# With weights in bfloat16 and float32 originals.
HALF = {
    **{f"half{number}": [*stage(number), *BF16] for number in range(4)},
    "half3-offload": [*stage(3, optimizer="cpu", param="cpu"), *BF16],
    "half1-sums": [*stage(1), *BF16, "deepspeed.data_types.grad_accum_dtype=fp32", "train.micro_batch_size=1"],
}
AUTOCAST = {f"autocast{number}": [*stage(number), "train.precision=bf16"] for number in range(4)}
RESUMED = ("offload1", "offload2-fourtimes", "offload3-all", *HALF)
QUICK = ("plain", "offload3-all", "half2", "autocast1", "autocast3")
RECOMPUTED = {  # with dropout, whose draws have to be the same again
    name: [*stage(3), *DROPOUT, f"model.checkpoint_every={every}"] for name, every in (("kept", 0), ("recomputed", 1))
}
CASES = SINGLE | HALF | AUTOCAST | RECOMPUTED


def arguments(out, *settings, resume="auto"):
    common = f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep_last=9"
    return [*words(out, *common, *settings), "--resume", str(resume)]


def middle(run):
    return run / "checkpoints" / f"{BETWEEN:08d}"


@pytest.fixture(scope="module")
def train_all(folder):
    """On two ranks; those in RESUMED once more from the checkpoint in the middle, as NAME-resumed."""

    def run(names):
        todo = [arguments(folder / name, *CASES[name]) for name in names]
        resumed = [name for name in names if name in RESUMED]
        todo += [arguments(folder / f"{name}-resumed", *CASES[name], resume=middle(folder / name)) for name in resumed]
        train(2, *todo)

    return run


def compare(run, expected, first=0, **tolerance):
    found = metrics(run)
    assert len(found) == STEPS - first
    for m, e in zip(found, metrics(expected)[first:], strict=True):
        assert (m["step"], m["lr"]) == (e["step"], e["lr"])
        for name in ("loss", "grad_norm"):
            assert m[name] == pytest.approx(e[name], **tolerance), (m["step"], name)


# ---- Curves ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", slow_unless(QUICK, [*SINGLE][1:]))
def test_offloading_and_accumulation_change_rounding_alone(runs, name):
    compare(runs / name, runs / "plain", rel=1e-4)
    expected, found = tensors(runs / "plain", STEPS), tensors(runs / name, STEPS)
    for key, value in expected.items():
        if not key[0].startswith("exp"):
            assert torch.allclose(value, found[key], rtol=0, atol=2e-4), key


@pytest.mark.parametrize("name", slow_unless(QUICK, [*HALF, *AUTOCAST]))
def test_bfloat16_stays_close_to_float32(runs, name):
    """Its numbers have 8 bits: each is off by up to 0.4 %, and a mean over many by less."""
    compare(runs / name, runs / "plain", rel=5e-3)


@pytest.mark.parametrize("name", slow_unless(QUICK, AUTOCAST))
def test_autocast_keeps_weights_in_float32(runs, name):
    compare(runs / name, runs / "autocast1", rel=1e-3)
    assert metrics(runs / name) != metrics(runs / "plain")  # it does something


def as_on_a_gpu():
    """DeepSpeed asks whether autocast is on, for CUDA, and if so switches it off; here the answer is for the CPU."""
    real = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: real(*device) if device else real("cpu")


def test_autocast_is_not_switched_off_by_deepspeed_on_a_gpu(tmp_path):
    settings = ["train.steps=2", "checkpoint.every=2", "train.precision=bf16"]
    for name, patch in (("here", None), ("gpu", as_on_a_gpu)):
        launched = Launched(1, tmp_path / name, *settings, patch=patch)
        assert launched.wait() == [0], launched.said()
    assert metrics(tmp_path / "gpu") == metrics(tmp_path / "here")


def test_it_does_what_a_plain_loop_of_torch_does(tmp_path):
    """To rounding, held against how far the weights have moved. Gradients are not far above eps, so clipping counts."""
    adam = "optimizer={lr: 0.001, warmup_steps: 2, betas: [0.5, 0.6], eps: 0.001, weight_decay: 10}"
    told = adam, "deepspeed.gradient_clipping=0.1", "loss.label_dropout=0.5", f"train.steps={STEPS}"
    launched = Launched(2, tmp_path / "run", *stage(1), *told)
    assert launched.wait() == [0, 0], launched.said()
    config = load_config(tmp_path / "run" / "config.yaml")
    torch.manual_seed(config.train.seed)
    flow = make_flow(config, Subspace.load(tmp_path / "run" / SUBSPACE)).train()
    begun = torch.nn.utils.parameters_to_vector(flow.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(flow.parameters(), betas=(0.5, 0.6), eps=1e-3, weight_decay=10)
    batches = Batches(make_dataset(config), config, 0, 1)
    for step, lr in enumerate((0.0005, 0.001, 0.001)):
        batch = batches[step]
        sigma = torch.sigmoid(config.loss.sigma_mean + config.loss.sigma_std * batch.normal)
        mix = sigma.view(-1, 1, 1, 1)
        velocity = flow((1 - mix) * batch.x0 + mix * batch.eps, sigma, labels=batch.labels)
        error = (velocity - (batch.eps - batch.x0)) * mix / mix.clamp(min=config.loss.sigma_floor)
        optimizer.zero_grad()
        error.square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), 0.1).item()
        assert norm > 0.1
        assert metrics(tmp_path / "run")[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    weights = tensors(tmp_path / "run", STEPS)
    found = torch.cat([weights["weights", name].flatten() for name, _ in flow.named_parameters()])
    ours = torch.nn.utils.parameters_to_vector(flow.parameters()).detach()
    assert (found - ours).norm() < 1e-3 * (ours - begun).norm()


@pytest.mark.slow
def test_recomputing_activations_changes_no_bit(runs):
    assert metrics(runs / "kept") == metrics(runs / "recomputed")
    assert same_bits(tensors(runs / "kept", STEPS), tensors(runs / "recomputed", STEPS))


# ---- Going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", slow_unless(QUICK, RESUMED))
def test_a_resumed_training_has_the_same_bits(runs, name):
    resumed = runs / f"{name}-resumed"
    assert metrics(runs / name)[BETWEEN:] == metrics(resumed)
    assert same_bits(tensors(runs / name, STEPS), tensors(resumed, STEPS))


@pytest.mark.parametrize(("of", "then"), [("half2", "half0"), pytest.param("half3", "half2", marks=pytest.mark.slow)])
def test_weights_in_bfloat16_go_on_in_another_stage(runs, tmp_path, of, then):
    train(2, arguments(tmp_path / "run", *HALF[then], resume=middle(runs / of)))
    compare(tmp_path / "run", runs / of, first=BETWEEN, rel=5e-3)


# ---- Averages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", slow_unless(QUICK, ["plain", "offload3-all", *HALF]))
def test_averages_are_of_the_float32_weights(runs, name):
    """Tracked again from the weights of every step, which bfloat16 would have rounded."""
    average = {}
    for step in range(1, STEPS + 1):
        found = tensors(runs / name, step)
        for key, weight in ((key, value) for (kind, key), value in found.items() if kind == "weights"):
            average[key] = torch.lerp(average.get(key, weight), weight, Profile(decay=0.9).share_at(step))
            assert torch.allclose(found["ema-0.9", key], average[key], rtol=1e-6, atol=1e-7), (step, key)
    weights = torch.cat([found["weights", key].flatten() for key in average])
    assert (weights != weights.bfloat16().float()).float().mean() > 0.5


# ---- Compiled --------------------------------------------------------------------------------------------------------
def without_the_compiler():
    compile_ = torch.compile
    torch.compile = lambda function, dynamic, options: compile_(function, dynamic=dynamic, backend="aot_eager")


@pytest.mark.slow
def test_compiled_blocks_under_every_kind_of_hook(runs, tmp_path):
    """All of torch.compile but for the compiler: graphs of forward and backward, whose kernels are those of torch."""
    settings = {"two": stage(2), "three": stage(3), "saving": [*stage(3), "model.checkpoint_every=2"]}
    compiled = ["train.compile=true", f"sample.every={STEPS}", "sample.num=6", "sample.steps=2"]
    todo = [arguments(tmp_path / name, *compiled, *words) for name, words in settings.items()]
    resumed = arguments(tmp_path / "resumed", *compiled, *settings["three"], resume=middle(tmp_path / "three"))
    eager = arguments(tmp_path / "eager", *stage(1), resume=middle(tmp_path / "two"))
    train(2, *todo, resumed, eager, patch=without_the_compiler)
    expected = tensors(runs / "plain", STEPS)
    for name in settings:
        compare(tmp_path / name, runs / "plain", rel=1e-4)
        found = tensors(tmp_path / name, STEPS)
        assert found.keys() == expected.keys()
        assert (tmp_path / name / "samples" / f"{STEPS:08d}.png").is_file()
        for key, value in expected.items():
            if not key[0].startswith("exp"):
                assert torch.allclose(value, found[key], rtol=0, atol=2e-4), (name, key)
    compare(tmp_path / "eager", runs / "plain", first=BETWEEN, rel=1e-4)  # where weights are padded, and where not
    assert metrics(tmp_path / "three")[BETWEEN:] == metrics(tmp_path / "resumed")
    assert same_bits(tensors(tmp_path / "three", STEPS), tensors(tmp_path / "resumed", STEPS))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_by_the_compiler(runs, tmp_path):
    small = ["model.options.depth=1", "model.options.in_context_start=0"]
    todo = [arguments(tmp_path / f"compiled-{c}", *stage(1), *small, f"train.compile={c}") for c in ("true", "false")]
    train(1, *todo)
    compare(tmp_path / "compiled-true", tmp_path / "compiled-false", rel=1e-4)


# ---- What is told of it ----------------------------------------------------------------------------------------------
def test_monitors_write_below_the_run_once_a_step(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    monitors = "deepspeed.tensorboard.enabled=true", "deepspeed.csv_monitor.enabled=true"
    drawn = "sample.every=2", "sample.num=2", "sample.steps=1"
    train(2, *(arguments(run, *stage(1), *monitors, *drawn, f"train.steps={steps}") for steps in (BETWEEN, STEPS)))
    steps = [m["step"] for m in metrics(run)]
    for name in ("loss", "lr", "grad_norm"):
        heading, *rows = csv.reader((run / "csv_monitor" / f"train_{name}.csv").open())
        assert heading == ["step", name]
        assert [(int(step), float(value)) for step, value in rows] == [(m["step"], m[name]) for m in metrics(run)]
    events = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    names = ("grad_norm", "images_per_second", "loss", "lr", "waiting")
    assert sorted(events.Tags()["scalars"]) == [f"train/{name}" for name in names]
    assert [event.step for event in events.Scalars("train/loss")] == steps
    grids = {int(path.stem): np.asarray(Image.open(path)) for path in (run / "samples").glob("*.png")}
    shown = {event.step: event.encoded_image_string for event in events.Images("samples")}
    assert shown.keys() == grids.keys() != set()
    for step, grid in grids.items():
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown[step]))), grid)
    assert len(list((run / "tensorboard").iterdir())) == 2  # of rank 0, for each start
    assert not (tmp_path / "DeepSpeedJobName").exists()


def without_wandb():
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else find(name, *rest)


def test_a_monitor_whose_package_is_not_installed_is_one_line(tmp_path):
    launched = Launched(2, tmp_path / "run", *stage(1), "deepspeed.wandb.enabled=true", patch=without_wandb)
    assert launched.wait() == [2, 2]
    expected = "train_ddp.py: error: deepspeed.wandb.enabled is true, but wandb is not installed: pip install wandb"
    assert launched.said() == [expected]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert cost.peak_flops(torch.device("cuda", 0)) == (tera and tera * 1e12)


def test_there_is_no_peak_of_a_cpu():
    assert cost.peak_flops(torch.device("cpu")) is None


def with_a_peak():
    loop.peak_flops = lambda device: 1e9


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])
def test_mfu_is_what_the_model_needs_of_all_peaks(tmp_path, every):
    """Forward and backward once, whatever is recomputed: 2 operations a multiply-add, and twice that backward."""
    settings = *stage(1), "train.steps=2", f"model.checkpoint_every={every}"
    launched = Launched(2, tmp_path / "run", *settings, patch=with_a_peak)
    assert launched.wait() == [0, 0], launched.said()
    config = load_config("shapes_tiny", TINY)
    flow = make_flow(config, Subspace.load(tmp_path / "run" / SUBSPACE))
    step = class_conditional_step(flow)
    cost.recompute(step, blocks=False)
    needed = cost.count(step, lambda step: step(images(1, (3, 16, 16)))).flops
    forward = cost.forward_flops(flow, (3, 16, 16))
    assert 2 * forward < needed <= 3 * forward
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for m in lines:
        assert m["mfu"] == pytest.approx(needed * m["images_per_second"] / 2e9)


def test_the_mfu_is_of_what_is_needed_and_not_shown_of_what_cannot_be_counted(capsys):
    """One of the user's own may look at values, of which there are none here."""

    class Own(ClassConditional):
        def losses(self, model, batch):
            return super().losses(model, batch) * float(batch.eps.mean() > 0)

    config = load_config("shapes_tiny", [*TINY, "model.checkpoint_every=1"])
    flow = make_flow(config, Subspace.random(192, 8)).train()
    step = class_conditional_step(flow)
    cost.recompute(step, blocks=False)
    needed = cost.count(step, lambda step: step(images(1, (3, 16, 16)))).flops
    for kind in (ClassConditional, Own):
        objective = kind(config, flow)
        objective.batches = lambda *_: [images(2, (3, 16, 16))]
        training = SimpleNamespace(config=config, objective=objective, dataset=None, rank=0, world=1)
        assert loop.Training.counted_flops(training, flow) == (needed if kind is ClassConditional else None)
    assert capsys.readouterr().err.startswith(
        "the MFU is not shown, because the operations of a step cannot be counted"
    )


def test_the_automatic_rank_is_that_of_the_noise_levels_of_the_loss(monkeypatch):
    """Where the levels are low, images are hidden by little noise, and more of their directions pay off."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    fits = []
    for mean in (0.8, -2.0):
        given = [f"loss.sigma_mean={mean}", "subspace.rank=auto", "subspace.images=50", "data.size=50"]
        config = load_config("shapes_tiny", given)
        fits.append(fit_subspace(config, make_dataset(config), torch.device("cpu")))
    sigma = torch.sigmoid(-2 + 0.8 * torch.randn(10**5, generator=torch.Generator().manual_seed(0)))
    assert fits[0].rank == auto_rank(fits[0].spectrum)
    assert fits[1].rank == auto_rank(fits[1].spectrum, sigma=sigma) > fits[0].rank
