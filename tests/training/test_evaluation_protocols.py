"""The protocol of an evaluation in training: a file of the user's, or what the keys of the configuration say."""

from pathlib import Path

import pytest

from asymflow.errors import InputError
from asymflow.training import evaluate
from asymflow.training.config.reading import load_config


@pytest.mark.parametrize(
    ("settings", "text", "said"),
    [
        (["evaluate.extractor=inception"], None, "evaluate.extractor is 'inception': input should be"),
        ([], "num: 10\nmethod: dpm\n", "method is 'dpm': it must be heun, euler, or package.module:Name"),
        (["evaluate.reference=x"], "num: 10\nreference: y\n", "evaluate.reference is what evaluate.protocol says"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_one_line(tmp_path, settings, text, said):
    if text:
        (tmp_path / "my.yaml").write_text(text)
        settings = [*settings, f"evaluate.protocol={tmp_path}/my.yaml"]
    with pytest.raises(InputError) as e:
        evaluate.protocol_of(load_config("shapes_tiny", settings))
    assert said in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("given", "expected"), [("null", "data"), ("photos", "photos")])
def test_a_protocol_without_a_reference_gets_that_of_the_training(tmp_path, given, expected):
    (tmp_path / "my.yaml").write_text("num: 10\n")
    settings = [f"evaluate.protocol={tmp_path}/my.yaml", f"evaluate.reference={given}"]
    protocol = evaluate.protocol_of(load_config("shapes_tiny", settings))
    assert (Path(protocol.reference).name, protocol.name) == (expected, "my")
