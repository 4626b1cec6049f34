"""A backbone of somebody else, which has what the contract of asymflow/backbones asks for, and nothing else."""

import json

import pytest
import torch
from torch import nn

from asymflow import AsymFlow, InputError, Subspace, cost, generate
from asymflow.cli import main

SIDE, CLASSES = 8, 3


class Foreign(nn.Module):
    def __init__(self, dim=12, width=16):
        super().__init__()
        self.into, self.out = nn.Linear(dim, width), nn.Linear(width, dim)
        self.time, self.kind = nn.Linear(1, width), nn.Embedding(CLASSES + 1, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, tokens, tau, labels):
        condition = self.time(tau[:, None].to(tokens)) + self.kind(labels)
        return self.out(self.layer(self.into(tokens) + condition[:, None]))


class Telling(Foreign):
    """The same, and all that it may tell of itself."""

    patch_size, grid, num_classes = 2, (SIDE // 2, SIDE // 2), CLASSES

    def __init__(self, **config):
        super().__init__(**config)
        self.config = config


def flow_of(kind, **options):
    torch.manual_seed(0)
    return AsymFlow(kind(), Subspace.random(12, 3), patch_size=2, **options).eval()


OPTIONS = dict(steps=2, guidance=2.0, interval=(0.0, 0.6))


def test_it_is_sampled_from_when_it_is_told_what_it_does_not_tell():
    told = generate(flow_of(Foreign), [0, 2], size=(SIDE, SIDE), null_label=CLASSES, **OPTIONS)
    assert told.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(told, generate(flow_of(Telling), [0, 2], **OPTIONS))
    assert not torch.equal(told, generate(flow_of(Telling), [0, 2], null_label=1, **OPTIONS))
    for options, word in [(dict(size=(SIDE, SIDE)), "null_label"), (dict(null_label=CLASSES), "size=")]:
        with pytest.raises(InputError, match=f"give {word}") as error:
            generate(flow_of(Foreign), [0, 2], **options, **OPTIONS)
        assert "\n" not in str(error.value)
    unguided = generate(flow_of(Foreign), [0, 2], size=(SIDE, SIDE), steps=2)  # no such label is needed
    assert torch.equal(unguided, generate(flow_of(Telling), [0, 2], steps=2))
    with pytest.raises(InputError, match="label 4 is not a class"):
        generate(flow_of(Telling), [4], **OPTIONS)


class Talkative(Telling):
    """Returns more than the prediction, as the contract allows."""

    def forward(self, tokens, tau, labels):
        return super().forward(tokens, tau, labels), "more"


@pytest.mark.parametrize("guidance", [{"guidance": 1.0}, {"guidance": 2.0}, OPTIONS])
def test_of_a_tuple_the_first_is_sampled(guidance):
    drawn = [generate(flow_of(kind), [0, 2], **{"steps": 2} | guidance) for kind in (Telling, Talkative)]
    assert torch.equal(*drawn)


@pytest.mark.filterwarnings("error")
def test_it_is_saved_and_loaded_into_another_of_its_kind(tmp_path):
    image = generate(flow_of(Foreign), [1], size=(SIDE, SIDE), steps=1)
    with pytest.warns(UserWarning, match="Foreign has no `config`"):
        flow_of(Foreign).save_pretrained(tmp_path / "Foreign")
    AsymFlow(Telling(dim=12, width=16), Subspace.random(12, 3)).save_pretrained(tmp_path / "Telling")
    for kind, said in ((Foreign, "one yourself and pass"), (Telling, "with {'dim': 12, 'width': 16}, and pass")):
        with pytest.raises(InputError, match=said):
            AsymFlow.from_pretrained(tmp_path / kind.__name__)
    config = json.loads((tmp_path / "Telling" / "config.json").read_text())["network"]["config"]
    assert AsymFlow.from_pretrained(tmp_path / "Telling", backbone=Telling(**config)).config["network"]["config"]
    loaded = AsymFlow.from_pretrained(tmp_path / "Foreign", backbone=Foreign())
    assert torch.equal(generate(loaded, [1], size=(SIDE, SIDE), steps=1), image)


def test_its_operations_are_counted_when_its_conditions_are_known():
    shape, labels = (3, SIDE, SIDE), torch.zeros(1, dtype=torch.long)
    counted = cost.forward_flops(flow_of(Foreign), shape, labels=labels)
    assert counted == cost.forward_flops(flow_of(Telling), shape) > 0
    with pytest.raises(InputError, match="Foreign needs labels: give tensors") as error:
        cost.forward_flops(flow_of(Foreign), shape)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Foreign has no `config`")
@pytest.mark.parametrize("kind", [Foreign, Telling])
def test_info_says_of_its_folder_what_is_known(tmp_path, capsys, kind):
    flow_of(kind).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"class {kind.__name__}" in text
    assert "not counted: the backbone is not ours" in text
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == cost.parameters(flow_of(kind))[0]


class Unconditional(nn.Module):
    """Needs no labels; nothing trains it, but it has a price."""

    patch_size, num_classes, grid = 2, 0, (4, 4)

    def __init__(self):
        super().__init__()
        self.layer, self.config = nn.Linear(12, 12), {}

    def forward(self, tokens, tau):
        return self.layer(tokens)


def test_info_of_a_backbone_without_labels(tmp_path, capsys, monkeypatch):
    AsymFlow(Unconditional(), Subspace.random(12, 3)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--backbone", f"{__name__}:Unconditional", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops"]["forward"] > 0
    assert found["flops"]["training_step"] is None
    assert main(["info", str(tmp_path), "--backbone", f"{__name__}:Unconditional"]) == 0
    assert "training step  not counted" in capsys.readouterr().out
