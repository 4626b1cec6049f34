"""What trainings import: imported once, by the process that all of them are forked from."""

import contextlib

import deepspeed.ops

import asymflow.training.start  # noqa: F401

with contextlib.suppress(ImportError):
    import asymflow.training.finetuning

with contextlib.suppress(ImportError):  # torch.compile, which takes seconds. Not in every version of DeepSpeed
    import deepspeed.runtime.zero.muon.muon_optimizer

getattr(deepspeed.ops, "__compatible_ops__", None)  # DeepSpeed asks the C compiler what there is, once
