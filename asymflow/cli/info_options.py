"""Which options of `asymflow info` count for what it describes. Others are refused, since they would change nothing."""

import argparse

from asymflow.errors import InputError

TRAINING = ("image_size", "batch", "gpus", "precision")
COUNTED = {  # by the first words of what is described; --json counts for all
    "config": (),
    "--classes": ("classes",),
    "a FLUX.2 klein": ("image_size", "batch", "gpus", "lora_rank", "full", "offload", "text_length"),
    "a finetuning": ("step", "ema"),
    "an adapter": (),
    "a subspace": (),
    "a model that could be trained": (*TRAINING, "rank"),
    "a training run": (*TRAINING, "step", "ema", "backbone"),
    "a folder of save_pretrained": (*TRAINING, "backbone"),
    "a published": (*TRAINING, "in_context_start"),
}
EVERY = dict.fromkeys(name for names in COUNTED.values() for name in names)


def check(args: argparse.Namespace, kind: str) -> None:
    """InputError if an option was given that does not count for this kind, such as "a training run, step 3"."""
    counted = next(names for words, names in COUNTED.items() if kind.startswith(words))
    for name in EVERY:
        value = getattr(args, name)
        if name not in counted and value is not None and value is not False:
            these = ", ".join(map(option, ["json", *counted]))
            raise InputError(f"{option(name)} does not go with {kind}: leave it out; what does is {these}")


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
