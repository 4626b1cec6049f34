"""toy.results: from a training to the page, in small."""

import re

import pytest
from PIL import Image

from toy import results


@pytest.mark.slow
def test_the_study_goes_from_a_training_to_a_page(tmp_path):
    assert results.main(["shapes", "--quick", "--out", str(tmp_path / "out")]) == 0
    assert results.main(["write", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs/results.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0] for row in rows[1:]] == ["| no guidance", rows[2][0]]
    assert rows[2][0].startswith("| **found**: guidance ")
    for row in rows[1:]:
        assert re.search(r"\d\.\d+\*{0,2} ± \d\.\d+", row[2])
    with Image.open(tmp_path / "docs/results_shapes.png") as picture:
        assert min(picture.size) > 200


def test_what_is_missing_is_one_line(tmp_path, capsys):
    for words, said in ((["write"], "has no study"), (["emoji64"], "emoji64 needs --data")):
        assert results.main([*words, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
