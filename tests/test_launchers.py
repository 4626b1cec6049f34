"""The launchers that users start trainings with: what they do when a rank fails, and with signals.

torchrun passes SIGTERM on to the ranks, waits 30 s, and exits with 1 itself; of SIGUSR1 it dies, and the ranks go on.
deepspeed on one machine is two processes: the first passes nothing on; the second passes SIGTERM on, waits 30 s, and
exits with 1; of SIGUSR1 either dies, and the ranks go on. So a signal is best sent to a rank, or to all processes.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import environment_of, words
from test_survival import ENDLESS, lines, whole_steps

pytestmark = pytest.mark.survival  # they take minutes

TESTS = Path(__file__).parent
DRIVER = """
import sys
sys.path[:0] = {paths!r}
from asymflow.training.start import main
{patch}
sys.exit(main())
"""


def launch(launcher, out, patch=""):
    driver = out.parent / "driver.py"
    driver.write_text(DRIVER.format(paths=[str(TESTS), str(TESTS.parent)], patch=patch))
    environment = environment_of(2)
    port = environment["MASTER_PORT"]
    command = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port],
    }[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (out.parent / "log").open("w")
    settings = words(out, *ENDLESS)
    command = [sys.executable, "-m", *command, str(driver), *settings]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def end(process, out, timeout=60):
    """Its exit code, and what was written by all."""
    try:
        code = process.wait(timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, (out.parent / "log").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_fails_is_shown_once(tmp_path, launcher):
    out = tmp_path / "run"
    process = launch(launcher, out, "from test_survival import dies; dies(1, 3, 'raise')")
    code, log = end(process, out)
    assert code == 1
    assert log.count("train_ddp.py: error: rank 1: ValueError: such is life") == 1
    assert log.count("raise ValueError") == 1
    assert lines(out / "metrics.jsonl") == 2


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_signal_to_the_launcher_or_to_all_processes(tmp_path, launcher):
    out = tmp_path / "run"
    process = launch(launcher, out)
    until = time.monotonic() + 100
    while lines(out / "metrics.jsonl") < 3:
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)
    if launcher == "torchrun":
        os.killpg(process.pid, signal.SIGTERM)  # to all, and torchrun passes it on once more
    else:
        (launch_py,) = psutil.Process(process.pid).children()
        launch_py.send_signal(signal.SIGTERM)
    code, log = end(process, out)
    assert code == 1
    assert whole_steps(out) == [lines(out / "metrics.jsonl")]
    assert log.count(f"SIGTERM: stopped and saved at step {lines(out / 'metrics.jsonl')} of ") == 1
