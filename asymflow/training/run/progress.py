"""The progress of a training, on stderr: a bar if that is a terminal, else a line every `train.log_every` steps."""

import sys
import time

import torch.distributed as dist
from tqdm import tqdm

from asymflow.training.config.reading import Config


def say(text: str) -> None:
    """Print, on rank 0 alone, what begins now and may take a while."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


class Progress:
    def __init__(self, config: Config, step: int, silent: bool):
        """step: how many steps are done already. silent: on all ranks but rank 0."""
        self.every, self.steps, self.first = config.train.log_every, config.train.steps, step + 1
        disable = True if silent else None  # to tqdm, None means: disabled unless stderr is a terminal
        self.bar = tqdm(desc="training", unit="step", total=self.steps, initial=step, disable=disable)
        self.silent, self.since, self.records = silent, time.monotonic(), []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, record: dict, unreadable: int) -> None:
        """Show a step. record: its line of metrics.jsonl. unreadable: how many images could not be read so far."""
        step = record["step"]
        if not self.bar.disable:
            self.bar.update()
            self.bar.set_postfix_str(", ".join(words_of([record], unreadable)), refresh=False)
        elif not self.silent:
            self.records.append(record)
            if step in (self.first, self.steps) or step % self.every == 0:
                now = time.monotonic()
                left = (now - self.since) / len(self.records) * (self.steps - step)
                words = [*words_of(self.records, unreadable), f"{tqdm.format_interval(left)} left"]
                print(f"step {step} of {self.steps}: {', '.join(words)}", file=sys.stderr, flush=True)
                self.since, self.records = now, []


def words_of(records: list[dict], unreadable: int) -> list[str]:
    """What to say of some steps: means over them, and the gradient norm of the last one that was not skipped."""
    taken = [record for record in records if record["grad_norm"] is not None]
    seconds = [1 / record["images_per_second"] for record in records]  # for one image
    waiting = sum(record["waiting"] * s for record, s in zip(records, seconds, strict=True)) / sum(seconds)
    words = []
    if taken:
        words += [f"loss {sum(record['loss'] for record in taken) / len(taken):.4f}"]
        words += [f"gradient norm {taken[-1]['grad_norm']:.3g}"]
    if skipped := len(records) - len(taken):
        words += [f"{skipped} skipped"]
    words += [f"{len(records) / sum(seconds):.1f} images/s", f"{waiting:.0%} waiting for data"]
    if "mfu" in records[-1]:
        words += [f"MFU {records[-1]['mfu']:.1%}"]
    if "gpu_memory" in records[-1]:
        words += [f"at most {records[-1]['gpu_memory']:.1f} GiB"]
    if unreadable:
        words += [f"{unreadable} unreadable"]
    return words
