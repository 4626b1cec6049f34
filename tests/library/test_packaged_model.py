"""The small model that comes with the code: `asymflow sample --model shapes` draws in the first minute."""

import torch

from asymflow import AsymFlow, generate, hub
from asymflow.cli import main
from asymflow.data.shapes import Shapes


def test_shapes_draws_by_the_names_of_its_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["sample", "--model", "shapes", "--classes", "red circle", "--num", "1", "--steps", "2", "--out", "first"]
    assert main(argv) == 0
    assert (tmp_path / "first/images/000000.png").is_file()
    assert main(["info", "shapes", "--classes"]) == 0
    assert capsys.readouterr().out.splitlines()[-16:] == [f"{i} {c}" for i, c in enumerate(Shapes(1, 32).classes)]


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.packaged(hub.Path("shapes")) == hub.MODELS / "shapes"
    (tmp_path / "shapes").mkdir()
    assert hub.packaged(hub.Path("shapes")) == hub.Path("shapes")


def test_what_it_draws_has_the_colour_of_its_class():
    """The darkest tenth of the numbers of a red, green or blue shape is in other channels than its own."""
    flow = AsymFlow.from_pretrained(hub.MODELS / "shapes")
    classes = [Shapes(1, 32).classes.index(f"{color} square") for color in ("red", "green", "blue")]
    with torch.inference_mode():
        images = generate(flow, classes, seed=0, steps=10, guidance=2.0)
    assert images.flatten(2).quantile(0.02, dim=-1).argmax(1).tolist() == [0, 1, 2]


def test_it_is_small():
    assert sum(file.stat().st_size for file in (hub.MODELS / "shapes").iterdir()) < 2_000_000
