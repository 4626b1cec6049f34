"""How far a training is, on stderr: a bar where that is a terminal, else a line every so many steps."""

import sys
import time

from tqdm import tqdm

from asymflow.training.config.reading import Config


class Progress:
    def __init__(self, config: Config, step: int, silent: bool):
        """step: how many are done. silent: for all ranks but the first."""
        self.every, self.steps, self.first = config.train.log_every, config.train.steps, step + 1
        self.bar = tqdm(
            desc="training", unit="step", total=self.steps, initial=step, disable=True if silent else None
        )  # None: unless stderr is a terminal
        self.silent, self.since, self.records = silent, time.monotonic(), []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, record: dict, unreadable: int) -> None:
        """Show a step. record: its line in the metrics. unreadable: images so far that could not be read."""
        step = record["step"]
        if not self.bar.disable:
            self.bar.update()
            self.bar.set_postfix_str(", ".join(told([record], unreadable)), refresh=False)
        elif not self.silent:
            self.records.append(record)
            if step in (self.first, self.steps) or step % self.every == 0:
                now = time.monotonic()
                left = (now - self.since) / len(self.records) * (self.steps - step)
                words = [*told(self.records, unreadable), f"{tqdm.format_interval(left)} left"]
                print(f"step {step} of {self.steps}: {', '.join(words)}", file=sys.stderr, flush=True)
                self.since, self.records = now, []


def told(records: list[dict], unreadable: int) -> list[str]:
    """What to say of some steps: means over them, and the gradient of the last that was taken."""
    taken = [record for record in records if record["grad_norm"] is not None]
    seconds = [1 / record["images_per_second"] for record in records]  # of an image
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
