"""What trainings import: imported once, by the process that all of them are forked from."""

import contextlib
import gc
import importlib

NAMES = (
    "asymflow.training.start",
    "asymflow.training.objectives.finetuning",  # diffusers and peft
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch.compile, which takes seconds; not in every DeepSpeed
)
gc.disable()
for name in NAMES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__", None)  # which asks the C compiler, once
gc.freeze()  # the garbage collector need not look through all of this again and again
gc.enable()
