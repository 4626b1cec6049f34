"""The noise of an image is timed, by where it is drawn."""

import pytest
import torch

from asymflow.bench_noise import main, measure_noise


def test_each_is_timed_for_each_size():
    found = measure_noise(torch.device("cpu"), (16, 32), repeats=2)
    for side in (16, 32):
        assert all(value > 0 for value in found[side].values())
        assert found[side]["bytes_eps"] == 4 * found[side]["bytes_pixels"] == 4 * 3 * side**2


def test_a_device_that_is_not_there_is_answered_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--device", "tpu9"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
