"""Shards of `asymflow data encode`: images with their latents and the embeddings of their captions, by number.

    ds = EncodedShards("shards")
    height, width = ds.buckets[ds.bucket[0]]

The format is described in `asymflow.data.encode`.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
from PIL import Image
from torch import Tensor

from asymflow import files
from asymflow.data.folder import to_uint8
from asymflow.data.images import Entry, UnreadableError
from asymflow.data.shards import load_index, read_meta
from asymflow.errors import InputError

FORMAT = "asymflow encoded shards 1"
EMPTY_PROMPT = "empty_prompt.safetensors"
KINDS = ("image", "facts", "tensors")  # of the files of a sample, in the order in which they are in the shard


class EncodedSample(NamedTuple):
    """image: (3, H, W) uint8. latent: (r, h, w) float32, as the transformer sees it: its tokens are
    `latent.flatten(1).T`, row by row. prompt: (L, C), the embedding of the caption, as it is stored (bfloat16, unless
    it was made otherwise). name: of the original. caption: what was embedded."""

    image: Tensor
    latent: Tensor
    prompt: Tensor
    name: str
    caption: str


class EncodedShards:
    """Samples by number, in the order of the shards, each of which has samples of one bucket.

    buckets: the sizes (height, width) of the images. bucket: (n,) the index of its bucket for each sample. meta: what
    meta.json holds; r is meta["rank"], and a latent token covers meta["patch_size"] pixels squared. empty_prompt:
    (L, C), the embedding of no caption.

    A sample is read from where it lies, in one piece, and what is known of all of them is in a few arrays, so processes
    that read may be forked. Raises InputError if the folder is not of `data encode`, or not all of it is there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.meta = read_meta(self.path, FORMAT)
        if not self.meta:
            raise InputError(f"{path} is not a folder of shards made by `asymflow data encode`")
        if "shards" not in self.meta:
            raise InputError(f"{path} is not finished: run its `asymflow data encode` again, it goes on where it was")
        self.buckets = [tuple(size) for size in self.meta["buckets"]]
        self.shards = [str(shard_path(self.path, number)) for number in range(self.meta["shards"])]
        indices = [load_index(shard) for shard in self.shards]
        if gone := [shard for shard, index in zip(self.shards, indices, strict=True) if index is None]:
            raise InputError(
                f"{path}: of {len(indices)} shards {len(gone)} are missing or damaged, the first {gone[0]} (or its "
                "index): run the `asymflow data encode` that made them again, or copy them again"
            )
        counts = [len(index["number"]) for index in indices]
        self.shard = np.repeat(np.arange(len(counts)), counts)
        self.bucket = np.repeat([int(index["bucket"]) for index in indices], counts)
        self.span = np.concatenate([index["span"] for index in indices])  # (n, 3, 2): offset and size of each of KINDS
        tensors, _ = files.read_tensors(self.path / EMPTY_PROMPT)
        form = {"prompt": tuple(self.meta["prompt_shape"])}
        files.check_tensors(tensors, form, str(self.path / EMPTY_PROMPT))
        self.empty_prompt = tensors["prompt"]

    def __len__(self) -> int:
        return len(self.bucket)

    def __getitem__(self, index: int) -> EncodedSample:
        """Raises UnreadableError, naming sample and shard, if it is damaged."""
        spans = self.span[index].tolist()
        start, end = spans[0][0], sum(spans[-1])
        shard, bucket = self.shards[self.shard[index]], self.buckets[self.bucket[index]]
        content = Entry(shard, offset=start, size=end - start).read()
        image, facts, tensors = (content[offset - start : offset - start + size] for offset, size in spans)
        try:
            facts, tensors = json.loads(facts), safetensors.torch.load(tensors)
            image = to_uint8(Image.open(io.BytesIO(image)).convert("RGB"))
            sample = EncodedSample(image, tensors["latent"], tensors["prompt"], facts["name"], facts["caption"])
        except Exception as e:  # damage shows in many ways
            raise UnreadableError(f"{shard}: sample {index} is damaged ({e or type(e).__name__})") from None
        grid = [length // self.meta["patch_size"] for length in bucket]
        shapes = [tuple(part.shape) for part in sample[:3]]
        if shapes != [(3, *bucket), (self.meta["rank"], *grid), tuple(self.meta["prompt_shape"])]:
            raise UnreadableError(f"{shard}: sample {index} is damaged (its shapes are {shapes})")
        return sample


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"
