"""What the tests of this folder share."""

import pytest
import torch
from finetuning_runs import SIZES, config_of, learn
from PIL import Image

from asymflow import Subspace
from asymflow.cli import main as asymflow
from asymflow.data.encoded import EncodedShards
from asymflow.data.shapes import Shapes
from asymflow.training.objectives.finetuning import make_finetuned
from toy.tiny_flux2 import make_base, normalize_latents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base whose latent model has learnt a little, shards of two sizes, and a subspace."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for i, (height, width) in enumerate(SIZES):
        sample = Shapes(64, 64, 3)[i]
        picture = Image.fromarray((sample.image // 2).permute(1, 2, 0).numpy()).resize((width, height))
        picture.save(folder / f"images/{i:03d}.png")
        (folder / f"images/{i:03d}.txt").write_text(sample.caption)
    pipeline = make_base([path.read_text() for path in (folder / "images").glob("*.txt")])
    pictures = [Shapes(64, 48, 3)[i].image // 2 for i in range(64)]  # near the mean of normalized Oklab
    normalize_latents(pipeline.vae, torch.stack(pictures).float() / 127.5 - 1)
    pipeline.save_pretrained(folder / "base")
    places = {"--base": folder / "base", "--data": folder / "images", "--out": folder / "shards"}
    options = {**places, "--size": 48, "--max-length": 32, "--dtype": "float32", "--batch": 16}
    assert not asymflow(["data", "encode", *(str(word) for pair in options.items() for word in pair)])
    assert not asymflow(["subspace", "procrustes", f"--shards={folder}/shards", f"--out={folder}/subspace.safetensors"])
    learn(pipeline.transformer, EncodedShards(folder / "shards"))
    pipeline.transformer.save_pretrained(folder / "base/transformer")
    return folder


@pytest.fixture(scope="module")
def model(made):
    config = config_of(made)
    torch.manual_seed(0)
    return make_finetuned(config, Subspace.load(made / "subspace.safetensors"))
