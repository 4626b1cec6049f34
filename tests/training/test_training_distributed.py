"""Training in real processes: every ZeRO stage gives the same curve, and an interruption leaves no trace in it."""

import pytest
import torch
from processes import metrics, tensors, train, words

from asymflow.training import checkpoint

STAGES = (0, 1, 2, 3)


def stage_runs(folder, stage):
    common = [f"deepspeed.zero_optimization.stage={stage}", "checkpoint.every=4", "checkpoint.keep_last=9"]
    straight = words(folder / f"stage{stage}", "train.steps=8", *common)
    first = words(folder / f"resumed{stage}", "train.steps=4", *common)
    rest = words(folder / f"resumed{stage}", "train.steps=8", *common)
    return [straight, first, rest]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Eight steps in each stage on two ranks, straight and resumed; and on one rank at stage 1."""
    folder = tmp_path_factory.mktemp("runs")
    train(2, *(arguments for stage in STAGES for arguments in stage_runs(folder, stage)))
    train(1, words(folder / "alone", "train.steps=8", "checkpoint.every=4", "deepspeed.zero_optimization.stage=1"))
    return folder


def test_every_stage_and_number_of_ranks_gives_the_same_curve(runs):
    """To the rounding of sums in another order, which training amplifies a little."""
    expected = metrics(runs / "alone")
    assert [m["step"] for m in expected] == list(range(1, 9))
    assert expected[-1]["loss"] < expected[0]["loss"]
    for stage in STAGES:
        for m, e in zip(metrics(runs / f"stage{stage}"), expected, strict=True):
            assert m["loss"] == pytest.approx(e["loss"], rel=1e-5)
            assert m["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-4)
            assert m["lr"] == e["lr"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_training_has_the_same_bits(runs, stage):
    straight, resumed = runs / f"stage{stage}", runs / f"resumed{stage}"
    keys = ("step", "loss", "grad_norm", "lr")
    assert [[m[k] for k in keys] for m in metrics(straight)] == [[m[k] for k in keys] for m in metrics(resumed)]
    a, b = tensors(straight, 8), tensors(resumed, 8)
    assert a.keys() == b.keys()
    assert {kind for kind, _ in a} == {
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "ema-0.5",
        "ema-0.9",
        "ema-rel-0.050",
        "ema-rel-0.100",
    }
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("stage", STAGES)
def test_the_pieces_of_all_ranks_make_up_each_parameter_once(runs, stage):
    reader = checkpoint.Reader(checkpoint.folder_of(runs / f"stage{stage}" / "checkpoints", 8))
    for key, pieces in reader.where.items():
        ends = [0]
        for begin, end, _ in sorted(pieces):
            assert begin == ends[-1], key
            ends.append(end)
        assert ends[-1] == torch.Size(reader.shapes[key.split("/", 1)[1]]).numel(), key


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_agree_on_weights_and_averages(runs, stage):
    alone, other = tensors(runs / "alone", 8), tensors(runs / f"stage{stage}", 8)
    for (kind, name), value in alone.items():
        if not kind.startswith("exp"):
            assert torch.allclose(value, other[kind, name], rtol=0, atol=2e-4), (kind, name)
