"""Images and captions become what a FLUX.2 is trained on, latents and prompt embeddings, in shards of one size each.

A shard has, for each sample, KEY.png (or webp), KEY.json (caption, name, original size, bucket) and KEY.safetensors:
`latent` (r, h, w) in float32 and `prompt` (L, C) in the dtype of the text encoder. `EncodedShards` reads them.

What is stored is what the stock pipeline feeds to its transformer. For a FLUX.2 klein 9B, the embedding of a caption is
512 x 12288 numbers in bfloat16, 12.6 MB, and a million captions are 12.6 TB. The positions after the end of a caption
cannot be left out or stored once: the transformer attends to all of them, without a mask, and since the text encoder
lets each look back at the caption, no two captions have the same there. So the only lever is `max_length`, which trains
the model on shorter ones. The latents, in float32 so that none of them is rounded again before Procrustes sums up
their products, are small beside: 2 MB at 1024 x 1024 pixels.
"""

import hashlib
import io
import itertools
import json
import sys
import tarfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from asymflow import files
from asymflow.data import pack
from asymflow.data.buckets import ENLARGED, buckets, enlargement, fill, nearest_bucket
from asymflow.data.captioned import Drawing, Photo, find_captioned
from asymflow.data.encoded import COLUMNS, EMPTY_PROMPT, FORMAT, shard_path
from asymflow.data.shards import META, fingerprint, load_index, read_meta, save_index
from asymflow.errors import InputError
from asymflow.pixels import UnreadableError, in_order, to_tensor

FORMATS = ("png", "webp")  # without loss: the image is to be what the latent was made of
PARTS = ("vae", "text_encoder", "tokenizer")
Result = TypeVar("Result")
LOCK = ".lock"  # with the number of the process that holds it: it is at work
AT_WORK = "is being encoded to"
OPTIONS = {  # what must stay the same when the command goes on, and what a user knows it as
    "data": "--data",
    "size": "--size",
    "max_aspect": "--max-aspect",
    "per_shard": "--per-shard",
    "images_as": "--format",
    "dtype": "--dtype",
    "max_length": "--max-length",
    **{part: f"the sha256 of {part} in --base" for part in PARTS},
}


# ---- What the transformer sees ---------------------------------------------------------------------------------------
@torch.no_grad()
def encode_image(vae: torch.nn.Module, images: Tensor) -> Tensor:
    """Latents (B, r, h, w) as the transformer of FLUX.2 sees them, in the dtype of the VAE.

    vae: an `AutoencoderKLFlux2` of r / 4 channels. images: (B, 3, H, W) in [-1, 1], H and W multiples of what a latent
    token covers. The mode of the posterior, squares of 2 x 2 moved into the channels, normalized by the running
    statistics of its batch norm: the operations of the stock pipelines, in their order, so the same bits.
    """
    mode = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, std = statistics(vae)
    return (F.pixel_unshuffle(mode, 2) - mean) / std


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `encode_image`: latents (B, r, h, w) to images (B, 3, H, W) in [-1, 1], clamped, float32."""
    mean, std = statistics(vae)
    mode = F.pixel_shuffle(latents.to(vae.device, vae.dtype) * std + mean, 2)
    return vae.decode(mode, return_dict=False)[0].float().clamp(-1, 1)


def statistics(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels of latents, (r, 1, 1)."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean[:, None, None].to(vae.dtype), variance.sqrt()[:, None, None].to(vae.dtype)


@torch.no_grad()
def encode_prompts(pipeline, captions: list[str], max_length: int) -> Tensor:
    """Embeddings (B, L, C) by the stock `Flux2KleinPipeline`, L = max_length, in the dtype of its text encoder.

    A caption that is too long is cut off there.
    """
    device = pipeline.text_encoder.device
    return pipeline.encode_prompt(captions, device=device, max_sequence_length=max_length)[0]


def load_encoders(base: Path, dtype: torch.dtype, device: torch.device | str):
    """A `Flux2KleinPipeline` of the folder `base` without its transformer, and its text encoder without the head.

    The head would compute the logits of 150,000 words for every position, and nobody reads them. InputError if
    something is not there, or cannot be loaded. Not one weight is random, as the libraries make those that they miss.
    """
    try:
        import diffusers
        import transformers
    except ImportError as e:
        raise InputError(f'encoding needs diffusers and transformers ({e}): pip install -e ".[flux2]"') from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # what they would only tell is an error here, or does not matter
    options = dict(torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    try:
        with warnings.catch_warnings():  # of the newest diffusers: older ones do not know torch_dtype by another name
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = diffusers.Flux2KleinPipeline.from_pretrained(
                base,
                transformer=None,
                vae=load_whole(diffusers.AutoencoderKLFlux2, base / "vae", options),
                text_encoder=load_whole(transformers.Qwen3Model, base / "text_encoder", options),
                **options,
            )
    except Exception as e:  # the libraries report what is missing or damaged by exceptions of many types
        raise InputError(f"--base {base} cannot be loaded: {first_line(e)}") from None
    return pipeline.to(device)


def load_whole(kind: type, folder: Path, options: dict) -> torch.nn.Module:
    """A model of diffusers or transformers, in eval mode. InputError if weights are missing, or of another shape."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if misfits := sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]):
        more = f" and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise InputError(f"{folder.name} lacks weights, or has them in another shape: {', '.join(misfits[:5])}{more}")
    return model.eval()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_base(base: Path) -> dict:
    """What is known of a base without loading it: rank r, patch_size, width C of its prompts."""
    try:
        json.loads((base / "model_index.json").read_text("utf-8"))
        vae, text = (json.loads((base / part / "config.json").read_text("utf-8")) for part in ("vae", "text_encoder"))
        kinds = vae["_class_name"], text["model_type"]
        if kinds == ("AutoencoderKLFlux2", "qwen3"):
            halvings = len(vae["block_out_channels"]) - 1
            return {
                "rank": 4 * vae["latent_channels"],
                "patch_size": 2 * 2**halvings,
                "prompt_width": 3 * text["hidden_size"],
            }
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--base {base} is not a folder of FLUX.2 klein in the layout of diffusers, with model_index.json, vae, "
            "text_encoder and tokenizer: give the folder that was downloaded from the Hub"
        ) from None
    raise InputError(f"--base {base} is no FLUX.2 klein: its vae is {kinds[0]}, its text_encoder {kinds[1]}")


