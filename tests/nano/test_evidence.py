"""The claim itself, at half of the default steps: a minute of training, so it runs only with `-m slow`."""

import json

import pytest

import nano_asymflow


@pytest.mark.slow
def test_asymmetric_prediction_comes_to_the_data_and_the_others_do_not(tmp_path):
    """Scores: 0 is pure noise, 1 is fresh data. u-prediction is spared most of the steps: it gets no better."""
    score = {}
    for prediction, steps in {"asym": 2000, "x0": 2000, "u": 500}.items():  # each has the figures it has among all
        nano_asymflow.main(["--prediction", prediction, "--steps", str(steps), "--out", str(tmp_path / prediction)])
        results = json.loads((tmp_path / prediction / "results.json").read_text())
        score[prediction] = results["runs"][0]["score"]
    assert score["asym"] > 0.75  # 84 %, see docs/toys.md
    assert score["x0"] < score["asym"] - 0.08  # by 16 points
    assert score["u"] < 0.3
