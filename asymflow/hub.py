"""Finding a model on this disk or on the Hugging Face Hub."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from asymflow.errors import InputError

MODELS, PACKAGED = Path(__file__).parent / "models", ("shapes",)  # models that come with this package, by their names
# Not there, not allowed, not reached, or a proxy refused.
GAVE_NOTHING = (HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")  # never downloaded, since they can carry code


def locate(path: str | Path, *names: str, what: str, perhaps: Sequence[str] = (), **hub_options) -> Path:
    """`path`, if it exists; else download it from the Hub, and return where it is.

    path: on the Hub either `ORG/NAME`, of which the files `names` are downloaded and their folder is returned, or a
        safetensors file `ORG/NAME/FILE`.
    perhaps: files that are downloaded as well, if they are there.
    what: what it should be, for the error message, such as "an adapter".
    hub_options: of `hf_hub_download`, such as token.
    Raises InputError if it is neither here nor on the Hub.

    A name of `PACKAGED` is the model that comes with this package, unless there is such a path.
    """
    path = packaged(Path(path))
    if path.exists():
        return path
    is_file = path.suffix == ".safetensors"
    if path.is_absolute() or len(path.parts) < (3 if is_file else 2) or path.suffix in PICKLES:
        raise InputError(f"{path} does not exist")
    try:
        if is_file:
            return Path(hf_hub_download("/".join(path.parts[:2]), "/".join(path.parts[2:]), **hub_options))
        *_, last = [Path(hf_hub_download(path.as_posix(), name, **hub_options)) for name in names]
        for name in perhaps:
            with suppress(EntryNotFoundError):
                hf_hub_download(path.as_posix(), name, **hub_options)
        return last.parent
    except GAVE_NOTHING as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path} is neither {what} here nor one that the Hub gave: {reason}") from None


def packaged(path: Path) -> Path:
    """The folder of a model that comes with this package, if `path` is its name and nothing has that path."""
    return MODELS / path if str(path) in PACKAGED and not path.exists() else path
