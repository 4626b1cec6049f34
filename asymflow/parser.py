"""Parsing of a command's options, with errors of one line."""

import argparse
import os
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with defaults in its help, and errors of one line that say where to find the help.

    An option with one value is refused if it comes twice: the first would be lost without a word.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **options)
        for name in (None, "store"):
            self.register("action", name, StoreOnce)

    def parse_known_args(self, args=None, namespace=None):
        """With ~ for the home folder in every path: shells do not replace it in `--out=~/runs`."""
        self.given = set()
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if isinstance(value, Path):
                setattr(namespace, name, Path(os.path.expanduser(value)))  # noqa: PTH111 (leaves what is no user)
            elif isinstance(value, list):
                home = lambda item: Path(os.path.expanduser(item)) if isinstance(item, Path) else item  # noqa: PTH111
                setattr(namespace, name, list(map(home, value)))
        return namespace, rest

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class StoreOnce(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser.given:
            raise argparse.ArgumentError(self, "it is given twice, but can have one value: leave out one of them")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that are worth showing, and keeps the line breaks of a description (its examples)."""

    def _get_help_string(self, action):
        worth_showing = action.default is not None and action.default is not False and not action.required
        return super()._get_help_string(action) if worth_showing else action.help
