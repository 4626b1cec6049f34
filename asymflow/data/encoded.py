"""Reads the shards of `asymflow data encode`: images with their latents and the embeddings of their captions.

    ds = EncodedShards("shards")
    height, width = ds.buckets[ds.bucket[0]]

The format is described in `asymflow.data.encode`.
"""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from asymflow import opening
from asymflow.data.folder import to_uint8
from asymflow.data.shards import (
    ENCODED,
    META,
    check_finished,
    check_shards,
    load_index,
    read_meta,
    shard_path,
    shards_digest,
)
from asymflow.entries import Entry, UnreadableError
from asymflow.errors import InputError

EMPTY_PROMPT = "empty_prompt.safetensors"
HEAD = 512  # bytes: the header of a sample's tensors is not longer
KINDS = ("image", "facts", "tensors")  # the files of a sample, in their order in the shard


class EncodedSample(NamedTuple):
    """image: (3, H, W) uint8. latent: (r, h, w) float32, as the transformer sees it: its tokens are
    `latent.flatten(1).T`, row by row. prompt: (L, C), the embedding of the caption, in the dtype in which it is stored
    (by default bfloat16). name: of the original image. caption: the text that was embedded."""

    image: Tensor
    latent: Tensor
    prompt: Tensor
    name: str
    caption: str


class EncodedShards:
    """Samples by number, in the order of the shards. Each shard has samples of one bucket.

    buckets: a list of image sizes (height, width). bucket: (n,), the index of each sample's bucket. meta: the content
    of meta.json; r is meta["rank"], and a latent token covers meta["patch_size"] squared pixels. empty_prompt: (L, C),
    the embedding of an empty caption.

    A sample is read in one piece from its place in the shard. The index is a few arrays, which forked workers share.
    Raises InputError if the folder was not made by `data encode`, or is not complete.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_meta(self.path, ENCODED)
        if not self.meta:
            raise InputError(f"{path} is not a folder of shards made by `asymflow data encode`")
        self.buckets = [tuple(size) for size in self.meta["buckets"]]
        there = len(list(self.path.glob("*.tar")))
        self.shards = [str(shard_path(self.path, number)) for number in range(min(self.meta.get("shards", 0), there))]
        indices = [load_index(shard, ENCODED.columns) for shard in self.shards]
        whole = [shard for shard, index in zip(self.shards, indices, strict=True) if index is not None]
        check_finished(self.path, ENCODED, self.meta, whole)
        self.fingerprints = np.array([index["fingerprint"] for index in indices])
        counts = [len(index["number"]) for index in indices]
        self.shard = np.repeat(np.arange(len(counts)), counts)
        self.bucket = np.repeat([int(index["bucket"]) for index in indices], counts)
        if not self.bucket.size:
            raise InputError(f"{path} has no images")
        if not 0 <= self.bucket.min() <= self.bucket.max() < len(self.buckets):
            raise InputError(f"{path}: an index names a bucket that {META} does not have: copy the folder again")
        self.span = np.concatenate([index["span"] for index in indices])  # (n, 3, 2): (offset, size) of each of KINDS
        tensors, _ = opening.read_tensors(self.path / EMPTY_PROMPT)
        opening.check_tensors(tensors, {"prompt": tuple(self.meta["prompt_shape"])}, str(self.path / EMPTY_PROMPT))
        self.empty_prompt = tensors["prompt"]

    def __len__(self) -> int:
        return len(self.bucket)

    @property
    def prompt_length(self) -> int:
        """The positions of each prompt."""
        return self.meta["prompt_shape"][0]

    @property
    def digest(self) -> str:
        return shards_digest(self.shards, self.fingerprints)

    def check(self) -> None:
        """Raises InputError if this machine has not the same shards as the one where this object was made."""
        check_shards(self.shards, self.fingerprints)

    def __getitem__(self, index: int) -> EncodedSample:
        """Raises UnreadableError, naming sample and shard, if it is damaged."""
        image, facts, tensors = self.read(index, sum(self.span[index, -1]))
        with self.naming(index):
            facts, tensors = json.loads(facts), safetensors.torch.load(tensors)
            sample = EncodedSample(bytes_to_uint8(image), **tensors, name=facts["name"], caption=facts["caption"])
            shapes = [tuple(part.shape) for part in sample[:3]]
            if shapes != [*self.shapes(index), tuple(self.meta["prompt_shape"])]:
                raise ValueError(f"its shapes are {shapes}")
        return sample

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and latent as in `EncodedSample`, without reading the prompt, the largest part. Raises the same."""
        size, shape = self.shapes(index)
        image, _, tensors = self.read(index, self.span[index, -1, 0] + HEAD + 4 * math.prod(shape))
        with self.naming(index):
            start = 8 + int.from_bytes(tensors[:8], "little")
            first, last = json.loads(tensors[8:start])["latent"]["data_offsets"]
            latent = np.frombuffer(tensors[start + first : start + last], "<f4").reshape(shape)
            image = bytes_to_uint8(image)
            if image.shape != size:
                raise ValueError(f"its image has the shape {tuple(image.shape)}")
        return image, torch.from_numpy(latent.copy())

    def read(self, index: int, end: int) -> list[bytes]:
        """The files of a sample, read in one piece. end: the offset in the shard where to stop reading."""
        spans = self.span[index].tolist()
        start = spans[0][0]
        content = Entry(self.shards[self.shard[index]], offset=start, size=max(int(end) - start, 0)).read()
        return [content[offset - start : offset - start + size] for offset, size in spans]

    def shapes(self, index: int) -> list[tuple[int, ...]]:
        """The shapes of a sample's image and latent."""
        bucket = self.buckets[self.bucket[index]]
        return [(3, *bucket), (self.meta["rank"], *(length // self.meta["patch_size"] for length in bucket))]

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """A context that turns every error into an UnreadableError that names the sample."""
        try:
            yield
        except Exception as e:  # a damaged file can raise many types of errors
            where = f"{self.shards[self.shard[index]]}: sample {index}"
            raise UnreadableError(f"{where} is damaged ({e or type(e).__name__})") from None


def bytes_to_uint8(content: bytes) -> Tensor:
    """Decode an image file to (3, H, W) uint8."""
    return to_uint8(Image.open(io.BytesIO(content)).convert("RGB"))
