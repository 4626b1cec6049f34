"""`asymflow subspace`: fit the subspace in which the noise is predicted, by PCA or Procrustes, or show one."""

import argparse
import io
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asymflow import files, opening
from asymflow.backbones.jit.published import load_published
from asymflow.cli.common import at_least, default_device, new_file, own_device, this_process
from asymflow.cli.models import MODEL, add_backbone, find_model, is_run, own_backbone
from asymflow.color import rgb_to_oklab
from asymflow.data.encoded import EncodedShards
from asymflow.entries import UnreadableError, choose, find_images, find_pairs
from asymflow.errors import InputError
from asymflow.fitting import energy_threshold, fit_pca, fit_procrustes
from asymflow.model import AsymFlow
from asymflow.passed_over import some
from asymflow.patches import CHANNEL_FIRST, CHANNEL_LAST, TOKEN_ORDERS, patchify
from asymflow.pictures import draw_subspace
from asymflow.pixels import in_order, read_pair, read_square
from asymflow.progress import progress_bar
from asymflow.subspace import Subspace

GROUP = """Fit the low-rank subspace in which an asymmetric flow predicts the noise, or look at one.

To train from scratch, the directions that hold most of the energy of the image patches:
  asymflow subspace pca --data imagenet/train --rank 8 --out imagenet-r8.safetensors

To turn a latent model into a pixel model, the directions and the scale that fit its latents best:
  asymflow subspace procrustes --shards shards --out flux2-r128.safetensors

What is in such a file:
  asymflow subspace show imagenet-r8.safetensors"""

PCA = """Fit a subspace to images by PCA of their patches, as for training from scratch: the eigenvectors of the
uncentred Gram matrix that hold most of the energy. Writes FILE.safetensors, and FILE.png to look at. Images are
cropped to squares as by ADM, DiT and JiT. On several GPUs: torchrun --nproc_per_node 8 -m asymflow subspace pca ..."""

PROCRUSTES = """Fit the subspace and the scale that lift the tokens of a latent model to pixels, by orthogonal
Procrustes: for turning a latent model into a pixel model. Writes FILE.safetensors, and FILE.png to look at. The rank is
that of the latents. Take at least 1,000 images. --shards: what `asymflow data encode` made. --data: latents from
elsewhere; each image, such as KEY.png, needs its latents beside it, KEY.latent.npy: a numpy array of the shape (h, w,
r) as the transformer sees them, for an image of h x w patches. Images are not cropped."""
ENOUGH = 1000  # images for Procrustes, as in arXiv 2605.12964; fewer give a warning

SHOW = """Print everything there is to know about a subspace: a file of this library, or a .pt file of the reference
implementation. With --out, draw it as well."""


def add_command(commands) -> None:
    group = commands.add_parser("subspace", description=GROUP)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)

    pca = actions.add_parser("pca", help="fit to images, to train from scratch", description=PCA)
    add_data(pca, "folders of images (with the folders and .tar files in them), .tar shards, or image files")
    pca.add_argument("--rank", type=rank_or_auto, default=8, help='number of directions, or "auto": as many as pay off')
    pca.add_argument("--image-size", type=at_least(1), default=256, metavar="N", help="side of the crops, in pixels")
    scale = (
        "standard deviation of the noise that --rank auto reckons with (default: 1; that of a JiT of 512 pixels is 2)"
    )
    pca.add_argument("--noise-scale", type=float, metavar="X", help=scale)
    add_options(pca, CHANNEL_LAST, "rgb", patch_size=16)
    pca.set_defaults(run=run_pca)

    procrustes = actions.add_parser("procrustes", help="fit to images and their latents", description=PROCRUSTES)
    source = procrustes.add_mutually_exclusive_group(required=True)
    add_data(procrustes, "folders (with .tar files in them) or .tar shards with images and their latents", source)
    source.add_argument("--shards", type=Path, metavar="FOLDER", help="made by `asymflow data encode`")
    rank = "that of the latents is the only one that fits; another number is refused"
    procrustes.add_argument("--rank", type=rank_or_auto, default="auto", metavar="N|auto", help=rank)
    add_options(procrustes, CHANNEL_FIRST, "oklab", patch_size=None)
    procrustes.set_defaults(run=run_procrustes)

    show = actions.add_parser("show", help="print what is in a file, and draw it", description=SHOW)
    show.add_argument(
        "file", type=Path, metavar="FILE", help=f"a .safetensors file, .pt of the reference, or a model: {MODEL}"
    )
    show.add_argument("--out", type=Path, metavar="PNG", help="also draw the directions and their energy to this file")
    add_backbone(show)
    show.set_defaults(run=run_show)


