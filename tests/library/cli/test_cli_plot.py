"""`asymflow plot`: what is drawn is what is in the files of the runs; what cannot be drawn is said."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asymflow.cli import main
from asymflow.cli.plot import DPI, WIDTH, draw, read_run, smoothed

NUMBERS = st.floats(1e-6, 1e6) | st.floats(1e30, 1e40)


def line(step, loss=1.0, **other):
    """A line of metrics.jsonl."""
    norm = None if loss is None else 2 * loss
    return {"step": step, "loss": loss, "grad_norm": norm, "lr": 1e-3, "images_per_second": 100.0} | other


def make_run(folder, lines, samples=()):
    """A folder with what `asymflow plot` reads of a run. samples: the steps with a grid."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    for step in samples:
        Image.new("RGB", (20, 10), (step, 0, 0)).save(folder / f"samples/{step:08d}.png")
    return folder


# ---- The curves ------------------------------------------------------------------------------------------------------
@given(st.lists(NUMBERS | st.just(math.nan), min_size=1, max_size=40), st.integers(0, 20))
def test_smoothed_is_the_mean_of_the_finite_steps_around(values, reach):
    found = smoothed(np.array(values), reach)
    for i, value in enumerate(values):
        around = [x for x in values[max(i - reach, 0) : i + min(reach, i) + 1] if not math.isnan(x)]
        expected = math.nan if math.isnan(value) else math.fsum(around) / len(around)
        np.testing.assert_allclose(found[i], expected, rtol=1e-13)


@given(st.integers(2, 60), st.integers(0, 30))
def test_smoothing_does_not_bend_a_straight_beginning(count, reach):
    straight = np.linspace(9, 1, count)
    np.testing.assert_allclose(smoothed(straight, reach)[: -reach or None], straight[: -reach or None], rtol=1e-13)


def test_every_number_of_every_run_is_in_its_panel(tmp_path):
    lines = [line(step, 1 / step, repa=0.5 / step) for step in range(1, 6)]
    longer = [line(step, 2 / step) for step in range(3, 400)]
    runs = [read_run(make_run(tmp_path / name, of, [7, 12]), name) for name, of in (("a", lines), ("b", longer))]
    panels = {axis.get_title(): axis for axis in draw(runs).axes}
    assert set(panels) == {"loss", "repa", "gradient norm", "learning rate", "images/s", "a, step 12", "b, step 12"}
    for title, key in (
        ("loss", "loss"),
        ("repa", "repa"),
        ("gradient norm", "grad_norm"),
        ("images/s", "images_per_second"),
    ):
        raw = [drawn for drawn in panels[title].lines if drawn.get_alpha()]
        of = [lines, longer] if key != "repa" else [lines]
        for drawn, entries in zip(raw, of, strict=True):
            np.testing.assert_array_equal(drawn.get_xdata(), [entry["step"] for entry in entries])
            np.testing.assert_array_equal(drawn.get_ydata(), [entry[key] for entry in entries])
    assert {axis.images[0].get_array()[0, 0, 0] for axis in panels.values() if axis.images} == {12}


# ---- Files that are not as they should be ----------------------------------------------------------------------------
@given(st.data())
def test_a_run_that_is_being_written_has_the_steps_that_are_whole(tmp_path_factory, data):
    folder = make_run(tmp_path_factory.mktemp("run"), [line(step) for step in range(1, 6)])
    content = (folder / "metrics.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    (folder / "metrics.jsonl").write_bytes(content[:cut])
    found = read_run(folder, "run")
    assert found.steps == list(range(1, content[:cut].count(b"\n") + 1))
    assert not any("cannot be read" in remark for remark in found.remarks)


STRANGE = st.binary(max_size=9) | st.sampled_from(
    [b"", b"[]", b"7", b"{}", b'{"step": true}', b'{"step": -1}', b"[" * 9999]
)


@given(st.lists(STRANGE.filter(lambda content: b"\n" not in content), min_size=1, max_size=5))
def test_lines_that_cannot_be_read_are_counted_and_left_out(tmp_path_factory, strange):
    folder = make_run(tmp_path_factory.mktemp("run"), [line(1), line(2)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(one + b"\n" for one in strange))
    found = read_run(folder, "run")
    assert found.steps == [1, 2]
    assert any(f"{len(strange)} of {len(strange) + 2} lines cannot be read" in remark for remark in found.remarks)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.sampled_from([None, math.nan, math.inf, "text", 10**400]))
def test_a_step_that_was_skipped_is_a_gap_and_is_said(tmp_path_factory, taken, value):
    lines = [line(i, **({} if ok else {"loss": value, "grad_norm": value})) for i, ok in enumerate(taken, 1)]
    found = read_run(make_run(tmp_path_factory.mktemp("run"), lines), "run")
    if any(taken):
        assert [not math.isnan(loss) for loss in found.curves["loss"]] == taken
    skipped = taken.count(False)
    assert any(f"{skipped} of {len(taken)} steps" in remark for remark in found.remarks) == (skipped > 0)


def test_a_step_that_was_taken_twice_counts_once_and_one_that_is_missing_is_said(tmp_path):
    lines = [line(1, 1.0), line(2, 2.0), line(3, 3.0), line(2, 20.0), line(6, 6.0)]
    found = read_run(make_run(tmp_path / "run", lines), "run")
    assert found.steps == [1, 2, 3, 6]
    assert list(found.curves["loss"]) == [1, 20, 3, 6]
    assert "run: 2 steps between 1 and 6 are not in metrics.jsonl" in found.remarks


# ---- Evaluations -----------------------------------------------------------------------------------------------------
def test_evaluations_are_apart_by_the_settings_that_differ(tmp_path):
    def evaluation(step, distance, guidance):
        settings = {"evaluate": {"num": 10}, "sample": {"steps": 5, "guidance": guidance}}
        settings["uncertainty"] = {"frechet_distance": distance and distance / 100}  # which is no setting
        return json.dumps({"step": step, "frechet_distance": distance, **settings}) + "\n"

    folder = make_run(tmp_path / "run", [line(step) for step in range(1, 21)])
    entries = [evaluation(20, 4.0, 1.0), evaluation(10, 9.0, 1.0), evaluation(20, 3.0, 2.5), evaluation(10, None, 2.5)]
    (folder / "evaluations.jsonl").write_text("".join(entries))
    found = read_run(folder, "run")
    assert any("step 10 was not measured" in remark for remark in found.remarks)
    panel = next(axis for axis in draw([found]).axes if axis.get_title() == "Fréchet distance")
    drawn = {of.get_label(): (list(of.get_xdata()), list(of.get_ydata())) for of in panel.lines}
    assert drawn == {"guidance 1.0": ([10, 20], [9, 4]), "guidance 2.5": ([20], [3])}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([None, 1.0, 2.5])), min_size=1, max_size=8))
