"""What the tests of this folder share."""

import pytest
from model_backbones import jit_flow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model in it, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    jit_flow().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be changed."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
