"""Training in real processes: every ZeRO stage gives the same curve, and an interruption leaves no trace in it."""

import ast
import re
from pathlib import Path

import pytest
import torch
from processes import metrics, tensors, train, words

import asymflow
from asymflow.training.run import checkpoint
from asymflow.training.zero import internals as deepspeed_internals

STAGES = (0, 1, 2, 3)


def stage_runs(folder, stage):
    settings = f"deepspeed.zero_optimization.stage={stage}", "train.steps=8", "checkpoint={every: 4, keep_last: 9}"
    straight, resumed = words(folder / f"stage{stage}", *settings), words(folder / f"resumed{stage}", *settings)
    return [straight, [*resumed, "--resume", str(folder / f"stage{stage}/checkpoints/00000004")]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Eight steps in each stage on two ranks, and the last four once more; and on one rank at stage 1."""
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
    assert metrics(straight)[4:] == metrics(resumed)
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


# ---- DeepSpeed's releases --------------------------------------------------------------------------------------------
DOCUMENTED = {"initialize", "init_distributed", "utils"}
INSIDES = (  # of DeepSpeed's optimizers and of the parameters that it has changed
    r"engine\.(optimizer|_)|\bds_(tensor|numel|shape|process_group)|_hp_mapping|grad_position|_groups_flat|fp(16|32)_groups|"
    r"single_partition_of|update_lp_params|persistent_parameters|_global_grad_norm|__compatible_ops__|DeepSpeedConfigModel"
)


def test_one_module_alone_reaches_into_deepspeed():
    for path in Path(asymflow.__file__).parent.rglob("*.py"):
        if path.name == "internals.py":
            assert re.search(INSIDES, path.read_text())
            continue
        assert not re.search(INSIDES, path.read_text()), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("deepspeed"), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("deepspeed.") for name in node.names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "deepspeed":
                assert node.attr in DOCUMENTED, path


def test_an_untested_release_of_deepspeed_is_remarked_upon_in_one_line(monkeypatch):
    import deepspeed

    oldest, newest = deepspeed_internals.OLDEST, deepspeed_internals.NEWEST
    for version in (oldest, newest, f"{newest}+abc123"):
        monkeypatch.setattr(deepspeed, "__version__", version)
        assert deepspeed_internals.remarks() == []
    for version in ("0.18.9", "0.20.0", "1.0.0rc1", "unknown"):
        monkeypatch.setattr(deepspeed, "__version__", version)
        assert deepspeed_internals.remarks() == [
            f"DeepSpeed {version} is untested here: tested are {oldest} to {newest}"
        ]
