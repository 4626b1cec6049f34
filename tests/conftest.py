"""Settings for every test: no network, the same examples on every machine, no deadline on a slow one, one thread.

The tensors here are small: further threads, also in the processes that tests start, would only wait for each other.
"""

import gc
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; without a network each question takes long

import pytest
from hypothesis import HealthCheck, settings

# What these assert is shown as in a test.
HELPERS = "processes ways_to_end checkpoint_pieces config_words encoding_runs model_backbones published_files"
pytest.register_assert_rewrite(*HELPERS.split())
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")
gc.disable()  # until all tests are imported: then what they import need not be looked through again and again


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


# ---- Trainings that many tests look at: CASES of a module, by name; those in its QUICK in the default suite ----------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def quick_runs(request, train_all):
    """train_all: of the module; it runs the trainings of these names, in the folder."""
    train_all(request.module.QUICK)


@pytest.fixture(scope="module")
def other_runs(request, quick_runs, train_all):
    train_all([name for name in request.module.CASES if name not in request.module.QUICK])


@pytest.fixture
def runs(request, folder):
    """Where the runs are: those in QUICK, and all if the test is slow."""
    request.getfixturevalue("other_runs" if request.node.get_closest_marker("slow") else "quick_runs")
    return folder


@pytest.fixture
def in_the_foreground():
    """Processes that the test starts are stopped by Ctrl-C, even if pytest itself was started in the background.

    A shell starts what a script runs in the background with SIGINT ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
