"""`--classes` by number or name, and the names beside a model."""

import json
import re

import pytest

from asymflow import InputError
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


def test_the_names_lie_beside_the_model(tmp_path):
    assert class_names(tmp_path) == []
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    assert class_names(tmp_path) == NAMES
    assert class_names(tmp_path / "classes.json") == []  # the file of a published model has no folder of its own
    for damaged in ("{}", "[1]", "[" * 10**5, "cat"):
        (tmp_path / "classes.json").write_text(damaged)
        with pytest.raises(InputError, match=r"classes\.json must be a list of names in JSON"):
            class_names(tmp_path)
