"""The benchmarks run, say what they measured, and report what went wrong without ending for it."""

import io
import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from asymflow.bench import emoji64, fast, gpu, kit, noise, right
from asymflow.bench.__main__ import COMMANDS
from asymflow.bench.__main__ import main as bench
from asymflow.bench.wrapper import main
from asymflow.parameterization import recover_velocity


def test_without_a_command_the_commands_are_listed(capsys):
    assert bench([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert bench(["gpus"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- The noise -------------------------------------------------------------------------------------------------------
def test_noise_is_timed_for_each_size():
    found = noise.measure_noise(torch.device("cpu"), (16, 32), repeats=2)
    for side in (16, 32):
        assert all(value > 0 for value in found[side].values())
        assert found[side]["bytes_eps"] == 4 * found[side]["bytes_pixels"] == 4 * 3 * side**2


def test_a_device_that_is_not_there_is_answered_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        noise.main(["--device", "tpu9"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sampling_is_timed_as_the_command_computes(monkeypatch):
    seen = []

    def generate(flow, labels, indices, **options):
        attention = {m.float32_attention for m in flow.modules() if hasattr(m, "float32_attention")}
        seen.append((flow.backbone_dtype, torch.is_autocast_enabled("cpu"), attention))
        return torch.zeros(len(labels), 3, 4, 4)

    monkeypatch.setattr(fast, "generate", generate)
    fast.sampling(SimpleNamespace(device=torch.device("cpu"), tiny=True, limits={}))
    assert seen == [(torch.float32, True, {True})] * 2


# ---- The wrapper -----------------------------------------------------------------------------------------------------
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


# ---- The checks for a GPU --------------------------------------------------------------------------------------------
def wrong(kit_):
    raise kit.WrongError("they differ", {"by": 2})


def broken(kit_):
    return {}["nothing"]


def without_package(kit_):
    kit_.need("json", "no_such_package")


def fine(kit_):
    return "one | two", {"x": torch.tensor(1.0)}


def run(monkeypatch, folder, *checks, options=()):
    monkeypatch.setattr(right, "CHECKS", list(checks))
    monkeypatch.setattr(fast, "CHECKS", [kit.Check("limits", lambda kit_: ("1", {}), 0, measures=True)])
    code = gpu.main(["--tiny", "--device", "cpu", "--out", str(folder), *options])
    found = json.loads((folder / "gpu.json").read_text())
    return code, {check["name"]: (check["status"], check["summary"]) for check in found["checks"]}


def test_each_check_is_by_itself(monkeypatch, tmp_path):
    """Whatever one of them does, the others run, and what it did is written down."""
    kinds = {"wrong": wrong, "broken": broken, "missing": without_package, "fine": fine}
    checks = [kit.Check(name, function, 0) for name, function in kinds.items()]
    checks += [kit.Check("slow", fine, 10**6), kit.Check("broken measure", broken, 0, measures=True)]
    code, found = run(monkeypatch, tmp_path, *checks)
    assert code == 1
    assert found == {
        "wrong": ("FAILED", "they differ"),
        "broken": ("FAILED", "KeyError: 'nothing'"),
        "missing": ("not run", "not installed: no_such_package"),
        "fine": ("passed", "one | two"),
        "slow": ("not run", found["slow"][1]),
        "broken measure": ("error", "KeyError: 'nothing'"),
        "limits": ("measured", "1"),
    }
    assert "it takes about 1000000" in found["slow"][1]
    rows = [re.split(r"(?<!\\)\|", line) for line in (tmp_path / "gpu.md").read_text().splitlines() if "|" in line]
    assert {len(row) for row in rows} == {6}
    assert len(rows) == 2 + len(found)


def test_what_is_wrong_or_breaks_makes_the_exit_code(monkeypatch, tmp_path):
    fine_ones = [kit.Check("fine", fine, 0), kit.Check("missing", without_package, 0), kit.Check("slow", fine, 10**6)]
    bad_ones = [kit.Check("wrong", wrong, 0), kit.Check("broken measure", broken, 0, measures=True)]
    assert run(monkeypatch, tmp_path, *fine_ones)[0] == 0
    for bad in bad_ones:
        assert run(monkeypatch, tmp_path, *fine_ones, bad)[0] == 1
    code, found = run(monkeypatch, tmp_path, *fine_ones, *bad_ones, options=["--only", "FINE"])
    assert code == 0
    assert found.keys() == {"fine", "limits"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (gpu, ["--tiny", "--only", "limits,reovery", "--out", "out"]),
        (gpu, ["--tiny", "--out", "file"]),
        (emoji64, ["--data", "file", "--out", "file"]),
        (emoji64, ["--data", "file", "--out", ".", "--set", "sample.every=null"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        command.main(["--device", "cpu", *words])
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_asked_of_it_fits_into_the_time():
    """With what was measured on an H100. How much of the loading is hidden, the last, is one question more."""
    *checks, last = [*right.CHECKS, *fast.CHECKS]
    assert last.name == "waiting for data"
    assert sum(check.seconds for check in checks) <= 8 * 60


def a_kit(folder):
    return kit.Kit(torch.device("cpu"), True, folder, None, float("inf"))


def test_recovery_is_checked_against_the_exact_one(monkeypatch, tmp_path):
    assert right.recovery(a_kit(tmp_path))[1]["highest"] > 0

    def off(u_a, *rest):
        return recover_velocity(u_a, *rest) * (1 if u_a.dtype == torch.float64 else 1.1)

    monkeypatch.setattr(right, "recover_velocity", off)
    with pytest.raises(kit.WrongError, match="beyond the bound"):
        right.recovery(a_kit(tmp_path))


@pytest.mark.parametrize(
    ("loss", "graphs", "wrong"),
    [
        (0.5, {"warm": 2, "end": 2}, None),
        (0.51, {"warm": 2, "end": 2}, "at stage 1 the losses differ by 2.0e-02"),
        (0.5, {"warm": 2, "end": 3}, "at stage 1 something was compiled after the warm-up"),
        (0.5, None, "at stage 1 something was compiled after the warm-up"),
    ],
)
def test_what_is_compiled_is_held_against_what_is_not(monkeypatch, tmp_path, loss, graphs, wrong):
    """With trainings that say this: to compile takes a minute on a CPU."""

    def train(name, settings):
        compiled = settings.get("train.compile", False)
        return {"metrics": [{"loss": loss if compiled else 0.5}]} | ({"graphs": graphs} if compiled else {})

    one = a_kit(tmp_path)
    one.train, one.on_a_gpu, one.trainings = train, lambda: None, SimpleNamespace(end=lambda: None)
    if wrong is None:
        assert right.compiled(one)[1]["graphs at stage 3"] == graphs
    else:
        with pytest.raises(kit.WrongError, match=wrong):
            right.compiled(one)


@pytest.mark.slow
def test_all_checks_on_a_cpu(tmp_path):
    """What can be checked on a CPU holds, and what cannot is listed."""
    assert gpu.main(["--tiny", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path)]) == 0
    found = {check["name"]: check for check in json.loads((tmp_path / "gpu.json").read_text())["checks"]}
    assert found.keys() == {check.name for check in [*right.CHECKS, *fast.CHECKS]}
    not_run = {name: check["summary"] for name, check in found.items() if check["status"] == "not run"}
    assert not_run == {"compiled against eager": "not on a CPU"}
    assert {check["status"] for check in found.values()} == {"not run", "passed", "measured"}, found
    assert found["killed and resumed"]["figures"]["as it is"] == {"losses": True, "weights": True}
    kept = found["finetuning FLUX.2"]["figures"]["kept"]
    assert kept["measured"]["ema"] == kept["counted"]["ema"]


@pytest.mark.slow
@pytest.mark.parametrize("given", [["--steps", 3], []])
def test_emoji64_leaves_pictures_and_curves(monkeypatch, tmp_path, given):
    for name, value in {"TRIAL": 3, "WARM_UP": 1, "RESERVE": 30}.items():  # so that no more than the trial fits
        monkeypatch.setattr(emoji64, name, value)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for i in range(64):
            pixels, picture = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8), io.BytesIO()
            Image.fromarray(pixels).save(picture, "png")
            for name, content in (("png", picture.getvalue()), ("cls", b"%d" % (i % 9))):
                info = tarfile.TarInfo(f"{i:02}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    settings = [
        "model.options={width: 32, depth: 2, heads: 2, bottleneck: 16, in_context_start: 1, in_context_tokens: 2}"
    ]
    settings += ["data.workers=0", "sample.num=4", "sample.steps=2", "train.precision=fp32"]
    words = [word for setting in settings for word in ("--set", setting)]
    options = ["--data", tmp_path / "some.tar", "--out", tmp_path / "out", "--minutes", 1, "--device", "cpu", *given]
    assert emoji64.main([*map(str, options), *words]) == 0
    found = json.loads((tmp_path / "out/emoji64.json").read_text())
    assert found["steps"] == 3
    assert [len(run["loss"]) for run in found["ranks"].values()] == [3, 3]
    for name in ("emoji64", "rank-8", "rank-0"):
        assert Image.open(tmp_path / f"out/{name}.png").size[0] > 64
