"""`asymflow sample`: what it leaves, that it resumes, and that no two runs ever mix in one folder."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asymflow import AsymFlow, Subspace, files
from asymflow.backbones.jit import JiT
from asymflow.cli import main
from asymflow.color import clamp_to_gamut, oklab_to_rgb
from asymflow.pixels import tensor_to_pil
from asymflow.precision import computing
from asymflow.sampling import generate


def save_model(folder, seed=0, **record):
    torch.manual_seed(seed)
    jit = JiT.from_name("tiny/4", image_size=16, num_classes=10)
    for weight in jit.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    AsymFlow(jit, Subspace.random(48, 8, **record)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(model, out, /, *options, **replaced):
    given = {"model": model, "out": out, "classes": "1,5", "num": 6, "steps": 3, "batch": 4, **replaced}
    return main(["sample", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *options])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())


NAMES = [f"images/{i:06d}.png" for i in range(6)]


def test_it_leaves_images_a_grid_and_a_record(model, tmp_path):
    out = tmp_path / "new" / "out"
    assert run(model, out) == 0
    assert files_in(out) == ["grid.png", *NAMES, "samples.json"]
    record = json.loads((out / "samples.json").read_text())
    assert [entry["class"] for entry in record["images"]] == [1, 5, 1, 5, 1, 5]
    assert [entry["file"] for entry in record["images"]] == NAMES
    assert record["settings"]["guidance"] == 2.3
    assert record["settings"]["interval"] == [0.0, 0.88]
    assert len({pixels(out / name).tobytes() for name in NAMES}) == 6
    assert pixels(out / "grid.png").shape[0] >= 32


def test_the_images_are_those_of_the_library(model, tmp_path):
    assert run(model, tmp_path / "out") == 0
    flow = AsymFlow.from_pretrained(model)
    images = generate(flow, [1, 5, 1, 5, 1, 5], steps=3, guidance=2.3, interval=(0, 0.88))
    for name, image in zip(NAMES, images, strict=True):
        assert np.abs(pixels(tmp_path / "out" / name) - np.asarray(tensor_to_pil(image)).astype(int)).max() <= 1


def test_every_option_reaches_the_library(model, tmp_path):
    told = dict(seed=7, steps=3, guidance=3.0, method="euler", shift=2.0, orthogonal=0.5)
    given = dict(interval="0.1,0.8", size="8x24", precision="bf16", classes="5", first=2, num=1)
    assert run(model, tmp_path / "out", "--clamp", **told, **given) == 0
    found = pixels(tmp_path / "out" / "images/000002.png")
    told |= dict(interval=(0.1, 0.8), size=(8, 24), denoised_hook=lambda x0, sigma: x0.clamp(-1, 1))

    def made(precision, **options):
        flow = AsymFlow.from_pretrained(model)
        with computing(flow, precision):
            return generate(flow, [5], [2], **options)[0]

    def differs(**options):
        other = np.asarray(tensor_to_pil(made("bf16", **options))).astype(int)
        return other.shape != found.shape or np.abs(other - found).max() > 1

    assert not differs(**told)
    assert not torch.equal(made("float32", **told), made("bf16", **told))
    for name in told:
        assert differs(**{other: told[other] for other in told if other != name}), name


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_too_little_memory_is_one_line(model, tmp_path, capsys, monkeypatch, error):
    def draw(*args):
        raise error

    monkeypatch.setattr("asymflow.cli.sample.draw", draw)
    assert run(model, tmp_path / "out") == 2
    assert "cpu has too little memory for this: try a smaller --batch or smaller images" in capsys.readouterr().err
    error.args = ("something else",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="something else"):
            run(model, tmp_path / "out")


def test_the_record_says_how_to_make_an_image_again(model, tmp_path):
    assert run(model, tmp_path / "a", "--clamp", seed=7, interval="0.1,0.9", size="8x24") == 0
    command = json.loads((tmp_path / "a" / "samples.json").read_text())["make_again"]
    words = shlex.split(command.replace("INDEX", "3").replace("FOLDER", str(tmp_path / "b")))
    assert words[0] == "asymflow"
    assert main(words[1:]) == 0
    assert NAMES[3] in files_in(tmp_path / "b")
    assert (
        np.abs(pixels(tmp_path / "a" / "images/000003.png") - pixels(tmp_path / "b" / "images/000003.png")).max() <= 1
    )


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_size_changes_no_image(model, tmp_path, batch):
    for name, size in (("a", 6), ("b", batch)):
        assert run(model, tmp_path / name, batch=size) == 0
    for name in NAMES:
        assert np.abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1


def test_it_goes_on_where_it_stopped(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, out, num=3) == 0
    before = {name: (out / name).stat().st_mtime_ns for name in NAMES[:3]}
    (out / NAMES[1]).unlink()
    assert run(model, out) == 0
    assert "2 of 6 images are in" in capsys.readouterr().out
    for name in (NAMES[0], NAMES[2]):
        assert (out / name).stat().st_mtime_ns == before[name]
    whole = tmp_path / "whole"
    assert run(model, whole) == 0
    for name in NAMES:
        assert np.abs(pixels(out / name) - pixels(whole / name)).max() <= 1
    assert json.loads((out / "samples.json").read_text()) == json.loads((whole / "samples.json").read_text())


@pytest.mark.parametrize(("dtype", "status"), [("float32", 0), ("bfloat16", 2)])
def test_a_folder_of_an_earlier_version_can_be_continued(model, tmp_path, dtype, status):
    out = tmp_path / "out"
    assert run(model, out, num=1, steps=1, precision="float32") == 0
    record = json.loads((out / "samples.json").read_text())
    del record["settings"]["precision"], record["settings"]["config_sha256"]
    record["settings"]["dtype"] = dtype
    (out / "samples.json").write_text(json.dumps(record))
    assert run(model, out, num=2, steps=1, precision="float32") == status


def test_a_complete_run_is_left_as_it_is(model, tmp_path):
    assert run(model, tmp_path / "out") == 0
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in NAMES}
    assert run(model, tmp_path / "out") == 0
    assert before == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in NAMES}


@pytest.mark.parametrize(
    "changed",
    [
        dict(seed=1),
        dict(steps=4),
        dict(guidance=1.0),
        dict(interval="0,0.5"),
        dict(classes="5,1"),
        dict(method="euler"),
        dict(shift=2.0),
        dict(orthogonal=1.0),
        dict(size="16x8"),
        dict(precision="bf16"),
    ],
)
def test_another_run_is_refused_and_harms_nothing(model, tmp_path, capsys, changed):
    out = tmp_path / "out"
    assert run(model, out, num=2) == 0
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    capsys.readouterr()
    assert run(model, out, **changed) == 2
    error = capsys.readouterr().err
    assert f"{next(iter(changed))} " in error
    assert error.count("\n") == 1
    assert before == {name: (out / name).read_bytes() for name in files_in(out)}


def test_another_model_is_refused_though_its_path_is_the_same(model, tmp_path, capsys):
    other = save_model(tmp_path / "model", seed=1)
    assert run(other, tmp_path / "out") == 0
    save_model(other, seed=2)
    assert run(other, tmp_path / "out") == 2
    assert "model_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("mine", [NAMES[2], "images/photo.jpg", "grid.png", "000002.png"])
def test_what_is_of_unknown_origin_is_neither_replaced_nor_taken_for_its_own(model, tmp_path, capsys, mine):
    (tmp_path / "images").mkdir()
    (tmp_path / mine).write_bytes(b"mine")
    assert run(model, tmp_path) == 2
    assert f"holds {Path(mine).name}, but no samples.json" in capsys.readouterr().err
    assert files_in(tmp_path) == [mine]
    assert (tmp_path / mine).read_bytes() == b"mine"


def test_other_files_in_its_folder_are_left_alone(model, tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"mine")
    assert run(model, tmp_path, num=1) == 0
    assert files_in(tmp_path) == ["grid.png", NAMES[0], "notes.txt", "samples.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"settings": {}, "images": [{}]}', '{"settings": [], "images": []}']
)
def test_a_damaged_record_is_refused(model, tmp_path, capsys, content):
    (tmp_path / "samples.json").write_text(content)
    assert run(model, tmp_path) == 2
    assert "not a record" in capsys.readouterr().err
    assert (tmp_path / "samples.json").read_text() == content


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(classes="1,10"), "--classes 10 is not a class"),
        (dict(classes="-1"), "--classes -1 is not a class"),
        (dict(classes="cat"), "--classes 'cat' is no class, and this model has no names of classes: numbers"),
        (dict(num=0), "--num must be at least 1"),
        (dict(first=-1), "--first must be at least 0"),
        (dict(batch=0), "--batch must be at least 1"),
        (dict(seed=-1), "--seed must be at least 0"),
        (dict(steps=0), "at least 1 step"),
        (dict(shift=0), "shift must be above 0"),
        (dict(size="17x16"), "multiples of 4"),
        (dict(orthogonal=2), "orthogonal"),
        (dict(device="tpu9"), "--device tpu9"),
        (dict(model="nowhere"), "nowhere"),
        (dict(guidance="nan"), "--guidance must be finite"),
        (dict(shift="inf"), "--shift must be finite"),
        (dict(seed=2**64), "--seed must be at least 0 and below 2^62"),
        ({"width": 0, "max-length": 0}, "--width, --max-length: for --base only, but --model is given"),
        (dict(first=2**64), "--first must be at least 0 and below 2^62"),
    ],
)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(model, tmp_path, capsys, option, message):
    out = tmp_path / "out"
    assert run(model, out, **option) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("asymflow sample: error: ")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "option", [dict(interval="0.9"), dict(interval="0.9,0.1"), dict(interval="a,b"), dict(size="16x")]
)
def test_values_of_the_wrong_form_are_answered_in_one_line(model, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as end:
        run(model, tmp_path / "out", **option)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--{next(iter(option))}" in error
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_what_is_finished(model, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr("asymflow.cli.sample.generate", interrupted)
    assert run(model, tmp_path / "out") == 130
    assert files_in(tmp_path / "out") == [*NAMES[:4], "samples.json"]
    monkeypatch.undo()
    assert run(model, tmp_path / "out") == 0
    assert files_in(tmp_path / "out") == ["grid.png", *NAMES, "samples.json"]


def test_a_model_in_oklab_gives_pictures_in_rgb(tmp_path):
    model = save_model(tmp_path / "model", color_space="oklab")
    assert run(model, tmp_path / "out", "--clamp", num=1) == 0
    options = dict(steps=3, guidance=2.3, interval=(0, 0.88), denoised_hook=lambda x0, sigma: clamp_to_gamut(x0))
    image = oklab_to_rgb(generate(AsymFlow.from_pretrained(model), [1], **options))[0]
    assert np.abs(pixels(tmp_path / "out" / NAMES[0]) - np.asarray(tensor_to_pil(image)).astype(int)).max() <= 1


@pytest.mark.slow
def test_two_processes_share_the_work(model, tmp_path):
    """As torchrun starts them; the second finds nothing missing and draws the grid."""
    command = [sys.executable, "-m", "asymflow", "sample", "--model", str(model), "--out", str(tmp_path / "out")]
    command += ["--classes", "1,5", "--num", "6", "--steps", "3"]
    workers = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert files_in(tmp_path / "out") == ["grid.png", *NAMES, "samples.json"]
    assert run(model, tmp_path / "alone") == 0
    for name in NAMES:
        assert np.abs(pixels(tmp_path / "out" / name) - pixels(tmp_path / "alone" / name)).max() <= 1


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2", "RANK": "2"}])
def test_an_environment_that_makes_no_sense_is_refused(model, tmp_path, capsys, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(model, tmp_path / "out") == 2
    assert "WORLD_SIZE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_for_pictures_of_classes_are_refused(tmp_path, capsys):
    for name, options in {"grey": {"channels": 1}, "classless": {"num_classes": 0}}.items():
        jit = JiT.from_name("tiny/4", image_size=16, **options)
        AsymFlow(jit, Subspace.empty(jit.dim)).save_pretrained(tmp_path / name)
        assert run(tmp_path / name, tmp_path / "out") == 2
        assert "3 channels and at least one class" in capsys.readouterr().err


def test_of_two_runs_that_start_together_one_is_refused(model, tmp_path, capsys, monkeypatch):
    """The other one's record appears between the look and the write."""
    out = tmp_path / "out"
    replacing = files.replacing

    def late(path, new=False):
        if path.name == "samples.json" and not path.exists():
            monkeypatch.setattr("asymflow.files.replacing", replacing)
            assert run(model, out, seed=1) == 0
        return replacing(path, new)

    monkeypatch.setattr("asymflow.files.replacing", late)
    assert run(model, out, seed=0) == 2
    assert "seed 1 there, 0 here" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["link", "link/below", "file", "file/below", "/proc/nothing/out", "x" * 300])
