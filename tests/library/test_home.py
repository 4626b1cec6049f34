"""~ is the home folder in every path of a user: shells do not replace it in --out=~/x or --set data.path=~/x."""

from pathlib import Path

import pytest

from asymflow.parser import Parser
from asymflow.training.config.reading import load_config
from asymflow.training.start import parse


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_in_options(home):
    p = Parser()
    p.add_argument("--out", type=Path)
    p.add_argument("--data", type=Path, nargs="+")
    p.add_argument("--prompt")
    args = p.parse_args(["--out=~/a", "--data", "~/b", "c/~", "~nobody-of-this-name/d", "--prompt", "~/e"])
    assert args.out == home / "a"
    assert args.data == [home / "b", Path("c/~"), Path("~nobody-of-this-name/d")]
    assert args.prompt == "~/e"
    args = parse(["--config=~/mine.yaml", "--resume=~/run/checkpoints/00000001"])
    assert (args.config, args.out) == (str(home / "mine.yaml"), Path("runs/mine"))
    assert args.resume == str(home / "run/checkpoints/00000001")


def test_in_configurations(home):
    (home / "mine.yaml").write_text("base: shapes_tiny\ndata: {path: ~/images}\nevaluate: {weights: ~/w.safetensors}\n")
    config = load_config(home / "mine.yaml", ["subspace.file=~/s.safetensors"])
    assert config.data.path == str(home / "images")
    assert config.evaluate.weights == str(home / "w.safetensors")
    assert config.subspace.file == str(home / "s.safetensors")
    assert load_config(home / "mine.yaml", ["data.path=null"]).data.path is None
