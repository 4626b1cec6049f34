"""The command `asymflow`: a module for each subcommand. What a user gets wrong is answered in one line, exit code 2."""

import os
import platform
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version

import torch

from asymflow.cli import data, export, import_, info, sample, subspace
from asymflow.cli.common import Parser
from asymflow.errors import InputError

EXAMPLES = """\
examples:
  asymflow subspace pca --data imagenet/train --rank 8 --out imagenet-r8.safetensors
  asymflow sample --model asymflow_h_16_r8_imagenet.safetensors --classes 207,360 --out runs/dogs
  asymflow info JiT-H/16

asymflow COMMAND --help says more about one of them, with examples."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `asymflow info DIR | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as e:
        return complain(args, e)
    except ModuleNotFoundError as e:
        return complain(args, f'{e.name} is needed, and not installed: pip install -e ".[train]"')
    except OSError as e:
        return complain(args, f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e)
    except KeyboardInterrupt:
        print(f"\nasymflow {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def end(number: int, frame) -> None:
    """Let SIGTERM, as schedulers send it, end a command like an error: what is half-written is cleared away."""
    raise SystemExit(128 + number)


def make_parser() -> Parser:
    parser = Parser(
        prog="asymflow",
        description="Asymmetric flow models: subspaces, checkpoints and samples.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=versions(), help="show versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (subspace, sample, import_, info, data, export):
        module.add_command(commands)
    return parser


def complain(args, message: object) -> int:
    print(f"asymflow {args.command}: error: {message}", file=sys.stderr)
    return 2


def versions() -> str:
    try:
        own = version("asymflow")
    except PackageNotFoundError:
        own = "(not installed)"
    return f"asymflow {own}, torch {torch.__version__}, Python {platform.python_version()}"
