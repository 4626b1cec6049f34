"""Backbones for tests of the wrapper, and models of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT

ONE_LINE = r"\A[^\n]+\Z"


class Oracle(nn.Module):
    """A backbone without weights that has the right answer and remembers what it was asked."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def forward(self, tokens, tau, **conditions):
        self.tokens, self.tau, self.conditions = tokens, tau, conditions
        return torch.zeros_like(tokens) if self.answer is None else self.answer


class Small(nn.Module):
    """A backbone of somebody else: it mixes tokens, and has a buffer and a configuration of its own."""

    def __init__(self, dim=12, patch_size=None):
        super().__init__()
        self.first, self.second = nn.Linear(dim, 8), nn.Linear(8, dim)
        self.register_buffer("shift", torch.rand(8))
        self.config = {"dim": dim}
        self.patch_size = patch_size

    def forward(self, tokens, tau):
        h = self.first(tokens) + self.shift + tau[:, None, None].to(tokens.dtype)
        return self.second(torch.tanh(h + h.mean(1, keepdim=True)))


def jit_flow(rank=5, scale=0.5, **options):
    """A JiT of 16 x 16 pixels, patch 4. Its head and modulation start at zero: here they do not."""
    torch.manual_seed(0)
    backbone = JiT.from_name("tiny/4", image_size=16, num_classes=10)
    for weight in backbone.parameters():
        nn.init.normal_(weight, std=0.05)
    subspace = Subspace.random(48, rank, scale=scale, color_space="sRGB", fitted_on="nothing")
    return AsymFlow(backbone, subspace, **options).eval()


def small_flow(**options):
    torch.manual_seed(1)
    return AsymFlow(Small(), Subspace.random(12, 4, scale=2.0), patch_size=2, **options).eval()


def jit_inputs(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 16, 16, generator=generator, dtype=dtype)
    return x, torch.linspace(0.1, 1, batch, dtype=dtype), torch.arange(batch) % 11


IMAGE, SPACE = torch.zeros(2, 3, 4, 6), Subspace.random(12, 3)
wrap = lambda backbone=None, subspace=SPACE, **options: AsymFlow(backbone or Oracle(), subspace, **options)
call = lambda image=IMAGE, sigma=0.5, answer=None: wrap(Oracle(answer), patch_size=2)(image, sigma)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_same(a, b):
    """Configuration, weights, subspace and velocity, to the last bit."""
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert b.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(b.state_dict()[name], tensor)
    x, sigma, labels = jit_inputs()
    inputs = {"labels": labels} if isinstance(a.backbone, JiT) else {}
    assert torch.equal(a(x, sigma, **inputs), b(x, sigma, **inputs))


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(source, *named, **options):
    with pytest.raises(InputError, match=ONE_LINE) as error:
        AsymFlow.from_pretrained(source, **options)
    assert [word for word in named if word not in str(error.value)] == []