def base_fingerprint(base: Path) -> dict[str, str]:
    """{vae, text_encoder, tokenizer: sha256 of the names and contents of the files in that folder}."""
    return {part: folder_digest(base / part) for part in PARTS}


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the files in a folder."""
    paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    return hashlib.sha256("".join(f"{path.name} {files.sha256(path)}\n" for path in paths).encode()).hexdigest()


# ---- From images to shards -------------------------------------------------------------------------------------------
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
    shuffled order that is always the same, is made by one process. Its content depends on the number of the processes
    in nothing, and on `batch` only by rounding. It is there when it is whole, and is not made again. What cannot be
    read, has no caption, or would have to be enlarged more than twice along each side, is left out, also when it is
    mended later, and listed in problems.log. rank, world: of this process among those that share the work, under
    torch.distributed.

    Raises InputError if more than `allow_bad` percent are left out, or `out` belongs to another call, or one that is
    not at its end.
    """
    data = [one_name(place) for place in map(str, data)]
    check_outside(out, data)
    form = read_base(base)
    if size % form["patch_size"]:
        raise InputError(f"--size {size} is not a multiple of {form['patch_size']}, what a latent token covers")
    sizes = buckets(size * size, form["patch_size"], max_aspect)
    items = find_captioned(data, size)
    listing = digest(map(str, items))
    if len(set(gathered(listing, world))) > 1:  # what one finds out about its share would be taken for other images
        raise InputError("the processes do not find the same images in --data: give all of them the same folder")
    encoders = cache(lambda: load_encoders(base, dtype, device))
    if "shards" not in read_meta(out, FORMAT):
        encoders()  # if they cannot be loaded, say so before the headers of a million images are read
    facts = inspect_all(items, sizes, threads, rank, world)
    locks = ExitStack()

    def start() -> dict[int, str]:
        pack.refuse_foreign(out, FORMAT, "data encode")
        locks.enter_context(hold_all(out))
        if not any(out.glob("[0-9]*.tar")):  # nothing was made, so the settings may change
            clear(out)
        unfit = {number: fact for number, fact in enumerate(facts) if isinstance(fact, str)}
        settings = {
            "format": FORMAT,
            "data": data,
            "files": len(items),
            "listing": listing,
            "size": size,
            "max_aspect": max_aspect,
            "per_shard": per_shard,
            "images_as": image_format,
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": max_length,
            **base_fingerprint(base),
            "rank": form["rank"],
            "patch_size": form["patch_size"],
            "prompt_shape": [max_length, form["prompt_width"]],
            "buckets": sizes,
            "unfit": unfit,
            "facts": facts_digest(facts, unfit),
        }
        pack.begin(out, settings, OPTIONS, "data encode")
        unfit = unfit_before(out, facts)
        write_problems(out, unfit.values())
        check_problems([*unfit.values()], len(items), allow_bad, out)
        return unfit

    with locks:
        unfit = in_first_process(start, rank, world)
        if rank > 0:
            locks.enter_context(files.hold(out / f"{LOCK}{rank}", AT_WORK))
        facts = [unfit.get(number, fact) for number, fact in enumerate(facts)]
        plan = plan_shards(facts, len(sizes), per_shard)
        indices = [load_index(shard_path(out, number), COLUMNS) for number in range(len(plan))]
        read_before = (index["problems"].tolist() for index in indices if index is not None)
        problems = [*unfit.values(), *itertools.chain.from_iterable(read_before)]
        todo = [number for number in range(rank, len(plan), world) if indices[number] is None]
        if not (out / EMPTY_PROMPT).exists():
            files.write_tensors(out / EMPTY_PROMPT, {"prompt": encode_prompts(encoders(), [""], max_length)[0]})
        try:
            total = sum(len(plan[number][1]) for number in todo)
            with tqdm(total=total, desc="encoding", unit="image", leave=False, disable=rank > 0) as bar:
                for number in todo:
                    bucket, members = plan[number]

                    def read(member: int, bucket: int = bucket) -> Sample:
                        return read_sample(member, items[member], facts[member], sizes[bucket], image_format)

                    results = readable(in_order(read, members, threads), problems, bar, len(items), allow_bad, out)
                    samples = encoded(encoders(), results, batch, max_length)
                    write_shard(shard_path(out, number), samples, bucket, image_format, problems)
        finally:
            write_problems(out, problems)
        return finish(out, len(plan), [*unfit.values()], allow_bad)


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
    with tqdm(total=len(share), desc="looking", unit="image", leave=False, disable=rank > 0) as bar:
        for result in in_order(look, share, threads):
            bar.update()
            found.append(str(result) if isinstance(result, UnreadableError) else result)
    shares = gathered(found, world)
    return [shares[i % world][i // world] for i in range(len(items))]


def plan_shards(facts: list[Facts | str], count: int, per_shard: int) -> list[tuple[int, list[int]]]:
    """(bucket, the numbers of its images) of every shard: bucket after bucket, the images of each shuffled."""
    members = [[] for _ in range(count)]
    for number in pack.shuffled(len(facts)):
        if isinstance(facts[number], Facts):
            members[facts[number].bucket].append(number)
    return [
        (bucket, numbers[first : first + per_shard])
        for bucket, numbers in enumerate(members)
        for first in range(0, len(numbers), per_shard)
    ]


class Sample(NamedTuple):
    """What is written of an image, the tensors only later. files: by their kind."""

    key: str
    image: Image.Image
    caption: str
    files: dict[str, bytes]


def read_sample(number: int, item: Photo | Drawing, facts: Facts, bucket: tuple[int, int], image_format: str) -> Sample:
    image, content = fill(item.pixels(), bucket), io.BytesIO()
    image.save(content, **{"format": image_format, **pack.FORMATS[image_format]})
    record = {"caption": facts.caption, "name": str(item), "width": facts.width, "height": facts.height}
    text = json.dumps({**record, "bucket": bucket}).encode()
    return Sample(f"{number:08d}", image, facts.caption, {image_format: content.getvalue(), "json": text})


def readable(
    results: Iterable[Sample | UnreadableError], problems: list[str], bar: tqdm, count: int, allow_bad: float, out: Path
) -> Iterator[Sample]:
    """Those that could be read. What is wrong with the others is added to `problems`; InputError if they get many."""
    for result in results:
        bar.update()
        if isinstance(result, UnreadableError):
            problems.append(str(result))
            check_problems(problems, count, allow_bad, out)
        else:
            yield result


def encoded(pipeline, samples: Iterator[Sample], batch: int, max_length: int) -> Iterator[Sample]:
    """The samples, which have one size, with their tensors."""
    while some := list(itertools.islice(samples, batch)):
        latents = encode_image(pipeline.vae, torch.stack([to_tensor(sample.image) for sample in some])).float().cpu()
        prompts = encode_prompts(pipeline, [sample.caption for sample in some], max_length).cpu()
        for sample, latent, prompt in zip(some, latents, prompts, strict=True):
            content = safetensors.torch.save({"latent": latent.contiguous(), "prompt": prompt.contiguous()})
            yield sample._replace(files={**sample.files, "safetensors": content})


def write_shard(shard: Path, samples: Iterator[Sample], bucket: int, image_format: str, problems: list[str]) -> None:
    """Write a shard and its index: number (n,), span (n, 3, 2), offset and size of each file, bucket, problems."""
    numbers, spans, before = [], [], len(problems)
    with files.replacing(shard) as beside:
        with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                numbers.append(int(sample.key))
                spans.append([pack.add(tar, f"{sample.key}.{kind}", part) for kind, part in sample.files.items()])
        index = {
            "number": np.array(numbers, np.int64),
            "span": np.array(spans, np.int64).reshape(-1, 3, 2),
            "bucket": np.array(bucket),
            "problems": np.array(problems[before:], np.str_),
        }
        save_index(shard, index, fingerprint(beside))


def finish(out: Path, count: int, unfit: list[str], allow_bad: float) -> dict | None:
    """If all shards are there, write the meta.json that says so. The last process finds them all, whichever it is."""
    indices = [load_index(shard_path(out, number), COLUMNS) for number in range(count)]
    if any(index is None for index in indices):
        return None
    problems = unfit + [problem for index in indices for problem in index["problems"].tolist()]
    write_problems(out, problems)
    meta = read_meta(out, FORMAT)
    check_problems(problems, meta["files"], allow_bad, out)  # others may have had some as well
    counts, in_bucket = [len(index["number"]) for index in indices], [int(index["bucket"]) for index in indices]
    images = np.bincount(in_bucket, counts, len(meta["buckets"])).astype(int).tolist()
    meta |= {"shards": count, "images": sum(counts), "left_out": len(problems), "images_in_bucket": images}
    pack.write_text(out / META, json.dumps(meta, indent=2) + "\n")
    return meta


def check_problems(problems: list[str], count: int, allow_bad: float, out: Path) -> None:
    if 100 * len(problems) > allow_bad * count or len(problems) == count:
        raise InputError(
            f"{len(problems)} of {count} images would be left out, and --allow-bad is {allow_bad:g} % (they are in "
            f"{out / pack.PROBLEMS}), the first: {problems[0]}"
        )


def write_problems(out: Path, problems: Collection[str]) -> None:
    if problems:
        pack.write_text(out / pack.PROBLEMS, "".join(f"{problem}\n" for problem in sorted(problems)))
    else:
        (out / pack.PROBLEMS).unlink(missing_ok=True)


def check_outside(out: Path, data: list[str]) -> None:
    for place in data:
        if Path(place).is_dir() and Path(place).resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"--out {out} is inside of --data {place}, where the shards would be taken for data")


def one_name(place: str) -> str:
    """The same for a place however it is spelled. A link to a file keeps its own name, whose end says what is in it."""
    path = Path(place)
    if place.startswith("shapes:"):
        return place
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def digest(parts: Iterable[str | tuple]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()


def facts_digest(facts: list[Facts | str], unfit: Collection[int]) -> str:
    return digest(fact for number, fact in enumerate(facts) if number not in unfit)


# ---- Again -----------------------------------------------------------------------------------------------------------
def clear(out: Path) -> None:
    """Remove what a call left that made no shard. Its meta.json last, which says that all of this is ours."""
    left = [*out.glob(".[0-9]*"), *out.glob("[0-9]*.index.npz"), out / pack.PROBLEMS, out / EMPTY_PROMPT]
    for path in (*left, out / META):
        path.unlink(missing_ok=True)


def unfit_before(out: Path, facts: list[Facts | str]) -> dict[int, str]:
    """What was left out when `out` was begun, by number, and so stays left out: else the shards would be others.

    InputError if anything else is not what it was.
    """
    meta = read_meta(out, FORMAT)
    unfit = {int(number): problem for number, problem in meta["unfit"].items()}
    for number, fact in enumerate(facts):
        if isinstance(fact, str) and number not in unfit:
            raise InputError(f"{fact}, but it could be used when {out} was begun: mend it, or choose another --out")
    if facts_digest(facts, unfit) != meta["facts"]:
        raise InputError(
            f"sizes or captions of images in --data have changed since {out} was begun: choose another --out"
        )
    if mended := sum(isinstance(facts[number], Facts) for number in unfit):
        what = f"{mended} of the images that could not be used when {out} was begun can be used now"
        print(f"{what}, but stay left out: choose another --out to have them", file=sys.stderr)
    return unfit


def hold_all(out: Path) -> TextIO:
    """The lock of the first process, if no process of another call is at work in `out`. Raises InputError."""
    own = out / f"{LOCK}0"
    out.mkdir(parents=True, exist_ok=True)
    locks = {path: files.hold(path, AT_WORK) for path in {own, *out.glob(f"{LOCK}*")}}
    for path, lock in locks.items():
        if path != own:
            lock.close()
    return locks[own]


# ---- Several processes -----------------------------------------------------------------------------------------------
def gathered(value: object, world: int) -> list:
    """The values of all processes, in each of them."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def in_first_process(work: Callable[[], Result], rank: int, world: int) -> Result:
    """Do it in the first process, while the others wait. All return what it returned, or raise its InputError."""
    result, fault = None, None
    if rank == 0:
        try:
            result = work()
        except InputError as e:
            fault = e
    result, fault = gathered((result, fault), world)[0]
    if fault:
        raise fault
    return result
