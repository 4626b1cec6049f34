"""DeepSpeed's configuration, made from the training's configuration."""

import copy
import os
from collections.abc import Iterable
from difflib import get_close_matches

import torch
from pydantic import ValidationError

from asymflow.errors import InputError
from asymflow.training.config.derived import batch_sizes, disagreement, same
from asymflow.training.config.sections import Sections, known_keys
from asymflow.training.zero.internals import Watched, config_class, config_models
from asymflow.yaml12 import one_line, shown


def deepspeed_config(config: Sections, world: int) -> dict:
    """The dictionary for `deepspeed.initialize`. It has no optimizer: `make_engine` makes that.

    Raises InputError if `world` ranks cannot share the batch, if the section `deepspeed` contradicts other keys, or if
    DeepSpeed rejects it.
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
        "steps_per_print": 2**62,  # never: the loop prints its own line
        "gradient_clipping": 0.0,  # off; DeepSpeed's default is a norm of 1
        "zero_allow_untested_optimizer": True,  # allow the user's own optimizer
        "zero_force_ds_cpu_optimizer": False,  # else DeepSpeed refuses torch's AdamW with CPU offload
    }
    check_by_deepspeed({name: value for name, value in config.deepspeed.items() if name not in derived}, world)
    return defaults | copy.deepcopy(config.deepspeed) | derived


def check_by_deepspeed(given: dict, world: int) -> None:
    """Let DeepSpeed check the section, with one more key each time. InputError for the first key that it rejects.

    By itself DeepSpeed complains only after the model is built, in many lines, and ignores keys that it does not know:
    those that it does not look for.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator
    checked, options, looked_for = config_class(), {"train_batch_size": world}, set()
    for name, value in given.items():
        options[name] = value
        try:
            checked(Watched(copy.deepcopy(options), looked_for))
        except ValidationError as e:
            raise InputError(refusal(name, e)) from None
        except ImportError:  # DeepSpeed is not installed
            raise
        except Exception as e:  # of any type: DeepSpeed uses some sections before it checks them
            raise InputError(f"deepspeed.{name} is refused by DeepSpeed: {one_line(e)}{given_as(value)}") from None
    if unknown := [name for name in given if name not in looked_for]:
        raise InputError(unknown_key("deepspeed", unknown[0], looked_for))


def refusal(name: str, error: ValidationError) -> str:
    """The first error that DeepSpeed's pydantic models report for the key `name`, in one line."""
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"]))  # it may or may not begin with `name`
    section = "deepspeed" if first["loc"][:1] == (name,) else f"deepspeed.{name}"
    key = f"{section}.{path}".removesuffix(".")
    if first["type"] != "extra_forbidden":
        return f"{key} is refused by DeepSpeed: {one_line(first['msg'])}{given_as(first['input'])}"
    known = next((known_keys(m) for m in config_models() if m.__name__ == error.title), ())
    return unknown_key(section, path, known)


def unknown_key(section: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {section}.{near[0]}?" if near else "DeepSpeed has none of that name"
    return f"unknown key {section}.{name}: {hint}"


def given_as(value: object) -> str:
    return f", but it is {shown(value)}" if value is None or isinstance(value, str | int | float | list) else ""
