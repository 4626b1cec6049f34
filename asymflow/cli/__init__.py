"""The command `asymflow`, with a module for each subcommand. A user's mistake gets one line, and exit code 2."""

import argparse
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

MODULES = {  # of each command; a module is imported only for its commands
    "data": "data",
    "subspace": "subspace",
    "info": "info",
    "plot": "plot",
    "compare": "compare",
    "evaluate": "evaluate",
    "export": "export",
    "ema": "export",
    "import": "import_",
    "card": "card",
    "sample": "sample",
}

MAP = """\
First, prepare:
  data      images for training: as shards (pack), or encoded with their captions (encode), to finetune a FLUX.2 klein
  subspace  fit the subspace of the noise to images, or look at one; a training from scratch fits its own
  info      what a model is, and what it costs to train and to run; also every key of a configuration

Second, train. This is a program of its own:
  python train_ddp.py --config shapes_tiny --out runs/shapes         a first one, in minutes and without any data
  deepspeed train_ddp.py --config imagenet256_h16 --set data.path=IMAGENET/train --out runs/h16

Third, look:
  plot      the curves and newest samples of one training or several, also while they go on
  compare   train asymmetric, x0- and u-prediction on your own images, and draw what came out
  evaluate  FID, KID, Inception Score, precision and recall of a model or of any images, by a protocol

Fourth, use it:
  export    make a folder of a model, from any checkpoint and average of a training
  ema       the same of an average of any length, after training
  import    the same of published weights, which are downloaded if they are on the Hugging Face Hub
  card      the README of a model for the Hub: configuration, curves, samples, results
  sample    draw images from a training, a model or published weights

examples:
  asymflow info JiT-H/16
  asymflow plot runs/shapes --out shapes.png
  asymflow sample --model shapes --classes "red circle,blue cross" --out runs/first     a model that comes with this

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
    """A parser with the options of one command; of all other commands it has only the names."""
    parser = Parser(
        prog="asymflow",
        usage="asymflow [-h] [--version] COMMAND ...",
        description="Asymmetric flow models: from images to a subspace, a training, and samples.",
        epilog=MAP,
    )
    parser.add_argument("--version", action="store_true", help="show versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="asymflow", help=argparse.SUPPRESS)
    module = MODULES.get(command)
    for name, other in MODULES.items():
        if other != module:
            commands.add_parser(name)
    if module:
        import_module(f"{__name__}.{module}").add_command(commands)
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
