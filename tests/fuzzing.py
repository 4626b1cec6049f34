"""Giving damaged files to a reader, within limits of time and memory."""

import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import mutated

from asymflow.errors import InputError

FEW, MANY = 150, 10_000  # cases for each reader, by default and with -m slow
SECONDS = 10  # for a case: a slow machine needs a hundredth of them
MEMORY = 300 * 2**20  # bytes by which the process may grow: a whole file takes some kilobytes
COUNTS = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.fuzz])])


def out_of_time(*_):
    raise TimeoutError(f"it took more than {SECONDS} s")


def fuzz(folder: Path, read: Callable[[Path], object], count: int) -> None:
    """Damage one file in `folder`, `count` times, and let `read(folder)` read it: it may fail with InputError only.

    The message must be one line, and name the folder or something in it.
    """
    whole = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    read(folder)  # whole, they can be read
    before, refused = peak(), 0
    previous = signal.signal(signal.SIGALRM, out_of_time)
    try:
        for case in range(count):
            rng = random.Random(f"{folder.name} {case}")
            name = rng.choice(list(whole))
            content = mutated(name.name, whole[name], rng)
            shutil.rmtree(folder)
            for path, data in whole.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content if path == name else data)
            refused += refuses(folder, read, f"case {case}, {name}")
            assert peak() - before < MEMORY, f"case {case}, {name}: it took {(peak() - before) / 2**20:.0f} MiB"
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert refused > count / 50  # else nothing is damaged, or nobody looks


def refuses(folder: Path, read: Callable[[Path], object], case: str) -> bool:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(folder)
    except InputError as e:
        message = str(e)
        assert len(message.splitlines()) == 1, f"{case}: {message!r}"
        assert str(folder) in message, f"{case}: it does not say which file: {message}"
        return True
    except BaseException:
        signal.setitimer(signal.ITIMER_REAL, 0)
        pytest.fail(f"{case}: {traceback.format_exc(limit=-4)}", pytrace=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
