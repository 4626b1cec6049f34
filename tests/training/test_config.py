"""Configurations: the recipe is the paper's, and whatever a user writes is a training or one line that helps."""

import functools
import importlib
import json
import math
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import asymflow
from asymflow.averages import power_of
from asymflow.backbones.jit import SIZES, JiT
from asymflow.cli import main
from asymflow.errors import InputError
from asymflow.sampling import METHODS
from asymflow.training.config.derived import batch_sizes, bf16_weights, network, sampling_precision
from asymflow.training.config.differences import MAY_CHANGE, differences
from asymflow.training.config.reading import Config, dump, load_config, shipped
from asymflow.training.config.sections import SampleSection, known_keys
from asymflow.training.config.yaml12 import parse as parse_yaml
from asymflow.training.start import parse
from asymflow.training.zero.settings import deepspeed_config

CONFIGS = Path(asymflow.__file__).parent / "configs"
IMAGENET = ("imagenet", "imagenet256_b16", "imagenet256_l16", "imagenet256_h16", "imagenet256_h16_repa")
NEEDED = {"data.path=somewhere"}  # what a user has to give, of the shipped files


FINETUNING = ("asymflux2_klein_9b", "asymflux2_klein_4b", "asymflux2_tiny")
FROM_SCRATCH = [name for name in shipped() if name not in FINETUNING]


def load(name: str, *overrides: str, file: str | None = None) -> Config:
    """A shipped configuration, or a file that is based on it."""
    needed = {"loss.repa.model=dinov2"} if name.endswith("_repa") else set()
    if name.startswith("asymflux2_klein"):
        needed |= {"finetune.base=base", "finetune.subspace=subspace"}
    if name not in ("shapes_tiny", "asymflux2_tiny"):
        needed |= NEEDED
    return load_config(file or name, [*sorted(needed), *overrides])


