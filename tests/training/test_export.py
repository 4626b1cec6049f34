"""`asymflow export` and `asymflow ema`: what comes out of a training run is the model that was trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from processes import train

from asymflow import AsymFlow
from asymflow.cli import main
from asymflow.data.images import to_image
from asymflow.subspace import Subspace
from asymflow.training import checkpoint
from asymflow.training.config.reading import load_config
from asymflow.training.objectives import drawn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps on one process; two would write the same pieces, see test_training_distributed.py.

    Snapshots at 5, 10 and, the last step, 12. Two of the widths are not those of their names, rel-0.013 and rel-0.289.
    """
    out = tmp_path_factory.mktemp("export") / "run"
    widths = "ema.sigma_rel=[0.05, 0.10, 0.0125, 0.2886]"
    samples = ["sample.every=12", "sample.num=8", "sample.steps=3", "train.precision=bf16"]
    train(1, out, "train.steps=12", "checkpoint.every=6", "ema.snapshot_every=5", widths, *samples)
    return out


@pytest.fixture(scope="module")
def model(run):
    """The first average of its last step."""
    folder = run.parent / "model"
    assert main(["export", "--run", str(run), "--out", str(folder)]) == 0
    return folder


def state(folder):
    return {n.removeprefix("module."): t for n, t in AsymFlow.from_pretrained(folder).named_parameters()}


@pytest.mark.parametrize(
    ("options", "step", "kind"),
    [
        ([], 12, "ema-0.5"),
        (["--ema", "none"], 12, "weights"),
        (["--ema", "0.9", "--step", "6"], 6, "ema-0.9"),
        (["--ema", "rel-0.050"], 12, "ema-rel-0.050"),
        (["--ema", "rel-0.289"], 12, "ema-rel-0.289"),
    ],
)
def test_an_exported_model_is_what_the_checkpoint_holds(run, tmp_path, options, step, kind):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model"), *options]) == 0
    reader = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", step))
    exported = state(tmp_path / "model")
    assert exported.keys() == reader.shapes.keys()
    for name, expected in reader.full(kind).items():
        assert torch.equal(exported[name], expected), name


def test_an_exported_model_can_be_asked_what_it_is(model, capsys):
    """With the spectrum that its subspace was fitted with."""
    assert AsymFlow.from_pretrained(model).subspace.spectrum is not None
    assert main(["info", str(model)]) == 0
    assert "GFLOPs an image" in capsys.readouterr().out


def sampled(model, out, config, *options):
    """By the command line, all in one batch, with the settings of the training."""
    c, words = config.sample, ["sample", "--model", str(model), "--out", str(out), "--seed", str(config.train.seed)]
    for name in ("num", "steps", "guidance", "method"):
        words += [f"--{name}", str(getattr(c, name))]
    assert main([*words, "--batch", str(c.num), "--interval", ",".join(map(str, c.interval)), *options]) == 0
    return json.loads((out / "samples.json").read_text())["settings"]


def test_the_grid_of_a_run_is_what_its_model_is_sampled_to(run, model, tmp_path):
    """Though the training is in bf16: on a CPU, where nothing else is said, samples are drawn in float32."""
    assert sampled(model, tmp_path / "out", load_config(run / "config.yaml"))["precision"] == "float32"
    drawn = Image.open(run / "samples" / "00000012.png")
    assert np.array_equal(drawn, Image.open(tmp_path / "out" / "grid.png"))


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_both_roads_to_an_image_give_the_same_bits(run, model, tmp_path, precision, monkeypatch):
    """As it is drawn for grids and for the evaluation in a training, and by the command line."""
    config, other = (load_config(run / "config.yaml", [f"sample.precision={p}"]) for p in (precision, "null"))
    images = []
    monkeypatch.setattr("asymflow.cli.sample.to_image", lambda image: (images.append(image), to_image(image))[1])
    assert sampled(model, tmp_path / "out", config, "--precision", precision)["precision"] == precision
    flow, indices = AsymFlow.from_pretrained(model), range(config.sample.num)
    images_of = lambda config: drawn(flow, config, [i % config.model.num_classes for i in indices], indices)
    assert torch.equal(torch.stack(images), images_of(config))
    assert torch.equal(images_of(other), images_of(config)) == (precision == "float32")  # the default on a CPU


@pytest.mark.parametrize("width", ["0.05", "0.10", "0.0125", "0.2886"])
def test_an_average_of_a_snapshot_is_that_snapshot(run, tmp_path, width, capsys):
    assert main(["ema", "--run", str(run), "--sigma-rel", width, "--out", str(tmp_path / "model")]) == 0
    assert "of its profile, 0.00% (of the norm) could not be matched" in capsys.readouterr().out
    direct = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", 12)).full(f"ema-rel-{float(width):.3f}")
    for name, found in state(tmp_path / "model").items():
        assert torch.allclose(found, direct[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--ema", "0.3"], "--ema 0.3 is not in the checkpoint: it has 0.5, 0.9"),
        (["export", "--step", "7"], "has no step 7: it has 6, 12"),
        (["ema", "--sigma-rel", "0.4"], "sigma_rel must be between"),
        (["ema", "--sigma-rel", "0.1", "--step", "2"], "no snapshot up to step 2: the first is of step 5"),
        (["ema", "--sigma-rel", "0.1", "--step", "0"], "no snapshot up to step 0"),
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


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_only_the_snapshots_that_are_used_have_to_be_whole(run, tmp_path, capsys):
    snapshots = shutil.copytree(run, tmp_path / "run") / "snapshots"
    ema = ["ema", "--run", str(snapshots.parent), "--sigma-rel", "0.07", "--out", str(tmp_path / "model")]
    cut(snapshots / "00000012" / "state.json")
    assert main(ema) == 2
    assert "00000012 is damaged (state.json is not as it was written): move it away" in capsys.readouterr().err
    assert main([*ema, "--step", "10"]) == 0
    assert "at step 10 from 8 averages" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model")
    cut(snapshots / "00000005" / "rank_00000.safetensors")
    assert main([*ema, "--step", "10"]) == 2
    said = capsys.readouterr().err.rpartition("\r")[2]  # after the bar
    assert said.startswith("asymflow ema: error: ")
    assert "00000005 is damaged (rank_00000.safetensors is not as it was written)" in said


@pytest.mark.parametrize("command", [["export"], ["ema", "--sigma-rel", "0.07"]])
def test_the_subspace_has_to_be_the_one_that_was_trained_with(run, tmp_path, capsys, command):
    copy = shutil.copytree(run, tmp_path / "run")
    trained = Subspace.load(copy / "subspace.safetensors")
    Subspace(-trained.basis, trained.scale, patch_size=8).save(copy / "subspace.safetensors")
    assert main([*command, "--run", str(copy), "--out", str(tmp_path / "model")]) == 2
    assert f"00000012 was trained with another subspace than {copy}/subspace.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
