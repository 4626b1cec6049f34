"""SIGTERM and SIGUSR1, by which schedulers ask a training to finish its step, save, and exit."""

import os
import signal
import time

CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 2.0  # seconds: a second signal within them is the same one, sent by the scheduler and again by the launcher


class Signals:
    """A context in which the first signal is kept in `received`, and a second one ends the process at once.

    If a signal came, the handlers stay after the context: its echo may arrive when everything is saved already.
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
    """For DataLoader workers. They get signals that are sent to all processes, but must finish the step's reading."""
    for number in (*CAUGHT, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
