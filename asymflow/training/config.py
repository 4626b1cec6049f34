"""The configuration of a training: what can be set, what it may be, and where it comes from.

    load_config("emoji64", ["data.path=emoji64.tar", "train.steps=1000"])

Every key is a field of one of the classes below, which say what it means and which values make sense. The YAML files
follow YAML 1.2: 1e-4 is a number, and only true and false are booleans. A file may begin with `base: NAME_OR_PATH` and
hold only what differs from that. Whatever is wrong ends in one line with the file, the line and the key.
"""

import copy
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from asymflow.backbones.jit import SIZES, JiT, check_sizes
from asymflow.errors import InputError
from asymflow.training.ema import Profile

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
RelativeWidth = Annotated[float, Field(ge=0.001, lt=math.sqrt(1 / 12))]  # see `ema.power_of`
Text = Annotated[str, Field(min_length=1)]


# ---- The sections ----------------------------------------------------------------------------------------------------
class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def listed(*default, **checks) -> Any:
    """A field that is a list in YAML and a tuple here; its elements are as strict as everything else."""
    return Field(default, strict=False, **checks)


class Options(Section):
    """Sizes of the network where they are not those that `model.size` has; null leaves them."""

    width: Count | None = Field(None, description="of the transformer")
    depth: Count | None = Field(None, description="blocks")
    heads: Count | None = Field(None, description="of the attention; width must be a multiple of 4 heads")
    bottleneck: Count | None = Field(None, description="rank of the patch embedding")
    in_context_start: WholeNumber | None = Field(None, description="the class tokens join before this block")
    in_context_tokens: WholeNumber | None = Field(None, description="class tokens")


class Model(Section):
    """The network: a JiT."""

    size: Text = Field(description="SIZE/PATCH, such as B/16; the sizes are those of asymflow/backbones/jit.py")
    image_size: Count = Field(description="height and width in pixels, a multiple of the patch")
    num_classes: Count = Field(description="classes in the data; one more, no class, is added")
    options: Options = Field(Options(), description="other sizes than the published ones")
    dropout: BelowOne | None = Field(None, description="of the projections; null: as published for the size")
    checkpoint_every: WholeNumber = Field(0, description="recompute every n-th block in the backward pass; 0: none")
    noise_scale: Positive = Field(1.0, description="standard deviation of the noise; published: 2 at 512 pixels")
    sigma_min: NotNegative = Field(0.04, description="clamp of sigma when sampling, outside of the subspace")


class Subspace(Section):
    """Where the noise is predicted. Rank 0 is x0-prediction, the full rank u-prediction."""

    rank: WholeNumber | Literal["full", "auto"] = Field(description="dimensions; auto: as many as pay off")
    file: Text | None = Field(None, description="of `asymflow subspace`; null: fitted on first start")
    images: Count = Field(10_000, description="images to fit it on")


class Data(Section):
    """Where the images come from."""

    kind: Literal["shapes", "image_folder", "webdataset"] = Field(description="what `path` is; shapes are generated")
    path: Text | None = Field(None, description="folder of images, or tar shards")
    size: Count | None = Field(None, description="how many images, for shapes")
    flip: bool = Field(False, description="mirror every other image at random")
    workers: WholeNumber = Field(4, description="processes that read images, for each rank; 0: the rank itself")


class Repa(Section):
    """Alignment of the tokens after one block with the features of DINOv2."""

    model: Text = Field(description="folder of a DINOv2 of the package transformers")
    weight: Positive = Field(0.5, description="of the alignment in the loss")
    after: Count = Field(8, description="blocks that the tokens have passed")
    hidden: Count = Field(2048, description="width of the projection")


class Loss(Section):
    """Flow matching: mean of ((u_pred - u) sigma / max(sigma, sigma_floor))^2."""

    sigma_mean: float = Field(0.8, description="sigma = sigmoid(sigma_mean + sigma_std n), n standard normal")
    sigma_std: NotNegative = Field(0.8, description="see sigma_mean")
    sigma_floor: Annotated[float, Field(gt=0, le=1)] = Field(0.05, description="below, errors count less")
    label_dropout: Fraction = Field(0.1, description="share of the images whose class is not told")
    repa: Repa | None = Field(None, description="null: none")


