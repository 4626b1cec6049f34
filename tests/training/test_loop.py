"""Single steps of a training in this process: what they keep, wait for and say."""

import os
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import environment_of, words
from test_repa import save_dinov2

from asymflow.data.batches import Batches
from asymflow.pictures import image_grid
from asymflow.training.ranks import join, meet, take_place
from asymflow.training.start import build, parse


@pytest.fixture(scope="module")
def device():
    """That of a group of this process alone."""
    before = dict(os.environ)
    os.environ.update(environment_of(1))
    take_place()
    yield join(meet())
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def training(device, tmp_path):
    """Makes a Training, with the settings `a.b=c` on top of TINY."""
    return lambda *settings: build(parse(words(tmp_path / "run", "data.workers=0", *settings)), device)


# ---- Memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("aligned", [False, True])
def test_memory_does_not_grow_with_the_number_of_micro_batches(training, tmp_path, monkeypatch, aligned):
    """Of eight in a step, at most three are there at a time: one that is used, and those that are made ready."""
    settings = []
    if aligned:
        save_dinov2(tmp_path / "dinov2")
        settings = [f"loss.repa={{model: {tmp_path / 'dinov2'}, after: 1, hidden: 16}}"]
    alive, most, get = [], 0, Batches.__getitem__

    def counted(self, k):
        nonlocal most
        batch = get(self, k)
        alive.append(weakref.ref(batch.eps))
        most = max(most, sum(reference() is not None for reference in alive))
        return batch

    monkeypatch.setattr(Batches, "__getitem__", counted)
    training("train.steps=1", "train.micro_batch_size=1", *settings).fit()
    assert len(alive) == 8
    assert most <= 3


# ---- Drawing ---------------------------------------------------------------------------------------------------------
def sizes_of_batches(model, sizes):
    return model.register_forward_pre_hook(lambda module, args, options: sizes.append(len(args[0])), with_kwargs=True)


def test_a_grid_is_drawn_in_micro_batches(training, tmp_path):
    """Without guidance, which doubles them; the images are those of one large batch, to rounding."""
    one = training("train.micro_batch_size=4", "sample={num: 36, steps: 2, guidance: 1}")
    sizes = []
    hook = sizes_of_batches(one.engine.module, sizes)
    one.draw()
    hook.remove()
    assert max(sizes) == 4
    with one.model_to_show() as flow, torch.no_grad():
        whole = image_grid(one.objective.draw(flow, range(36)))
    drawn = Image.open(tmp_path / "run" / "samples" / "00000000.png")
    difference = np.asarray(drawn).astype(int) - np.asarray(whole).astype(int)
    assert abs(difference).max() <= 1
