"""What trainings import: imported once, by the process that all of them are forked from."""

import contextlib
import importlib

import deepspeed.ops

NAMES = (
    "asymflow.training.start",
    "asymflow.training.finetuning",  # diffusers and peft
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch.compile, which takes seconds; not in every DeepSpeed
)
for name in NAMES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
getattr(deepspeed.ops, "__compatible_ops__", None)  # DeepSpeed asks the C compiler what there is, once
