"""What code of a user's own does not take is said, or refused; it is not dropped."""

import pytest
import torch
from torch import nn

from asymflow import AsymFlow, InputError, Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.repa import Aligned
from asymflow.training.zero import engine


@pytest.mark.parametrize(("kind", "lost"), [("torch.optim:SGD", ["betas"]), ("torch.optim:AdamW", [])])
def test_keys_that_an_optimizer_does_not_take_are_said(monkeypatch, kind, lost):
    told = []
    monkeypatch.setattr(engine, "say", told.append)
    settings = [f"optimizer.kind={kind}", "optimizer.betas=[0.5, 0.6]", "optimizer.weight_decay=0.1"]
    made = engine.make_optimizer(
        [{"params": [nn.Parameter(torch.ones(2))]}], load_config("shapes_tiny", settings).optimizer
    )
    assert made.defaults["weight_decay"] == 0.1
    assert [text.partition(": ")[2] for text in told] == [f"optimizer.{key}" for key in lost]


def test_alignment_of_a_backbone_that_has_no_width_or_gives_no_tokens_is_refused():
    class Net(nn.Module):
        patch_size, config = 2, {"width": 3}

        def forward(self, tokens, tau, labels):
            return tokens

    with pytest.raises(InputError, match="takes return_tokens_after: Net has not both"):
        Aligned(AsymFlow(Net(), Subspace.random(12, 2, patch_size=2)), 1, 4, 4)