class Train(Section):
    """How long, how much at a time, and in what numbers."""

    steps: Count = Field(description="optimizer steps in all")
    global_batch_size: Count = Field(description="images in a step, of all ranks together")
    micro_batch_size: Count | None = Field(None, description="images at a time on a rank; null: all of its share")
    seed: WholeNumber = Field(description="with an image's index, fixes everything random about it")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    compile: bool = Field(False, description="use torch.compile")
    skip_nonfinite: WholeNumber = Field(0, description="steps with a NaN or infinite loss to skip before giving up")


class Optimizer(Section):
    """AdamW; the learning rate rises linearly over the warm-up, then stays."""

    lr: NotNegative = Field(2e-4, description="learning rate")
    betas: tuple[BelowOne, BelowOne] = listed(0.9, 0.95, description="decays of the two moments")
    weight_decay: NotNegative = Field(0.0, description="decoupled from the gradient")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    warmup_steps: WholeNumber = Field(0, description="0: none")


class Ema(Section):
    """Moving averages of the weights."""

    decays: tuple[BelowOne, ...] = listed(0.9999, description="constant decays, each an average of its own")
    sigma_rel: tuple[RelativeWidth, ...] = listed(
        0.05, 0.10, description="relative widths of the power-function averages that others are rebuilt from"
    )
    snapshot_every: Count | None = Field(None, description="steps between snapshots of them; null: none")


class Checkpoint(Section):
    """What is saved, and how much of it stays."""

    every: Count = Field(description="steps between checkpoints")
    keep_last: Count = Field(3, description="the newest so many stay")
    keep_every: Count | None = Field(None, description="those of every so many steps stay too; null: none")


class Sample(Section):
    """Images drawn while it trains, always from the same noise."""

    every: Count | None = Field(None, description="steps between grids; null: none")
    num: Count = Field(16, description="images in the grid")
    steps: Count = Field(50, description="of the sampler")
    method: Literal["heun", "euler"] = Field("heun", description="heun evaluates the model twice a step")
    guidance: float = Field(2.3, description="scale of classifier-free guidance; 1: none")
    interval: tuple[Fraction, Fraction] = listed(0.0, 0.88, description="noise levels where guidance acts, low first")


class Evaluate(Section):
    """Fréchet distance between the data and samples drawn as in `sample`, by torch-fidelity, while it trains."""

    every: Count | None = Field(None, description="steps between evaluations; null: none")
    num: Annotated[int, Field(ge=2)] = Field(10_000, description="samples to draw; distances of other numbers differ")
    batch_size: Count = Field(64, description="samples at a time on a rank")
    extractor: Text = Field("inception-v3-compat", description="torch-fidelity's name, or classifier: of this package")
    weights: Text | None = Field(None, description="file of the weights of the extractor; null: downloaded")
    reference: Text | None = Field(None, description="npz file with mu and sigma; null: taken from the training images")


class Config(Section):
    """A whole training. Raises pydantic's ValidationError; `load_config` makes one line of it."""

    model: Model
    subspace: Subspace
    data: Data
    loss: Loss = Loss()
    train: Train
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    checkpoint: Checkpoint
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    deepspeed: dict[str, JsonValue] = Field(description="DeepSpeed's own configuration, passed on as it is")

    @model_validator(mode="after")
    def check(self):
        if faults := [*contradictions(self), *deepspeed_contradictions(self)]:
            raise ValueError(faults)
        return self


