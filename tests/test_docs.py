"""The pages of docs/: their code runs, their commands and keys exist, and the reference has every public name."""

import ast
import importlib.util
import re
from pathlib import Path

import matplotlib.image
import pytest
import torch

import asymflow
import nano_asymflow
from asymflow.training.config.sections import Sections, known_keys
from nano_asymflow import random_stream

ROOT = Path(nano_asymflow.__file__).parent
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))}
ALL = "\n".join(PAGES.values())
REFERENCE = re.findall(r"^::: (\S+)(.*?)(?=^:::|\Z)", ALL, re.MULTILINE | re.DOTALL)


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```(?:python|py)\n(.*?)```", PAGES[page], re.DOTALL)


def defined_in(module: str) -> set[str]:
    """The names that a module defines, by its text: modules of an extra are not imported for this."""
    place = ROOT / module.replace(".", "/")
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    statements = ast.parse(path.read_text()).body
    targets = [target for s in statements if isinstance(s, ast.Assign) for target in s.targets]
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    return assigned | {s.name for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef)}


def referenced() -> set[str]:
    """All names with an entry of their own in the reference, or as a member of a module that has one."""
    names = set()
    for name, options in REFERENCE:
        members = re.search(r"members: \[(.*?)\]", options)
        names |= {name, *(f"{name}.{member}" for member in (members[1].split(", ") if members else []))}
    return names


# ---- The reference ---------------------------------------------------------------------------------------------------
def test_every_public_name_is_in_the_reference():
    public = {f"asymflow.{module}.{name}" for name, module in asymflow.MODULES.items()}
    assert public - referenced() == set()


def test_every_name_that_a_page_imports_exists_and_is_in_the_reference():
    text = ALL + (ROOT / "README.md").read_text()
    imports = re.findall(r"^ *from (asymflow[\w.]*) import ([\w, ]+)", text, re.MULTILINE)
    assert imports
    for module, names in imports:
        for name in names.strip().split(", "):
            source = f"asymflow.{asymflow.MODULES[name]}" if module == "asymflow" else module
            assert name in defined_in(source), f"{module} has no {name}"
            assert f"{source}.{name}" in referenced(), f"{module}.{name} is in no page of the reference"


def test_every_entry_of_the_reference_exists():
    for name, _ in REFERENCE:
        module, _, last = name.rpartition(".")
        is_module = (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").is_file()
        assert is_module or last in defined_in(module), name


# ---- The pages -------------------------------------------------------------------------------------------------------
def test_links_lead_to_pages_and_all_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page, text in PAGES.items():
        assert re.search(rf": {re.escape(page)}$", navigation, re.MULTILINE), f"{page} is not in mkdocs.yml"
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / "docs" / page).parent.joinpath(link).is_file(), f"{page} links to {link}"


def test_every_picture_is_in_the_gallery():
    pictures = {path.name for path in ROOT.glob("docs/*.png")}
    assert pictures - set(re.findall(r"\]\((\w+\.png)\)", PAGES["gallery.md"])) == set()


def test_commands_name_what_there_is():
    experiments, configurations, keys = (
        set(re.findall(pattern, ALL))
        for pattern in (r"-m toy\.([a-z]\w+)", r"--config (\w+)(?![\w./])", r"--set ([\w.]+)=")
    )
    there = {path.stem for path in (ROOT / "toy").glob("*.py")} | {
        path.parent.name for path in (ROOT / "toy").glob("*/__main__.py")
    }
    assert experiments - there == set()
    assert {name for name in configurations if not (ROOT / f"asymflow/configs/{name}.yaml").is_file()} <= {"dit"}
    known = known_keys(Sections)
    unknown = {key for key in keys if key not in known and not key.startswith("deepspeed.")}
    assert unknown <= {"a.b", "train.step"}  # a placeholder, and the mistake that a page shows
    assert len(experiments) > 5
    assert len(configurations) > 3
    assert len(keys) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page)])
def test_code_can_be_read(page):
    for code in code_blocks(page):
        ast.parse(code)


def test_files_that_pages_show_are_there():
    """A formatter of code, taking the mark for Python, has put spaces into it once."""
    marks = [line for text in PAGES.values() for line in text.splitlines() if "--8" in line]
    assert len(marks) > 2
    assert all((ROOT / re.fullmatch(r'--8<-- "(.+)"', mark)[1]).is_file() for mark in marks)


def test_the_method_page_computes_what_nano_asymflow_computes():
    """Bit for bit: the same products in the same order."""
    shown = {}
    exec(code_blocks("method.md")[0], shown)
    x, y = torch.randn(2, 5, 7, generator=random_stream(0, "test"))
    basis, sigma = torch.linalg.qr(y.mT).Q[:, :3], torch.linspace(0.1, 1, 5)[:, None]
    assert torch.equal(shown["asymmetric_velocity"](x, y, basis), nano_asymflow.asymmetric_velocity(x, y, basis))
    assert torch.equal(
        shown["recover_velocity"](x, y, sigma, basis), nano_asymflow.recover_velocity(x, y, sigma, basis)
    )


@pytest.mark.slow  # the README has the same example, and a test of it
def test_the_example_of_the_library_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec(code_blocks("library.md")[0], shown)
    assert shown["u"].shape == shown["images"].shape == (2, 3, 64, 64)
    assert shown["loss"].requires_grad


def test_the_oracle_of_the_evaluation_page_reads_its_own_picture():
    shown = {}
    exec(code_blocks("evaluation.md")[1], shown)
    assert shown["read_scene"](shown["picture"]).caption == shown["scene"].caption


def test_the_distance_of_the_evaluation_page_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec(code_blocks("evaluation.md")[0], shown)
    assert shown["frechet_distance"](shown["one"], shown["other"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vit", "dit"])
def test_the_example_of_an_own_backbone_learns_and_draws(tmp_path, network, monkeypatch):
    spec = importlib.util.spec_from_file_location("own_backbone", ROOT / "docs/examples/own_backbone.py")
    example, losses = importlib.util.module_from_spec(spec), []
    spec.loader.exec_module(example)
    loss = example.flow_matching_loss
    monkeypatch.setattr(example, "flow_matching_loss", lambda *given: losses.append(loss(*given)) or losses[-1])
    example.main(network, 20, str(tmp_path / "drawn.png"))
    first, last = (torch.stack(some).mean() for some in (losses[:3], losses[-3:]))
    assert len(losses) == 20
    assert last < 0.7 * first
    assert matplotlib.image.imread(tmp_path / "drawn.png").std() > 0.01
