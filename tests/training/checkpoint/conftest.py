"""What the tests of this folder share."""

import pytest
import torch.distributed as dist
from checkpoint_pieces import SHAPES, pieces, save

from asymflow.training.run import checkpoint
from asymflow.training.run import folder as run


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 4)
    return folder


@pytest.fixture
def out(tmp_path):
    """A run with checkpoints at steps 4 and 8, and snapshots at 2, 6 and 10."""
    for name, steps in ((run.CHECKPOINTS, (4, 8)), (run.SNAPSHOTS, (2, 6, 10))):
        for step in steps:
            path = checkpoint.folder_of(tmp_path / "run" / name, step)
            checkpoint.save(path, pieces(step), SHAPES, {"step": step})
    return tmp_path / "run"