def add_data(parser: argparse.ArgumentParser, what: str, group=None) -> None:
    """Add --data and --out. group: of options of which one is required, to which --data is added."""
    required = {} if group else {"required": True}
    (group or parser).add_argument(
        "--data", type=Path, nargs="+", action="extend", metavar="PATH", help=what, **required
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")


def add_options(parser: argparse.ArgumentParser, token_order: str, color: str, patch_size: int | None) -> None:
    option = parser.add_argument
    default = "" if patch_size else "; the default is that of --shards, or 16"
    side = f"side of a patch, one token, in pixels{default}"
    order = "order of the numbers in a token: channel_last as in DiT and JiT, channel_first as in FLUX"
    option("--patch-size", type=at_least(1), default=patch_size, metavar="N", help=side)
    option("--images", type=at_least(1), default=10_000, metavar="N", help="how many to fit to, chosen at random")
    option("--token-order", choices=TOKEN_ORDERS, default=token_order, help=order)
    space = "colour space in which the model is to work: train_ddp.py trains from scratch in rgb, finetunes in oklab"
    option("--color", choices=("rgb", "oklab"), default=color, help=space)
    option("--seed", type=at_least(0), default=0, metavar="N", help="another number chooses other images")
    option("--batch", type=at_least(1), default=64, metavar="N", help="images in memory at a time")
    option("--device", default=default_device(), help="where to compute, such as cpu, cuda or cuda:1")


def rank_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'it must be a whole number or "auto", but it is {text!r}')
    return text if text == "auto" else int(text)


# ---- Fitting ---------------------------------------------------------------------------------------------------------


def run_pca(args: argparse.Namespace) -> None:
    dim = 3 * args.patch_size**2
    if args.image_size % args.patch_size:
        raise InputError(f"--image-size {args.image_size} is not a multiple of --patch-size {args.patch_size}")
    if args.rank != "auto" and args.rank > dim:
        raise InputError(
            f"--rank {args.rank} is more than the {dim} dimensions of a token (3 channels x {args.patch_size} x "
            f"{args.patch_size} pixels)"
        )
    if args.noise_scale is not None and args.rank != "auto":
        raise InputError(f"--noise-scale is for --rank auto, but --rank is {args.rank}: leave out one of the two")
    noise_scale = 1.0 if args.noise_scale is None else args.noise_scale
    threshold = energy_threshold(noise_scale)
    enlarged = []

    def read(entry) -> tuple[Tensor]:
        return (read_square(entry, args.image_size, enlarged),)

    def solve(batches: Iterable[tuple[Tensor]], **record) -> Subspace:
        return fit_pca((pixels for (pixels,) in batches), args.rank, noise_scale=noise_scale, **record)

    def reason(subspace: Subspace) -> dict[str, str]:
        if args.rank != "auto":
            return {}
        more = f"{threshold:.2f}, where the noise has {noise_scale**2:g}"
        return {"rank auto": f"{subspace.rank}, for so many directions have more energy than {more} (see auto_rank)"}

    fit(args, find_images, read, solve, lambda subspace, tally: reason(subspace), enlarged)


def run_procrustes(args: argparse.Namespace) -> None:
    shards = EncodedShards(args.shards) if args.shards else None
    args.patch_size = args.patch_size or (shards.meta["patch_size"] if shards else 16)
    known = {}

    def read(pair) -> tuple[Tensor, Tensor]:
        latents, image = read_pair(pair, args.patch_size)
        rank = latents.shape[-1]
        if args.rank not in ("auto", rank):
            raise InputError(f"--rank {args.rank} does not fit: the latent tokens of {pair[1]} have {rank} dimensions")
        if rank != known.setdefault("rank", rank):
            raise InputError(f"{pair[1]} has latent tokens of dimension {rank}, but in others it is {known['rank']}")
        return latents, image

    def error(subspace: Subspace, tally: dict) -> dict[str, str]:
        """The error of the lifted latents s A z; s is such that they have the energy of the pixels in the subspace."""
        common = subspace.scale * (subspace.basis.double().mT * tally["cross"]).sum() / tally["tokens"]
        inside, total = subspace.spectrum[: subspace.rank].sum(), subspace.spectrum.sum()
        left = ((inside + total - 2 * common) / total).item()
        facts = {"error": f"{100 * left:.2f} % = |s A z - x|^2 / |x|^2"}
        if tally["images"] < ENOUGH:
            facts["warning"] = f"only {tally['images']} image{'s' * (tally['images'] != 1)}: take at least {ENOUGH:,}"
        return facts

    if shards is None:
        fit(args, find_pairs, read, fit_procrustes, error)
        return
    for option, given in (("patch_size", args.patch_size), ("rank", args.rank)):
        fits = shards.meta[option]
        if given not in ("auto", fits):
            raise InputError(f"--{option.replace('_', '-')} {given} does not fit: it is {fits} in {args.shards}")

    def read_encoded(number: int) -> tuple[Tensor, Tensor]:
        image, latent = shards.pair(number)
        pixels = image.numpy().astype(np.float32) / 127.5 - 1  # in numpy, see `to_tensor`
        return latent.permute(1, 2, 0), torch.from_numpy(pixels)

    args.data = [args.shards]
    fit(args, lambda _: range(len(shards)), read_encoded, fit_procrustes, error)


