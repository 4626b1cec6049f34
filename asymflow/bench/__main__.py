"""`python -m asymflow.bench COMMAND`: each command is a module of this package."""

import importlib
import sys

from asymflow.packages import importing

COMMANDS = {
    "wrapper": "what the wrapper costs next to its backbone, on a CPU or a GPU",
    "flux2": "a finetuning step and an evaluation of a FLUX.2-sized model: seconds and memory",
    "noise": "the noise of an image, drawn on the CPU and copied or drawn on the device",
    "gpu": "is all of it right on this GPU, and how fast is it? In a few minutes",
    "emoji64": "train rank 8 and rank 0 on emoji64.tar for some minutes, and draw from both",
}


def main(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in COMMANDS:
        with importing(__name__):
            program = importlib.import_module(f"asymflow.bench.{command}").main
        return program(rest) or 0
    lines = "".join(f"  {name:10}{text}\n" for name, text in COMMANDS.items())
    usage = f"usage: python -m asymflow.bench COMMAND [--help]\n\n{lines}"
    if command in ("-h", "--help"):
        print(usage, end="")
        return 0
    print(
        f"python -m asymflow.bench: error: there is no {command}: the commands are {', '.join(COMMANDS)}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