# ---- What does not fit together: the key that is to blame, and why ---------------------------------------------------
def contradictions(c: Config) -> Iterator[tuple[str, str]]:
    try:
        net = network(c.model)
    except InputError as e:
        yield "model.size", str(e)
        return
    if c.model.image_size % net["patch_size"]:
        yield "model.image_size", f"must be a multiple of the patch of {c.model.size}, but it is {c.model.image_size}"
    else:
        try:
            check_sizes(net)
        except InputError as e:
            yield "model.options", f"make no network: {e}"
    if net["in_context_start"] >= net["depth"]:
        yield "model.options.in_context_start", f"must be below the depth {net['depth']}: no block would see the class"
    dim = net["channels"] * net["patch_size"] ** 2
    if isinstance(c.subspace.rank, int) and c.subspace.rank > dim:
        yield "subspace.rank", f"must be at most {dim}, all of a patch of {c.model.size}, but it is {c.subspace.rank}"
    if c.data.kind == "shapes" and c.data.size is None:
        yield "data.size", "is needed for generated images: how many there are"
    if c.data.kind != "shapes" and c.data.path is None:
        yield "data.path", f"is needed for {c.data.kind}, as with --set data.path=PATH"
    if c.loss.repa and c.loss.repa.after > net["depth"]:
        yield "loss.repa.after", f"must be at most {net['depth']}, the blocks there are, but it is {c.loss.repa.after}"
    for key, names in (
        ("ema.decays", [Profile(decay=decay).name for decay in c.ema.decays]),
        ("ema.sigma_rel", [Profile(sigma_rel=width).name for width in c.ema.sigma_rel]),
    ):
        if len(set(names)) < len(names):
            yield key, f"has two that are the same when rounded as in their names: {short(', '.join(names))}"
    if c.ema.snapshot_every and not c.ema.sigma_rel:
        yield "ema.snapshot_every", "needs ema.sigma_rel: there is nothing to take snapshots of"
    if c.checkpoint.keep_every and c.checkpoint.keep_every % c.checkpoint.every:
        yield "checkpoint.keep_every", f"must be a multiple of checkpoint.every, but it is {c.checkpoint.keep_every}"
    if c.evaluate.every and c.evaluate.extractor == "classifier" and not c.evaluate.weights:
        yield "evaluate.weights", "is needed for the extractor classifier: the file that it was saved to"
    if c.sample.interval[0] > c.sample.interval[1]:
        yield "sample.interval", f"must have its low end first, but it is {list(c.sample.interval)}"


REFUSED = {  # in the section deepspeed
    "optimizer": "is not used: AdamW has a section of its own, optimizer",
    "scheduler": "is not used: see optimizer.warmup_steps",
    "bfloat16": "is an old name of bf16: use that",
    "amp": "is gone from DeepSpeed: use train.precision: bf16",
}
SWITCHES = {
    "fp16": "float16 is not supported: its loss scale skips steps and is in no checkpoint. Use train.precision: bf16",
    "torch_autocast": "autocast is what train.precision: bf16 switches on: use that",
}
ROUNDED = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
MISSPELT = ("zero_optimization", "gradient_clipping", "gradient_accumulation_steps", "bf16", "fp16")


def deepspeed_contradictions(c: Config) -> Iterator[tuple[str, str]]:
    """DeepSpeed ignores what it does not know, and leaves to chance what contradicts the rest; here it is said."""
    given = c.deepspeed
    for name in given:
        if name in REFUSED:
            yield f"deepspeed.{name}", REFUSED[name]
        elif name not in MISSPELT and (near := get_close_matches(name, MISSPELT, 1, cutoff=0.85)):
            yield f"deepspeed.{name}", f"is unknown: did you mean deepspeed.{near[0]}?"
    on = {}
    for name in ("bf16", *SWITCHES):
        section = given.get(name) or {}
        on[name] = section.get("enabled", False) if isinstance(section, dict) else None
        if not isinstance(on[name], bool):
            yield f"deepspeed.{name}", "must be a section with the key enabled: true or false"
        elif on[name] and name in SWITCHES:
            yield f"deepspeed.{name}.enabled", f"cannot be true: {SWITCHES[name]}"
    if on["bf16"]:
        if c.train.precision != "bf16":
            yield "deepspeed.bf16.enabled", f"is true, which contradicts train.precision: {c.train.precision}"
        for name in ROUNDED:
            if given["bf16"].get(name):
                yield f"deepspeed.bf16.{name}", "is refused: averages and checkpoints are made of float32 weights"
    clip = given.get("gradient_clipping", 0)
    if isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0:
        yield "deepspeed.gradient_clipping", f"must be a number, at least 0, but it is {shown(clip)}"
    for name, expected in (
        ("train_batch_size", c.train.global_batch_size),
        ("train_micro_batch_size_per_gpu", c.train.micro_batch_size),
    ):
        if name in given and expected is not None and not same(given[name], expected):
            yield f"deepspeed.{name}", disagreement(given[name], expected)
    yield from zero_contradictions(given.get("zero_optimization"))


