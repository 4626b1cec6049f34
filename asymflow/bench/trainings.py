"""Trainings by the real `train_ddp.py`, one after the other in one process, which is started again if it dies.

One process, because starting torch and DeepSpeed takes longer than most of these trainings. See worker.py for what is
observed in them.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

import asymflow


class FailedError(Exception):
    """A training failed. The message is what it printed."""


class Trainings:
    """Runs trainings in a process of its own. As a context, it ends the process, which frees the GPU's memory.

    log: a file for all that the trainings print.
    """

    def __init__(self, log: Path, **environment: str):
        self.log, self.process, self.answers = log, None, None
        source = Path(asymflow.__file__).parent.parent
        self.environment = {**os.environ, "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}", **environment}

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def run(self, out: Path, config: str, settings: dict, timeout: float, **watch) -> dict:
        """Train in the folder `out`. Returns what the worker observed, and `metrics`: the lines of metrics.jsonl.

        settings: {key of the configuration: value}. watch: see `worker.Watch`. Raises FailedError if the training
        fails, or takes more than `timeout` seconds.
        """
        if self.process is None:
            self.start()
        said = self.log.stat().st_size
        words = [f"--set={key}={in_yaml(value)}" for key, value in settings.items()]
        task = {"arguments": ["--config", config, "--out", str(out), *words], **watch}
        try:
            self.process.stdin.write(f"{json.dumps(task)}\n".encode())
            self.process.stdin.flush()
            answer = self.answer(timeout)
        except OSError:  # the process died after the last training
            answer = ""
        if answer is None:
            self.end()
            raise FailedError(f"no answer after {timeout:.0f} s, and ended; {self.last_words(said)}")
        if not answer:
            code = self.end()
            raise FailedError(f"its process died with {code}; {self.last_words(said)}")
        found = json.loads(answer)
        if found["code"]:
            raise FailedError(self.last_words(said))
        return found | {"metrics": metrics(out)}

    def start(self) -> None:
        reading, writing = os.pipe()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from asymflow.bench.worker import main; main({writing})"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                start_new_session=True,
                env=self.environment,
            )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def answer(self, timeout: float) -> str | None:
        """The next line of the process; empty if it died, None if it took too long."""
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            if select.select([self.answers], [], [], left)[0]:
                return self.answers.readline()
        return None

    def end(self) -> int | None:
        """Kill the process and those that it started. Returns its exit code, or None if there was none."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self.answers.close()
        with suppress(OSError):  # closing fails if something was still to be written
            process.stdin.close()
        return code

    def last_words(self, start: int) -> str:
        """The last error in the log since byte `start`, or else the last line."""
        with self.log.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        ours = [line for line in lines if line.startswith("train_ddp.py: error:")]
        errors = [line for line in lines if "error:" in line.lower()]
        return (ours or errors or lines or ["it said nothing"])[-1][:500]


def in_yaml(value: object) -> str:
    """A value in the form that `--set` reads."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def images_per_second(steps: list[dict]) -> float:
    """The mean speed over all of these steps."""
    return len(steps) / sum(1 / step["images_per_second"] for step in steps)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