def complaint(*args) -> str:
    with pytest.raises(InputError) as caught:
        load_config(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return write


# ---- What is shipped -------------------------------------------------------------------------------------------------
def test_the_promised_configurations_are_shipped():
    assert {"shapes_tiny", "emoji64", *IMAGENET, "imagenet512_h32", *FINETUNING} == set(shipped())


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_shipped_files_load_have_the_promised_keys_and_say_what_they_are(name):
    c = load(name)
    assert min(c.train.steps, c.train.global_batch_size, c.checkpoint.every) >= 1
    assert c.train.seed >= 0
    assert c.subspace.rank == 8
    assert c.deepspeed["zero_optimization"]["stage"] == 1
    JiT(**network(c.model) | {"width": 16, "heads": 2, "depth": 16, "bottleneck": 2})  # the arguments are JiT's
    comment = (CONFIGS / f"{name}.yaml").read_text().split("\nmodel:")[0].split("\nbase:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "--config " in comment
    assert "--set subspace.rank=0" in comment
    assert "--set subspace.rank=full" in comment
    for ranks in (1, 2, 4, 8, *([16, 32] if "8 to 32 GPUs" in comment else [])):
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
    assert {*json.loads(capsys.readouterr().out)["properties"]} == {*Config.model_fields}


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


# ---- YAML ------------------------------------------------------------------------------------------------------------
TINY = "base: shapes_tiny\n"


def test_numbers_and_words_are_those_of_yaml_1_2(write):
    c = load_config(write(TINY + "optimizer: {lr: 1e-4, eps: 1E-9, weight_decay: .5}\ndata: {path: on}\n"))
    assert (c.optimizer.lr, c.optimizer.eps, c.optimizer.weight_decay) == (1e-4, 1e-9, 0.5)
    assert c.data.path == "on"
    c = load_config(
        write(
            TINY
            + "train: {seed: 0x10, steps: 010, compile: TRUE, skip_nonfinite: 0o17}\nsubspace: {file: 2024-01-01}\n"
        )
    )
    assert (c.train.seed, c.train.steps, c.train.compile, c.train.skip_nonfinite) == (16, 10, True, 15)
    assert c.subspace.file == "2024-01-01"
    for word in ("yes", "on", "no", "off", "y", "1"):
        assert "train.compile must be true or false" in complaint(write(TINY + f"train: {{compile: {word}}}\n"))
    for number in ("1:30", "1_000", "1e3", "10.0", '"10"'):
        assert "train.steps must be a whole number" in complaint(write(TINY + f"train: {{steps: {number}}}\n"))
    for number in (".nan", ".inf", "-.inf", "nan", "inf", "1e999", "1" * 5000):
        assert "optimizer.lr" in complaint(write(TINY + f"optimizer: {{lr: {number}}}\n"))


def test_a_whole_number_is_accepted_where_any_number_is(write):
    c = load_config(write(TINY + "optimizer: {lr: 1, betas: [0, 0]}\n"))
    assert isinstance(c.optimizer.lr, float)
    assert c.optimizer.betas == (0.0, 0.0)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "my.yaml must have sections of keys, such as train: {steps: 1000}, but it is empty"),
        ("# nothing\n", "but it is empty"),
        ("- a\n- b\n", "but it is [a, b]"),
        ("train\n", "but it is 'train'"),
        (b"\xff\xfe\x00\x01", "my.yaml is not text in UTF-8"),
        (b"PK\x03\x04\x00", "my.yaml, line 1: the character '\\x03' is not allowed"),
        (TINY + "train:\n\tseed: 3\n", "my.yaml, line 3: "),
        (TINY + "train:\n\tseed: 3\n", "(indent with spaces)"),
        (TINY + "train:\n  seed: 3\n  steps: 2\n  seed: 4\n", "my.yaml, line 5: train.seed is given twice"),
        (TINY + "train:\n  seed: 3\n  steps: 2\n  seed: 4\n", "the first time at line 3"),
        (LAUGHS, "my.yaml, line 1: what begins with & must be in quotes: there are no aliases"),
        (TINY + "train: " + "[" * 5000, "my.yaml, line 2: nested too deeply"),
        (TINY + "train: " + "{a: " * 5000, "my.yaml, line 2: nested too deeply"),
        (TINY + "\n".join(" " * i + "a:" for i in range(300)), "nested too deeply"),
        (TINY + "x: " + "y" * 50_000, "my.yaml has more than 50000 bytes"),
        (TINY + "data: !!python/object/apply:os.getcwd []\n", "my.yaml, line 2: what begins with ! must be in quotes"),
        (TINY + "data: !!set {a, b}\n", "my.yaml, line 2: what begins with ! must be in quotes"),
        (TINY + "data: !mine 3\n", "my.yaml, line 2: what begins with ! must be in quotes: there are no aliases, tags"),
        (TINY + "train: {seed: !!int many}\n", "what begins with ! must be in quotes"),
        ("%YAML 1.1\n---\n" + TINY, "my.yaml, line 1: what begins with % must be in quotes"),
        (TINY + "? [a, b]\n: 3\n", "my.yaml, line 2: a key must be a word"),
        (TINY + "---\ntrain: {seed: 3}\n", "my.yaml, line 2: "),
        (TINY + 'data: {path: "a\\nb"}\n', "my.yaml, line 2: the character '\\n' is not allowed"),
        (TINY + 'data: {path: "\\UFFFFFFFF"}\n', "my.yaml, line 2: this is not YAML"),
        (TINY + 'data: {path: "\\U00110000"}\n', "my.yaml, line 2: this is not YAML"),
        (TINY + 'data: {path: "\\uD800"}\n', "is not allowed"),
        (TINY + "data: {path: a\u2028b}\n", "my.yaml, line 2: the character '\\u2028' is not allowed"),
        (TINY + "data: {path: 'a\x85b'}\n", "my.yaml, line 2: the character '\\x85' is not allowed"),
        (TINY + "train: {seed\u00a0: 3}\n", "'\\xa0' is not allowed"),
        (TINY + "<<: {train: {seed: 3}}\n", "my.yaml, line 2: unknown key <<"),
    ],
)
def test_what_is_no_configuration_is_answered_in_one_line(write, content, expected):
    assert expected in complaint(write(content))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    c = load_config(write(b"\xef\xbb\xbf" + (TINY + "train:\n  seed: 3\n").replace("\n", "\r\n").encode()))
    assert c.train.seed == 3


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
        ("model: {options: {in_context_start: 4}}\n", "model.options.in_context_start must be below the depth 4"),
        ("model: {options: {depth: 1}}\n", "model.options.in_context_start must be below the depth 1"),
        ("loss: {label_dropout: 1.1}\n", "loss.label_dropout must be at most 1"),
        (
            "loss: {repa: {model: x, after: 5}}\n",
            "loss.repa.after must be at most 4, the blocks there are, but it is 5",
        ),
        ("loss:\n  repa: {weight: 1}\n", "my.yaml, line 3: loss.repa.model is missing"),
        ("checkpoint: {keep_every: 750}\n", "checkpoint.keep_every must be a multiple of checkpoint.every"),
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


