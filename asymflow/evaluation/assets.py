"""Weights and statistics that evaluations need, and others have published: given, kept in a folder, or downloaded."""

import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch

from asymflow import files
from asymflow.errors import InputError
from asymflow.progress import progress_bar

OFFLINE = ("HF_HUB_OFFLINE", "ASYMFLOW_OFFLINE")
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
JIT = "https://github.com/LTH14/JiT/raw/main/fid_stats"


class Asset(NamedTuple):
    """A published file. sha256: how its checksum begins, if that is known."""

    what: str
    url: str
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


ASSETS = {
    "inception-v3-compat": Asset(
        "the weights of Inception, as torch-fidelity has them",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "vgg16": Asset(
        "the weights of VGG16, as torchvision has them",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
    ),
    "adm-imagenet256": Asset(
        "ADM's reference of ImageNet at 256 pixels", f"{OPENAI}/256/VIRTUAL_imagenet256_labeled.npz"
    ),
    "adm-imagenet512": Asset("ADM's reference of ImageNet at 512 pixels", f"{OPENAI}/512/VIRTUAL_imagenet512.npz"),
    "jit-imagenet256": Asset("JiT's statistics of ImageNet at 256 pixels", f"{JIT}/jit_in256_stats.npz"),
    "jit-imagenet512": Asset("JiT's statistics of ImageNet at 512 pixels", f"{JIT}/jit_in512_stats.npz"),
}


def cache_folder() -> Path:
    """Where they are kept: $ASYMFLOW_CACHE, or ~/.cache/asymflow."""
    return Path(os.environ.get("ASYMFLOW_CACHE") or "~/.cache/asymflow").expanduser() / "evaluation"


def find(name: str) -> Path:
    """The file of an asset: in the cache folder, or where torch keeps what torch-fidelity downloaded; or downloaded.

    Raises InputError, one line: which file, from where, into which folder.
    """
    asset, folder = ASSETS[name], cache_folder()
    for place in (folder, Path(torch.hub.get_dir()) / "checkpoints"):
        if (place / asset.name).is_file():
            return place / asset.name
    if any(os.environ.get(variable, "0") not in ("", "0") for variable in OFFLINE):
        raise InputError(f"{missing(asset)} ({next(v for v in OFFLINE if os.environ.get(v))} is set)")
    try:
        download(asset, folder / asset.name)
    except (OSError, HTTPException) as e:
        raise InputError(f"{missing(asset)} (it could not be downloaded: {' '.join(str(e).split())})") from None
    return folder / asset.name


def missing(asset: Asset) -> str:
    return f"not here: {asset.what}. Put {asset.url} into {cache_folder()}"


def download(asset: Asset, file: Path) -> None:
    """Download it, whole or not at all. Raises OSError, also if it ends early or has another checksum."""
    request = urllib.request.Request(asset.url, headers={"User-Agent": "asymflow"})
    with urllib.request.urlopen(request, timeout=30) as answer, files.replacing(file) as beside:
        size = int(answer.headers.get("Content-Length") or 0)
        digest, had = hashlib.sha256(), 0
        with (
            beside.open("wb") as stream,
            progress_bar(desc=f"downloading {asset.name}", unit="byte", total=size) as bar,
        ):
            while part := answer.read(1 << 20):
                stream.write(part)
                digest.update(part)
                had += len(part)
                bar.update(len(part))
        if size and had != size:
            raise OSError(f"it ended after {had:,} of {size:,} bytes")
        if not digest.hexdigest().startswith(asset.sha256):
            raise OSError(f"its checksum is {digest.hexdigest()[:8]}, not {asset.sha256}")
