"""What is not installed is said in one line, with the extra that brings it; what needs no extra works without any."""

import ast
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import huggingface_hub.hub_mixin  # noqa: F401 (needs yaml itself, and would say so)
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nano_asymflow
from asymflow.packages import EXTRAS, advice

ROOT = Path(nano_asymflow.__file__).parent
OURS = ("asymflow", "toy", "nano_asymflow")
SOURCES = [*ROOT.glob("asymflow/**/*.py"), *ROOT.glob("toy/**/*.py"), ROOT / "train_ddp.py", ROOT / "nano_asymflow.py"]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text()
)
ALL = [package for extra, packages in EXTRAS.items() if extra for package in packages]


# ---- The table is that of pyproject.toml -----------------------------------------------------------------------------
def imported(path):
    """The packages of others that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        yield from (name.partition(".")[0] for name in names)


def named(extra):
    """The distributions that pyproject.toml names for an install with this extra."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]  # Python 3.11
    names, todo = set(), list(project["optional-dependencies"][extra] if extra else project["dependencies"])
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == project["name"]:
            todo += [line for inner in requirement.extras for line in project["optional-dependencies"][inner]]
        else:
            names.add(canonicalize_name(requirement.name))
    return names


distributions = cache(packages_distributions)  # of each package that is installed; takes seconds


def needed_by(names):
    """What these distributions need themselves, without extras of theirs."""
    needed = [Requirement(line) for name in names for line in requires(name) or ()]
    return {canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})}


def test_every_import_is_in_the_table():
    others = {name for path in SOURCES for name in imported(path)} - sys.stdlib_module_names - {*OURS}
    assert others - {name for packages in EXTRAS.values() for name in packages} == set()


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_what_the_table_says_and_no_smaller_one_names_it(extra):
    inside = named(extra)
    smaller = [named(other) for other in EXTRAS if named(other) < inside]
    for package in EXTRAS[extra]:
        names = {canonicalize_name(name) for name in distributions()[package]}
        assert names & (inside | needed_by(inside)), package
        assert not any(names & other for other in smaller), package


