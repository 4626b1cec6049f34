"""The launchers that users start trainings with: the commands of docs/training.md, several nodes, failures, signals.

torchrun passes SIGTERM on to the ranks, waits 30 s, and exits with 1 itself; of SIGUSR1 it dies, and the ranks go on.
deepspeed on one machine is two processes: the first passes nothing on; the second passes SIGTERM on, waits 30 s, and
exits with 1; of SIGUSR1 either dies, and the ranks go on. So a signal is best sent to a rank, or to all processes.
"""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import GUARD, ROOT, environment_of, metrics, wait_for, words
from ways_to_end import ENDLESS, lines, whole_steps

from asymflow import AsymFlow

pytestmark = pytest.mark.slow  # launchers start Python several times for each training
TESTS = Path(__file__).parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
DRIVER = """
import sys
sys.path[:0] = {paths!r}
from asymflow.training.start import main
{patch}
sys.exit(main())
"""


# ---- The commands of docs/training.md --------------------------------------------------------------------------------
QUICK = (
    *("train.steps=3", "train.global_batch_size=8", "checkpoint.every=3", "ema.snapshot_every=1", "sample.every=null"),
    *("subspace.images=64", "data.size=256", "data.workers=1"),
)


def shown(command):
    """The lines of docs/training.md that begin like this and are about shapes_tiny."""
    found = re.findall(rf"^{command} .*/shapes.*$", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    assert found, f"docs/training.md shows no command `{command} ... /shapes ...`, which is tested here"
    return [re.sub(r" +#.*", "", line) for line in found]


def execute(command, folder, *settings):
    """In a folder that has train_ddp.py, as typed but for a port and settings; nothing may be left running."""
    if not (folder / "train_ddp.py").exists():
        (folder / "train_ddp.py").symlink_to(ROOT / "train_ddp.py")
    mark = secrets.token_hex(8)
    program, *rest = shlex.split(command)
    if program in ("deepspeed", "torchrun"):
        rest = ["--master_port", environment_of(2)["MASTER_PORT"], *rest]
    line = shlex.join([program, *rest, *(word for setting in settings for word in ("--set", setting))])
    environment = {**os.environ, "PATH": PATH, "ASYMFLOW_TEST": mark}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(line, shell=True, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            code = process.wait(GUARD)
        finally:
            left = marked(mark)
            for other in left:
                other.kill()
    assert code == 0, (folder / "log").read_text()
    assert not left


def marked(mark, **environment):
    """The processes that were started with this mark, and these variables, in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if {"ASYMFLOW_TEST": mark, **environment}.items() <= process.environ().items():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each launcher, the folder where its command was run, and its run."""
    folders = {}
    for launcher in ("deepspeed", "torchrun", "python"):
        (command,) = shown(launcher)
        folder = tmp_path_factory.mktemp(launcher)
        execute(command, folder, *QUICK)
        folders[launcher] = folder, folder / re.search(r"--out (\S+)", command)[1]
    return folders


def test_the_commands_that_train_give_the_same_curve(trained):
    curves = {launcher: metrics(run) for launcher, (_, run) in trained.items()}
    assert curves["deepspeed"] == curves["torchrun"]
    assert [m["step"] for m in curves["python"]] == [1, 2, 3]
    for two, one in zip(curves["torchrun"], curves["python"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_only_our_lines_are_shown(trained):
    """The launchers print some of their own; that of DeepSpeed warns once more that it found no GPU."""
    launcher = re.compile(r"\] \[(launch|runner|real_accelerator)\.py:|^\*+$|OMP_NUM_THREADS")
    for name, (folder, _) in trained.items():
        lines = [line for line in (folder / "log").read_text().splitlines() if not launcher.search(line)]
        assert not [line for line in lines if re.search(r"\[(INFO|WARNING)\]|^\S*[WI]\d{4} |Warning:", line)]
        assert name == "deepspeed" or "real_accelerator" not in (folder / "log").read_text()


def test_the_commands_that_follow_a_training(trained):
    folder, _ = trained["deepspeed"]
    for command in shown("asymflow"):
        execute(command, folder)
    for model in ("shapes", "shapes_ema"):
        assert AsymFlow.from_pretrained(folder / "models" / model).subspace.rank == 8
    assert len(list((folder / "runs" / "shapes_samples" / "images").iterdir())) == 8


# ---- Several nodes: here, launchers of their own, with one rank each -------------------------------------------------
NODES = {
    "torchrun": "torchrun --nnodes 2 --node-rank {n} --master-addr 127.0.0.1 --master-port {port} --nproc-per-node 1",
    "deepspeed": "deepspeed --hostfile hosts --no_ssh --node_rank {n} --master_addr 127.0.0.1 --master_port {port}",
}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_dies_ends_those_on_other_nodes(tmp_path, launcher):
    out, mark, port = tmp_path / "run", secrets.token_hex(8), environment_of(2)["MASTER_PORT"]
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    environment = {**os.environ, "PATH": PATH, "ASYMFLOW_TEST": mark}
    arguments = [str(ROOT / "train_ddp.py"), *words(out, *ENDLESS, "data.workers=1")]
    nodes = []
    for n in range(2):
        log = (tmp_path / f"log{n}").open("w")
        command = [*NODES[launcher].format(n=n, port=port).split(), *arguments]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    try:
        wait_for_lines(out / "metrics.jsonl", 3, tmp_path)
        worker, rank = sorted(marked(mark, RANK="1"), key=lambda process: len(process.children()))
        assert worker.parent() == rank
        rank.kill()
        assert all(node.wait(GUARD) for node in nodes)  # not 0
        assert (tmp_path / "log0").read_text().count("rank 1 died without a word") == 1
    finally:
        left = marked(mark)
        for process in left:
            process.kill()
    assert not left


def wait_for_lines(path, count, logs):
    wait_for(lambda: lines(path) >= count, lambda: [log.read_text() for log in logs.glob("log*")])


# ---- Failures and signals --------------------------------------------------------------------------------------------
def launch(launcher, out, patch=""):
    driver = out.parent / "driver.py"
    driver.write_text(DRIVER.format(paths=[str(TESTS), str(TESTS.parent), str(ROOT)], patch=patch))
    environment = environment_of(2)
    port = environment["MASTER_PORT"]
    command = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port],
    }[launcher]
    environment = {**os.environ, "PATH": PATH}
    log = (out.parent / "log").open("w")
    settings = words(out, *ENDLESS)
    command = [sys.executable, "-m", *command, str(driver), *settings]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def end(process, out):
    """Its exit code, and what was written by all."""
    try:
        code = process.wait(GUARD)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, (out.parent / "log").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_fails_is_shown_once(tmp_path, launcher):
    out = tmp_path / "run"
    process = launch(launcher, out, "from ways_to_end import dies; dies(1, 3, 'raise')")
    code, log = end(process, out)
    assert code == 1
    assert log.count("train_ddp.py: error: rank 1: ValueError: such is life") == 1
    assert log.count("raise ValueError") == 1
    assert lines(out / "metrics.jsonl") == 2


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_signal_to_the_launcher_or_to_all_processes(tmp_path, launcher):
    out = tmp_path / "run"
    process = launch(launcher, out, "from asymflow.training.run import signals; signals.ECHO = 1000")
    wait_for_lines(out / "metrics.jsonl", 3, tmp_path)
    if launcher == "torchrun":
        os.killpg(process.pid, signal.SIGTERM)  # to all, and torchrun passes it on once more
    else:
        (launch_py,) = psutil.Process(process.pid).children()
        launch_py.send_signal(signal.SIGTERM)
    code, log = end(process, out)
    assert code == 1
    assert whole_steps(out) == [lines(out / "metrics.jsonl")]
    assert log.count(f"SIGTERM: stopped and saved at step {lines(out / 'metrics.jsonl')} of ") == 1
