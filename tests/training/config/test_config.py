"""Configurations: the recipe is the paper's, and whatever a user writes is a training or one line that helps."""

import functools
import importlib
import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
from config_words import CONFIGS, NEEDED, TINY, complaint, load
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from asymflow.averages import power_of
from asymflow.backbones.jit import SIZES, JiT
from asymflow.cli import main
from asymflow.sampling import METHODS
from asymflow.training.config.derived import batch_sizes, bf16_weights, network
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, dump, load_config, shipped
from asymflow.training.config.sections import SampleSection, file_schema, known_keys
from asymflow.training.run.folder import differences_of_state
from asymflow.training.start import parse
from asymflow.yaml12 import parse as parse_yaml

TOYS = Path(__file__).resolve().parents[3] / "toy"
IMAGENET = ("imagenet", "imagenet256_b16", "imagenet256_l16", "imagenet256_h16", "imagenet256_h16_repa")
FINETUNING = ("asymflux2_klein_9b", "asymflux2_klein_4b", "asymflux2_tiny")
FROM_SCRATCH = [name for name in shipped() if name not in FINETUNING]


# ---- What is shipped -------------------------------------------------------------------------------------------------
def test_the_promised_configurations_are_shipped():
    assert {"shapes_tiny", "emoji64", *IMAGENET, "imagenet512_h32", *FINETUNING} == set(shipped())


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_shipped_files_load_have_the_promised_keys_and_say_what_they_are(name):
    c = load(name)
    assert min(c.train.steps, c.train.global_batch_size, c.checkpoint.every) >= 1
    assert c.train.seed >= 0
    assert c.subspace.rank == 8
    assert c.deepspeed["zero_optimization"]["stage"] == (0 if name == "emoji64" else 1)
    in_checkpoint = json.loads(json.dumps(c.model_dump(mode="json")))
    assert differences_of_state({"config": in_checkpoint}, c) == []
    assert differences_of_state({"config": in_checkpoint}, load(name, "train.seed=3")) == [
        "train.seed: 0 there, 3 here"
    ]
    JiT(**network(c.model) | {"width": 16, "heads": 2, "depth": 16, "bottleneck": 2})  # the arguments are JiT's
    comment = (CONFIGS / f"{name}.yaml").read_text().split("\nmodel:")[0].split("\nbase:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "--config " in comment
    assert "--set subspace.rank=0" in comment
    assert "--set subspace.rank=full" in comment
    for ranks in (1, 2, 4, 8, *([16] if "8 or 16 GPUs" in comment else [])):
        micro, accumulation = batch_sizes(c, ranks)
        assert micro * accumulation * ranks == c.train.global_batch_size


@pytest.mark.parametrize("name", shipped())
def test_the_commands_in_the_shipped_files_are_understood_by_launcher_and_program(name):
    from deepspeed.launcher.runner import parse_args as deepspeed
    from torch.distributed.run import get_args_parser as torchrun

    text = re.sub(r"\\\n# +", "", (CONFIGS / f"{name}.yaml").read_text())  # a command may go on in the next line
    commands = [shlex.split(line.lstrip("# "), comments=True) for line in text.splitlines() if "train_ddp.py" in line]
    assert commands
    for launcher, *words in commands:
        if launcher == "python":
            script, *arguments = words
        elif launcher == "deepspeed":
            launched = deepspeed(words)
            script, arguments = launched.user_script, launched.user_args
        else:
            launched = torchrun().parse_args(words)
            script, arguments = launched.training_script, launched.training_script_args
        assert script == "train_ddp.py"
        args = parse(arguments)
        assert args.config == {"imagenet": "imagenet256_h16"}.get(name, name)
        assert load_config(args.config, args.set) == load(args.config, *args.set)


@pytest.mark.parametrize("name", ["asymflux2_klein_9b", "asymflux2_klein_4b"])
def test_the_finetuning_is_that_of_the_paper(name):
    c = load(name)
    assert (c.finetune.lora.rank, c.finetune.lora.dropout, c.finetune.lora.targets) == (256, 0.05, None)
    assert (c.optimizer.lr, c.optimizer.betas, c.optimizer.warmup_steps) == (1e-4, (0.9, 0.95), 100)
    assert c.optimizer.multipliers == {"proj_out": 10.0}
    assert (c.train.steps, c.train.global_batch_size) == (15_000, 256)
    assert c.deepspeed["gradient_clipping"] == 200
    assert (c.loss.sigma_mean, c.loss.sigma_std, c.loss.sigma_shift, c.loss.sigma_floor) == (0, 1, 17, 0.05)
    assert (c.loss.weight, c.loss.variance_reduction, c.loss.perceptual.weight) == (5, 0.3, 1)
    (width,) = c.ema.sigma_rel
    assert power_of(width) - 1 == pytest.approx(7, abs=0.01)  # gamma
    assert (c.sample.steps, c.sample.guidance) == (38, 4)
    for ranks in (1, 2, 4, 8, 32):
        micro, accumulation = batch_sizes(c, ranks)
        assert micro * accumulation * ranks == 256


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("asymflux2_klein_9b", [], "finetune.base is needed"),
        ("asymflux2_klein_9b", ["finetune.base=x"], "finetune.subspace is needed"),
        ("asymflux2_klein_9b", ["finetune.base=x", "finetune.subspace=y"], "data.path is needed"),
        ("asymflux2_tiny", ["data.kind=webdataset"], "data.kind must be encoded for finetune"),
        ("asymflux2_tiny", ["data.flip=true"], "data.flip cannot be true"),
        ("asymflux2_tiny", ["evaluate.every=5"], "evaluate.every does not go with finetune"),
        ("asymflux2_tiny", ["loss.repa={model: x}"], "loss.repa does not go with finetune"),
        ("asymflux2_tiny", ["finetune=null"], "model is missing"),
        ("shapes_tiny", ["finetune={base: x, subspace: y}"], "model does not go with finetune"),
        ("shapes_tiny", ["loss.variance_reduction=0.3"], "loss.variance_reduction needs the section finetune"),
        ("shapes_tiny", ["loss.perceptual={}"], "loss.perceptual needs the section finetune"),
        ("shapes_tiny", ["data={kind: encoded, path: x}"], "data.kind cannot be encoded"),
    ],
)
def test_what_does_not_go_with_finetuning_is_refused_by_name(name, overrides, expected):
    assert expected in complaint(name, overrides)