def zero_contradictions(zero: object) -> Iterator[tuple[str, str]]:
    key = "deepspeed.zero_optimization"
    if not isinstance(zero, dict):
        yield key, "must be a section with the key stage"
        return
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        yield f"{key}.stage", f"must be 0, 1, 2 or 3, but it is {shown(stage)}"
        return
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(name) or {}
        device = section.get("device", "none") if isinstance(section, dict) else None
        if device == "nvme":
            yield f"{key}.{name}.device", "cannot be nvme: averages and checkpoints need the weights in memory. Use cpu"
        elif device not in ("cpu", "none"):
            yield f"{key}.{name}", "must be a section with the key device: cpu or none"
        elif device == "cpu" and stage < lowest:
            yield f"{key}.{name}", f"needs stage {lowest} or above, but the stage is {stage}"
        elif device == "cpu" and section.get("super_offload"):
            yield f"{key}.{name}.super_offload", "is refused: averages and checkpoints cannot see such weights"
    if zero.get("zenflow") is not None:
        yield f"{key}.zenflow", "is refused: averages and checkpoints cannot see such weights"


def disagreement(given: object, expected: int) -> str:
    return f"is {shown(given)}, but by the section train it is {expected}: leave it out, it is derived"


# ---- What follows from a configuration -------------------------------------------------------------------------------
def network(model: Model) -> dict:
    """All arguments of `JiT`: the published ones of the size, and what is set instead. InputError for no such size."""
    size, _, patch = model.size.partition("/")
    if size not in SIZES or not re.fullmatch("[1-9][0-9]{0,3}", patch):
        names = ", ".join(SIZES)
        raise InputError(f"must be SIZE/PATCH, such as B/16, with SIZE in {names}, but it is {shown(model.size)}")
    defaults = {name: p.default for name, p in inspect.signature(JiT).parameters.items() if p.default is not p.empty}
    given = {"dropout": model.dropout, **dict(model.options)}
    return {
        **defaults,
        **SIZES[size],
        "patch_size": int(patch),
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "checkpoint_every": model.checkpoint_every,
        **{name: value for name, value in given.items() if value is not None},
    }


def bf16_weights(config: Config) -> bool:
    """Whether DeepSpeed keeps the weights in bfloat16, beside float32 originals. Then autocast has nothing to do."""
    return bool((config.deepspeed.get("bf16") or {}).get("enabled", False))


