"""Packages that are not installed: which extra of pyproject.toml brings them, said in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# By the names that are imported. Of several extras that bring a package, the smallest. "": what every install has.
EXTRAS = {
    "": ("torch", "numpy", "tqdm", "matplotlib"),
    "library": ("safetensors", "huggingface_hub", "PIL"),
    "train": ("deepspeed", "pydantic", "yaml", "torch_fidelity"),
    "repa": ("transformers", "tokenizers"),
    "flux2": ("diffusers", "peft", "accelerate", "lpips", "torchvision"),
    "toy": ("sklearn",),
}


def advice(e: ModuleNotFoundError) -> str | None:
    """How to install what is missing, in one line. None if no extra brings it: then nobody forgot an extra.

    None too if the package is there, and only a module within it is missing: its version is another.
    """
    package, _, module = (e.name or "").partition(".")
    if module and find_spec(package):
        return None
    for extra, packages in EXTRAS.items():
        if package in packages:
            what = f'".[{extra}]"' if extra else "."
            return f"{package} is needed, and not installed: pip install -e {what}"
    return None


def need(*packages: str) -> None:
    """Raises ModuleNotFoundError for the first of the packages that is not installed, without importing any."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Around the imports of a program: what is not installed ends it with one line and exit code 2.

    module: the `__name__` of the program. Where that is not "__main__", somebody imports it, and the error is theirs.
    Of the processes that a launcher started, the first of each machine speaks for all.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        text = advice(e)
        if module != "__main__" or text is None:
            raise
        spec = sys.modules["__main__"].__spec__
        program = spec.name if spec else Path(sys.argv[0]).name
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
