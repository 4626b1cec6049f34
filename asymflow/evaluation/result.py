"""The result of an evaluation: one JSON file that says how each number was made."""

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from asymflow import files, opening
from asymflow.errors import InputError
from asymflow.evaluation.measures import MEASURES, ORACLE, Measured, Reference, Samples

KIND = "asymflow evaluation 1"


class Named(BaseModel):
    name: str


class Extractor(Named):
    weights_sha256: str


class Found(BaseModel):
    value: FiniteFloat | None
    uncertainty: FiniteFloat | None
    remarks: list[str]


class Scored(BaseModel):
    interval: list[float] = []
    step: int | None = None
    settings: dict = {}


class Against(BaseModel):
    name: str | None = None


class Result(BaseModel):
    """What readers of a result rely on; it has more."""

    kind: Literal[KIND]
    of: str
    images: int
    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    scored: Scored
    protocol: Named
    extractor: Extractor
    reference: Against
    measures: dict[str, Found]


TITLES = {"kid": "KID", "inception_score": "Inception Score", "precision": "precision", "recall": "recall"} | {
    "clip_score": "CLIP score",
    "count": "right count",
    "color": "right colour",
    "shape": "right shape",
    "right": "all right",
    "residual": "residual, grey levels",
}
FRECHET = {"inception-v3-compat": "FID", "dinov2": "FD-DINOv2", "vgg16": "FD-VGG16"}
DIGITS = {"kid": 5, "precision": 3, "recall": 3}


def title(measure: str, extractor: str) -> str:
    """What a measure is called: the Fréchet distance is an FID only in the features of Inception."""
    if measure.endswith("frechet_distance"):
        patch = "patch " if measure.startswith("patch") else ""
        return patch + FRECHET.get(extractor, f"FD ({extractor})")
    plain = measure in (*ORACLE, "clip_score") or extractor == "inception-v3-compat"
    return TITLES.get(measure, measure) + ("" if plain else f" ({extractor})")


def besides(scored: dict) -> list[str]:
    """What of how images were drawn is not known, or no protocol says. scored: of a result."""
    if "images" not in scored:  # they were drawn by the protocol
        return []
    if not (settings := scored.get("settings")):
        return ["how these images were drawn is not known"]
    classes = settings.get("classes", "all")
    of_some = [f"drawn of the classes {classes} alone"] if classes != "all" else []
    return of_some + (["clamped while they were drawn"] if settings.get("clamp") else [])


def measure(names: tuple[str, ...], sample: Samples, reference: Reference | None) -> dict[str, Measured]:
    """Each of the measures, by its name."""
    return {name: MEASURES[name](sample, reference) for name in names}


def as_json(measured: dict[str, Measured]) -> dict[str, dict]:
    return {
        name: {"value": found.value, "uncertainty": found.uncertainty, "remarks": list(found.remarks)}
        | ({"interval": found.interval} if found.interval else {})
        for name, found in measured.items()
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("asymflow", "torch", "torch-fidelity", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(path: Path, result: dict) -> None:
    with files.replacing(path) as beside:
        beside.write_text(json.dumps({"kind": KIND} | result, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict:
    """A result, or that of a folder. Raises InputError if it is none."""
    path = path / "result.json" if path.is_dir() else path
    result = opening.read_json(path)
    try:
        Result.model_validate(result, strict=True)
    except ValidationError:
        raise InputError(f"{path} is not a result of asymflow evaluate") from None
    return result


def shown(name: str, value: float | None, uncertainty: float | None) -> str:
    """A value with as many digits as its uncertainty lets one see."""
    if value is None:
        return "-"
    digits = DIGITS.get(name, 2)
    if uncertainty:
        digits = max(0, min(8, 1 - math.floor(math.log10(uncertainty))))
        return f"{value:.{digits}f} ± {uncertainty:.{digits}f}"
    return f"{value:.{digits}f}"


def lines(result: dict) -> list[str]:
    """The measures of a result for people, a line each, and what to know before use."""
    extractor, found = result["extractor"]["name"], result["measures"]
    wide = max(len(title(name, extractor)) for name in found)
    text = []
    for name, one in found.items():
        remarks = f"   {'; '.join(one['remarks'])}" if one["remarks"] else ""
        text.append(f"{title(name, extractor):{wide}}   {shown(name, one['value'], one['uncertainty'])}{remarks}")
    return text