def batch_sizes(config: Config, world: int) -> tuple[int, int]:
    """(images at a time on a rank, how often before a step). InputError if `world` ranks cannot share the batch."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % (world * (micro or 1)):
        by = f"{world} ranks" + (f" x train.micro_batch_size {micro}" if micro else "")
        raise InputError(f"train.global_batch_size {total} is not divisible by {by}")
    micro = micro or total // world
    return micro, total // (world * micro)


def deepspeed_config(config: Config, world: int) -> dict:
    """The dictionary for `deepspeed.initialize`, without an optimizer: that comes from the section of this name.

    Raises InputError if `world` ranks cannot share the batch, or the section deepspeed says otherwise.
    """
    micro, accumulation = batch_sizes(config, world)
    derived = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    for name, value in derived.items():
        if not same(config.deepspeed.get(name, value), value):
            raise InputError(f"deepspeed.{name} {disagreement(config.deepspeed[name], value)} on {world} ranks")
    defaults = {
        "steps_per_print": 2**62,  # the loop has a line of its own
        "gradient_clipping": 0.0,  # none; DeepSpeed's own default is a norm of 1
        "zero_force_ds_cpu_optimizer": False,  # with CPU offload, DeepSpeed would refuse torch's AdamW
    }
    return defaults | copy.deepcopy(config.deepspeed) | derived


def same(given: object, expected: int) -> bool:
    return given == expected and not isinstance(given, bool)


# ---- Going on with a run ---------------------------------------------------------------------------------------------
MAY_CHANGE = (  # without making another training of it: the weights after a given step stay what they are
    "train.steps",  # longer, or shorter: the learning rate does not depend on it
    "train.micro_batch_size",  # the same images make up a step, however they are cut, as on another number of ranks
    "train.compile",
    "train.skip_nonfinite",
    "model.checkpoint_every",  # of memory and time only
    "data.path",  # data is moved between machines
    "data.workers",
    "ema.snapshot_every",  # what is taken out, not what is averaged
    "checkpoint",
    "sample",
    "evaluate",
    "deepspeed.zero_optimization",  # the checkpoints are of any stage
    "deepspeed.train_batch_size",  # these three must agree with the section train, given or not
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
    "deepspeed.tensorboard",  # what is told of the run, and where
    "deepspeed.wandb",
    "deepspeed.csv_monitor",
    "deepspeed.comet",
    "deepspeed.steps_per_print",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.flops_profiler",
)


def differences(there: Config, here: Config) -> list[str]:
    """What makes `here` another training than `there`, as in "train.seed: 0 there, 1 here"; MAY_CHANGE does not."""
    return list(differing(there.model_dump(), here.model_dump(), ""))


def differing(there: object, here: object, key: str) -> Iterator[str]:
    if key in MAY_CHANGE:
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            below = f"{key}.{name}" if key else name
            yield from differing(there.get(name, ABSENT), here.get(name, ABSENT), below)
    elif there != here or isinstance(there, bool) != isinstance(here, bool):
        yield f"{key}: {in_yaml(there)} there, {in_yaml(here)} here"


ABSENT = object()


def in_yaml(value: object) -> str:
    if value is ABSENT:
        return "not set"
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, **STYLE)
    return text.removesuffix("...\n").strip()


# ---- Reading ---------------------------------------------------------------------------------------------------------
CONFIGS = files("asymflow") / "configs"
LARGEST_FILE, DEEPEST, LARGEST_NUMBER = 50_000, 20, 2**63  # bytes, levels; what 64 bits hold
Keys = tuple[str | int, ...]


class Origin(NamedTuple):
    """Where a value was given, and how it was written there."""

    place: str
    text: str | None = None


class Layer(NamedTuple):
    """Values, and where each of them came from."""

    values: Any
    origins: dict[Keys, Origin]

    def over(self, below: "Layer") -> "Layer":
        return Layer(merged(below.values, self.values), below.origins | self.origins)


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A shipped configuration by its name (see `shipped`), or a YAML file; then `overrides`, such as "train.steps=10".

    The value of an override is YAML too: a number, a word, a list as in "ema.decays=[0.999, 0.9999]".
    Raises InputError, one line with file, line and key, and the nearest right key if that one does not exist.
    """
    layer = read_file(str(name_or_path))
    for override in overrides:
        layer = read_override(override).over(layer)
    try:
        return Config.model_validate(layer.values)
    except ValidationError as e:
        raise InputError(first_fault(e, layer)) from None


def shipped() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in CONFIGS.iterdir() if file.name.endswith(".yaml"))


def read_file(name: str, folder: Path = Path(), above: tuple[str, ...] = (), asked: str = "") -> Layer:
    """A file and, below it, its base. `above`: the files that are based on it; `asked`: where the last of them says so.

    A relative path starts from `folder`.
    """
    if name in shipped():
        file, label, folder = CONFIGS / f"{name}.yaml", f"asymflow/configs/{name}.yaml", Path()
    else:
        file = folder / name
        label, folder = one_line(file), file.parent
        if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for what cannot be a name)
            near = get_close_matches(name, shipped(), 1)
            hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
            raise InputError(f"{asked}{short(label)} is neither a file nor a shipped configuration: {hint}")
    identity = os.path.realpath(file) if isinstance(file, Path) else label
    if identity in above:
        raise InputError(f"{asked}{label} is based on itself, directly or through its base")
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        text = content.decode()
    except OSError as e:
        raise InputError(f"{label} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{label} is not text in UTF-8: is it a YAML file?") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"{label} has more than {LARGEST_FILE} bytes: that is no configuration")
    layer = parse(text, lambda line: f"{label}, line {line + 1}")
    if not isinstance(layer.values, dict):
        found = "it is empty" if layer.values is None else f"it is {shown(layer.values)}"
        raise InputError(f"{label} must have sections of keys, such as train: {{steps: 1000}}, but {found}")
    layer.origins[()] = Origin(label)
    base = layer.values.pop("base", None)
    if base is None:
        return layer
    place = layer.origins["base",].place
    if not isinstance(base, str) or not base:
        raise InputError(f"{place}: base must be a name or a path, but it is {shown(base)}")
    return layer.over(read_file(base, folder, (*above, identity), f"{place}: base "))


