"""The configuration of DeepSpeed, from that of the training."""

import copy
import os
from difflib import get_close_matches

import torch
from pydantic import ValidationError

from asymflow.errors import InputError
from asymflow.training.config.derived import batch_sizes, disagreement, same
from asymflow.training.config.sections import Sections, known_keys
from asymflow.training.config.yaml12 import one_line, shown
from asymflow.training.zero.internals import config_class, config_models


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
        "zero_allow_untested_optimizer": True,  # one of the user's own
        "zero_force_ds_cpu_optimizer": False,  # with CPU offload, DeepSpeed would refuse torch's AdamW
    }
    check_by_deepspeed({name: value for name, value in config.deepspeed.items() if name not in derived}, world)
    return defaults | copy.deepcopy(config.deepspeed) | derived


def check_by_deepspeed(given: dict, world: int) -> None:
    """Let DeepSpeed read the section, one key more each time: InputError on the first that it cannot use.

    It would say so itself, but in many lines, and only when the model is built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    checked, options = config_class(), {"train_batch_size": world}
    for name, value in given.items():
        options[name] = value
        try:
            checked(copy.deepcopy(options))
        except ValidationError as e:
            raise InputError(refusal(name, e)) from None
        except ImportError:  # DeepSpeed itself is not there
            raise
        except Exception as e:  # anything: some of its sections it uses before it checks them
            raise InputError(f"deepspeed.{name} is refused by DeepSpeed: {one_line(e)}{given_as(value)}") from None


def refusal(name: str, error: ValidationError) -> str:
    """The first of what DeepSpeed's models say of the key `name`, in one line."""
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"]))  # within the section, or beginning with it
    section = "deepspeed" if first["loc"][:1] == (name,) else f"deepspeed.{name}"
    key = f"{section}.{path}".removesuffix(".")
    if first["type"] != "extra_forbidden":
        return f"{key} is refused by DeepSpeed: {one_line(first['msg'])}{given_as(first['input'])}"
    known = next((known_keys(m) for m in config_models() if m.__name__ == error.title), ())
    near = get_close_matches(path, known, 1, 0.5)
    hint = f"did you mean {section}.{near[0]}?" if near else "DeepSpeed has none of that name"
    return f"unknown key {key}: {hint}"


def given_as(value: object) -> str:
    return f", but it is {shown(value)}" if value is None or isinstance(value, str | int | float | list) else ""
