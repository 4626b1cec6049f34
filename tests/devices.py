"""Devices that are not here."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asymflow import fitting, model, subspace
from asymflow.backbones import jit


class NoFloat64(TorchDispatchMode):
    """Within it the device `meta` is as the GPU of a Mac: no tensor on it may be in float64."""

    def __init__(self, monkeypatch):
        super().__init__()
        for module in (fitting, model, subspace, jit):
            monkeypatch.setattr(module, "has_float64", lambda device: torch.device(device).type != "meta")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            assert not (isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64), func
        return result