def test_settings_in_which_runs_differ_are_in_the_legend(tmp_path_factory, evaluated):
    """Points have the same label and mark exactly if they have the same settings, of whichever run they are."""
    folder, runs = tmp_path_factory.mktemp("runs"), []
    for name in range(3):
        lines = [
            json.dumps({"step": i, "kid": i + 1.0, "sample": {"steps": 5, "guidance": guidance}})
            for i, (of, guidance) in enumerate(evaluated)
            if of == name
        ]
        one = make_run(folder / str(name), [line(1)])
        (one / "evaluations.jsonl").write_text("".join(entry + "\n" for entry in lines))
        runs.append(read_run(one, str(name)))
    panel = next(axis for axis in draw(runs).axes if axis.get_title() == "kid")
    differ, marks = len({guidance for _, guidance in evaluated}) > 1, {}
    for of in panel.lines:
        for step in of.get_xdata():
            guidance = evaluated[step][1]
            assert not differ or of.get_label() == f"guidance {guidance}"
            marks.setdefault(guidance, set()).add(of.get_marker())
    assert all(len(same) == 1 for same in marks.values())
    assert len(set.union(*marks.values())) == len(marks)
    assert (panel.get_legend() is not None) == differ


# ---- The command -----------------------------------------------------------------------------------------------------
def test_the_picture_is_as_wide_as_a_phone_and_is_not_overwritten(tmp_path, run, refused):
    one = make_run(tmp_path / "one", [line(1)])
    other = make_run(tmp_path / "other", [line(step) for step in range(1, 100)], samples=[3])
    empty, out = make_run(tmp_path / "empty", []), tmp_path / "picture.png"
    run("plot", one, other, empty, "--out", out)
    with Image.open(out) as picture:
        assert picture.width == round(WIDTH * DPI)
    before = out.read_bytes()
    assert "is not overwritten" in refused("plot", one, "--out", out)
    assert out.read_bytes() == before


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    other = make_run(tmp_path / "other", [line(1, None), line(2)], samples=[3])
    (other / "samples/00000004.png").write_bytes(b"not an image")
    empty = make_run(tmp_path / "empty", [])
    assert main(["plot", str(other), str(empty), "--out", str(tmp_path / "picture.png")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "1 of 2 steps were not finite" in said[0]
    assert "00000004.png is not a whole image" in said[1]
    assert "empty has no step yet" in said[2]


@pytest.mark.parametrize("case", ["no run", "twice", "nothing", "not png"])
def test_mistakes_are_answered_in_one_line(tmp_path, refused, capsys, case):
    run = make_run(tmp_path / "run", [line(1)] if case != "nothing" else [])
    argv, message = {
        "no run": ([tmp_path / "run/samples"], "no run of train_ddp.py"),
        "twice": ([run, tmp_path / "run/../run"], "given twice"),
        "nothing": ([run], "no step is in"),
        "not png": ([run], "must end in .png"),
    }[case]
    out = tmp_path / ("picture.pdf" if case == "not png" else "picture.png")
    if case == "nothing":
        assert main(["plot", str(run), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]  # after the remark that the run has no step
    else:
        assert message in refused("plot", *argv, "--out", out)
    assert not out.exists()
