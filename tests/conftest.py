"""Settings for every test: no network, the same examples on every machine, no deadline on a slow one, one thread.

The tensors here are small: further threads would only wait for each other.
"""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; without a network each question takes long

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")


@pytest.fixture
def in_the_foreground():
    """Processes that the test starts are stopped by Ctrl-C, even if pytest itself was started in the background.

    A shell starts what a script runs in the background with SIGINT ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
