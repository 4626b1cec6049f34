"""SIGTERM and SIGUSR1, as schedulers send them: finish the step, save, and end well."""

import os
import signal
import time

CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 2.0  # seconds in which a scheduler and a launcher may both pass on one signal


class Signals:
    """Within it the first signal is remembered in `received`, and a second one ends the process at once.

    After a signal it stays so, for an echo that comes when all is saved.
    """

    def __init__(self):
        self.received, self.when = 0, 0.0

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.receive) for number in CAUGHT}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items() if not self.received else ():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
        elif time.monotonic() > self.when + ECHO:
            os._exit(128 + number)


def ignore() -> None:
    """In the workers of a DataLoader, which get the signals that are sent to all processes, but have yet to read."""
    for number in (*CAUGHT, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