@pytest.mark.parametrize("rank", ["0", "full"])
@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_baseline_is_one_line_and_differs_in_nothing_else(name, rank, write):
    asymmetric, baseline = load(name), load(name, f"subspace.rank={rank}")
    assert differences(asymmetric, baseline) == [f"subspace.rank: 8 there, {rank} here"]
    assert load(name, file=write(f"base: {name}\nsubspace: {{rank: {rank}}}\n")) == baseline


@pytest.mark.parametrize("name", [*IMAGENET, "imagenet512_h32"])
def test_the_recipe_is_that_of_the_paper(name):
    c = load(name)
    epoch = 1_281_167 / 1024
    assert c.train.global_batch_size == 1024
    assert abs(c.train.steps - 600 * epoch) < 1
    assert abs(c.optimizer.warmup_steps - 5 * epoch) < 1
    assert c.train.precision == "bf16"
    assert not bf16_weights(c)
    assert (c.optimizer.lr, c.optimizer.betas, c.optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0)
    assert (c.loss.sigma_mean, c.loss.sigma_std, c.loss.sigma_floor, c.loss.label_dropout) == (0.8, 0.8, 0.05, 0.1)
    assert c.ema.decays == (0.9999,)
    assert c.data.flip
    assert "gradient_clipping" not in c.deepspeed
    assert (c.subspace.rank, c.subspace.images) == (8, 10_000)
    assert (c.sample.method, c.sample.steps, c.sample.interval) == ("heun", 50, (0, 0.88))
    assert c.sample.guidance == (2.2 if "repa" in name else 2.3)
    assert c.model.num_classes == 1000
    assert c.model.sigma_min == 0.04
    large = name == "imagenet512_h32"
    assert (c.model.image_size, c.model.noise_scale) == ((512, 2) if large else (256, 1))
    net = network(c.model)
    assert net["image_size"] // net["patch_size"] == 16  # 256 tokens in all of them
    size = {"imagenet": "B"}.get(name, name.split("_")[-1 - ("repa" in name)][0].upper())
    assert net["dropout"] == (0.2 if size == "H" else 0.0)
    assert {key: net[key] for key in SIZES[size]} == SIZES[size]
    if "repa" in name:
        assert (c.loss.repa.weight, c.loss.repa.after, c.loss.repa.hidden) == (0.5, 8, 2048)
    else:
        assert c.loss.repa is None


