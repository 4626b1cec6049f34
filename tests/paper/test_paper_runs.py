"""toy.paper: a run from its training to its JSON file, in small."""

import json

import pytest
import torch

from asymflow.subspace import Subspace
from asymflow.training.config.reading import load_config
from asymflow.training.start import make_flow
from toy.paper import __main__ as paper
from toy.paper.measures import LEVELS
from toy.paper.runs import EMBEDDED, EULER, HERE, SWITCHED_AT, checksum


@pytest.mark.slow
def test_a_run_is_trained_and_measured_once(tmp_path, capsys):
    words = ["rank", "--quick", "--out", str(tmp_path), "--only", "rank-8-seed-0"]
    assert paper.main(words) == 0
    file = tmp_path / "rank-8-seed-0.json"
    found, written = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert len(found["losses"]) == 1  # the mean of so few steps
    assert found["hours"].keys() == {"training", "measuring"}
    assert list(found["on the way"]) == ["4", "8"]
    assert [float(level) for level in found["on the way"]["8"]["held_out"]] == list(LEVELS)
    assert found["on the way"]["8"]["held_out"] != found["on the way"]["4"]["held_out"]
    guided, loose = found["at the end"]["guided"], found["at the end"]["guided, no clamp"]
    assert guided.keys() == loose.keys() >= {"frechet_distance", "precision", "right", "patches", "spectrum", "seams"}
    assert guided["patches"] != loose["patches"]  # rank 8 divides by sigma outside of its subspace
    assert paper.main(words) == 0
    assert file.stat().st_mtime_ns == written
    assert paper.main(["guidance", *words[1:4], "--only", "guidance-rank-8-seed-0"]) == 0
    redrawn = json.loads((tmp_path / "guidance-rank-8-seed-0.json").read_text())["at the end"]
    assert redrawn.keys() == {"guidance 1.5", "guidance 3"}
    assert redrawn["guidance 1.5"].keys() == guided.keys()
    assert redrawn["guidance 1.5"]["patches"] != redrawn["guidance 3"]["patches"] != guided["patches"]
    assert paper.main(["directions", *words[1:4], "--only", "directions-rank-8-seed-0"]) == 0
    parts = json.loads((tmp_path / "directions-rank-8-seed-0.json").read_text())["at the end"]
    for level, loss in found["on the way"]["8"]["held_out"].items():
        assert parts["inside"][level] + parts["outside"][level] == pytest.approx(loss, rel=1e-5)
        assert min(parts["inside"][level], parts["outside"][level]) > 0
    assert paper.main(["speed", *words[1:4], "--only", "speed-rank-8-seed-0"]) == 0
    halfway = json.loads((tmp_path / "speed-rank-8-seed-0.json").read_text())["at the end"]
    assert list(halfway) == ["4"]
    assert halfway["4"].keys() == guided.keys()
    assert halfway["4"]["patches"] != guided["patches"]
    assert paper.main(["rate", *words[1:4], "--only", "rank-8-rate-0.0003-seed-3"]) == 0
    assert list(json.loads((tmp_path / "rank-8-rate-0.0003-seed-3.json").read_text())["on the way"]) == ["4", "8"]
    assert paper.main(["repa", *words[1:4], "--only", "rank-8-repa-seed-0"]) == 0
    aligned = json.loads((tmp_path / "rank-8-repa-seed-0.json").read_text())
    assert aligned["losses"] != found["losses"]
    assert len(aligned["alignment"]) == 1
    assert aligned["teacher"] == checksum(tmp_path / "teacher" / "model.safetensors")
    assert aligned["classifier"] == found["classifier"] != ""
    assert not any((tmp_path / f"{what}-rank-8-seed-0").exists() for what in ("guidance", "directions", "speed"))
    files = ("pca-8-shapes64-0.safetensors", "rank-8-seed-0/subspace.safetensors")
    assert torch.equal(*(Subspace.load(tmp_path / file).basis for file in files))
    assert paper.main(["embedding", *words[1:4], "--only", "rank-0-seeded-seed-0"]) == 0
    seeded = json.loads((tmp_path / "rank-0-seeded-seed-0.json").read_text())["at the end"]
    assert seeded.keys() == found["at the end"].keys()
    assert paper.main(["switch", *words[1:4], "--only", "switch-rank-32-unseeded-seed-0"]) == 0  # it trains both
    switched = json.loads((tmp_path / "switch-rank-32-unseeded-seed-0.json").read_text())["at the end"]
    assert len(switched) == len({found["patches"] for found in switched.values()}) == 2 * len(SWITCHED_AT)
    assert paper.main(["renew", *words[1:4], "--only", "renew-rank-32-unseeded-seed-0"]) == 0
    renewed = json.loads((tmp_path / "renew-rank-32-unseeded-seed-0.json").read_text())["at the end"]
    assert len(renewed) == len({found["patches"] for found in renewed.values()}) == len(EULER)
    assert paper.main([word for word in words if word != "--quick"]) == 2
    assert "has a classifier of other data and epochs: choose another --out" in capsys.readouterr().err
    file.write_text(json.dumps({**found, "run": {**found["run"], "settings": ["subspace.rank=9"]}}))
    assert paper.main(words) == 2
    assert "rank-8-seed-0.json is of another run: choose another --out" in capsys.readouterr().err


def test_a_run_that_there_is_not_is_one_line(tmp_path, capsys):
    assert paper.main(["rank", "--out", str(tmp_path), "--only", "rank-9-seed-0"]) == 2
    error = capsys.readouterr().err
    assert "--only rank-9-seed-0 is none of rank-8-seed-0, rank-0-seed-0" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 8, 32])
def test_networks_of_another_start_differ_in_nothing_else(tmp_path, rank):
    """With the directions that it would get anyway the network is the one of the configuration, to the bit."""
    subspace = Subspace.random(768, rank, patch_size=16)
    subspace.save(tmp_path / "it.safetensors")
    own = [f"model.backbone={EMBEDDED}", "model.size=null"]
    made = []
    for keys in ([], own, [*own, f"model.options.directions={tmp_path / 'it.safetensors'}"]):
        torch.manual_seed(0)
        made.append(make_flow(load_config(HERE / "shapes64.yaml", keys), subspace).state_dict())
    for name, weight in made[0].items():
        assert torch.equal(weight, made[2][name])
        assert torch.equal(weight, made[1][name]) == (rank == 0 or not name.endswith("x_embedder.proj1.weight"))