def test_what_cannot_be_a_folder_is_one_line(model, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    assert run(model, out, num=1, steps=1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asymflow sample: error: ")
    assert files_in(tmp_path) == ["file", "link"]


def test_the_grid_shows_the_first_images_of_the_folder(model, tmp_path):
    out = tmp_path / "out"
    assert run(model, out) == 0
    before = pixels(out / "grid.png")
    (out / "grid.png").unlink()
    assert run(model, out, first=4, num=1) == 0
    assert np.array_equal(pixels(out / "grid.png"), before)


@pytest.mark.slow
def test_torchrun_starts_it_as_the_help_says(model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command += ["asymflow", "sample", "--model", str(model), "--out", str(tmp_path / "out"), "--num", "3"]
    command += ["--steps", "2"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert files_in(tmp_path / "out") == ["grid.png", *NAMES[:3], "samples.json"]


def test_a_folder_of_an_earlier_version_goes_on_as_it_was(model, tmp_path):
    """With the images beside samples.json."""
    out = tmp_path / "out"
    assert run(model, out, num=4) == 0
    whole = {name: pixels(out / name) for name in NAMES[:4]}
    for name in NAMES[:4]:
        (out / name).rename(out / Path(name).name)
    (out / "images").rmdir()
    record = json.loads((out / "samples.json").read_text())
    for entry in record["images"]:
        entry["file"] = Path(entry["file"]).name
    (out / "samples.json").write_text(json.dumps(record))
    (out / Path(NAMES[1]).name).unlink()
    assert run(model, out) == 0
    assert files_in(out) == [*(Path(name).name for name in NAMES), "grid.png", "samples.json"]
    assert all(np.abs(pixels(out / Path(name).name) - image).max() <= 1 for name, image in whole.items())