# ---- Files that are based on others ----------------------------------------------------------------------------------
def test_a_file_holds_only_what_differs_from_its_base(write):
    write(TINY + "optimizer: {lr: 1e-3}\ntrain: {seed: 5}\ndeepspeed: {gradient_clipping: 1.0}\n", "below/base.yaml")
    write("base: ../below/base.yaml\ntrain: {steps: 7}\nema: {decays: [0.5]}\nsample: {every: null}\n", "above/my.yaml")
    c, tiny = load_config("above/my.yaml"), load("shapes_tiny")
    assert (c.train.steps, c.train.seed, c.optimizer.lr, c.ema.decays, c.sample.every) == (7, 5, 1e-3, (0.5,), None)
    assert c.deepspeed == {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}
    assert (c.model, c.data, c.loss, c.optimizer.warmup_steps) == (
        tiny.model,
        tiny.data,
        tiny.loss,
        tiny.optimizer.warmup_steps,
    )


def test_an_error_in_a_base_names_the_base(write):
    write(TINY + "train:\n  stpes: 3\n", "below.yaml")
    write("base: below.yaml\n")
    assert complaint("my.yaml").startswith("below.yaml, line 3: unknown key train.stpes")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("base: my.yaml\n", "my.yaml, line 1: base my.yaml is based on itself"),
        ("base: ../deep/../my.yaml\n", "is neither a file"),
        ("base: ./x/../other.yaml\n", "is based on itself"),
        (
            "\nbase: shape_tiny\n",
            "my.yaml, line 2: base shape_tiny is neither a file nor a shipped configuration: did you",
        ),
        ("base: [shapes_tiny]\n", "base must be a name or a path, but it is [shapes_tiny]"),
        ("base: 3\n", "base must be a name or a path, but it is 3"),
        ("base: .\n", "is neither a file"),
    ],
)
def test_bases_that_cannot_be(write, content, expected):
    write("base: my.yaml\n", "other.yaml")
    write("", "x/empty")
    assert expected in complaint(write(content))


@pytest.mark.parametrize("name", ["shapes-tiny", "shapes_tiny.yaml", "x" * 5000, "a\0b", "a\nb", "/", "", ".", "../x"])
def test_names_that_nothing_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = complaint(name)
    assert "is neither a file nor a shipped configuration" in message
    assert len(message) < 400
    assert ("did you mean shapes_tiny?" in message) == name.startswith("shapes")


def test_a_file_that_may_not_be_read(write):
    path = Path(write(TINY))
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        assert "my.yaml cannot be read: Permission denied" in complaint("my.yaml")
    finally:
        path.chmod(0o644)


