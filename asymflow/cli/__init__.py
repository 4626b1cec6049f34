"""The command `asymflow`: one module for each subcommand. What a user gets wrong is answered in one line, exit code 2."""

import os
import sys

from asymflow.cli import import_, info, sample, subspace
from asymflow.cli.common import Parser
from asymflow.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = Parser(prog="asymflow", description="Asymmetric flow models: subspaces, checkpoints and samples.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (subspace, sample, import_, info):
        module.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # `asymflow info DIR | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as e:
        return complain(args, e)
    except OSError as e:
        return complain(args, f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e)
    except KeyboardInterrupt:
        print(f"\nasymflow {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def complain(args, message: object) -> int:
    print(f"asymflow {args.command}: error: {message}", file=sys.stderr)
    return 2
