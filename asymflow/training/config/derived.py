"""What follows from a configuration: the arguments of the network and of DeepSpeed."""

import copy
import inspect
import os
import re
from difflib import get_close_matches

import torch
from pydantic import ValidationError

from asymflow.backbones.jit import SIZES, JiT
from asymflow.errors import InputError
from asymflow.precision import Precision, usual_precision
from asymflow.training.config.sections import Model, Sections, known_keys
from asymflow.training.config.yaml12 import one_line, shown


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


def bf16_weights(config: Sections) -> bool:
    """Whether DeepSpeed keeps the weights in bfloat16, beside float32 originals. Then autocast has nothing to do."""
    return bool((config.deepspeed.get("bf16") or {}).get("enabled", False))


def sampling_precision(config: Sections, device: torch.device) -> Precision:
    return config.sample.precision or ("bf16" if bf16_weights(config) else usual_precision(device))


def batch_sizes(config: Sections, world: int) -> tuple[int, int]:
    """(images at a time on a rank, how often before a step). InputError if `world` ranks cannot share the batch."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % (world * (micro or 1)):
        by = f"{world} ranks" + (f" x train.micro_batch_size {micro}" if micro else "")
        raise InputError(f"train.global_batch_size {total} is not divisible by {by}")
    micro = micro or total // world
    return micro, total // (world * micro)


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------
def deepspeed_config(config: Sections, world: int) -> dict:
    """The dictionary for `deepspeed.initialize`, without an optimizer: that comes from the section of this name.

    Raises InputError if `world` ranks cannot share the batch, the section deepspeed says otherwise, or DeepSpeed cannot
    read it.
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
    check_by_deepspeed({name: value for name, value in config.deepspeed.items() if name not in derived}, world)
    return defaults | copy.deepcopy(config.deepspeed) | derived


def same(given: object, expected: int) -> bool:
    return given == expected and not isinstance(given, bool)


def disagreement(given: object, expected: int) -> str:
    return f"is {shown(given)}, but by the section train it is {expected}: leave it out, it is derived"


def check_by_deepspeed(given: dict, world: int) -> None:
    """Let DeepSpeed read the section, one key more each time: InputError on the first that it cannot use.

    It would say so itself, but in many lines, and only when the model is built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    from deepspeed.runtime.config import DeepSpeedConfig  # takes seconds: not before it is needed

    options = {"train_batch_size": world}
    for name, value in given.items():
        options[name] = value
        try:
            DeepSpeedConfig(copy.deepcopy(options))
        except ValidationError as e:
            raise InputError(refusal(name, e)) from None
        except Exception as e:  # anything: some of its sections it uses before it checks them
            raise InputError(f"deepspeed.{name} is refused by DeepSpeed: {one_line(e)}{given_as(value)}") from None


def refusal(name: str, error: ValidationError) -> str:
    """The first of what DeepSpeed's models say of the key `name`, in one line."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"]))  # within the section, or beginning with it
    section = "deepspeed" if first["loc"][:1] == (name,) else f"deepspeed.{name}"
    key = f"{section}.{path}".removesuffix(".")
    if first["type"] != "extra_forbidden":
        return f"{key} is refused by DeepSpeed: {one_line(first['msg'])}{given_as(first['input'])}"
    known = next((known_keys(m) for m in DeepSpeedConfigModel.__subclasses__() if m.__name__ == error.title), ())
    near = get_close_matches(path, known, 1, 0.5)
    hint = f"did you mean {section}.{near[0]}?" if near else "DeepSpeed has none of that name"
    return f"unknown key {key}: {hint}"


def given_as(value: object) -> str:
    return f", but it is {shown(value)}" if value is None or isinstance(value, str | int | float | list) else ""