# ---- --set -----------------------------------------------------------------------------------------------------------
def test_overrides_in_all_forms():
    c = load_config(
        "shapes_tiny",
        [
            "train.steps=10",
            "optimizer.lr=1e-4",
            "subspace.rank=full",
            "data.path=/images/a=b",
            "ema.decays=[0.5, 0.9]",
            "sample.every=null",
            "train.compile=true",
            "loss.repa.model=dino",
            "loss.repa.after=2",
            "deepspeed.tensorboard.enabled=true",
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.gradient_clipping=1",
            "train={seed: 4, skip_nonfinite: 2}",
            "train.steps=11",
        ],
    )
    assert (c.train.steps, c.train.seed, c.train.skip_nonfinite, c.train.compile) == (11, 4, 2, True)
    assert (c.optimizer.lr, c.subspace.rank, c.data.path, c.ema.decays) == (1e-4, "full", "/images/a=b", (0.5, 0.9))
    assert c.sample.every is None
    assert (c.loss.repa.model, c.loss.repa.after, c.loss.repa.weight) == ("dino", 2, 0.5)
    assert c.deepspeed == {
        "zero_optimization": {"stage": 3},
        "tensorboard": {"enabled": True},
        "gradient_clipping": 1,
    }
    assert c.train.global_batch_size == load("shapes_tiny").train.global_batch_size


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stpes=1", "--set train.stpes=1: unknown key train.stpes: did you mean train.steps?"),
        ("train.steps=many", "--set train.steps=many: train.steps must be a whole number, but it is 'many'"),
        ("train.steps=", "--set train.steps=: train.steps must be a whole number, but it is null"),
        ("train.steps", "--set train.steps: expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train..steps=3", "expected KEY=VALUE"),
        ("train.st\neps=3", "expected KEY=VALUE"),
        ("train.steps=[", "--set train.steps=[: "),
        ("train.steps=*a", "--set train.steps=*a: what begins with * must be in quotes: there are no aliases"),
        ("train.steps=1\n2", "--set train.steps=1 2: train.steps must be a whole number"),
        ("train.steps.x=1", "train.steps must be a whole number, but it is a section"),
        ("optimizer.betas.0=1", "optimizer.betas must be a list, but it is a section"),
        ("base=emoji64", "unknown key base: "),
        ("train={seed: 1, seed: 2}", "train.seed is given twice, the first time at line 1"),
        ("sample.interval=0,0.88", "sample.interval must be a list, but it is '0,0.88'"),
        ("loss.repa.weight=1", "--set loss.repa.weight=1: loss.repa.model is missing"),
        ("deepspeed.zero_optimization=3", "deepspeed.zero_optimization must be a section with the key stage"),
        ("deepspeed.zero_optimization.stage.x=1", "stage must be 0, 1, 2 or 3, but it is a section"),
        ("x" * 10_000 + "=1", "unknown key xxxx"),
    ],
)
def test_overrides_that_cannot_be(override, expected):
    message = complaint("shapes_tiny", [override])
    assert expected in message
    assert len(message) < 500


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
        (["deepspeed.gradient_cliping=1"], "deepspeed.gradient_cliping is unknown: did you mean deepspeed.gradient_cl"),
        (["deepspeed.zero_optimisation.stage=2"], "did you mean deepspeed.zero_optimization?"),
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
        ["deepspeed.csv_monitor={enabled: true, output_path: runs}", "deepspeed.something_new=[1, {a: null}]"],
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


