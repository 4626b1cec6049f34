"""A checkpoint that a new run cannot begin from is refused before anything is made."""

from contextlib import nullcontext

import pytest

from asymflow.errors import InputError
from asymflow.training.config.reading import load_config
from asymflow.training.run import checkpoint
from asymflow.training.run.folder import check_resume


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"step": 4, "averages": {"0.9": 0.1}}, "is a snapshot of averages: give a checkpoint"),
        ({"images": 9, "averages": []}, "has no average 0.9, which ema asks for: it has none"),
        ({"images": 9, "averages": ["0.99"]}, "has no average 0.9, which ema asks for: it has 0.99"),
        ({"images": 9, "averages": ["0.99", "0.9"]}, None),
    ],
)
def test_a_snapshot_and_a_checkpoint_of_other_averages_are_refused(tmp_path, monkeypatch, state, said):
    other = tmp_path / "run/checkpoints/00000004"
    other.mkdir(parents=True)
    (other / checkpoint.MANIFEST).touch()
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: state)
    config = load_config("shapes_tiny", ["ema={decays: [0.9], sigma_rel: []}", "ema.snapshot_every=null"])
    with pytest.raises(InputError, match=said) if said else nullcontext():
        check_resume(tmp_path / "new", str(other), config)
