"""Images and captions become what a FLUX.2 is trained on, latents and prompt embeddings, in shards of one size each.

A shard has, for each sample, KEY.png (or webp), KEY.json (caption, name, original size, bucket) and KEY.safetensors:
`latent` (r, h, w) in float32 and `prompt` (L, C) in the dtype of the text encoder. `EncodedShards` reads them.

What is stored is what the stock pipeline feeds to its transformer. For a FLUX.2 klein 9B, the embedding of a caption is
512 x 12288 numbers in bfloat16, 12.6 MB. The positions after the end of a caption cannot be left out or stored once:
the transformer attends to all of them, without a mask, and since the text encoder lets each look back at the caption,
no two captions have the same there. So the only lever is `max_length`, which trains the model on shorter ones. The
latents, in float32 so that none is rounded again before Procrustes sums up their products, are small beside.
"""

import json
import sys
from collections.abc import Collection, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from asymflow import files
from asymflow.data import writing
from asymflow.data.buckets import ENLARGED, buckets, enlargement, fill, nearest_bucket, share_kept
from asymflow.data.captioned import Drawing, Photo, each_once, find_captioned
from asymflow.data.encoded import EMPTY_PROMPT
from asymflow.data.encoders import (
    PARTS,
    encode_image,
    encode_prompts,
    folder_digest,
    load_encoders,
    prompt_tokens,
    read_base,
)
from asymflow.data.shards import ENCODED, Index, read_meta
from asymflow.entries import UnreadableError
from asymflow.errors import InputError
from asymflow.passed_over import PassedOver, some
from asymflow.pixels import in_order, to_tensor
from asymflow.progress import progress_bar

CUT = "cut_captions.log"  # "name: tokens" of each caption that is longer than --max-length, sorted
LEAST_SHARE = 0.5  # of an image that its bucket keeps; images of which it is less are counted
LOSSLESS = ("png", "webp")  # formats of images: the image is to be what the latent was made of
SAME = {  # what must stay the same when the command goes on, and what a user knows it as
    **writing.SAME,
    "max_aspect": "--max-aspect",
    "dtype": "--dtype",
    "max_length": "--max-length",
    **{part: f"the sha256 of {part} in --base" for part in PARTS},
}


class Facts(NamedTuple):
    """What is known of an image before its pixels are read."""

    width: int
    height: int
    caption: str
    bucket: int