def at(config: Config, key: str):
    """The value of a key, None if a section that it is in is."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


# ---- Writing, and reading again --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", shipped())
def test_dumped_configurations_have_all_keys_and_load_as_the_same(name, write):
    c = load(name)
    text = dump(c)
    assert load_config(write(text)) == c
    assert dump(load_config("my.yaml")) == text
    sections = [line.partition(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert sections == list(Config.model_fields)
    absent = [key for key in known_keys(Config) if at(c, key) is None]
    for key in known_keys(Config):
        if not any(key.startswith(f"{section}.") for section in absent):
            assert f"{key.rpartition('.')[2]}:" in text


@pytest.mark.parametrize("path", ["1e-4", "0o7", "on", "null", "1_000", "2024-01-01", "x " * 100 + "x", "größe/🙂"])
def test_words_stay_words_and_long_ones_one_line(path, write):
    content = load("shapes_tiny").model_dump()
    content["data"]["path"] = content["subspace"]["file"] = path
    c = Config(**content)
    write(dump(c).encode("ascii"))
    assert load_config("my.yaml") == c
    assert [len(line.splitlines()) for line in differences(load("shapes_tiny"), c)] == [1]


words = st.text(st.characters(codec="utf-8"), max_size=12).filter(str.isprintable) | st.sampled_from(
    [
        "1e-4",
        "on",
        "no",
        "null",
        "~",
        "0x1",
        "1",
        ".5",
        "true",
        "- a",
        "a: b",
        "#",
        "*a",
        "&a",
        "!x",
        "'",
        '"',
        "",
        " ",
        "=",
    ]
)
numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(-1e18, 1e18) | st.sampled_from([1e-5, 5e-324, 1e17, 0.1])
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=100)
@given(
    anything,
    words.filter(bool),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=4, unique_by=lambda d: f"{d:.10g}"),
    st.floats(0, 1e15),
    st.integers(0, 2**63 - 1),
)
def test_whatever_is_valid_survives_writing_and_reading(folder, extra, path, decays, lr, seed):
    content = load("shapes_tiny").model_dump()
    content["deepspeed"] |= {"something_new": extra}
    content["data"]["path"] = path
    content["ema"]["decays"] = [d for d in decays if f"{d:.10g}" != "1"]
    content["optimizer"]["lr"], content["train"]["seed"] = lr, seed
    c = Config(**content)
    again = load_text(folder, dump(c))
    assert again == c
    assert differences(c, again) == []
    assert repr(again) == repr(c)  # 1, 1.0 and true are equal to Python


def load_text(folder: Path, text: str) -> Config:
    (folder / "dumped.yaml").write_text(text, encoding="ascii")
    return load_config(folder / "dumped.yaml")


# ---- A thousand broken files -----------------------------------------------------------------------------------------
SOURCES = [
    (CONFIGS / "shapes_tiny.yaml").read_text(),
    (CONFIGS / "imagenet.yaml").read_text().replace("path: null", "path: x"),
    "base: imagenet256_h16_repa\nloss:\n  repa:\n    model: dino\ndata:\n  path: x\ntrain:\n  seed: 1\n",
]
ODD = """
0 1 -1 3 0.5 1e-4 -0.0 1e999 .nan .inf nan 9223372036854775808 1e400 0x1 0o7 true false null ~ yes on '' full auto heun
fp32 bf16 B/16 tiny/4 S/8 H/0 [] [0.5] [0,1] [1,2,3] {} {a:1} {"a":1} {"enabled":true} [[]] 2024-01-01 12:30 1_000 naïve
日本語 🙂 '\\u2028' "\\n" "\\0" "\\ud800" "\\UFFFFFFFF" !!python/name:os.system *a | > % @ ` - shapes webdataset
image_folder imagenet broken.yaml ../x"""
ODDER = ["!!int 3", "!!int x", "!!str 3", "!!binary eA==", "&a 1", "- 1", "a: b", "[0.5, *a]", "9" * 400, "1" * 5000]
VALUES = st.sampled_from([*ODD.split(), *ODDER, "[" * 200, "x" * 1000, "1e" + "9" * 50])
KEYS = st.sampled_from(
    [key.rpartition(".")[2] for key in known_keys(Config)]
    + ["base", "<<", "", "?", "1", "null", "fp16", "bf16", "ключ", "a.b", "-"]
) | st.text(max_size=6)
JUNK = st.binary(max_size=4) | st.sampled_from(
    [b"\t", b"\0", b"\xff", b"{", b"]", b'"', b"---\n", b"...\n", b"\r", b"%YAML 9"]
)


@st.composite
def broken_files(draw) -> bytes:
    lines = draw(st.sampled_from(SOURCES)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(len(lines) - 1, 0)))
        line = lines[i] if lines else ""
        indent, (key, colon, value) = " " * (len(line) - len(line.lstrip())), line.strip().partition(":")
        kind = draw(st.sampled_from(["value", "value", "value", "key", "delete", "duplicate", "nest", "move", "swap"]))
        if kind == "value" and colon:
            lines[i] = f"{indent}{key}: {draw(VALUES)}"
        elif kind == "key" and colon:
            lines[i] = f"{indent}{draw(KEYS)}:{value}"
        elif kind == "delete":
            lines[i : i + 1] = []
        elif kind == "duplicate":
            lines[i:i] = [line]
        elif kind == "nest" and colon:
            lines[i : i + 1] = [f"{indent}{key}:", f"{indent}  {draw(KEYS)}: {draw(VALUES)}"]
        elif kind == "move":
            lines[i : i + 1] = [" " * draw(st.integers(0, 5)) + line.lstrip()]
        else:
            lines[i : i + 1] = [*lines[:i][-1:], line]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(JUNK) + content[at:]
    return content


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_broken_files_are_valid_or_answered_in_one_line(folder, count):
    outcomes = {True: 0, False: 0}

    @settings(max_examples=count)
    @given(broken_files())
    def check(content):
        path = folder / "broken.yaml"
        path.write_bytes(content)
        try:
            c, message = load_config(path), None
        except InputError as e:
            c, message = None, str(e)
        outcomes[c is not None] += 1
        if c is None:
            assert len(message.splitlines()) == 1
            assert len(message.encode()) < 600  # and it can be printed
            assert "broken.yaml" in message
        else:
            assert all(math.isfinite(x) for x in (c.optimizer.lr, *c.ema.decays, c.loss.sigma_mean))
            assert load_text(folder, dump(c)) == c

    check()
    assert min(outcomes.values()) >= count // 10, outcomes
