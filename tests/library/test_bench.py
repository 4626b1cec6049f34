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

from asymflow.bench import __main__ as bench
from asymflow.bench import fast, kit, right
from asymflow.parameterization import recover_velocity


def a_kit(folder, **options):
    args = SimpleNamespace(tiny=True, out=folder, data=None, **options)
    return kit.Kit(torch.device("cpu"), args, folder, None, float("inf"))


# ---- What needs no training ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("check", "kinds"), [(fast.wrapper, 4), (fast.noise, 5)])
def test_what_is_timed_on_any_machine_is_said_in_milliseconds(tmp_path, check, kinds):
    summary, figures = check(a_kit(tmp_path))
    assert len(re.findall(r" [\d.e-]+ ms", summary)) == kinds
    times = figures.get(16, figures)
    assert len(times) == kinds
    assert all(value > 0 for value in times.values())


def test_sampling_is_timed_as_the_command_computes(monkeypatch):
    seen = []

    def generate(flow, labels, indices, **options):
        attention = {m.float32_attention for m in flow.modules() if hasattr(m, "float32_attention")}
        seen.append((flow.backbone_dtype, torch.is_autocast_enabled("cpu"), attention))
        return torch.zeros(len(labels), 3, 4, 4)

    monkeypatch.setattr(fast, "generate", generate)
    fast.sampling(a_kit(None))
    assert seen == [(torch.float32, True, {True})] * 2


# ---- One check after the other ---------------------------------------------------------------------------------------
def wrong(kit_):
    raise kit.WrongError("they differ", {"by": 2})


def broken(kit_):
    return {}["nothing"]


def without_package(kit_):
    kit_.need("json", "no_such_package")


def fine(kit_):
    return "one | two", {"x": torch.tensor(1.0)}


def run(monkeypatch, folder, *checks, options=("--tiny",)):
    limits = kit.Check("limits", lambda kit_: ("1", {}), 0, measures=True)
    monkeypatch.setattr(bench, "CHECKS", [*checks, limits])
    monkeypatch.setattr(bench, "MEASUREMENTS", [limits])
    code = bench.main(["--device", "cpu", "--out", str(folder), *options])
    found = json.loads((folder / "bench.json").read_text())
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
    rows = [re.split(r"(?<!\\)\|", line) for line in (tmp_path / "bench.md").read_text().splitlines() if "|" in line]
    assert {len(row) for row in rows} == {6}
    assert len(rows) == 2 + len(found)


def test_what_is_wrong_or_breaks_makes_the_exit_code(monkeypatch, tmp_path):
    fine_ones = [kit.Check("fine", fine, 0), kit.Check("missing", without_package, 0), kit.Check("slow", fine, 10**6)]
    bad_ones = [kit.Check("wrong", wrong, 0), kit.Check("broken measure", broken, 0, measures=True)]
    assert run(monkeypatch, tmp_path / "fine", *fine_ones)[0] == 0
    for bad in bad_ones:
        assert run(monkeypatch, tmp_path / bad.name, *fine_ones, bad)[0] == 1
    code, found = run(monkeypatch, tmp_path / "some", *fine_ones, *bad_ones, options=["--tiny", "--only", "FINE"])
    assert code == 0
    assert found.keys() == {"fine", "limits"}


@pytest.mark.parametrize("name", ["bench.json", "bench.md", "emoji64.png", "rank-8.png", "rank-0.png"])
def test_what_an_earlier_run_wrote_is_kept(tmp_path, capsys, name):
    (tmp_path / name).write_text("earlier")
    with pytest.raises(SystemExit) as end:
        bench.main(["--tiny", "--device", "cpu", "--only", "limits", "--out", str(tmp_path)])
    assert end.value.code == 2
    assert f"{name} exists already" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_on_a_cpu_what_would_take_hours_is_not_run(monkeypatch, tmp_path):
    checks = [kit.Check("long", fine, 0), kit.Check("short", fine, 0, anywhere=True)]
    code, found = run(monkeypatch, tmp_path, *checks, options=())
    assert code == 0
    not_run = ("not run", "on a CPU it would take hours: give --tiny")
    assert found == {"long": not_run, "limits": not_run, "short": ("passed", "one | two")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out", "--only", "limits,reovery"], "--only reovery: in the name of no check"),
        (["--out", "file"], "File exists: 'file'"),
        (["--out", "out", "--data", "nothing.tar"], "nothing.tar does not exist"),
        (["--out", "out", "--image-size", "0.5"], "argument --image-size: it must be pixels"),
        (["--out", "out", "--only", "wrapper", "--data", "file"], "--data is for the check emoji64"),
        (["--out", "out", "--only", "emoji64", "--no-lpips"], "--no-lpips is for the check finetuning FLUX.2"),
        (["--out", "out", "--device", "tpu9"], "argument --device: invalid choice: 'tpu9'"),
        (["--tiny", "--out", "out", "--size", "4B"], "--size 4B is of FLUX.2, and --tiny takes a tiny model"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(SystemExit) as end:
        bench.main(words if "--device" in words else ["--device", "cpu", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_asked_of_it_fits_into_the_time():
    """With what was measured on an H100. The last two, how much of the loading is hidden and emoji64, are extra."""
    *checks, loading, emoji64 = bench.CHECKS
    assert [loading.name, emoji64.name] == ["waiting for data", "emoji64"]
    assert sum(check.seconds for check in checks) <= 8 * 60 + 15


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
    emoji64 = some_images(tmp_path / "some.tar")
    assert bench.main(["--tiny", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path), "--data", emoji64]) == 0
    found = {check["name"]: check for check in json.loads((tmp_path / "bench.json").read_text())["checks"]}
    assert found.keys() == {check.name for check in bench.CHECKS}
    not_run = {name: check["summary"] for name, check in found.items() if check["status"] == "not run"}
    assert not_run == {"compiled against eager": "not on a CPU"}
    assert {check["status"] for check in found.values()} == {"not run", "passed", "measured"}, found
    assert found["killed and resumed"]["figures"]["as it is"] == {"losses": True, "weights": True}
    tuned = found["finetuning FLUX.2"]["figures"]
    counted, kept, trained = tuned["kept"]["counted"], tuned["kept"]["measured"], tuned["parameters"]["trained"]
    assert kept["weights"] == counted["weights"] + counted["trained"]  # to the byte, of the tensors of the real engine
    assert kept["master_weights"] + kept["adam"] == counted["optimizer"]
    assert kept["ema"] == counted["ema"] == 4 * trained
    assert tuned["memory"]["peak"]["counted"] > tuned["memory"]["before"]["counted"] > 0
    drawn = found["emoji64"]["figures"]
    assert [len(drawn[rank]["loss"]) for rank in ("8", "0")] == [3, 3]
    for name in ("emoji64", "rank-8", "rank-0"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 64


def some_images(path):
    with tarfile.open(path, "w") as tar:
        for i in range(64):
            pixels, picture = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8), io.BytesIO()
            Image.fromarray(pixels).save(picture, "png")
            for name, content in (("png", picture.getvalue()), ("cls", b"%d" % (i % 9))):
                info = tarfile.TarInfo(f"{i:02}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)
