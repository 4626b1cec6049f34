"""`--classes` by number or name, and the names beside a model."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT
from asymflow.cli import info_classes, main
from asymflow.cli.models import class_names
from asymflow.cli.sample import class_list

NAMES = ["cat", "golden retriever", "otter, sea", "10", "3", "Überschall", "a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("golden retriever", [1]),
        ("Golden Retriever,cat, 7", [1, 0, 7]),
        ("otter, sea", [2]),
        ("überschall", [5]),
        ("3", [3]),
        ("all", list(range(10))),
        ("golden retriver", "'golden retriver' is no class: did you mean golden retriever?"),
        ("10", "--classes 10 is not a class of this model: they run from 0 to 9"),
        ("-1", "--classes -1 is not a class of this model"),
        ("", "'' is no class: numbers, such as 207,360, names, or all"),
    ],
)
def test_classes_are_told_by_number_or_name(capsys, text, expected):
    if isinstance(expected, str):
        with pytest.raises(InputError, match=re.escape(expected)):
            class_list(text, 10, NAMES)
    else:
        assert class_list(text, 10, NAMES) == expected
        said = "--classes 3 is class number 3: that named 3 is 4\n" if text == "3" else ""
        assert capsys.readouterr().err == said


@given(st.lists(st.text("aAbB", min_size=1, max_size=3), min_size=1, unique=True), st.data())
def test_a_name_as_it_is_written_counts_and_else_one_that_only_one_class_may_have(names, data):
    word = data.draw(st.sampled_from(names)).swapcase()
    alike = [i for i, name in enumerate(names) if name.lower() == word.lower()]
    if word in names or len(alike) == 1:
        assert class_list(f"{word},{word}", len(names), names) == 2 * [names.index(word) if word in names else alike[0]]
    else:
        with pytest.raises(InputError, match=rf"'{word}' may be class {alike[0]} .* or class {alike[1]} .*number$"):
            class_list(word, len(names), names)


def test_of_two_classes_with_one_name_the_number_is_asked_for():
    with pytest.raises(InputError, match=r"'crane' may be class 0 \(crane\) or class 2 \(crane\): give the number"):
        class_list("crane", 3, ["crane", "Crane", "crane"])
    assert class_list("2, Crane", 3, ["crane", "Crane", "crane"]) == [2, 1]


def test_the_names_lie_beside_the_model(tmp_path):
    assert class_names(tmp_path) == []
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    assert class_names(tmp_path) == NAMES
    assert class_names(tmp_path / "classes.json") == []  # the file of a published model has no folder of its own
    for damaged in ("{}", "[1]", "[" * 10**5, "cat"):
        (tmp_path / "classes.json").write_text(damaged)
        with pytest.raises(InputError, match=r"classes\.json must be a list of names in JSON"):
            class_names(tmp_path)


def test_names_of_more_classes_than_the_model_has_are_refused(tmp_path, capsys):
    """The last of two would be "no class". Fewer names are those of a training with data.fewer_classes."""
    jit = JiT.from_name("tiny/4", image_size=8, num_classes=2, depth=1, in_context_start=0)
    AsymFlow(jit, Subspace.empty(jit.dim)).save_pretrained(tmp_path / "model")
    options = ["--steps", "1", "--num", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    for names, chosen in ((["a", "b", "extra"], "extra"), (["a"], "a")):
        (tmp_path / "model/classes.json").write_text(json.dumps(names))
        drawn = main(["sample", "--model", str(tmp_path / "model"), "--classes", chosen, *options])
        assert drawn == (2 if chosen == "extra" else 0)
        assert ("names 3 classes, but the model has 2: remove it" in capsys.readouterr().err) == (chosen == "extra")
        assert (tmp_path / "out").exists() == (chosen == "a")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=20)))
def test_the_first_classes_are_shown_each_with_its_number_and_all_on_demand(tmp_path_factory, names):
    text = info_classes.shown(names, "runs/a b", 15)
    assert text.replace("\n" + 15 * " ", " ").startswith(", ".join(f"{i} {n}" for i, n in enumerate(names[:32])))
    assert ("asymflow info 'runs/a b' --classes" in text) == (len(names) > 32)
    folder = tmp_path_factory.mktemp("model")
    (folder / "classes.json").write_text(json.dumps(names))
    if names:
        assert info_classes.every(str(folder)).split("\n") == [f"{i} {name}" for i, name in enumerate(names)]
    else:
        with pytest.raises(InputError, match="are not known"):
            info_classes.every(str(folder))


def test_lines_of_classes_are_no_wider_than_the_page_and_names_cannot_break_them():
    text = info_classes.shown([f"golden retriever\n{i}" for i in range(1000)], "runs/dogs", 15)
    assert max(map(len, (15 * " " + text).split("\n"))) <= 120
    assert text.endswith("... (all 1,000: asymflow info runs/dogs --classes)")
