"""Configurations: the section deepspeed, and going on with a run."""

import sys

import pytest
import torch
from config_words import complaint, load
from hypothesis import given
from hypothesis import strategies as st

from asymflow.errors import InputError
from asymflow.training.config.derived import batch_sizes, bf16_weights, sampling_precision
from asymflow.training.config.differences import MAY_CHANGE, differences
from asymflow.training.config.reading import Config
from asymflow.training.config.sections import known_keys
from asymflow.training.zero.settings import deepspeed_config


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["deepspeed.optimizer.type=Adam"], "deepspeed.optimizer is not used: AdamW has a section of its own"),
        (["deepspeed.scheduler.type=x"], "deepspeed.scheduler is not used"),
        (["deepspeed.fp16.enabled=true"], "deepspeed.fp16.enabled cannot be true: float16 is not supported"),
        (["deepspeed.torch_autocast.enabled=true"], "deepspeed.torch_autocast.enabled cannot be true"),
        (["deepspeed.bfloat16.enabled=true"], "deepspeed.bfloat16 is an old name of bf16"),
        (["deepspeed.bf16.enabled=true"], "deepspeed.bf16.enabled is true, which contradicts train.precision: fp32"),
        (["deepspeed.bf16.enabled=auto"], "deepspeed.bf16 must be a section with the key enabled: true or false"),
        (["deepspeed.bf16=true"], "deepspeed.bf16 must be a section"),
        (
            ["deepspeed.bf16.enabled=true", "train.precision=bf16", "sample.precision=float32"],
            "sample.precision cannot be float32 where deepspeed.bf16 keeps the weights in bf16",
        ),
        (
            [
                "train.precision=bf16",
                "deepspeed.bf16.enabled=true",
                "deepspeed.bf16.bf16_master_weights_and_grads=true",
            ],
            "deepspeed.bf16.bf16_master_weights_and_grads is refused",
        ),
        (["deepspeed.train_batch_size=65"], "deepspeed.train_batch_size is 65, but by the section train it is 64"),
        (
            ["train.global_batch_size=1", "deepspeed.train_batch_size=true"],
            "train_batch_size is true, but by the section",
        ),
        (["deepspeed.train_batch_size=auto"], "deepspeed.train_batch_size is 'auto'"),
        (
            ["train.micro_batch_size=8", "deepspeed.train_micro_batch_size_per_gpu=4"],
            "deepspeed.train_micro_batch_size_per_gpu is 4, but by the section train it is 8",
        ),
        (["deepspeed.gradient_clipping=-1"], "deepspeed.gradient_clipping must be a number, at least 0, but it is -1"),
        (["deepspeed.gradient_clipping=true"], "deepspeed.gradient_clipping must be a number"),
        (
            ["deepspeed.zero_optimization.stage=4"],
            "deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, but it is 4",
        ),
        (["deepspeed.zero_optimization.stage=true"], "stage must be 0, 1, 2 or 3, but it is true"),
        (["deepspeed.zero_optimization.stage=2.0"], "stage must be 0, 1, 2 or 3, but it is 2.0"),
        (["deepspeed.zero_optimization.offload_optimizer.device=nvme"], "offload_optimizer.device cannot be nvme"),
        (["deepspeed.zero_optimization.offload_optimizer.device=disk"], "with the key device: cpu or none"),
        (["deepspeed.zero_optimization.offload_optimizer=cpu"], "with the key device: cpu or none"),
        (
            [
                "deepspeed.zero_optimization.stage=0",
                "deepspeed.zero_optimization.offload_optimizer.device=cpu",
            ],
            "offload_optimizer needs stage 1 or above, but the stage is 0",
        ),
        (["deepspeed.zero_optimization.offload_param.device=cpu"], "offload_param needs stage 3 or above"),
        (["deepspeed.zero_optimization.offload_param.device=nvme"], "offload_param.device cannot be nvme"),
        (
            ["deepspeed.zero_optimization.offload_optimizer={device: cpu, super_offload: true}"],
            "super_offload is refused",
        ),
        (
            [
                "deepspeed.zero_optimization.stage=3",
                "deepspeed.zero_optimization.offload_optimizer={device: cpu, ratio: 0.5}",
            ],
            "ratio must be 1",
        ),
        (["deepspeed.zero_optimization.zenflow.topk_ratio=0.1"], "zenflow is refused"),
        (["deepspeed.zero_optimization.compute_grad_norm=false"], "compute_grad_norm cannot be false"),
        (
            ["deepspeed.activation_checkpointing={}"],
            "activation_checkpointing has no effect on this model: use model.c",
        ),
    ],
)
def test_contradictions_with_deepspeed_are_refused_by_name(overrides, expected):
    assert expected in complaint("shapes_tiny", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        *[[f"deepspeed.zero_optimization.stage={stage}"] for stage in range(4)],
        ["deepspeed.zero_optimization.offload_optimizer.device=cpu"],
        ["deepspeed.zero_optimization.offload_optimizer.device=none", "deepspeed.zero_optimization.stage=0"],
        ["deepspeed.zero_optimization.offload_param.device=cpu", "deepspeed.zero_optimization.stage=3"],
        ["deepspeed.gradient_clipping=0.5"],
        ["deepspeed.fp16.enabled=false", "deepspeed.bf16=null"],
        ["deepspeed.bf16.enabled=true", "train.precision=bf16"],
        ["deepspeed.train_batch_size=64", "deepspeed.gradient_accumulation_steps=2", "train.micro_batch_size=16"],
        ["deepspeed.csv_monitor={enabled: true, output_path: runs}", "deepspeed.flops_profiler.enabled=false"],
        ["deepspeed.prescale_gradients=true", "deepspeed.steps_per_print=7"],
    ],
)
def test_what_deepspeed_gets_is_what_was_given_and_batch_sizes(overrides):
    from deepspeed.runtime.config import DeepSpeedConfig

    c = load("shapes_tiny", *overrides)
    before = c.model_dump()
    options = deepspeed_config(c, 2)
    assert c.deepspeed.items() <= options.items()
    micro, accumulation = batch_sizes(c, 2)
    assert options["train_batch_size"] == c.train.global_batch_size == 2 * micro * accumulation
    assert options["train_micro_batch_size_per_gpu"] == micro
    assert options["gradient_accumulation_steps"] == accumulation
    assert "optimizer" not in options
    assert (options["steps_per_print"] > 1e9) == ("steps_per_print" not in c.deepspeed)
    assert not options["zero_force_ds_cpu_optimizer"]
    assert bf16_weights(c) == ("deepspeed.bf16.enabled=true" in overrides)
    assert sampling_precision(c, torch.device("cpu")) == ("bf16" if bf16_weights(c) else "float32")
    options["zero_optimization"]["stage"] = 99  # the caller's own
    assert c.model_dump() == before
    ours = DeepSpeedConfig(deepspeed_config(c, 1) if micro * accumulation == 64 else alone(c))
    assert ours.zero_optimization_stage == c.deepspeed["zero_optimization"]["stage"]
    assert ours.gradient_clipping == c.deepspeed.get("gradient_clipping", 0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["zero_optimization.stag3_prefetch=1"],
            "unknown key deepspeed.zero_optimization.stag3_prefetch: did you mean "
            "deepspeed.zero_optimization.stage3_prefetch_bucket_size?",
        ),
        (
            ["zero_optimization.offload_optimizer={device: cpu, pin_memroy: true}"],
            "did you mean deepspeed.zero_optimization.offload_optimizer.pin_memory?",
        ),
        (["gradient_cliping=1"], "unknown key deepspeed.gradient_cliping: did you mean deepspeed.gradient_clipping?"),
        (["zero_optimisation.stage=2"], "did you mean deepspeed.zero_optimization?"),
        (["tensorbord.enabled=true"], "did you mean deepspeed.tensorboard?"),
        (["prescale_gradient=true"], "did you mean deepspeed.prescale_gradients?"),
        (["foo=1"], "unknown key deepspeed.foo: DeepSpeed has none of that name"),
        (["zero_optimization.qqqq=1"], "unknown key deepspeed.zero_optimization.qqqq: DeepSpeed has none"),
        (["zero_optimization.reduce_bucket_size=big"], "deepspeed.zero_optimization.reduce_bucket_size is refused"),
        (
            ["zero_optimization.reduce_bucket_size=big"],
            "valid integer, unable to parse string as an integer, but it is",
        ),
        (["zero_optimization.leaf_module=3"], "deepspeed.zero_optimization is refused by DeepSpeed: leaf_module"),
        (["tensorboard.enabledd=true"], "deepspeed.tensorboard.enabledd: did you mean deepspeed.tensorboard.enabled?"),
        (["csv_monitor=3"], "deepspeed.csv_monitor is refused by DeepSpeed"),
        (["wandb.projet=x"], "did you mean deepspeed.wandb.project?"),
        (["bf16={enabled: false, immediate: true}"], "did you mean deepspeed.bf16.immediate_grad_update?"),
        (["torch_autocast={enabled: false, dtype: float7}"], "deepspeed.torch_autocast is refused by DeepSpeed"),
        (["flops_profiler=3"], "deepspeed.flops_profiler is refused by DeepSpeed: 'int' object has no"),
        (
            ["zero_optimization.stage=3", "gradient_allreduce_op=sum"],
            "deepspeed.gradient_allreduce_op is refused by DeepSpeed",
        ),
    ],
)
def test_what_deepspeed_would_stumble_over_is_one_line(overrides, expected):
    c = load("shapes_tiny", *(f"deepspeed.{override}" for override in overrides))
    with pytest.raises(InputError) as caught:
        deepspeed_config(c, 2)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_configuration_is_read_without_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.config", None)
    c = load("shapes_tiny", "deepspeed.zero_optimization.stag3_prefetch=1")
    with pytest.raises(ImportError):
        deepspeed_config(c, 1)


