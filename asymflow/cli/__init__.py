"""The command `asymflow`, with a module for each subcommand. A user's mistake gets one line, and exit code 2."""

import os
import platform
import signal
import sys
import threading
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from asymflow import packages
from asymflow.errors import InputError, out_of_memory
from asymflow.parser import Parser

COMMANDS = {  # the commands of each module, with their lines in the help; a module is imported only for its commands
    "subspace": {"subspace": "fit the subspace of the noise, or look at one"},
    "sample": {"sample": "draw images from a model"},
    "import_": {"import": "make a folder of a published model"},
    "info": {"info": "what a model is, and what it costs"},
    "plot": {"plot": "draw the curves and samples of trainings"},
    "data": {"data": "prepare images for training"},
    "export": {
        "export": "make a model of a checkpoint of a training run",
        "ema": "make an average of any length after training",
    },
}

EXAMPLES = """\
examples:
  asymflow subspace pca --data imagenet/train --rank 8 --out imagenet-r8.safetensors
  asymflow sample --model asymflow_h_16_r8_imagenet.safetensors --classes 207,360 --out runs/dogs
  asymflow info JiT-H/16

asymflow COMMAND --help says more about one of them, with examples."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if not word.startswith("-")), None)
    program = f"asymflow {command}" if command else "asymflow"
    try:
        parser = make_parser(command)
        args = parser.parse_args(argv)
        if args.version:
            print(versions())
            return 0
        if command is None:
            parser.print_help(sys.stderr)
            return 2
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `asymflow info DIR | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as e:
        return complain(program, e)
    except ModuleNotFoundError as e:
        if (text := packages.advice(e)) is None:
            raise
        return complain(program, text)
    except OSError as e:
        return complain(program, f"{e.filename}: {e.strerror}" if e.filename and e.strerror else e)
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        return complain(program, f"too little memory: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def end(number: int, frame) -> None:
    """The handler of SIGTERM. It ends the command like an error, so that half-written files are removed."""
    raise SystemExit(128 + number)


def make_parser(command: str | None = None) -> Parser:
    """A parser with the options of one command; of all other commands it has only the names and their help."""
    parser = Parser(
        prog="asymflow",
        description="Asymmetric flow models: subspaces, checkpoints and samples.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="store_true", help="show versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module, about in COMMANDS.items():
        if command in about:
            import_module(f"{__name__}.{module}").add_command(commands)
        else:
            for name, text in about.items():
                commands.add_parser(name, help=text)
    return parser


def complain(program: str, message: object) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


def versions() -> str:
    import torch  # here, because it takes seconds

    try:
        own = version("asymflow")
    except PackageNotFoundError:
        own = "(not installed)"
    return f"asymflow {own}, torch {torch.__version__}, Python {platform.python_version()}"