def encode(
    data: list[str],
    base: Path,
    out: Path,
    *,
    size: int = 1024,
    max_aspect: float = 2.0,
    per_shard: int = 256,
    image_format: str = "png",
    dtype: torch.dtype = torch.bfloat16,
    max_length: int = 512,
    batch: int = 8,
    allow_bad: float = 1.0,
    threads: int = 8,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> dict | None:
    """Write the shards `out`/00000.tar, ...; returns what meta.json holds, or None where other processes are to finish.

    First all headers and captions are read, to give each image its bucket; then each shard, of one bucket and in a
    shuffled order that is always the same, is made by one process, `rank` of `world` under torch.distributed. Its
    content depends on the number of the processes in nothing, and on `batch` only by rounding. What cannot be read, has
    no caption, or would have to be enlarged more than twice along each side, is left out, also when it is mended later.

    Raises InputError if more than `allow_bad` percent are left out, or `out` belongs to another call, or one that is
    not at its end.
    """
    data = [one_name(place) for place in map(str, data)]
    writing.check_outside(out, data)
    form = read_base(base)
    if size % form["patch_size"]:
        raise InputError(f"--size {size} is not a multiple of {form['patch_size']}, what a latent token covers")
    sizes = buckets(size * size, form["patch_size"], max_aspect)
    passed = PassedOver()
    items = each_once(find_captioned(data, size, passed), passed)
    if rank == 0:
        passed.say()
    listing = writing.digest(json.dumps(str(item)).encode() for item in items)
    if {*writing.gathered(lambda: listing, world)} != {listing}:  # the facts of a share would be those of other images
        raise InputError("the processes do not find the same images in --data: give all of them the same folder")
    encoders = cache(lambda: load_encoders(base, dtype, device))
    if "shards" not in read_meta(out, ENCODED):
        encoders()  # if they cannot be loaded, say so before the headers of a million images are read
    facts = inspect_all(items, sizes, threads, rank, world)
    unfit = {number: fact for number, fact in enumerate(facts) if isinstance(fact, str)}
    settings = {
        "format": ENCODED.format,
        "data": data,
        "files": len(items),
        "listing": listing,
        "size": size,
        "max_aspect": max_aspect,
        "per_shard": per_shard,
        "images_as": image_format,
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": max_length,
        **{part: folder_digest(base / part) for part in PARTS},
        "rank": form["rank"],
        "patch_size": form["patch_size"],
        "prompt_shape": [max_length, form["prompt_width"]],
        "buckets": sizes,
        "unfit": unfit,
        "facts": facts_digest(facts, unfit),
    }
    with writing.Writer(out, ENCODED, len(items), allow_bad, rank, world) as shards:
        shards.begin(settings, SAME, beside=[EMPTY_PROMPT])
        facts = as_begun(shards, facts)
        cropped = [item for item, fact in zip(items, facts, strict=True) if mostly_lost(fact, sizes)]
        if cropped and rank == 0:
            what = f"{some(cropped, 'image')} more than half of which is cropped away"
            print(f"{what}: a larger --max-aspect keeps more of long images", file=sys.stderr)
        plan = writing.plan_shards([getattr(fact, "bucket", None) for fact in facts], per_shard)
        todo = shards.todo(plan, "encoding")
        if not (out / EMPTY_PROMPT).exists():
            files.write_tensors(out / EMPTY_PROMPT, {"prompt": encode_prompts(encoders(), [""], max_length)[0]})
        for number in todo:
            bucket, cut = facts[plan[number][0]].bucket, []
            pictures = in_order(partial(read, items, facts, sizes[bucket], image_format), plan[number], threads)
            samples = encoded(encoders(), shards.readable(pictures), facts, batch, max_length, cut)
            shards.write(number, samples, partial(index_of, bucket, cut))
        return shards.finish(len(plan), partial(summary, shards, len(cropped)))


def inspect_all(items: list, sizes: list, threads: int, rank: int, world: int) -> list[Facts | str]:
    """The `Facts` of each item, or what is wrong with it. Each process looks at its share."""

    def look(item: Photo | Drawing) -> Facts:
        (width, height), caption = item.size(), item.caption()
        bucket = nearest_bucket(sizes, width, height)
        if enlargement(sizes[bucket], width, height) > ENLARGED:
            goal = f"{sizes[bucket][1]} x {sizes[bucket][0]}"
            raise UnreadableError(f"{item} is too small: {width} x {height} pixels, for {goal}")
        return Facts(width, height, caption, bucket)

    share, found = items[rank::world], []
    with progress_bar(desc="looking", unit="image", total=len(share), silent=rank > 0) as bar:
        for result in in_order(look, share, threads):
            bar.update()
            found.append(str(result) if isinstance(result, UnreadableError) else result)
    shares = writing.gathered(lambda: found, world)
    return [shares[i % world][i // world] for i in range(len(items))]


def read(items: list, facts: list, size: tuple[int, int], image_format: str, number: int) -> tuple:
    """An image as it is encoded, and of its sample the number and the files, but for the tensors."""
    item, (width, height, caption, _) = items[number], facts[number]
    pixels, about = item.pixels(), {"caption": caption, "name": str(item), "width": width, "height": height}
    if pixels.size != (width, height):
        found = f"{pixels.width} x {pixels.height}"
        raise UnreadableError(f"{item} has {found} pixels, where its header says {width} x {height}")
    image = fill(pixels, size)
    text = json.dumps({**about, "bucket": size}).encode()
    return image, number, {image_format: writing.image_bytes(image, image_format), "json": text}


def encoded(
    pipeline, pictures: Iterator, facts: list, batch: int, max_length: int, cut: list[str]
) -> Iterator[writing.Sample]:
    """What was `read` as samples with their tensors. cut: gets a line for each caption that is too long."""
    while some := list(islice(pictures, batch)):
        images, numbers, contents = zip(*some, strict=True)
        for number, content in zip(numbers, contents, strict=True):
            if (tokens := prompt_tokens(pipeline, facts[number].caption)) > max_length:
                cut.append(f"{json.loads(content['json'])['name']}: {tokens} tokens, of which {max_length} are used")
        latents = encode_image(pipeline.vae, torch.stack([*map(to_tensor, images)])).float().cpu()
        prompts = encode_prompts(pipeline, [facts[number].caption for number in numbers], max_length).cpu()
        for number, content, latent, prompt in zip(numbers, contents, latents, prompts, strict=True):
            tensors = {"latent": latent.contiguous(), "prompt": prompt.contiguous()}
            yield number, {**content, "safetensors": safetensors.torch.save(tensors)}


def index_of(bucket: int, cut: list[str], numbers: list[int], spans: list[writing.Spans]) -> Index:
    """number (n,), span (n, 3, 2), offset and size of each file, bucket, and cut, a line for each caption too long."""
    span = np.array(spans, np.int64).reshape(-1, 3, 2)
    index = {"number": np.array(numbers, np.int64), "span": span, "bucket": np.array(bucket)}
    return index | {"cut": np.array(cut, np.str_)}


def mostly_lost(fact: Facts | str, sizes: list[tuple[int, int]]) -> bool:
    return isinstance(fact, Facts) and share_kept(sizes[fact.bucket], fact.width, fact.height) < LEAST_SHARE


def summary(shards: writing.Writer, cropped: int, indices: list[Index]) -> dict:
    counts, in_bucket = [len(index["number"]) for index in indices], [int(index["bucket"]) for index in indices]
    images = np.bincount(in_bucket, counts, len(shards.meta["buckets"])).astype(int).tolist()
    cut = sorted(line for index in indices for line in index.get("cut", np.array([], np.str_)).tolist())
    if cut:
        writing.write_text(shards.out / CUT, "".join(f"{line}\n" for line in cut))
    known = {"left_out": len(shards.problems), "cut_captions": len(cut), "mostly_cropped": cropped}
    return {"images": sum(counts), **known, "images_in_bucket": images}


def as_begun(shards: writing.Writer, facts: list[Facts | str]) -> list[Facts | str]:
    """What was left out when the folder was begun stays left out: else the shards would be others.

    InputError if anything else is not what it was.
    """
    out, unfit = shards.out, {int(number): problem for number, problem in shards.meta["unfit"].items()}
    for number, fact in enumerate(facts):
        if isinstance(fact, str) and number not in unfit:
            raise InputError(f"{fact}, but it could be used when {out} was begun: mend it, or choose another --out")
    if facts_digest(facts, unfit) != shards.meta["facts"]:
        raise InputError(
            f"sizes or captions of images in --data have changed since {out} was begun: choose another --out"
        )
    mended = sum(isinstance(facts[number], Facts) for number in unfit)
    if mended and shards.rank == 0:
        what = f"{mended} of the images that could not be used when {out} was begun can be used now"
        print(f"{what}, but stay left out: choose another --out to have them", file=sys.stderr)
    return [unfit.get(number, fact) for number, fact in enumerate(facts)]


def one_name(place: str) -> str:
    """The same for a place however it is spelled. A link to a file keeps its own name, whose end says what is in it."""
    path = Path(place)
    if place.startswith("shapes:"):
        return place
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def facts_digest(facts: list[Facts | str], unfit: Collection[int]) -> str:
    return writing.digest(json.dumps(fact).encode() for number, fact in enumerate(facts) if number not in unfit)
