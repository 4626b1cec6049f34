"""How images are drawn and measured: all that must be equal for two numbers to be compared.

    load_protocol("adm", {"num": 10_000})

A protocol is a small YAML file: one of those beside this module (see `shipped`), or your own. What may differ between
two models that are compared is not in it: the weights, the moving average, the guidance.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from asymflow import opening, streams, yaml12
from asymflow.errors import InputError
from asymflow.evaluation.features import EXTRACTORS
from asymflow.evaluation.measures import CAPTIONS, FEATURES, MEASURES, ORACLE
from asymflow.extensions import check_name
from asymflow.sampling import METHODS

PROTOCOLS = files("asymflow.evaluation") / "protocols"
MOST_BYTES = 50_000  # of a file
UNSAID = ("weights", "reference", "first", "clip")  # changes that are told by their checksums
Count = Annotated[int, Field(ge=1, lt=2**40)]


class Protocol(BaseModel):
    """All that must be equal for two numbers to be compared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1, description="its name, for tables")
    about: str = Field("", description="what it is, and who reports it")
    num: Annotated[int, Field(ge=2, lt=2**40)] = Field(description="images to draw")
    first: Annotated[int, Field(ge=0, lt=2**62)] = Field(0, description="the number of the first image")
    seed: Annotated[int, Field(ge=0, lt=2**62)] = Field(0, description="with its number, fixes the noise of an image")
    classes: Literal["balanced", "data"] = Field("balanced", description="all classes as often, or as in the reference")
    order: Literal["in turn", "sorted", "shuffled"] = Field(
        "in turn",
        description="of the classes: one after the other, over and over; all images of the first, then of the next; or "
        "each once in a random order, over and over",
    )
    method: str = Field("heun", description="the sampler")
    steps: Count = Field(50, description="of the sampler")
    shift: Annotated[float, Field(gt=0)] = Field(1.0, description="of the noise levels")
    precision: Literal["usual", "bf16", "float32"] = Field("usual", description="of the model; usual: bf16 on a GPU")
    quantize: Literal["round", "floor"] = Field("round", description="how a pixel becomes one of 256 values")
    crop: Count | None = Field(
        None, description="side to which images of folders are cropped; null: they have one size"
    )
    turn: bool = Field(False, description="whether photographs of folders are turned upright, as their EXIF says")
    extractor: Literal[EXTRACTORS] = Field("inception-v3-compat", description="the network of the features")
    weights: str | None = Field(None, description="its file or folder; null: looked for, or downloaded")
    reference: str | None = Field(
        None, description="images, an .npz, data (the training images), or a published one: adm-imagenet, jit-imagenet"
    )
    clip: str | None = Field(None, description="the folder of a CLIP, for the measure clip_score")
    measures: Annotated[tuple[Literal[tuple(MEASURES)], ...], Field(min_length=1, strict=False)] = Field(
        tuple(FEATURES), description="what is measured"
    )

    @field_validator("method")
    @classmethod
    def is_a_sampler(cls, name: str) -> str:
        if wrong := check_name(name, METHODS):
            raise ValueError(f"it {wrong.partition(', but')[0]}")
        return name

    def label(self, number: int, num_classes: int) -> int:
        """The class of image `first`, `first` + 1, ..., if all classes are drawn as often."""
        if self.order == "in turn":
            return number % num_classes
        if self.order == "shuffled":
            return streams.image_index(self.seed, number, num_classes)
        return min((number - self.first) * num_classes // self.num, num_classes - 1)


def shipped() -> list[str]:
    """The names of the protocols that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in PROTOCOLS.iterdir() if file.name.endswith(".yaml"))


def load_protocol(name_or_path: str, changes: Mapping[str, object] | None = None) -> Protocol:
    """A shipped protocol by its name, or a YAML file; then `changes`. Changed, its name says so: "adm, num 1000".

    Raises InputError, one line with file, line and key.
    """
    if name_or_path in shipped():
        text, label = (PROTOCOLS / f"{name_or_path}.yaml").read_text(), f"{name_or_path}.yaml"
    elif not os.path.isfile(name_or_path):  # noqa: PTH113 (Path.is_file raises for what cannot be a name)
        near = get_close_matches(name_or_path, shipped(), 1)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
        raise InputError(f"{yaml12.short(name_or_path)} is neither a file nor a shipped protocol: {hint}")
    else:
        text, label = opening.read_text(name_or_path, MOST_BYTES), yaml12.one_line(name_or_path)
    layer = yaml12.parse(text, lambda line: f"{label}, line {line + 1}")
    if not isinstance(layer.values, dict):
        raise InputError(f"{label} must be a section of keys, such as num: 50000")
    given = {"name": Path(label).stem} | layer.values  # not the path, which is nobody else's
    changed = {key: value for key, value in (changes or {}).items() if value is not None and given.get(key) != value}
    if said := [f"{key} {plain(value)}" for key, value in changed.items() if key not in UNSAID]:
        given["name"] = f"{given['name']}, {', '.join(said)}"
    try:
        return with_fitting_measures(Protocol.model_validate(given | changed))
    except ValidationError as e:
        raise InputError(fault(e, layer)) from None


def plain(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def with_fitting_measures(protocol: Protocol) -> Protocol:
    """The protocol. InputError if its extractor does not find what its measures need, or a CLIP is given for none."""
    known = ORACLE if protocol.extractor == "oracle" else FEATURES | CAPTIONS
    if strange := [name for name in protocol.measures if name not in known]:
        raise InputError(f"the extractor {protocol.extractor} is not for {strange[0]}, but for {', '.join(known)}")
    if protocol.extractor == "oracle" and protocol.reference not in (None, "data"):
        raise InputError(f"the oracle knows the truth, and needs no reference, but it is given {protocol.reference}")
    if protocol.clip and "clip_score" not in protocol.measures:
        raise InputError(f"a CLIP is for the measure clip_score, which the protocol {protocol.name} does not have")
    return protocol


def renamed(protocol: Protocol, **changes: object) -> Protocol:
    """The protocol with changes, which its name tells."""
    changed = {key: value for key, value in changes.items() if getattr(protocol, key) != value}
    if not changed:
        return protocol
    said = ", ".join(f"{key} {value}" for key, value in changed.items() if key not in UNSAID)
    return protocol.model_copy(update=changed | ({"name": f"{protocol.name}, {said}"} if said else {}))


def fault(error: ValidationError, layer: yaml12.Layer) -> str:
    """The first thing that is wrong, in one line: unknown keys first."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    key = str(first["loc"][0])
    origin = layer.origins.get((key,)) or next(iter(layer.origins.values()))
    known = list(Protocol.model_fields)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        return f"{origin.place}: unknown key {yaml12.short(key)}: {hint}"
    if first["type"] == "missing":
        return f"{origin.place}: {key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{origin.place}: {key} is {yaml12.shown(first['input'])}: {message}"
