"""Settings of the encodings here, and encodings by two processes."""

import multiprocessing
import os

import torch
from processes import environment_of

from asymflow.cli import main

LENGTH = 48  # of prompts here: a caption of shapes in the chat template is shorter
SETTINGS = dict(size=64, per_shard=4, batch=3, max_length=LENGTH, dtype=torch.float32, threads=2)


def content(folder):
    """Every file, hidden ones too, but the locks, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def copy_of(base, folder):
    for path in base.rglob("*.*"):
        (folder / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(base)).write_bytes(path.read_bytes())
    return folder


def one_of_two(rank, environment, argv, log):
    import sys

    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(log, "w") as sys.stderr, open(f"{log}.out", "w") as sys.stdout:  # noqa: PTH123
        code = main(argv)
    os._exit(code)


def two_processes(tmp_path, *argv, code=0):
    """Run a command in two processes, forked from this one, which has imported everything; returns what they print.

    code: with which both are to end."""
    context, environment = multiprocessing.get_context("fork"), environment_of(2)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    jobs = [context.Process(target=one_of_two, args=(r, environment, list(map(str, argv)), logs[r])) for r in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
        job.kill()
    assert [job.exitcode for job in jobs] == [code, code], [log.read_text() for log in logs]
    return "".join((tmp_path / f"{rank}.log{end}").read_text() for rank in range(2) for end in ("", ".out"))
