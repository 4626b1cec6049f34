"""Files that were written at 3f6b099, before the code moved to where it is now: they are read, and gone on with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import Launched
from safetensors.torch import load_file

from asymflow import AsymFlow, Subspace, generate
from asymflow.cli import main as asymflow
from asymflow.data.encoded import EncodedShards
from asymflow.data.shards import TarShards

BEFORE = Path(__file__).parents[1] / "data" / "made_at_3f6b099"


@pytest.fixture
def before(tmp_path):
    """A copy: to go on is to write there."""
    return shutil.copytree(BEFORE, tmp_path / "before")


def expected(name):
    return load_file(BEFORE / "expected" / f"{name}.safetensors")


def test_a_model_draws_the_same_images():
    drawn = generate(AsymFlow.from_pretrained(BEFORE / "model"), [0, 1, 2, 3], steps=4, guidance=2.0)
    torch.testing.assert_close(drawn, expected("model")["images"], rtol=0, atol=1e-5)


def test_a_run_goes_on_as_it_would_have(before):
    """The same losses in steps 5 to 8 as a training of 8 steps had then, and the model exported of step 4."""
    assert asymflow(["export", "--run", str(before / "run"), "--out", str(before / "again")]) == 0
    again, then = (load_file(folder / "model.safetensors") for folder in (before / "again", BEFORE / "model"))
    assert again.keys() == then.keys()
    assert all(torch.equal(value, then[name]) for name, value in again.items())
    arguments = ["--config", str(before / "run/config.yaml"), "--out", str(before / "run"), "--set", "train.steps=8"]
    assert Launched(1, arguments=arguments).wait() == [0]
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in (before / "run/metrics.jsonl", BEFORE / "expected/metrics.jsonl")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_shards_have_the_same_images(before):
    dataset, then = TarShards(before / "packed", 16), expected("packed")
    assert torch.equal(torch.stack([dataset[i].image for i in range(len(dataset))]), then["images"])
    assert [dataset.label(i) for i in range(len(dataset))] == then["labels"].tolist()
    encoded, then = EncodedShards(before / "encoded"), expected("adapter")
    samples = [encoded[i] for i in range(len(encoded))]
    assert torch.equal(torch.stack([s.image for s in samples]), then["images"])
    assert torch.equal(torch.stack([s.latent for s in samples]), then["latents"])


def test_an_adapter_makes_the_same_pixel_model():
    diffusers = pytest.importorskip("diffusers")
    from asymflow.backbones.flux2.adapter import load_adapter

    then = expected("adapter")
    base = diffusers.Flux2Transformer2DModel.from_pretrained(BEFORE / "transformer")
    flow = load_adapter(base, BEFORE / "adapter").eval()
    assert torch.equal(flow.subspace.basis, Subspace.load(BEFORE / "subspace.safetensors").basis.float())
    with torch.no_grad():
        velocity = flow(then["x"], torch.tensor([0.3, 0.9]), encoder_hidden_states=then["prompts"])
    torch.testing.assert_close(velocity, then["velocity"], rtol=1e-4, atol=1e-4)
