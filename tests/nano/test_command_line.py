"""The command line: what it writes, what it refuses and how, what Ctrl-C does. And what the file itself promises."""

import ast
import functools
import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

import nano_asymflow
from nano_asymflow import PREDICTIONS, TOYS, main

FILE = Path(nano_asymflow.__file__)
SMALL = ["--dim=6", "--steps=3", "--batch=8", "--width=4"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Evaluate on a few points, in a few steps. What is tested here does not depend on their number."""
    few_steps = functools.partial(nano_asymflow.integrate, steps=5)
    for name, value in {"POINTS": 64, "integrate": few_steps}.items():
        monkeypatch.setattr(nano_asymflow, name, value)


@pytest.fixture
def run(tmp_path):
    """Run the program in this process, successfully; return results.json, the folder, and the picture of TOY.png."""

    def run(*argv, out=tmp_path / "out"):
        main([*SMALL, "--out", str(out), *argv])
        results = json.loads((out / "results.json").read_text())
        return results, out, matplotlib.image.imread(out / f"{results['toy']}.png")

    return run


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run the file as a program, which is to end with an exit code and one line on stderr; return that line."""

    def refused(*argv):
        monkeypatch.setattr(sys, "argv", [str(FILE), *SMALL, "--out", str(tmp_path / "out"), *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(FILE), run_name="__main__")
        text = capsys.readouterr()
        if end.value.code == 2:  # of the parser
            said = text.err
        else:
            said = f"{end.value.code}\n"  # Python prints it to stderr, and exits with 1
            assert isinstance(end.value.code, str)
        assert "Traceback" not in text.out + said
        (line,) = (line.rpartition("\r")[2] for line in said[:-1].split("\n"))  # a terminal shows no more
        assert line.startswith("nano_asymflow.py: error: ")
        assert not (tmp_path / "out" / "results.json").exists()
        return line

    return refused


# ---- What it writes --------------------------------------------------------------------------------------------------


def test_results_hold_the_settings_the_floor_and_a_run_for_each_prediction(run):
    results, _, _ = run("--prediction", "all", "--toy", "rings", "--rank", "3", "--seed", "5")
    settings = {"toy": "rings", "dim": 6, "rank": 3, "steps": 3, "batch": 8, "width": 4, "seed": 5, "detail": 0}
    assert {name: results[name] for name in settings} == settings
    assert 0 < results["floor"] < results["noise"]
    assert [(r["prediction"], r["rank"]) for r in results["runs"]] == [("asym", 3), ("x0", 0), ("u", 6), ("eps", "-")]
    for r in results["runs"]:
        assert r["score"] < 1.5
        assert r["outside_rms"] >= 0
        assert r["seconds"] >= 0


def test_one_prediction_alone_has_the_figures_it_has_among_all(run, tmp_path):
    """What one part draws at random does not shift another's."""
    among = run("--prediction", "all", out=tmp_path / "all")[0]
    for prediction, other in zip(PREDICTIONS, among["runs"], strict=True):
        alone = run("--prediction", prediction, out=tmp_path / prediction)[0]
        (one,) = alone["runs"]
        assert one | {"seconds": 0} == other | {"seconds": 0}
        assert alone["floor"] == among["floor"]


@pytest.mark.parametrize("toy", TOYS)
def test_the_picture_shows_the_data_and_the_samples(run, toy):
    """Above and below, left and right: the frames and titles are grey, so all that has a color is a point."""
    results, _, picture = run("--toy", toy)
    assert results["toy"] == toy
    height, width, _ = picture.shape
    assert min(height, width) > 300
    color = picture[..., :3].max(-1) - picture[..., :3].min(-1) > 0.1
    for rows in (slice(height // 2), slice(height // 2, None)):
        for columns in (slice(width // 2), slice(width // 2, None)):
            assert color[rows, columns].sum() > 50


@pytest.mark.parametrize(
    "argv",
    ["--dim 2", "--dim 2 --rank 0", "--rank 0", "--rank 6", "--detail 0.3", "--steps 0", "--batch 1 --width 1"],
)
def test_settings_at_the_edge_of_what_makes_sense_work(run, argv):
    results, _, _ = run(*argv.split(), "--prediction", "all")
    assert len(results["runs"]) == 4


def test_two_runs_with_a_seed_are_identical_and_another_seed_is_not(run, tmp_path):
    """In every figure but the seconds, and in every pixel: the samples are the same."""

    def scores(seed, out):
        results, _, picture = run("--prediction", "all", "--seed", seed, out=tmp_path / out)
        return results | {"out": "", "runs": [r | {"seconds": 0} for r in results["runs"]]}, picture.tobytes()

    first, again, other = scores("0", "a"), scores("0", "b"), scores("1", "c")
    assert first == again
    assert first[0]["runs"] != other[0]["runs"]
    assert first[1] != other[1]


def test_a_second_run_replaces_the_files_of_the_first_and_says_so(run, capsys):
    _, out, _ = run("--seed", "0")
    assert "writing" in capsys.readouterr().out
    assert run("--seed", "1")[0]["seed"] == 1
    assert "replacing" in capsys.readouterr().out
    assert len([*out.iterdir()]) == 2


def test_folders_are_made_as_needed(run, tmp_path):
    assert run(out=tmp_path / "a" / "b" / "c")[1].is_dir()


# ---- What it refuses -------------------------------------------------------------------------------------------------

REFUSED = {
    "--toy": ["nonsense", "", "swissroll,rings"],
    "--prediction": ["v", "ALL", ""],
    "--dim": ["1", "0", "-3", "2.5", "many", "nan"],
    "--rank": ["7", "-1", "1.5", "two"],
    "--steps": ["-1", "1e3", "inf"],
    "--batch": ["0", "-4", "0.5"],
    "--width": ["0", "-4", "wide"],
    "--detail": ["-0.1", "nan", "inf", "-inf", "much"],
    "--seed": ["-1", "0.5", "99999999999999999999"],
}
FLAGS = [*REFUSED, "--device", "--out"]


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag in REFUSED for value in REFUSED[flag]])
def test_a_value_that_makes_no_sense_is_refused_in_one_line_that_names_the_flag(refused, flag, value):
    line = refused(f"{flag}={value}")
    assert flag in line
    assert value in line


@pytest.mark.parametrize("argv", [["--nonsense"], ["--nonsense", "1"], ["nonsense"], ["--dim"], ["--out"]])
def test_what_is_no_flag_or_lacks_its_value_is_refused(refused, argv):
    assert argv[0] in refused(*argv)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "hpu", "mtia", "nonsense", ""])
def test_a_device_that_is_not_there_is_one_line(refused, device):
    assert refused("--device", device)


def test_detail_in_two_dimensions_is_refused(refused):
    assert "--detail" in refused("--dim", "2", "--detail", "0.3")


@pytest.mark.parametrize("prediction", ["x0", "u", "eps"])
def test_a_rank_of_what_has_no_basis_is_refused(refused, prediction):
    assert f"--rank 3 is of asym, but --prediction is {prediction}" in refused("--rank=3", f"--prediction={prediction}")


@pytest.mark.parametrize("below", [".", "folder", "a/b"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(refused, tmp_path, below):
    """A path at or below a regular file: that stops even root."""
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" / below
    assert str(tmp_path / "file") in refused("--out", str(out))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_exists_and_takes_no_files_is_refused(refused):
    """On Linux, nobody can write to /proc; elsewhere, nobody can make it."""
    assert "/proc" in refused("--out", "/proc/a")


@pytest.mark.slow
def test_a_refusal_in_a_process_of_its_own(tmp_path):
    argv = [sys.executable, FILE, "--toy", "nonsense", "--out", tmp_path]
    end = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (end.returncode, end.stdout) == (2, "")
    assert len(end.stderr.splitlines()) == 1


def test_help_tells_of_every_flag_and_no_other(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert set(re.findall(r"--[a-z]+", text)) == {"--help", *FLAGS}
    for name in (*TOYS, *PREDICTIONS, "all"):
        assert name in text


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def under_way(tmp_path):
    """Starts a training that would take hours, in a process of its own; returns when it has shown a step."""
    processes = []

    def start(width=128):
        argv = ["--dim=8", f"--width={width}", "--batch=16", "--steps=10000000", "--prediction=all", "--out", tmp_path]
        command = [sys.executable, FILE, *argv]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        shows(processes[0], b"step/s, loss")
        return processes[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def shows(process, text):
    shown = b""
    while text not in shown:
        byte = process.stderr.read(1)
        assert byte, shown
        shown += byte


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_ends_it_with_one_line(under_way, tmp_path):
    training = under_way()
    training.send_signal(signal.SIGINT)
    out, err = (text.decode() for text in training.communicate(timeout=300))
    assert training.returncode == 1
    assert "Traceback" not in out + err
    assert err.endswith("interrupted\n")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_in_the_background_of_a_script_it_trains_on(under_way):
    """A shell starts it with SIGINT ignored, so that Ctrl-C ends what is in the foreground alone."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        training = under_way()
    finally:
        signal.signal(signal.SIGINT, before)
    training.send_signal(signal.SIGINT)
    for _ in range(3):  # the first may be from before the signal; no more come if it ends the training
        shows(training, b"step/s")
    assert training.poll() is None


# ---- The file itself -------------------------------------------------------------------------------------------------


def test_the_file_is_short_and_needs_little():
    source = FILE.read_text()
    assert len(source.splitlines()) <= 300
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module)
    needed = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert needed <= {"torch", "numpy", "tqdm", "matplotlib"}