def test_emoji64_is_the_network_of_the_specification():
    net = network(load("emoji64").model)
    assert (net["width"], net["depth"], net["patch_size"], net["image_size"]) == (256, 6, 16, 64)


@pytest.mark.parametrize("size", [32, 240, 256, 272, 512, 1024])
def test_unless_given_the_noise_is_that_of_jit(size):
    c = load("imagenet256_b16", f"model.image_size={size}")
    assert c.model.noise_scale == JiT(**network(c.model) | {"width": 16, "heads": 2, "depth": 5}).noise_scale
    assert load("imagenet256_b16", f"model.image_size={size}", "model.noise_scale=3").model.noise_scale == 3


def test_the_network_is_what_is_set_and_published_otherwise():
    set_ = {"num_classes": 3, "checkpoint_every": 2, "dropout": 0.0, "options": {"in_context_start": 0, "heads": 4}}
    c = load("imagenet256_h16", f"model={set_}")
    net, published = network(c.model), network(load("imagenet256_h16").model)
    changed = {name: value for name, value in net.items() if value != published[name]}
    assert changed == {"num_classes": 3, "checkpoint_every": 2, "dropout": 0.0, "in_context_start": 0, "heads": 4}


def test_every_key_says_what_it_is():
    for key, field in known_keys(Config).items():
        assert field.annotation.__doc__ if is_section(field.annotation) else field.description, key


def is_section(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_info_lists_all_keys_with_their_defaults_as_a_file_would_have_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "config"]) == 0
    text = capsys.readouterr().out
    values, origins = parse_yaml(text, str)
    listed = {".".join(path): path for path in origins if path and all(isinstance(name, str) for name in path)}
    assert listed.keys() == known_keys(Config).keys()
    for key, field in known_keys(Config).items():
        value = functools.reduce(dict.get, listed[key], values)
        if not (isinstance(value, dict) or field.is_required() or field.default_factory or "." not in key):
            assert value == json.loads(json.dumps(field.default)), key
    assert "  steps:                            # whole number, at least 1; needed; optimizer steps in all" in text
    assert main(["info", "config", "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)["properties"]} == {"base", *Config.model_fields}


@pytest.mark.parametrize("path", sorted([*CONFIGS.glob("*.yaml"), *TOYS.rglob("*.yaml")]), ids=lambda path: path.stem)
def test_the_schema_for_editors_takes_the_files_here(path):
    validator = Draft202012Validator(file_schema())
    values, _ = parse_yaml(path.read_text(), str)
    assert not [fault.message for fault in validator.iter_errors(values)]


def test_the_schema_for_editors_sees_wrong_keys_and_values():
    validator = Draft202012Validator(file_schema())
    for values in ({}, {"model": {"options": None}}, {"base": "imagenet", "train": {"steps": 1}}):
        assert validator.is_valid(values), values
    for values in ({"trian": {}}, {"train": {"step": 1}}, {"train": {"steps": "many"}}, {"base": 1}):
        assert not validator.is_valid(values), values


def test_the_sampling_methods_are_those_of_the_sampler():
    for method in METHODS:
        assert SampleSection(method=method).method == method


def test_they_are_found_when_the_package_is_imported_from_a_zip_file(tmp_path, monkeypatch):
    source = CONFIGS.parent
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w") as wheel:
        for path in [*source.rglob("*.py"), *source.rglob("*.yaml")]:
            wheel.write(path, path.relative_to(source.parent))
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "asymflow"}
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "wheel.zip")
    try:
        zipped = importlib.import_module("asymflow.training.config.reading")
        assert "wheel.zip" in zipped.__file__
        assert zipped.shipped() == shipped()
        assert dump(zipped.load_config("imagenet256_l16", NEEDED)) == dump(load("imagenet256_l16"))
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "asymflow"]:
            del sys.modules[name]
        sys.modules.update(ours)


