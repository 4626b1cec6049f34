"""docs/tour.py runs, and docs/tour.ipynb is the same notebook with what it shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nano_asymflow

ROOT = Path(nano_asymflow.__file__).parent
SCRIPT = (ROOT / "docs/tour.py").read_text()
TEXT = (ROOT / "docs/tour.ipynb").read_text()
NOTEBOOK = json.loads(TEXT)["cells"]
CODE = [cell for cell in NOTEBOOK if cell["cell_type"] == "code"]


def cells_of_script() -> list[tuple[str, str]]:
    """The cells of the percent format: each begins with a line "# %%", and Markdown is in comments."""
    before, *rest = re.split(r"^# %%(.*)\n", SCRIPT, flags=re.MULTILINE)
    assert before == ""
    cells = []
    for kind, text in zip(rest[::2], rest[1::2], strict=True):
        text = text.strip("\n")
        is_text = kind == " [markdown]"
        cells.append(("markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE)) if is_text else ("code", text))
    return cells


def test_script_and_notebook_have_the_same_cells():
    """If not: CONTRIBUTING.md has the command that makes the notebook of the script."""
    assert cells_of_script() == [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK]
    assert len(CODE) > 10


def test_the_notebook_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert figures == len(re.findall(r"^(?:plt\.)?show\(", SCRIPT, re.MULTILINE))


def test_the_notebook_is_small_and_so_are_its_cells():
    assert len(TEXT) < 1.5e6
    lines = [[line for line in "".join(cell["source"]).split("\n") if line] for cell in CODE]
    assert max(map(len, lines)) <= 15


@pytest.mark.slow
def test_the_script_runs():
    env = {**os.environ, "TOUR_QUICK": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "docs/tour.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "prediction   rank   score" in done.stdout
