"""Loading configurations that users write, and their complaints."""

from pathlib import Path

import pytest
from hypothesis import strategies as st

import asymflow
from asymflow.errors import InputError
from asymflow.training.config.reading import Config, load_config

CONFIGS = Path(asymflow.__file__).parent / "configs"
NEEDED = {"data.path=somewhere"}  # what a user has to give, of the shipped files


def load(name: str, *overrides: str, file: str | None = None) -> Config:
    """A shipped configuration, or a file that is based on it."""
    needed = {"loss.repa.model=dinov2"} if name.endswith("_repa") else set()
    if name.startswith("asymflux2_klein"):
        needed |= {"finetune.base=base", "finetune.subspace=subspace"}
    if name not in ("shapes_tiny", "asymflux2_tiny"):
        needed |= NEEDED
    return load_config(file or name, [*sorted(needed), *overrides])


def complaint(*args) -> str:
    with pytest.raises(InputError) as caught:
        load_config(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


TINY = "base: shapes_tiny\n"


def at(config: Config, key: str):
    """The value of a key, None if a section that it is in is."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


words = st.text(st.characters(codec="utf-8"), max_size=12).filter(str.isprintable) | st.sampled_from(
    [
        "1e-4",
        "on",
        "no",
        "null",
        "~",
        "0x1",
        "1",
        ".5",
        "true",
        "- a",
        "a: b",
        "#",
        "*a",
        "&a",
        "!x",
        "'",
        '"',
        "",
        " ",
        "=",
    ]
)
