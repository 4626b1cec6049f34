"""Models that are here, or else on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from asymflow.errors import InputError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")  # nobody's are downloaded


def locate(path: str | Path, *names: str, what: str) -> Path:
    """`path`, if something is there; else what the Hub has by that name, downloaded.

    path: `ORG/NAME`, of which the files `names` are downloaded, and their folder is returned; or the safetensors file
        `ORG/NAME/FILE`.
    what: it is meant to be, in the error: such as "an adapter".
    Raises InputError if there is neither.
    """
    path = Path(path)
    if path.exists():
        return path
    is_file = path.suffix == ".safetensors"
    if path.is_absolute() or len(path.parts) < (3 if is_file else 2) or path.suffix in PICKLES:
        raise InputError(f"{path} does not exist")
    try:
        if is_file:
            return Path(hf_hub_download("/".join(path.parts[:2]), "/".join(path.parts[2:])))
        *_, last = [Path(hf_hub_download(path.as_posix(), name)) for name in names]
        return last.parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path} is neither {what} here nor one that the Hub gave: {reason}") from None
