"""Adapters and base models with any damage are read or refused in one line."""

import copy
import json
import shutil
import time

import pytest
import torch
from fuzzing import COUNTS, fuzz

from asymflow import InputError, Subspace
from asymflow.backbones.flux2 import latent_to_pixel
from asymflow.backbones.flux2.adapter import add_lora, fingerprint, load_adapter, published_names, write_adapter
from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline
from asymflow.data.encoders import read_base
from asymflow.training.objectives.finetuning import load_transformer
from asymflow.training.objectives.klein import empty_transformer
from toy.tiny_flux2 import make_base

SUBSPACE = Subspace.random(768, 16, scale=1.7, token_order="channel_first", color_space="oklab", patch_size=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(["a red square"]).save_pretrained(folder)
    return folder


@COUNTS
def test_a_damaged_adapter_is_read_or_refused_in_one_line(base, count, tmp_path):
    latent = load_transformer(base, torch.float32)
    flow = latent_to_pixel(copy.deepcopy(latent), SUBSPACE)
    add_lora(flow.backbone.transformer, 2)
    full = ("x_embedder", "proj_out", "norm_out")
    state = {n: p for n, p in flow.backbone.transformer.named_parameters() if "lora_" in n or n.startswith(full)}
    write_adapter(folder := tmp_path / "adapter", published_names(state), SUBSPACE, latent.config, fingerprint(latent))
    (folder / "README.md").unlink()
    fuzz(folder, lambda folder: load_adapter(copy.deepcopy(latent), folder), count // 2)


@COUNTS
def test_a_damaged_base_is_read_or_refused_in_one_line(base, count, tmp_path):
    folder = tmp_path / "base"
    for part in ("transformer", "vae", "text_encoder"):
        shutil.copytree(base / part, folder / part)
    shutil.copy(base / "model_index.json", folder)

    def read(folder):
        read_base(folder)
        load_transformer(folder, torch.float32)

    fuzz(folder, read, count // 2)


@pytest.mark.slow
def test_a_base_that_claims_a_million_layers_is_refused_before_they_are_made(base, tmp_path):
    folder, started = shutil.copytree(base, tmp_path / "base"), time.monotonic()
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_single_layers": 10**6}))
    doors = (
        lambda: load_transformer(folder, torch.float32),
        lambda: AsymFlux2KleinPipeline.from_pretrained(folder, adapter="none"),
        lambda: empty_transformer(json.loads(path.read_text())),
    )
    for door in doors:
        with pytest.raises(InputError, match="describes a network of more tensors"):
            door()
    assert time.monotonic() - started < 60