def read_override(text: str) -> Layer:
    place = short(one_line(f"--set {text}"))
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path) or not key.isprintable():
        raise InputError(f"{place}: expected KEY=VALUE, such as train.steps=1000")
    values, origins = parse(value, lambda line: place, path)
    for name in reversed(path):
        values = {name: values}
    return Layer(values, origins)


def merged(below: object, above: object) -> object:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: merged(below[name], value) if name in below else value for name, value in above.items()}


# ---- YAML 1.2, core schema, without what a configuration has no use for ----------------------------------------------
TAG = "tag:yaml.org,2002:"
SCALARS = [
    (f"{TAG}null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (f"{TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (f"{TAG}int", re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    (f"{TAG}float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")),  # no NaN, no infinity
]
CONVERTERS = {
    f"{TAG}null": lambda text: None,
    f"{TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{TAG}int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    f"{TAG}float": float,
    f"{TAG}str": str,
}


class Loader(yaml.SafeLoader):
    """Reads nodes only: what they mean is decided by `construct`."""

    yaml_implicit_resolvers = {None: SCALARS}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"write out what *{event.anchor} is", problem_mark=event.start_mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads: one key a line, lists within the line, no aliases."""

    yaml_implicit_resolvers = {None: SCALARS}  # noqa: RUF012

    def ignore_aliases(self, data):
        return True

    def represent_list(self, data):
        return self.represent_sequence(f"{TAG}seq", data, flow_style=True)


Dumper.add_representer(list, Dumper.represent_list)
Dumper.add_representer(tuple, Dumper.represent_list)
STYLE = dict(sort_keys=False, width=math.inf)


def dump(config: Config) -> str:
    """All keys, in the order of the classes, in ASCII. From a file with this text `load_config` makes it again."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, default_flow_style=False, **STYLE)


def parse(text: str, place: Callable[[int], str], path: Keys = ()) -> Layer:
    """What a text in YAML says. `place`: what to call a line of it, counted from 0; `path`: of its values."""
    origins: dict[Keys, Origin] = {}
    try:
        loader = Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        reason = one_line(", ".join(filter(None, (e.context, e.problem))))
        tab = " (indent with spaces)" if "'\\t'" in reason else ""
        raise InputError(f"{place(mark.line if mark else 0)}: {reason}{tab}") from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position)
        raise InputError(f"{place(line)}: the character {chr(e.character)!a} is not allowed") from None
    except (ValueError, OverflowError) as e:  # numbers in escapes and directives
        raise InputError(f"{place(loader.line)}: this is not YAML ({one_line(e)})") from None
    values = None if root is None else construct(root, path, place, origins)
    origins.setdefault(path, Origin(place(0), ""))
    return Layer(values, origins)


def construct(node: yaml.Node, path: Keys, place: Callable[[int], str], origins: dict[Keys, Origin]) -> object:
    here = place(node.start_mark.line)
    origins.setdefault(path, Origin(here, node.value if isinstance(node, yaml.ScalarNode) else None))
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        values = {}
        for key, value in node.value:
            at = place(key.start_mark.line)
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{at}: a key must be a word, but this is a list or a section")
            below = (*path, checked_text(key.value, at))
            if key.value in values:
                first = origins[below].place.rpartition(", ")[2]
                raise InputError(f"{at}: {dotted(below)} is given twice, the first time at {first}")
            origins[below] = Origin(at, value.value if isinstance(value, yaml.ScalarNode) else None)
            values[key.value] = construct(value, below, place, origins)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        return [construct(value, (*path, i), place, origins) for i, value in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in CONVERTERS:
        raise InputError(f"{here}: the tag {shown(node.tag)} is not allowed")
    text = checked_text(node.value, here)
    try:
        value = CONVERTERS[node.tag](text)
    except (ValueError, KeyError):  # too many digits, or an explicit tag such as !!int on something else
        value = math.inf
    if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
        raise InputError(f"{here}: {dotted(path)} is no number that can be used: {short(text)}")
    return value


def checked_text(text: str, place: str) -> str:
    for character in text:
        if not character.isprintable():  # in a key or a path it is a slip, and messages are to stay one line
            raise InputError(f"{place}: the character {character!a} is not allowed")
    return text


# ---- Saying what is wrong --------------------------------------------------------------------------------------------
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text, not empty",
    "tuple_type": "a list",
    "too_long": "a list of {max_length}",
    "too_short": "a list of more than {length}",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}


def first_fault(error: ValidationError, layer: Layer) -> str:
    """One line on the first thing that is wrong: wrong keys and values before missing ones, which may be the same."""
    faults: dict[Keys, list[str]] = {}
    for e in sorted(error.errors(include_url=False), key=lambda e: e["type"] == "missing"):
        type_, loc = e["type"], e["loc"]
        if type_ == "missing" and isinstance(loc[-1], int):  # an element of a list
            type_, loc, e["ctx"] = "too_short", loc[:-1], {"length": loc[-1]}
        if type_ == "value_error":
            faults |= {tuple(key.split(".")): [f"{key} {reason}"] for key, reason in e["ctx"]["error"].args[0]}
        elif type_ == "extra_forbidden":
            faults[loc] = []
        elif type_ == "missing":
            faults[loc] = [f"{dotted(loc)} is missing: give it in the file or by --set"]
        else:
            path, value = locate(loc, layer.values)
            expected = EXPECTED.get(type_, e["msg"]).format(**e.get("ctx", {}))
            if path in faults:  # the other branch of "a number or one of these words"
                expected = f"{faults[path][0]} or {expected}"
            plain = not isinstance(value, str | list | dict)  # a number is shown as it was written
            faults[path] = [expected, short((plain and origin(path, layer).text) or shown(value))]
    path, words = next(iter(faults.items()))
    if not words:
        message = f"unknown key {dotted(path)}: {suggestion(path)}"
    else:
        message = words[0] if len(words) == 1 else f"{dotted(path)} must be {words[0]}, but it is {words[1]}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{origin(path, layer).place}: {message}{more}"


def locate(loc: Keys, values: object) -> tuple[Keys, object]:
    """The part of pydantic's `loc` that is a path into the values (the rest names branches of a union), and its end."""
    for i, part in enumerate(loc):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return loc[:i], values
    return loc, values


def origin(path: Keys, layer: Layer) -> Origin:
    """Where the value was given, or else the section that should have it, or else something in that section."""
    found, _ = locate(path, layer.values)
    inside = (place for below, place in layer.origins.items() if below[: len(found)] == found)
    return layer.origins.get(found) or next(inside)


def suggestion(path: Keys) -> str:
    """The nearest key: in the same section, or else anywhere."""
    *section, name = map(str, path)
    if dotted(path) in known_keys():
        return f"within a file, sections are nested, as in {name.replace('.', ': {', 1)}: ...}}"
    siblings = {key[-1]: ".".join(key) for key in map(split, known_keys()) if key[:-1] == section}
    anywhere = {key[-1]: ".".join(key) for key in map(split, reversed(known_keys()))}
    for choice, cutoff in ((siblings, 0.5), (anywhere, 0.75)):
        if near := get_close_matches(name, choice, 1, cutoff):
            return f"did you mean {choice[near[0]]}?"
    return f"the keys of {dotted(section) or 'a configuration'} are {', '.join(siblings)}"


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def split(key: str) -> list[str]:
    return key.split(".")


def dotted(path: Iterable[str | int]) -> str:
    return short("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix("."))


def shown(value: object) -> str:
    """A value as a user would recognize it."""
    if isinstance(value, dict):
        return "a section"
    return short(repr(value) if isinstance(value, str) else in_yaml(value))


def short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: object) -> str:
    return " ".join(str(text).split())
