"""Whether a run may go on with another configuration than the one it began with."""

from collections.abc import Iterator

from asymflow.training.config.sections import Sections
from asymflow.yaml12 import in_yaml

MAY_CHANGE = (  # without making another training of it
    "train.steps",  # longer, or shorter: the learning rate does not depend on it
    # The images, labels and noise of a step stay, however they are cut. Not so the masks of dropout, if there is any,
    # as on another number of ranks: from then on the weights are others, but no better or worse.
    "train.micro_batch_size",
    "train.compile",
    "train.skip_nonfinite",
    "train.log_every",
    "model.checkpoint_every",  # of memory and time only
    "data.path",  # data is moved between machines
    "data.workers",
    "data.fewer_classes",  # what is allowed, not what there is
    "loss.repa.model",  # and so is DINOv2
    "loss.perceptual.vgg",  # the weights of torchvision, wherever they are, but see `UNLESS`
    "finetune.base",  # that it is the same model is seen in its weights
    "finetune.subspace",  # a copy is in the run, and no other one is taken
    "finetune.checkpointing",
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
UNLESS = {"loss.perceptual.vgg": "random"}  # a value of such a key: to change to it, or from it, is another training
ABSENT = object()


def differences(there: Sections, here: Sections) -> list[str]:
    """What makes `here` another training than `there`, as in "train.seed: 0 there, 1 here"; MAY_CHANGE does not."""
    return list(differing(everything(there), everything(here), ""))


def everything(sections: Sections) -> dict:
    found = sections.model_dump()
    found["loss"]["objective"] = sections.objective  # the same, whether it is given by its name or not
    return found


def differing(there: object, here: object, key: str) -> Iterator[str]:
    if key in MAY_CHANGE and (key not in UNLESS or (there == UNLESS[key]) == (here == UNLESS[key])):
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            below = f"{key}.{name}" if key else name
            yield from differing(there.get(name, ABSENT), here.get(name, ABSENT), below)
    elif there != here or isinstance(there, bool) != isinstance(here, bool):  # 1 is not true
        yield f"{key}: {given(there)} there, {given(here)} here"


def given(value: object) -> str:
    return "not set" if value is ABSENT else in_yaml(value)
