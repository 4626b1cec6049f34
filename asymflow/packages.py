"""One-line advice for a missing package: which extra of pyproject.toml installs it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# The import names of packages, each under the smallest extra that installs it. "": installed without any extra.
EXTRAS = {
    "": ("torch", "jinja2", "numpy", "tqdm", "matplotlib"),  # jinja2 comes with torch
    "library": ("safetensors", "huggingface_hub", "PIL"),
    "train": ("deepspeed", "pydantic", "yaml", "torch_fidelity"),
    "repa": ("transformers", "tokenizers"),
    "flux2": ("diffusers", "peft", "accelerate", "lpips", "torchvision"),
    "toy": ("sklearn",),
}


def advice(e: ModuleNotFoundError) -> str | None:
    """How to install the missing package, in one line. None if no extra installs it.

    None too if the package is installed and only a module inside of it is missing: then its version is wrong.
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
    """A context for the imports of a program: if a package is missing, exit with one line and code 2.

    module: the `__name__` of the program. If it is not "__main__", the program is being imported, and the error is
    raised as usual. If a launcher started several processes, only the first on each machine prints.
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
