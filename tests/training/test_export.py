"""What comes out of a training run, by `asymflow export`, `ema`, `sample` and `info`, is the model that was trained."""

import json
import re
import shlex
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from processes import train, words

from asymflow import AsymFlow
from asymflow.cli import main
from asymflow.cli.models import class_names
from asymflow.data.shapes import Shapes
from asymflow.evaluation.classifier import Classifier
from asymflow.pixels import tensor_to_pil
from asymflow.subspace import Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.objectives.class_conditional import drawn
from asymflow.training.run import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps on one process; two would write the same pieces, see test_training_distributed.py.

    Snapshots at 5, 10 and, the last step, 12. Two of the widths are not those of their names, rel-0.013 and rel-0.289.
    """
    out = tmp_path_factory.mktemp("export") / "run"
    widths = "ema.sigma_rel=[0.05, 0.10, 0.0125, 0.2886]"
    samples = ["sample.every=12", "sample.num=8", "sample.steps=3", "train.precision=bf16"]
    train(1, words(out, "train.steps=12", "checkpoint.every=6", "ema.snapshot_every=5", widths, *samples))
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
        (["--ema", "0.05"], 12, "ema-rel-0.050"),
        (["--ema", "rel-0.0125"], 12, "ema-rel-0.013"),
        (["--ema", ".90"], 12, "ema-0.9"),
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


def test_the_names_of_the_classes_are_kept(run, model, tmp_path):
    assert class_names(run) == class_names(model) == Shapes(1, 8).classes
    words = ["--classes", "blue circle", "--num", "1", "--steps", "1", "--device", "cpu"]
    assert main(["sample", "--model", str(model), "--out", str(tmp_path / "out"), *words]) == 0
    (drawn,) = json.loads((tmp_path / "out/samples.json").read_text())["images"]
    assert drawn["class"] == Shapes(1, 8).classes.index("blue circle")


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
    monkeypatch.setattr(
        "asymflow.cli.drawing.tensor_to_pil", lambda image: (images.append(image), tensor_to_pil(image))[1]
    )
    assert sampled(model, tmp_path / "out", config, "--precision", precision)["precision"] == precision
    flow, indices = AsymFlow.from_pretrained(model), range(config.sample.num)
    images_of = lambda config: drawn(flow, config, [i % config.model.num_classes for i in indices], indices)
    assert torch.equal(torch.stack(images), images_of(config))
    assert torch.equal(images_of(other), images_of(config)) == (precision == "float32")  # the default on a CPU


@pytest.mark.parametrize("width", ["0.05", "0.10", "0.0125", "0.2886"])
def test_an_average_of_a_snapshot_is_that_snapshot(run, tmp_path, width, capsys):
    assert main(["ema", "--run", str(run), "--sigma-rel", width, "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr()
    assert "of its profile, 0.00% (of the norm) could not be matched" in said.out
    assert "remark" not in said.err
    direct = checkpoint.Reader(checkpoint.folder_of(run / "checkpoints", 12)).full(f"ema-rel-{float(width):.3f}")
    for name, found in state(tmp_path / "model").items():
        assert torch.allclose(found, direct[name], rtol=0, atol=1e-5), name


def test_an_average_that_was_not_tracked_is_put_together_wherever_a_run_is_named(run, tmp_path, capsys):
    model = tmp_path / "model"
    assert main(["export", "--run", str(run), "--ema", "0.07", "--out", str(model)]) == 0
    assert "average rel-0.07 was not tracked: put together from" in capsys.readouterr().err
    assert main(["ema", "--run", str(run), "--sigma-rel", "0.07", "--out", str(tmp_path / "same")]) == 0
    same = state(tmp_path / "same")
    assert all(torch.equal(value, same[name]) for name, value in state(model).items())


def test_a_poor_match_is_remarked_on_with_what_is_matched_exactly(run, tmp_path, capsys):
    """At step 9, with snapshots of step 5 alone: half of the steps that count most are in none of them."""
    ema = ["ema", "--run", str(run), "--out", str(tmp_path / "model")]
    assert main([*ema, "--sigma-rel", "0.02", "--step", "9"]) == 0
    said = capsys.readouterr()
    assert float(re.search(r"of its profile, (.*)% ", said.out)[1]) > 10
    assert "remark: " in said.err
    assert "Matched exactly: --step 5 --sigma-rel 0.05 or 0.1 or 0.0125 or 0.2886. To match others better" in said.err
    shutil.rmtree(tmp_path / "model")
    assert main([*ema, "--sigma-rel", "0.0125", "--step", "5"]) == 0
    assert "of its profile, 0.00% (of the norm) could not be matched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--ema", "0.5x"], "--ema 0.5x is not in the checkpoint: it has 0.5, 0.9"),
        (["export", "--step", "7"], "has no step 7: it has 6, 12"),
        (["ema", "--sigma-rel", "0.4"], "sigma_rel must be between"),
        (["ema", "--sigma-rel", "0.1", "--step", "2"], "no snapshot up to step 2: the first is of step 5"),
        (["ema", "--sigma-rel", "0.1", "--step", "0"], "no snapshot up to step 0"),
        (["ema", "--sigma-rel", "0.1", "--step", "13"], "--step 13 is beyond step 12, to which"),
        (["export", "--out", "../" + Path.cwd().name], " is the folder that you are in"),
        (["export", "--out", "."], ". is the folder that you are in: choose a new one"),
        (["export", "--run", "typo"], "typo is no run of train_ddp.py"),
        (["ema", "--sigma-rel", "0.1", "--run", "typo"], "typo is no run of train_ddp.py"),
        (["export", "--base", "flux"], "--base is for a finetuning"),
        (["ema", "--sigma-rel", "0.1", "--base", "flux"], "--base is for a finetuning"),
        (["export", "--run", "checkpoints/00000006"], "is a checkpoint: give its run, ., and --step 6"),
    ],
)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(run, tmp_path, capsys, words, message):
    command, *rest = words
    given = {"--run": str(run), "--out": str(tmp_path / "model")} | dict(zip(rest[::2], rest[1::2], strict=True))
    assert main([command, *chain.from_iterable(given.items())]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model")]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine"]


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


# ---- `asymflow sample` and `asymflow info` of a run ------------------------------------------------------------------
def sample(model, out, *options):
    return main(["sample", "--model", str(model), "--out", str(out), "--num", "2", "--steps", "2", *options])


def record(folder):
    return json.loads((folder / "samples.json").read_text())


@pytest.mark.parametrize(
    ("options", "step", "average"), [([], 12, "0.5"), (["--ema", "none", "--step", "6"], 6, "none")]
)
def test_samples_of_a_run_are_those_of_its_exported_model(run, tmp_path, capsys, options, step, average):
    assert sample(run, tmp_path / "a", *options) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "training run" in line]
    assert line == f"{run} is a training run: step {step}, average {average}"
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model"), *options]) == 0
    assert sample(tmp_path / "model", tmp_path / "b") == 0
    for name in ("images/000000.png", "images/000001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    found = record(tmp_path / "a")
    assert (found["run"], found["settings"]["step"], found["settings"]["average"]) == (str(run), step, average)
    again = found["make_again"].replace("INDEX", "1").replace("FOLDER", str(tmp_path / "c"))
    assert main(shlex.split(again)[1:]) == 0
    assert (tmp_path / "a/images/000001.png").read_bytes() == (tmp_path / "c/images/000001.png").read_bytes()


def test_images_of_two_checkpoints_of_a_run_do_not_mix(run, tmp_path, capsys):
    growing = shutil.copytree(run, tmp_path / "run")
    (growing / "checkpoints/00000012").rename(tmp_path / "later")
    assert sample(growing, tmp_path / "out") == 0
    (tmp_path / "later").rename(growing / "checkpoints/00000012")
    (tmp_path / "out/images/000001.png").unlink()
    capsys.readouterr()
    assert sample(growing, tmp_path / "out") == 2
    said = f"{tmp_path}/out holds images of step 6 of a run, but this is step 12: go on with --step 6"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out/images/000001.png").exists()
    assert sample(growing, tmp_path / "out", "--step", "6") == 0
    assert (tmp_path / "out/images/000001.png").exists()


def test_info_of_a_run_is_that_of_its_exported_model(run, tmp_path, capsys):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "model")]) == 0
    found = []
    for model in (run, tmp_path / "model"):
        capsys.readouterr()
        assert main(["info", str(model), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].pop("kind") == "a training run, step 12, average 0.5"
    assert found[1].pop("kind") == "a folder of save_pretrained"
    assert [one.pop("model") for one in found] == [str(run), str(tmp_path / "model")]
    assert found[0] == found[1]


def test_the_subspace_of_a_run_can_be_shown(run, capsys):
    assert main(["subspace", "show", str(run)]) == 0
    assert "of 192 dimensions" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sample", "info"])
def test_a_run_that_cannot_be_used_is_one_line(run, tmp_path, capsys, command):
    def refused(model, *options):
        out = ["--out", str(tmp_path / "out")] if command == "sample" else []
        words = ["--model", str(model)] if command == "sample" else [str(model)]
        assert main([command, *words, *out, *options]) == 2
        assert not (tmp_path / "out").exists()
        *said, line = capsys.readouterr().err.splitlines()
        said = [other for other in said if other.strip() and "checking: " not in other]  # a bar
        assert all("is a training run: step" in other for other in said), said
        return line

    copy = shutil.copytree(run, tmp_path / "run")
    assert "--ema 0.5x is not in the checkpoint: it has 0.5, 0.9" in refused(copy, "--ema", "0.5x")
    assert "has no step 7: it has 6, 12" in refused(copy, "--step", "7")
    assert f"give its run, {copy}, and --step 6" in refused(copy / "checkpoints/00000006")
    config = (copy / "config.yaml").read_text()
    if command == "sample":  # `info` reads no weights
        (copy / "config.yaml").write_text(config.replace("bottleneck: 16", "bottleneck: 8"))
        assert (
            "does not fit: wrong shapes: backbone.x_embedder.proj1.weight has (16, 192), expected (8, 192)"
            in refused(copy)
        )
    (copy / "config.yaml").write_text("base: asymflux2_tiny\n")
    if command == "sample":
        line = refused(copy)
        assert "finetunes runs/toy/asymflux2_tiny/pixel-base: asymflow export --run" in line
        assert "asymflow sample --base BASE --adapter ADAPTER" in line
    shutil.rmtree(copy / "checkpoints")
    assert "holds no whole checkpoint" in refused(copy)
    (copy / "config.yaml").unlink()
    assert "--ema is for a training run, but" in refused(copy, "--ema", "0.5")
    said = {"info": "--step does not go with a model that could be trained", "sample": "--step is for a training run"}
    assert said[command] in refused("JiT-B/16", "--step", "5")


# ---- The card --------------------------------------------------------------------------------------------------------
def evaluated(run, out, *options):
    """The result.json of a few images."""
    weights = out.with_suffix(".safetensors")
    Classifier(16, width=8).save(weights)
    words = ["--num", "12", "--steps", "1", "--extractor", "classifier", "--weights", str(weights), *options]
    assert main(["evaluate", "--model", str(run), "--device", "cpu", *words, "--out", str(out)]) == 0
    return out / "result.json"


def test_a_card_has_what_a_reader_needs_and_nothing_of_this_machine(run, tmp_path, capsys):
    result = json.loads(evaluated(run, tmp_path / "scored").read_text())
    result["protocol"]["clip"] = str(tmp_path / "clip")
    (tmp_path / "scored" / "result.json").write_text(json.dumps(result))
    card = ["card", "--run", str(run), "--license", "apache-2.0", "--name", "me/mine", "--data-name", "My Shapes"]
    assert main([*card, "--result", str(tmp_path / "scored"), "--out", str(tmp_path / "card")]) == 0
    written = sorted(path.name for path in (tmp_path / "card").iterdir())
    assert written == ["README.md", "config.yaml", "curves.png", "samples.png"]
    loaded = ModelCard.load(tmp_path / "card" / "README.md")
    found = {one.metric_type: one.metric_value for one in loaded.data.eval_results}
    assert found["fd-classifier"] == result["measures"]["frechet_distance"]["value"]
    assert "fid" not in found  # it is no FID in other features
    assert loaded.data.license == "apache-2.0"
    assert load_config(tmp_path / "card" / "config.yaml").model == load_config(run / "config.yaml").model
    for name in ("README.md", "config.yaml"):
        assert str(tmp_path.parent) not in (tmp_path / "card" / name).read_text()
    # A result of another run is refused.
    result["scored"]["checkpoint_sha256"] = "0" * 64
    (tmp_path / "scored" / "result.json").write_text(json.dumps(result))
    capsys.readouterr()
    assert main([*card, "--result", str(tmp_path / "scored"), "--out", str(tmp_path / "other")]) == 2
    assert "is of a checkpoint that is not, or no longer, in" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_card_says_of_which_step_a_result_is_and_what_could_not_be_read(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("damaged\n")
    (copy / "samples/00000012.png").write_bytes(b"damaged")
    result = evaluated(run, tmp_path / "scored", "--step", "6", "--orthogonal", "0.5")
    capsys.readouterr()
    assert main(["card", "--run", str(copy), "--result", str(result), "--out", str(tmp_path / "card")]) == 0
    said = capsys.readouterr().err
    assert "1 of 13 lines cannot be read" in said
    assert "its samples are not drawn" in said
    assert f"{result} is of step 6, but the card is of step 12" in said
    settings = "step 6, average 0.5, guidance 2.3, interval [0.0, 0.88], orthogonal 0.5"
    assert settings in (tmp_path / "card" / "README.md").read_text().partition("## Results")[2]
    assert all(settings in one.metric_name for one in ModelCard.load(tmp_path / "card/README.md").data.eval_results)


def test_a_result_of_snapshots_that_the_run_does_not_have_is_refused(run, tmp_path, capsys):
    result = evaluated(run, tmp_path / "scored", "--ema", "0.07")
    card = ["card", "--run", str(run), "--result", str(result)]
    assert main([*card, "--out", str(tmp_path / "card")]) == 0
    whole = json.loads(result.read_text())
    for change in ({"step": 10}, {"average": "rel-x"}, {"snapshots_sha256": "0" * 64}):
        result.write_text(json.dumps(whole | {"scored": whole["scored"] | change}))
        capsys.readouterr()
        assert main([*card, "--out", str(tmp_path / "other")]) == 2
        assert capsys.readouterr().err.endswith(f"is of snapshots that are not, or no longer, in {run}\n")
    assert not (tmp_path / "other").exists()
