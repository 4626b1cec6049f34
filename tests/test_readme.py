"""What the README shows is what the repository does."""

import re
import shlex
from pathlib import Path

import nano_asymflow
from asymflow.cli import make_parser

ROOT = Path(nano_asymflow.__file__).parent
README = (ROOT / "README.md").read_text()


def code_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_its_example_of_the_library_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec(code_blocks()[0], shown)
    assert shown["u"].shape == shown["images"].shape == (2, 3, 64, 64)
    assert shown["loss"].requires_grad
    assert len(README.splitlines()) <= 120
    assert (tmp_path / "runs/readme/model.safetensors").is_file()


def test_its_commands_of_the_library_exist():
    """Every command line shown is one that the parser takes."""
    lines = re.findall(r"^asymflow (.*?)(?: +#.*)?$", README, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert make_parser(words[0]).parse_args(words).run


def test_the_commands_in_docs_exist():
    """Those on lines of their own, and those within a sentence that are whole: that have two options or more."""
    found = 0
    for page in sorted(ROOT.glob("docs/**/*.md")):
        text = page.read_text()
        lines = re.findall(r"^asymflow (.*?)(?: +#.*)?$", text, re.MULTILINE)
        lines += [line for line in re.findall(r"`asymflow ([^`\n]+)`", text) if line.count(" --") > 1]
        for line in lines:
            words = shlex.split(line)
            assert make_parser(words[0]).parse_args(words).run
        found += len(lines)
    assert found >= 4


def test_its_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_experiments_listed_are_those_in_toy():
    listed = set(re.findall(r"^\| `(\w+)` \(", (ROOT / "toy/README.md").read_text(), re.MULTILINE))
    packages = {file.parent.name for file in (ROOT / "toy").glob("*/__main__.py")}
    assert listed == packages | {file.stem for file in (ROOT / "toy").glob("*.py")} - {
        "__init__",
        "common",
        "make_emoji64",
        "oracle",
        "tiny_flux2",
    }