def alone(c: Config) -> dict:
    """For one rank, as this test is."""
    content = c.model_dump()
    content["deepspeed"].pop("gradient_accumulation_steps", None)
    return deepspeed_config(Config(**content), 1)


@given(st.integers(1, 64), st.none() | st.integers(1, 64), st.integers(1, 9))
def test_batch_sizes_multiply_to_the_batch_or_are_refused(total, micro, world):
    content = load("shapes_tiny").model_dump()
    content["train"] |= {"global_batch_size": total, "micro_batch_size": micro}
    c = Config(**content)
    if total % (world * (micro or 1)):
        with pytest.raises(InputError, match=f"global_batch_size {total} is not divisible by {world} ranks"):
            batch_sizes(c, world)
    else:
        at_once = micro or total // world
        assert batch_sizes(c, world) == (at_once, total // (world * at_once))


def test_batch_sizes_that_depend_on_the_ranks_must_agree_too():
    c = load("shapes_tiny", "deepspeed.gradient_accumulation_steps=2", "train.micro_batch_size=16")
    assert deepspeed_config(c, 2)["gradient_accumulation_steps"] == 2
    with pytest.raises(InputError, match=r"gradient_accumulation_steps is 2, but .* it is 4.* on 1 ranks"):
        deepspeed_config(c, 1)
    c = load("shapes_tiny", "deepspeed.train_micro_batch_size_per_gpu=32")
    assert deepspeed_config(c, 2)["train_micro_batch_size_per_gpu"] == 32
    with pytest.raises(InputError, match="train_micro_batch_size_per_gpu is 32, but"):
        deepspeed_config(c, 1)


# ---- Going on with a run ---------------------------------------------------------------------------------------------
def test_what_makes_another_training_is_listed():
    a = load("shapes_tiny")
    assert differences(a, a) == []
    b = load(
        "shapes_tiny",
        "train.seed=1",
        "optimizer.lr=1e-5",
        "ema.decays=[0.5]",
        "deepspeed.gradient_clipping=1.5",
        "loss.repa={model: x, after: 1}",
    )
    assert differences(a, b) == [
        "loss.repa: null there, {model: x, weight: 0.5, after: 1, hidden: 2048} here",
        "train.seed: 0 there, 1 here",
        "optimizer.lr: 0.001 there, 1.0e-05 here",
        "ema.decays: [0.995] there, [0.5] here",
        "deepspeed.gradient_clipping: not set there, 1.5 here",
    ]
    assert [line.split(":")[0] for line in differences(b, a)] == [line.split(":")[0] for line in differences(a, b)]


def test_what_may_change_may():
    a = load("shapes_tiny")
    b = load(
        "shapes_tiny",
        "train.steps=5",
        "train.micro_batch_size=4",
        "train.compile=true",
        "train.skip_nonfinite=3",
        "model.checkpoint_every=1",
        "data.path=/elsewhere",
        "data.workers=7",
        "ema.snapshot_every=5",
        "checkpoint={every: 3, keep_last: 9, keep_every: 30}",
        "sample={every: 3, guidance: 1.0}",
        "evaluate={every: 3, num: 5}",
        "deepspeed.zero_optimization={stage: 3, offload_optimizer: {device: cpu}}",
        "deepspeed.train_batch_size=64",
        "deepspeed.wandb.enabled=true",
    )
    assert differences(a, b) == differences(b, a) == []


@pytest.mark.parametrize("other", ["null", "file", "elsewhere"])
def test_random_weights_of_a_loss_are_not_those_of_a_file(other):
    paths = ("finetune.base=b", "finetune.subspace=s", "data.path=d")
    vgg = lambda value: load("asymflux2_tiny", *paths, f"loss.perceptual.vgg={value}")
    assert differences(vgg("file"), vgg(other)) == differences(vgg("random"), vgg("random")) == []
    assert differences(vgg("random"), vgg(other)) == [f"loss.perceptual.vgg: random there, {other} here"]
    assert differences(vgg(other), vgg("random")) == [f"loss.perceptual.vgg: {other} there, random here"]


def test_an_objective_that_is_given_by_name_is_the_one_that_is_taken_without():
    there, here = load("shapes_tiny"), load("shapes_tiny", "loss.objective=class_conditional")
    assert differences(there, here) == differences(here, there) == []
    other = load("shapes_tiny", "loss.objective=x:Y")
    assert differences(there, other) == ["loss.objective: class_conditional there, x:Y here"]


def test_one_is_not_true():
    there, here = (load("shapes_tiny", f"deepspeed.new={value}") for value in ("1", "true"))
    assert differences(there, here) == ["deepspeed.new: 1 there, true here"]


def test_every_key_that_may_change_exists():
    assert all(key in known_keys(Config) for key in MAY_CHANGE if not key.startswith("deepspeed."))


OTHERS = {  # another valid value for every key that counts
    "model.size": "S/4",
    "model.image_size": "64",
    "model.num_classes": "5",
    "model.dropout": "0.1",
    "model.noise_scale": "2",
    "model.sigma_min": "0.01",
    "subspace.rank": "0",
    "subspace.file": "x",
    "subspace.images": "7",
    "data.kind": "webdataset",
    "data.size": "99",
    "data.flip": "true",
    "loss.weight": "2",
    "loss.sigma_mean": "0",
    "loss.sigma_shift": "2",
    "loss.sigma_std": "1",
    "loss.sigma_floor": "0.1",
    "loss.label_dropout": "0",
    "train.global_batch_size": "32",
    "train.seed": "9",
    "train.precision": "bf16",
    "optimizer.lr": "1",
    "optimizer.betas": "[0, 0]",
    "optimizer.weight_decay": "1",
    "optimizer.eps": "1",
    "optimizer.warmup_steps": "0",
    "optimizer.multipliers": "{x: 2}",
    "optimizer.kind": "x:y",
    "loss.objective": "x:Y",
    "ema.decays": "[]",
    "ema.sigma_rel": "[]",
}
NESTED = ("loss.repa", "loss.variance", "loss.perceptual", "loss.options", "model.options", "model.backbone")
NESTED += ("data.options", "optimizer.options", "finetune", "deepspeed")


def test_every_other_key_counts():
    common = "data.path=x", "ema.snapshot_every=null"
    a = load("shapes_tiny", *common)
    sections = {key.rpartition(".")[0] for key in known_keys(Config)}
    allowed = {k for k in known_keys(Config) if any(f"{k}.".startswith(f"{m}.") for m in MAY_CHANGE)}
    nested = {k for k in known_keys(Config) if k.startswith(NESTED)}
    assert set(known_keys(Config)) - sections - allowed - nested == set(OTHERS)
    for key, value in OTHERS.items():
        found = differences(a, load("shapes_tiny", *common, f"{key}={value}"))
        assert [line.split(":")[0].removesuffix(".x") for line in found] == [key]
