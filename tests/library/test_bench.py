"""The benchmark runs, says what it measured, and shows what it is there to show."""

import re

import pytest

from asymflow.bench import main


def test_it_prints_four_times(capsys):
    main(["--model", "tiny/8", "--batch", "1", "--repeats", "3", "--device", "cpu"])
    first, *rows = capsys.readouterr().out.splitlines()
    assert "1 images of 128 x 128, float32, cpu" in first
    assert len(rows) == 4
    assert all(re.search(r" \d+\.\d\d ms$", row) for row in rows)


def test_mistakes_are_answered_in_one_line(capsys):
    for option in (["--model", "Z/16"], ["--device", "tpu9"], ["--rank", "800"]):
        with pytest.raises(SystemExit) as end:
            main(["--model", "tiny/4", *option])
        assert end.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
