"""`asymflow export` and `asymflow ema`: what comes out of a training run is the model that was trained."""

import pytest
import torch
from processes import train

from asymflow import AsymFlow
from asymflow.cli import main
from asymflow.training import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps on one process; two would write the same pieces, see test_training_distributed.py."""
    out = tmp_path_factory.mktemp("export") / "run"
    train(1, out, "train.steps=12", "checkpoint.every=6", "ema.snapshot_every=3", "ema.sigma_rel=[0.05, 0.10]")
    return out


def state(folder):
    return {n.removeprefix("module."): t for n, t in AsymFlow.from_pretrained(folder).named_parameters()}


@pytest.mark.parametrize(
    ("options", "step", "kind"),
    [
        ([], 12, "ema-0.5"),
        (["--ema", "none"], 12, "weights"),
        (["--ema", "0.9", "--step", "6"], 6, "ema-0.9"),
        (["--ema", "rel-0.050"], 12, "ema-rel-0.050"),
    ],
)
def test_an_exported_model_is_what_the_checkpoint_holds(run, tmp_path, options, step, kind):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model"), *options]) == 0
    reader = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", step))
    exported = state(tmp_path / "model")
    assert exported.keys() == reader.shapes.keys()
    for name, expected in reader.full(kind).items():
        assert torch.equal(exported[name], expected), name


@pytest.mark.parametrize("width", ["0.05", "0.10"])
def test_an_average_of_a_snapshot_is_that_snapshot(run, tmp_path, width, capsys):
    assert main(["ema", "--run", str(run), "--sigma-rel", width, "--out", str(tmp_path / "model")]) == 0
    assert "could not be matched" in capsys.readouterr().out
    direct = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", 12)).full(f"ema-rel-{float(width):.3f}")
    for name, found in state(tmp_path / "model").items():
        assert torch.allclose(found, direct[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--ema", "0.3"], "--ema 0.3 is not in the checkpoint: it has 0.5, 0.9"),
        (["export", "--step", "7"], "has no step 7: it has 6, 12"),
        (["ema", "--sigma-rel", "0.4"], "sigma_rel must be between"),
        (["ema", "--sigma-rel", "0.1", "--step", "2"], "no snapshot up to step 2"),
    ],
)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(run, tmp_path, capsys, words, message):
    command, *rest = words
    assert main([command, "--run", str(run), "--out", str(tmp_path / "model"), *rest]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten_and_damage_is_named(run, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model")]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "holds no whole checkpoint" in capsys.readouterr().err
