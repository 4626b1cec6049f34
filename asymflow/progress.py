"""How far a long command has come, on stderr: a bar on a terminal, or now and then a line, such as in a log file.

for image in progress_bar(images, "reading", "image"):
    ...
with progress_bar(desc="sampling", unit="image", total=50_000, silent=rank > 0) as bar:
    bar.update()
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

FIRST = 10  # seconds until the first line; later lines come after a 20th of the time so far, if that is longer


def progress_bar(
    iterable: Iterable | None = None,
    desc: str = "",
    unit: str = "",
    total: int | None = None,
    silent: bool = False,
    delay: float = 0,
) -> "tqdm | Lines":
    """A bar of tqdm, or lines. silent: show nothing, as on ranks above 0. delay: seconds until a bar is shown."""
    if silent or sys.stderr is None or sys.stderr.isatty():
        return tqdm(iterable, desc, total, unit=unit, leave=False, disable=silent or sys.stderr is None, delay=delay)
    return Lines(iterable, desc, unit, total)


def limit_loading_bars() -> None:
    """Let transformers and diffusers show the bars of loading a model only on a terminal, and only in one process."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    if os.environ.get("RANK", "0") != "0" or sys.stderr is None or not sys.stderr.isatty():
        of_diffusers.disable_progress_bar()
        of_transformers.disable_progress_bar()


class Lines:
    """What a command uses of tqdm, for a log file. Nothing is printed in the first `FIRST` seconds."""

    def __init__(self, iterable: Iterable | None, desc: str, unit: str, total: int | None):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.desc, self.unit, self.total, self.n = iterable, desc, unit, total, 0
        self.started = time.monotonic()
        self.next = self.started + FIRST

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __len__(self) -> int:
        return len(self.iterable)

    def update(self, n: int = 1) -> None:
        self.n += n
        if (now := time.monotonic()) >= self.next:
            spent = now - self.started
            self.next = now + max(FIRST, spent / 20)
            print(self.line(spent), file=sys.stderr, flush=True)

    def line(self, spent: float) -> str:
        if not self.total or not self.n:
            return f"{self.desc}: {self.n:,} {self.unit}s so far"
        left = tqdm.format_interval(spent / self.n * (self.total - self.n))
        return f"{self.desc}: {self.n:,} of {self.total:,} {self.unit}{'s' * (self.total > 1)}, {left} left"

    def close(self) -> None:
        """Nothing to be done. (A bar is removed from the terminal.)"""