# ---- Programs --------------------------------------------------------------------------------------------------------
def in_another_process(program, argv, missing, written):
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(written / stream, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for module in [*sys.modules]:
        if module.partition(".")[0] in (*OURS, *missing):
            del sys.modules[module]
    sys.modules.update(dict.fromkeys(missing))  # with None there, an import fails as if nothing were installed
    sys.argv = [program, *argv]
    if program == "train_ddp":
        sys.argv[0] = str(ROOT / "train_ddp.py")
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run(tmp_path, program, argv, missing):
    """The exit code of `python -m program` where packages are missing, and what it writes. Forked: torch is there."""
    process = multiprocessing.get_context("fork").Process(
        target=in_another_process, args=(program, [str(word) for word in argv], missing, tmp_path)
    )
    process.start()
    process.join()
    return process.exitcode, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()


SAMPLE = ["sample", "--out", "no", "--base", "no"]


@pytest.mark.parametrize(
    ("program", "argv", "missing", "extra"),
    [
        ("train_ddp", [], "torch", ""),
        ("train_ddp", [], "safetensors", "library"),
        ("train_ddp", [], "pydantic", "train"),
        ("train_ddp", [], "yaml", "train"),
        ("train_ddp", ["--out", "runs/no"], "deepspeed", "train"),
        ("asymflow", ["--version"], "torch", ""),
        ("asymflow", ["subspace", "show", "no.safetensors"], "safetensors", "library"),
        ("asymflow", ["sample", "--help"], "PIL", "library"),
        ("asymflow", ["import", "no", "--out", "no"], "huggingface_hub", "library"),
        ("asymflow", ["info", "config"], "pydantic", "train"),
        ("asymflow", ["export", "--run", "no", "--out", "no"], "pydantic", "train"),
        ("asymflow", ["ema", "--run", "no", "--out", "no", "--sigma-rel", "0.1"], "pydantic", "train"),
        ("asymflow", ["compare", "--data", "no", "--out", "no"], "deepspeed", "train"),
        ("asymflow", ["info", "FLUX.2-klein-9B"], "diffusers", "flux2"),
        ("asymflow", SAMPLE, "diffusers", "flux2"),
        ("asymflow", SAMPLE, "peft", "flux2"),
        ("asymflow", SAMPLE, "accelerate", "flux2"),
        ("asymflow", SAMPLE, "transformers", "repa"),
        ("toy.digits", ["--quick"], "sklearn", "toy"),
        ("toy.make_emoji64", [], "PIL", "library"),
        ("toy.emoji64", [], "deepspeed", "train"),
        ("toy.emoji64", [], "torch_fidelity", "train"),
        ("toy.asymflux2_tiny", [], "diffusers", "flux2"),
        ("asymflow.bench", [], "safetensors", "library"),
    ],
)
def test_what_is_missing_is_one_line_with_its_extra(tmp_path, monkeypatch, program, argv, missing, extra):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(tmp_path, program, argv, [missing])
    what = f'".[{extra}]"' if extra else "."
    assert err.replace("rank 0: ", "").endswith(
        f"error: {missing} is needed, and not installed: pip install -e {what}\n"
    )
    assert len(err.splitlines()) == 1
    assert (code, out) == (2, "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_after_the_bare_install_every_program_helps_or_says_what_it_needs(tmp_path, program):
    code, out, err = run(tmp_path, program.removesuffix(".__main__"), ["--help"], ALL)
    if code == 0:
        assert "usage:" in out
    else:
        (line,) = err.splitlines()
        assert (code, out) == (2, "")
        assert 'not installed: pip install -e ".[' in line


def test_of_several_processes_one_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(tmp_path, "train_ddp", [], ["safetensors"]) == (2, "", "")


def test_the_help_and_the_version_need_no_extra(tmp_path):
    code, out, _ = run(tmp_path, "asymflow", ["--help"], ALL)
    assert code == 0
    assert "usage: asymflow" in out
    code, out, _ = run(tmp_path, "asymflow", ["--version"], ALL)
    assert code == 0
    assert out.startswith("asymflow ")


def test_the_help_does_not_wait_for_torch():
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('asymflow', run_name='__main__')\n"
    code += "except SystemExit: assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_library_says_which_extra_it_needs(monkeypatch):
    """`from asymflow import AsymFlow` in a script of somebody: an ImportError as ever, and the extra is in it."""
    for module in [name for name in sys.modules if name.partition(".")[0] in ("asymflow", "safetensors")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    try:
        with pytest.raises(ModuleNotFoundError, match=r'safetensors is needed.*: pip install -e "\.\[library\]"'):
            from asymflow import AsymFlow  # noqa: F401
    finally:
        for module in [name for name in sys.modules if name.partition(".")[0] == "asymflow"]:
            del sys.modules[module]


def test_all_names_of_the_library_can_be_had():
    import asymflow

    assert {*asymflow.__all__} <= {*dir(asymflow)}
    assert all(getattr(asymflow, name).__module__.startswith("asymflow.") for name in asymflow.__all__)
    with pytest.raises(AttributeError, match="'asymflow' has no attribute 'nothing'"):
        asymflow.nothing  # noqa: B018


def test_its_modules_are_there_without_an_import_of_their_own(monkeypatch):
    import asymflow

    for name in ("sampling", "precision", "backbones"):
        module = getattr(asymflow, name)
        monkeypatch.delattr(asymflow, name)
        assert getattr(asymflow, name) is module
        assert module.__name__ == f"asymflow.{name}"
    assert not hasattr(asymflow, "__path_of_nothing__")


@pytest.mark.parametrize("name", ["asymflow.nothing", "toy.nothing", "no_such_package", "diffusers.nothing", None])
def test_what_no_extra_brings_is_no_forgotten_extra(name):
    """A bug, or a broken installation: the traceback says where."""
    assert advice(ModuleNotFoundError("No module", name=name)) is None