def fit(
    args: argparse.Namespace, find: Callable, read: Callable, solve: Callable, reason: Callable, enlarged: list = ()
) -> None:
    """Find, choose and read the samples; solve; then, in the first process, write the two files and print a summary.

    read: returns a sample as a tuple of tensors, of which the last is the image (3, H, W). solve: gets batches of such
    tuples, as tokens (n, ...), and returns the subspace. reason: returns more facts to print; it gets the subspace and
    the tally of what was read, in which "cross" is sum z^T x if samples are pairs. enlarged: filled by `read`.
    """
    start = time.perf_counter()
    out, picture = new_outputs(args.out)
    with processes(args.device) as (index, count, device):
        with redirect_stderr(io.StringIO()) if index else nullcontext():  # one process says what is passed over
            found = find(args.data)
        chosen = choose(found, args.images, args.seed)
        share, tally = chosen[index::count], {"images": 0, "tokens": 0, "sizes": set(), "unreadable": [], "cross": 0}
        tally["enlarged"] = enlarged

        def tokens() -> Iterator[tuple[Tensor, ...]]:
            with progress_bar(desc="reading", unit="image", total=len(share), silent=index > 0) as bar:
                results = only_readable(in_order(read, share, min(8, os.cpu_count() or 1)), len(share), tally, bar)
                while batch := [to_tokens(sample, args, device) for sample in itertools.islice(results, args.batch)]:
                    parts = tuple(torch.cat(part) for part in zip(*batch, strict=True))
                    if len(parts) == 2:  # float32 is enough here: the result is only printed
                        tally["cross"] = tally["cross"] + (parts[0].mT @ parts[1]).cpu().double()
                    tally["tokens"] += len(parts[0])
                    yield parts

        record = dict(patch_size=args.patch_size, token_order=args.token_order, color_space=args.color)
        subspace = solve(tokens(), **record)
        tally = added_up(tally, count)
    if index > 0:
        return
    subspace.fitted_on = f"{described(tally, found, args)}, seed {args.seed}"
    new_outputs(args.out)  # once more, because somebody may have made these files meanwhile
    with files.replacing(picture) as beside:  # renamed last, so that there is no picture without a subspace
        draw_subspace(subspace, beside)
        subspace.save(out)
    if bad := tally["unreadable"]:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        were = "image could not be read and was" if len(bad) == 1 else "images could not be read and were"
        print(f"{len(bad)} {were} left out: {'; '.join(bad[:5])}{more}", file=sys.stderr)
    if small := sorted(tally["enlarged"]):
        print(f"smaller than --image-size {args.image_size}, and enlarged: {some(small, 'image')}", file=sys.stderr)
    seconds = f"{time.perf_counter() - start:.1f}"
    print_facts(subspace, {**reason(subspace, tally), "tokens": f"{tally['tokens']:,}", "seconds": seconds})
    print(f"wrote {out} and {picture}; to see this again: asymflow subspace show {shlex.quote(str(out))}")


def only_readable(results: Iterable, total: int, tally: dict, bar) -> Iterator[tuple[Tensor, ...]]:
    """Yield the samples that could be read, and note the others in `tally`. InputError if those are more than 1 %."""
    bad = tally["unreadable"]
    for result in results:
        bar.update()
        if isinstance(result, UnreadableError):
            bad.append(str(result))
            if 100 * len(bad) > total:
                raise InputError(f"more than 1 % of the {total} images cannot be read, the first: {bad[0]}")
            continue
        tally["images"] += 1
        tally["sizes"].add(tuple(result[-1].shape[:0:-1]))
        yield result