# ---- Keys and values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("train:\n  stpes: 3\n", "my.yaml, line 3: unknown key train.stpes: did you mean train.steps?"),
        ("trian:\n  steps: 3\n", "my.yaml, line 2: unknown key trian: did you mean train?"),
        ("steps: 3\n", "my.yaml, line 2: unknown key steps: did you mean train.steps?"),
        ("global_batch: 3\n", "my.yaml, line 2: unknown key global_batch: did you mean train.global_batch_size?"),
        ("train:\n  lr: 3\n", "my.yaml, line 3: unknown key train.lr: did you mean optimizer.lr?"),
        ("loss: {repa: {modle: x}}\n", "unknown key loss.repa.modle: did you mean loss.repa.model? (and 1 more)"),
        ("train: {qqq: 3}\n", "unknown key train.qqq: the keys of train are steps, global_batch_size"),
        ("train.steps: 3\n", "unknown key train.steps: within a file, sections are nested, as in train: {steps: ...}"),
        ("train:\n\n  steps: many\n", "my.yaml, line 4: train.steps must be a whole number, but it is 'many'"),
        ("train:\n  steps: true\n", "my.yaml, line 3: train.steps must be a whole number, but it is true"),
        ("train:\n  steps:\n", "my.yaml, line 3: train.steps must be a whole number, but it is null"),
        ("train:\n", "my.yaml, line 2: train must be a section of keys, but it is null"),
        ("train: [1, 2]\n", "train must be a section of keys, but it is [1, 2]"),
        ("train: {steps: {a: 3}}\n", "train.steps must be a whole number, but it is a section"),
        ("train: {steps: 0}\n", "train.steps must be at least 1, but it is 0"),
        ("train: {steps: 0, seed: -1, compile: 3}\n", "(and 2 more)"),
        ("optimizer: {lr: true}\n", "optimizer.lr must be a number, but it is true"),
        ("optimizer: {lr: -1e-4}\n", "optimizer.lr must be at least 0, but it is -1e-4"),
        ("optimizer: {betas: 0.9}\n", "optimizer.betas must be a list, but it is 0.9"),
        ("optimizer: {betas: [0.9]}\n", "optimizer.betas must be a list of more than 1, but it is [0.9]"),
        ("optimizer: {betas: [0, 0, 0]}\n", "optimizer.betas must be a list of 2, but it is [0, 0, 0]"),
        ("optimizer:\n  betas: [0.9,\n    1]\n", "my.yaml, line 4: optimizer.betas[1] must be below 1, but it is 1"),
        ("optimizer: {betas: [0.9, '0.9']}\n", "optimizer.betas[1] must be a number, but it is '0.9'"),
        ("ema: {decays: [0.9, true]}\n", "ema.decays[1] must be a number, but it is true"),
        ("ema: {decays: [0.9, 0.90]}\n", "ema.decays has two that are the same"),
        ("ema: {sigma_rel: [0.05, 0.0501]}\n", "ema.sigma_rel has two that are the same"),
        ("ema: {sigma_rel: [0.3]}\n", "ema.sigma_rel[0] must be below 0.288675, but it is 0.3"),
        ("ema: {sigma_rel: [], snapshot_every: 10}\n", "ema.snapshot_every needs ema.sigma_rel"),
        ("subspace: {rank: half}\n", "subspace.rank must be a whole number or 'full' or 'auto', but it is 'half'"),
        ("subspace: {rank: -1}\n", "subspace.rank must be at least 0 or 'full' or 'auto', but it is -1"),
        ("subspace: {rank: true}\n", "subspace.rank must be a whole number or 'full' or 'auto', but it is true"),
        ("subspace:\n  rank: 49\n", "my.yaml, line 3: subspace.rank must be at most 48"),
        ("subspace: {file: ''}\n", "subspace.file must be text, not empty, but it is ''"),
        (
            "data: {kind: image}\n",
            "data.kind must be shapes, image_folder, webdataset, encoded, or package.module:Name of your own",
        ),
        ("data: {kind: image_folder}\n", "data.path is needed for image_folder"),
        ("data: {kind: webdataset}\n", "data.path is needed for webdataset"),
        ("data: {size: null}\n", "data.size is needed for generated images"),
        ("model: {size: X/4}\n", "model.size must be SIZE/PATCH, such as B/16, with SIZE in tiny, S, B, L, H"),
        ("model: {size: B}\n", "model.size must be SIZE/PATCH"),
        ("model: {size: B/0}\n", "model.size must be SIZE/PATCH"),
        ("model: {size: B/4x}\n", "model.size must be SIZE/PATCH"),
        (
            "model: {image_size: 30}\n",
            "line 2: model.image_size must be a multiple of the patch of tiny/4, but it is 30",
        ),
        ("model: {dropout: 1}\n", "model.dropout must be below 1"),
        ("model: {num_classes: 0}\n", "model.num_classes must be at least 1"),
        ("model: {options: {heads: 3}}\n", "line 2: model.options make no network: width 64 is not a multiple of 4"),
        ("model: {options: {in_context_start: 4}}\n", "make no network: in_context_start 4 of a JiT must be below"),
        ("model: {options: {depth: 1}}\n", "make no network: in_context_start 1 of a JiT must be below its depth 1"),
        (
            "model: {dropout: 0.1, options: {depth: 3}}\n",
            "make no network: dropout 0.1 of a JiT would reach none of its 3",
        ),
        ("loss: {label_dropout: 1.1}\n", "loss.label_dropout must be at most 1"),
        (
            "loss: {repa: {model: x, after: 5}}\n",
            "loss.repa.after must be at most 4, the blocks there are, but it is 5",
        ),
        ("loss:\n  repa: {weight: 1}\n", "my.yaml, line 3: loss.repa.model is missing"),
        ("checkpoint: {keep_every: 750}\n", "checkpoint.keep_every must be a multiple of checkpoint.every"),
        ("finetune: {lora: {targets: []}}\n", "finetune.lora.targets must be a list of more than 0, but it is []"),
        ("sample: {interval: [0.9, 0.1]}\n", "sample.interval must have its low end first, but it is [0.9, 0.1]"),
        (
            "sample: {method: rk4}\n",
            "sample.method must be heun, euler, or package.module:Name of your own",
        ),
        ("train: {precision: fp16}\n", "train.precision must be 'fp32' or 'bf16', but it is 'fp16'"),
        ("deepspeed: 3\n", "my.yaml, line 2: deepspeed must be a section of keys, but it is 3"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_the_nearest_right_key(write, content, expected):
    message = complaint(write(TINY + content))
    assert expected in message
    assert message.startswith(("my.yaml, line ", "asymflow/configs/shapes_tiny.yaml, line "))


def test_what_is_missing_is_named(write):
    text = (CONFIGS / "shapes_tiny.yaml").read_text()
    for key in ("steps", "global_batch_size", "seed"):
        lines = [line for line in text.splitlines() if not line.startswith(f"  {key}:")]
        assert f"train.{key} is missing" in complaint(write("\n".join(lines)))
    assert "subspace.rank is missing" in complaint(
        write(text.replace("  rank: 8", "  images: 8").replace("images: 2000", ""))
    )
    assert "deepspeed is missing" in complaint(write(text[: text.index("deepspeed:")]))
    assert "deepspeed.zero_optimization must be" in complaint(write(text[: text.index("deepspeed:")] + "deepspeed: {}"))
    assert complaint(write("train: {steps: 4}")).startswith("my.yaml: data is missing")


@pytest.mark.parametrize("key", [k for k in known_keys(Config) if k.count(".") and "options" not in k])
def test_one_wrong_letter_in_any_key_is_corrected(write, key):
    section, _, name = key.rpartition(".")
    wrong = name[:-1] + ("x" if name[-1] != "x" else "y")
    assert f"did you mean {key}?" in complaint("shapes_tiny", [f"{section}.{wrong}=1"])


@pytest.mark.parametrize(
    "override", ["subspace.rank=48", "loss.repa={model: x, after: 4}", "sample.interval=[0.5, 0.5]"]
)
def test_the_ends_of_a_range_belong_to_it(override):
    load("shapes_tiny", override)


def test_objects_made_in_python_are_checked_too():
    content = load("shapes_tiny").model_dump()
    assert Config(**content) == load("shapes_tiny")
    with pytest.raises(ValidationError, match=r"subspace\.rank"):
        Config(**content | {"subspace": {"rank": 49}})
    with pytest.raises(ValidationError, match="frozen"):
        load("shapes_tiny").train.steps = 3
