"""What the tests of this folder share."""

import pytest
from tiny_pipelines import PROMPTS, load, save_adapter

from asymflow.sampling import image_noise
from toy.tiny_flux2 import make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(PROMPTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), 0.1)


@pytest.fixture(scope="module")
def pipeline(base, adapter):
    """For tests that leave it as it is."""
    return load(base, adapter)


@pytest.fixture(scope="module")
def noise():
    return image_noise(0, range(2), (3, 32, 48))
