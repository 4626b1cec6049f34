"""What the tests of this folder share."""

import numpy as np
import pytest
import torch
from encoding_runs import SETTINGS
from PIL import Image

from asymflow.data import encode as encoding
from asymflow.data.encode import encode
from asymflow.data.shapes import Shapes
from toy.tiny_flux2 import make_base


@pytest.fixture(scope="module")
def pipeline():
    """With statistics of the batch norm that are not those of a new one."""
    pipeline = make_base(Shapes(50, 32)[i].caption for i in range(50))
    g = torch.Generator().manual_seed(0)
    pipeline.vae.bn.running_mean.normal_(generator=g)
    pipeline.vae.bn.running_var.uniform_(0.5, 2, generator=g)
    return pipeline


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 photographs of three shapes and noise, with captions, in folders."""
    folder, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        width, height = [(90, 90), (128, 70), (64, 100)][i % 3]
        small = Image.fromarray(g.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"set{i % 2}" / f"p{i}.v1.{'jpg' if i % 4 == 0 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"  photo {i}, grün\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shards(base, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shards"
    encode([photos], base, out, **SETTINGS)
    return out


@pytest.fixture
def without_models(monkeypatch):
    """Latents and prompts that are 0: for what is not about them."""
    monkeypatch.setattr(encoding, "load_encoders", lambda *_: type("P", (), {"vae": None}))
    zeros = lambda vae, images: torch.zeros(len(images), 16, *(n // 16 for n in images.shape[2:]))
    monkeypatch.setattr(encoding, "encode_image", zeros)
    monkeypatch.setattr(encoding, "prompt_tokens", lambda *_: 1)
    monkeypatch.setattr(encoding, "encode_prompts", lambda pipeline, texts, n: torch.zeros(len(texts), n, 96))
