"""Progress: a bar on a terminal, and a few lines in a log file, however long it takes."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymflow import progress
from asymflow.progress import FIRST, progress_bar


def lines_of(monkeypatch, seconds, **options):
    """What is printed to a file in a loop whose rounds take so many seconds."""
    clock, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.sys, "stderr", out)
    for _, took in zip(progress_bar(range(len(seconds)), "reading", "image", **options), seconds, strict=True):
        clock[0] += took
    return out.getvalue().splitlines()


@given(st.lists(st.floats(0, 3 * FIRST), max_size=50), st.sampled_from([{}, {"silent": True}]))
def test_in_a_file_there_are_lines_seldom_and_never_two_close_together(seconds, options):
    with pytest.MonkeyPatch.context() as patch:
        lines = lines_of(patch, seconds, **options)
    assert len(lines) <= sum(seconds) / FIRST
    if options or sum(seconds) < FIRST:
        assert lines == []
    elif sum(seconds) > FIRST:
        assert lines
    for line in lines:
        done, total = map(int, re.fullmatch(r"reading: (\d+) of (\d+) images?, \d\S+ left", line).groups())
        assert 0 < done <= total == len(seconds)


def test_a_day_is_a_hundred_lines_and_the_time_left_is_right(monkeypatch):
    lines = lines_of(monkeypatch, [1.0] * 86_400)
    assert 50 < len(lines) < 200
    assert "reading: 10 of 86,400 images, 23:59:50 left" in lines


def test_without_a_total_it_counts(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0)
    with progress_bar(desc="reading", unit="image") as bar:
        bar.update(3)
    assert capsys.readouterr().err == "reading: 3 images so far\n"


def test_on_a_terminal_it_is_a_bar_which_is_removed(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    assert list(progress_bar(range(3), "reading", "image")) == [0, 1, 2]
    assert "reading" in terminal.getvalue()
    assert terminal.getvalue().split("\r")[-1].strip() == ""


@given(st.lists(st.integers(1, 5), max_size=9), st.booleans())
def test_a_bar_and_lines_can_be_exchanged(steps, silent):
    """Whether there is a terminal changes what is shown, and nothing else: a loop may rely on either."""
    seen = []
    for terminal in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            stream = io.StringIO()
            stream.isatty = lambda terminal=terminal: terminal
            patch.setattr(progress.sys, "stderr", stream)
            bar = progress_bar(steps, "reading", "image", silent=silent)
            with progress_bar(desc="adding", unit="image", total=sum(steps)) as other:
                for n in steps:
                    other.update(n)
                seen.append((len(bar), list(bar), other.n, other.total, bar.total))
    assert seen[0] == seen[1]