def to_tokens(sample: tuple[Tensor, ...], args: argparse.Namespace, device: torch.device) -> tuple[Tensor, ...]:
    """(latents (h, w, r), image) or (image,) to (latent tokens (n, r), pixel tokens (n, D)) or (pixel tokens,)."""
    *latents, image = (part.to(device) for part in sample)
    image = rgb_to_oklab(image) if args.color == "oklab" else image
    return *(z.flatten(0, 1) for z in latents), patchify(image[None], args.patch_size, args.token_order)[0]


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """A context with (index of this process, number of processes, its device). Several of them form a process group."""
    _, count = this_process()
    usable = own_device(device)
    if count == 1:
        yield 0, 1, usable
        return
    if usable.type == "cuda":
        torch.cuda.set_device(usable)
    try:
        dist.init_process_group("nccl" if usable.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"WORLD_SIZE is {count}, but the processes cannot join: {reason}. Use torchrun") from None
    try:
        yield dist.get_rank(), count, usable
    finally:
        time.sleep(0.1)  # else torch 2.6 may hang: gloo's threads need the GIL to release the last tensors
        dist.destroy_process_group()


def added_up(tally: dict, count: int) -> dict:
    """The sum of the tallies of all processes."""
    if count == 1:
        return tally
    tallies = [None] * count
    dist.all_gather_object(tallies, tally)
    first, *others = tallies
    for other in others:
        first = {name: value | other[name] if name == "sizes" else value + other[name] for name, value in first.items()}
    return first


def described(tally: dict, found: list, args: argparse.Namespace) -> str:
    """A sentence about the images that the subspace was fitted on."""
    names = [Path(os.path.abspath(path)).name for path in args.data]  # noqa: PTH100 (a link keeps its own name)
    source = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    sizes = tally["sizes"]
    size = "{} x {} pixels".format(*next(iter(sizes))) if len(sizes) == 1 else f"{len(sizes)} sizes"
    return f"{tally['images']} of {len(found)} images of {source}, {size}"


def new_outputs(out: Path) -> tuple[Path, Path]:
    """Check that FILE.safetensors and FILE.png do not exist and can be written. Returns them; makes nothing."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end with .safetensors (the picture beside it will end with .png)")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"--out {out} cannot be written: {folder} is not a folder that takes files")
    return new_file(out), new_file(out.with_suffix(".png"))


# ---- Showing ---------------------------------------------------------------------------------------------------------


def run_show(args: argparse.Namespace) -> None:
    if args.out is not None:
        if args.out.suffix.lower() != ".png":
            raise InputError(f"--out {args.out} must end in .png")
        new_file(args.out)
    subspace = load(args.file, args.backbone)
    if args.out is not None:
        draw_subspace(subspace, args.out)
    gram = subspace.basis.double().mT @ subspace.basis.double()
    error = (gram - torch.eye(subspace.rank)).abs().max().item() if subspace.rank else 0.0
    print_facts(subspace, {"orthonormal": f"to {error:.1e} (largest entry of |A^T A - 1|)"})
    if args.out is not None:
        print(f"wrote {args.out}")


def load(path: Path, backbone: str | None) -> Subspace:
    """The subspace in a run, in a model (folder or published file), or in a file of this library or the reference.

    backbone: the option --backbone.
    """
    run = is_run(path)
    path = path if run else find_model(path, None, None)
    if path.is_dir() and not run:
        return AsymFlow.from_pretrained(path, backbone=own_backbone(backbone)).subspace
    if backbone:
        raise InputError(f"--backbone is for the folder of a model, but {path} is none: leave it out")
    if run:
        return Subspace.load(path / "subspace.safetensors")
    if path.suffix == ".safetensors" and "basis" in opening.read_tensors(path)[0]:
        return Subspace.load(path)
    published = load_published(path)
    return published if isinstance(published, Subspace) else published.subspace


def print_facts(subspace: Subspace, more: dict[str, str]) -> None:
    unknown = "not recorded"
    facts = {
        "rank": f"{subspace.rank} of {subspace.dim} dimensions",
        "patch size": subspace.patch_size or unknown,
        "token order": subspace.token_order or unknown,
        "colour": subspace.color_space or unknown,
        "fitted on": subspace.fitted_on or unknown,
        "scale": f"{subspace.scale:.6g}",
        "energy": shares(subspace),
        **more,
    }
    for name, value in facts.items():
        print(f"{name:12} {value}")


def shares(subspace: Subspace) -> str:
    """The shares of the energy in the first 1, 8, 32 and 128 directions, and in those of the subspace, as text."""
    if subspace.spectrum is None:
        return "not recorded"
    energy = subspace.spectrum.double()
    ranks = sorted({r for r in (1, 8, 32, 128, subspace.rank) if r <= len(energy)})
    together = [f"{r}: {100 * (energy[:r].sum() / energy.sum()).item():.1f} %" for r in ranks]
    return f"{', '.join(together)} (in so many directions)"
