"""What the subcommands share: parsing that answers in one line, and refusing to overwrite."""

import argparse
from pathlib import Path

import torch

from asymflow.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with defaults in its help, and errors of one line that say where to find the help."""

    def __init__(self, *args, **options):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that are worth showing, and keeps the line breaks of a description (its examples)."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) or action.required else super()._get_help_string(action)


def new_file(path: Path) -> Path:
    """`path`, if nothing is there yet. Called before long work, so that it is not refused afterwards."""
    if path.exists():
        raise InputError(f"{path} exists already, and is not overwritten: choose another name or remove it")
    return path


def usable_device(name: str) -> torch.device:
    """The device of that name, if tensors can be made on it. Raises InputError."""
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
