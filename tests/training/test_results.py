"""toy.results: from a training to the page, in small."""

import json
import re
import shutil

import pytest
from PIL import Image

from toy import results


@pytest.mark.slow
def test_the_study_goes_from_a_training_to_a_page(tmp_path):
    assert results.main(["shapes", "--quick", "--out", str(tmp_path / "out")]) == 0
    about = tmp_path / "out/shapes" / results.ABOUT
    about.write_text(json.dumps(json.loads(about.read_text()) | {"quick": False}))
    shutil.copytree(tmp_path / "out/shapes", tmp_path / "out/emoji64")
    assert results.main(["write", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs/results.md").read_text().partition("## Emoji")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0] for row in rows[1:]] == ["| no guidance", rows[2][0]]
    assert rows[2][0].startswith("| **found**: guidance ")
    for row in rows[1:]:
        assert re.search(r"\d\.\d+\*{0,2} ± \d\.\d+", row[2])
    with Image.open(tmp_path / "docs/results_shapes.png") as picture:
        assert min(picture.size) > 200


def test_what_is_missing_is_one_line(tmp_path, capsys):
    cases = {
        "write": "has no study shapes: python -m toy.results shapes makes it",
        "emoji64": "emoji64 needs --data",
        "write --data x.tar": "--data does not go with write",
        "write --quick": "--quick does not go with write",
        "shapes --docs docs": "--docs does not go with shapes",
    }
    for words, said in cases.items():
        assert results.main([*words.split(), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_quick_look_and_a_missing_study_do_not_come_into_the_page(tmp_path, capsys):
    docs = tmp_path / "docs"
    words = ["write", "--out", str(tmp_path), "--docs", str(docs)]
    for name, quick, said in (("shapes", False, "has no study emoji64: "), ("shapes", True, "is a quick look")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / results.ABOUT).write_text(json.dumps({"quick": quick}))
        assert results.main(words) == 2
        assert said in capsys.readouterr().err
        assert not docs.exists()
