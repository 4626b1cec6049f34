"""What the tests of this folder share."""

import pytest
import torch

from asymflow import AsymFlow, Subspace
from asymflow.backbones.jit import JiT


@pytest.fixture(scope="module")
def flow():
    """A class-conditional model whose every weight matters, in float64."""
    torch.manual_seed(0)
    jit = JiT.from_name("tiny/4", image_size=16, num_classes=10)
    for weight in jit.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return AsymFlow(jit, Subspace.random(48, 8)).double().eval()
