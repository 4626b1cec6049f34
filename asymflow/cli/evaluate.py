"""`asymflow evaluate`: hold samples against images, by a protocol that can be repeated."""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from asymflow import files, packages
from asymflow.cli import evaluate_report, evaluate_search
from asymflow.cli.common import at_least, begun_folder, default_device, interval, new_file, own_device, this_process
from asymflow.cli.models import MODEL, Choice, add_choice, find_model, identity, load_model, refuse_choice
from asymflow.errors import InputError
from asymflow.extensions import find, is_own
from asymflow.pictures import GRID_WIDTH, image_grid
from asymflow.precision import Precision, usual_precision
from asymflow.sampling import METHODS, guided, sigma_grid
from asymflow.text import count

ABOUT = """Score the images of a model, of a folder, or of an .npz batch of samples, by a protocol: FID, KID, Inception
Score, precision and recall, each with its uncertainty. OUT/result.json says how every number was made."""
EXAMPLES = """\
examples:
  asymflow evaluate --model runs/shapes --out evals/shapes                  a look: 2,048 images against the training's
  asymflow evaluate --model runs/h16 --ema 0.9999 --protocol adm --guidance 2.7 --interval 0,0.82 --out evals/h16
  torchrun --nproc-per-node 8 -m -- asymflow evaluate --model runs/h16 --protocol adm --out evals/h16
  asymflow evaluate --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol adm --out evals/theirs
  asymflow evaluate --images photos --reference more_photos --crop 256 --out evals/photos
  asymflow evaluate --images drawn --reference photos --crop 1024 --protocol captions --clip clip-vit-large-patch14 \\
      --out evals/drawn
  asymflow evaluate report evals/*/result.json                              one table of several results

Image i has the noise of its number, whatever the batch and the number of processes. Stopped, even by kill -9, the same
command goes on. Features stay in OUT, 12 KB for each image; the images do not, but for --save-npz. What a protocol is:
the files in asymflow/evaluation/protocols; --protocol also takes a file of your own."""
ACTIONS = "instead: a table of several results, or the best guidance, interval and average; each has its own --help"
RESULT, GRID = "result.json", "grid.png"
FEATURES, REFERENCE = "features", "reference"
# Of a protocol: what features do not depend on, or what a checksum tells.
ELSEWHERE = {"name", "about", "weights", "reference", "measures", "clip"}
GUIDANCE = {"guidance": 2.3, "interval": (0.0, 0.88), "orthogonal": 0.0}
DRAWING = ("num", "first", "seed", "steps", "method", "precision")
SAMPLER = ("seed", "steps", "method", "shift", "precision")  # settings of asymflow sample that a protocol has
SHOWN = ("step", "average", *GUIDANCE)  # and those that tables show
CHANGES = (*DRAWING, "extractor", "weights", "reference", "crop", "clip")


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("evaluate", description=ABOUT, epilog=EXAMPLES)
    actions = p.add_subparsers(dest="action", metavar="[report | search]", help=ACTIONS)
    evaluate_report.add_command(actions)
    evaluate_search.add_command(actions)
    p.add_argument("--model", type=Path, help=f"what draws the images: {MODEL}")
    add_choice(p)
    p.add_argument(
        "--images", type=Path, metavar="PATH", help="instead: a folder or .tar of images, or .npz with arr_0"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for result.json, a grid and the features (needed)")
    p.add_argument(
        "--protocol",
        default="quick",
        metavar="NAME",
        help="adm, jit, edm2-dino, captions, shapes, quick, or a file",
    )
    p.add_argument("--guidance", type=float, help="its scale; 1 is none (default: 2.3)")
    p.add_argument("--interval", type=interval, help="noise levels where guidance acts (default: 0,0.88)")
    p.add_argument("--orthogonal", type=float, help="0 to 1: take away guidance that only adds contrast (default: 0)")
    p.add_argument("--batch", type=at_least(1), default=64, metavar="N", help="images at a time")
    p.add_argument("--save-npz", type=Path, metavar="FILE", help="also write the images, as ADM's evaluator reads them")
    p.add_argument("--device", default=default_device(), help="such as cpu, cuda or cuda:1")

    changes = p.add_argument_group("changes of the protocol, which its name in the result tells")
    changes.add_argument("--reference", metavar="WHAT", help="images, .npz, data, shapes, adm-imagenet or jit-imagenet")
    changes.add_argument("--extractor", help="inception-v3-compat, vgg16, dinov2, classifier or oracle")
    changes.add_argument("--weights", metavar="PATH", help="of the extractor")
    changes.add_argument("--clip", metavar="FOLDER", help="of a CLIP of transformers, for clip_score")
    changes.add_argument("--num", type=at_least(2), metavar="N", help="how many images are drawn")
    changes.add_argument("--first", type=at_least(0), metavar="N", help="number of the first image")
    changes.add_argument("--seed", type=at_least(0), metavar="N", help="with its number, fixes the noise of an image")
    changes.add_argument("--steps", type=at_least(1), metavar="N", help="of the sampler")
    changes.add_argument("--method", help=f"{', '.join(METHODS)}, or package.module:function of your own")
    changes.add_argument("--precision", choices=get_args(Precision), help="of the model")
    changes.add_argument("--crop", type=at_least(1), metavar="N", help="side to which images of folders are cropped")
    changes.add_argument("--measures", metavar="A,B", help="such as frechet_distance,kid")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.images is None):
        raise InputError("give one of --model, whose samples are scored, and --images, which are scored")
    if args.out is None:
        raise InputError("give --out, a folder for the result")
    packages.need("pydantic", "yaml", "torch_fidelity")
    from asymflow.evaluation.protocol import load_protocol

    changes = {name: getattr(args, name) for name in CHANGES}
    changes["measures"] = args.measures and [word.strip() for word in args.measures.split(",")]
    protocol = load_protocol(args.protocol, changes)
    check(args, protocol)
    device = own_device(args.device)
    found = evaluate(Scored(args, protocol, device), args.out, device, args.batch, args.save_npz)
    if found:
        say(found, args.out)


def check(args: argparse.Namespace, protocol) -> None:
    """Raise errors about options before anything is read."""
    begun_folder(args.out, FEATURES, RESULT, GRID)
    if args.save_npz and args.save_npz.suffix != ".npz":
        raise InputError(f"--save-npz {args.save_npz} must end with .npz")
    if args.save_npz and not (args.out / FEATURES).exists():
        new_file(args.save_npz)
    if args.images:
        refuse_choice(args.images, args.step, args.ema)
        if drawing := [name for name in (*DRAWING, *GUIDANCE, "backbone") if getattr(args, name) is not None]:
            raise InputError(f"--{drawing[0]} is for drawing, and --images are scored as they are, all of them")
        return
    for name, usual in GUIDANCE.items():
        setattr(args, name, usual if getattr(args, name) is None else getattr(args, name))
    sigma_grid(protocol.steps, protocol.shift)
    guided(None, {}, {}, args.guidance, args.interval, args.orthogonal)


class Scored:
    """What is scored: images of a folder, of an .npz, or drawn of a model. about: what determines them, for records."""

    def __init__(self, args: argparse.Namespace, protocol, device: torch.device):
        from asymflow.evaluation.result import besides

        self.of, self.data, self.protocol = str(args.images or args.model), None, protocol
        self.precision = usual_precision(device) if protocol.precision == "usual" else protocol.precision
        if args.images:
            self.reads(args)
        else:
            self.draws(args, device)
        self.remarks = besides(self.about)

    def reads(self, args: argparse.Namespace) -> None:
        from asymflow.evaluation.images import open_source
        from asymflow.evaluation.protocol import renamed

        self.source = open_source(args.images, self.protocol.crop, self.protocol.turn)
        if len(self.source) < 2:
            raise InputError(f"{args.images} has 1 image: at least 2 are needed")
        self.about, settings = {"images": self.source.identity}, getattr(self.source, "settings", None) or {}
        known = {name: settings[name] for name in SAMPLER if name in settings}
        if known.get("precision") == self.precision:
            del known["precision"]
        known |= {"classes": "balanced", "order": "in turn"} if "classes" in settings else {}
        self.protocol = renamed(self.protocol, num=len(self.source), **known)
        if settings:
            self.about |= {name: settings[name] for name in SHOWN if name in settings} | {"settings": settings}

    def draws(self, args: argparse.Namespace, device: torch.device) -> None:
        from asymflow.evaluation.drawn import Drawn

        found, p = find_model(args.model, args.step, args.ema), self.protocol
        flow = load_model(found, device, args.backbone)
        check_model(args.model, flow)
        options = {name: getattr(args, name) for name in ("guidance", "interval", "orthogonal")}
        method = find(p.method, {}, "--method") if is_own(p.method) else p.method
        label = None
        if isinstance(found, Choice) and (p.reference == "data" or p.classes == "data"):
            self.data, label = training_images(found)
        if p.classes == "data" and label is None:
            raise InputError("classes: data means those of a training's images: give a run as --model, or balanced")
        label = label if p.classes == "data" else None
        self.source = Drawn(flow, p, self.precision, options, method, label=label)
        self.about = identity(found) | options | {"precision": self.precision}
        self.about |= {"sigma_min": flow.sigma_min, "noise_scale": flow.noise_scale}


def check_model(model: Path, flow) -> None:
    """InputError unless it is a class-conditional model of RGB images."""
    if missing := [name for name in ("num_classes", "grid") if not hasattr(flow.backbone, name)]:
        raise InputError(f"{type(flow.backbone).__name__} has no attribute {missing[0]}, which drawing needs")
    if flow.channels != 3 or not flow.backbone.num_classes:
        has = f"{count(flow.channels, 'channel')} and {count(flow.backbone.num_classes, 'class')}"
        raise InputError(f"{model} has {has}: images are drawn of models with 3 channels and at least one class")


def training_images(choice: Choice):
    """The images of a run's training, at most 50,000 of them in a random order, and the class of each number."""
    from asymflow import streams
    from asymflow.cli.models import about
    from asymflow.evaluation.reference import Images
    from asymflow.training.datasets import make_dataset
    from asymflow.training.evaluate import MOST
    from asymflow.training.loader import read_or_replace

    config, _, _ = about(choice.run, choice.folder)
    try:
        dataset = make_dataset(config)
    except InputError as e:
        raise InputError(f"the images of the training of {choice.run}: {e}; or give --reference IMAGES") from None
    seed, size = config.train.seed, (config.model.image_size,) * 2

    def read(number: int, bad: list[str]) -> Tensor:
        return read_or_replace(dataset, seed, number, bad).image

    images = Images(read, min(len(dataset), MOST), size, getattr(dataset, "digest", "unknown"))
    return images, lambda number: dataset.label(streams.image_index(seed, number, len(dataset)))


def evaluate(
    scored: Scored,
    out: Path,
    device: torch.device,
    batch: int,
    save_npz: Path | None = None,
    reference_folder: Path | None = None,
) -> dict[str, object] | None:
    """Compute what is missing, then measure, and write the result. All processes call this; the first one measures.

    Returns the result, and None to the other processes. save_npz: a file for the images. reference_folder: of the
    features of the reference, if not within `out`.
    """
    from asymflow.evaluation import reference, result
    from asymflow.evaluation.blocks import Blocks
    from asymflow.evaluation.features import PATCH, load_extractor, reader
    from asymflow.evaluation.images import write_batch

    protocol, source, started = scored.protocol, scored.source, time.time()
    rank, world = this_process()
    extractor = load_extractor(protocol.extractor, protocol.weights, device)
    size, against = tuple(source.size), None
    if not extractor.columns:
        if protocol.reference is None:
            raise InputError(f"the protocol {protocol.name} needs --reference: images, or an .npz file")
        width, data = extractor.width(max(size)), scored.data
        against = reference.Opened(protocol.reference, size, protocol.crop, width, data, protocol.turn)
    about = {
        "size": size,
        "scored": scored.about,
        "protocol": protocol.model_dump(mode="json", exclude=ELSEWHERE),
        "extractor": {"name": extractor.name, "weights_sha256": extractor.weights},
    }
    patch, clip = "patch_frechet_distance" in protocol.measures, None
    about |= {"patch": PATCH} if patch else {}
    if "clip_score" in protocol.measures:
        clip, about["clip"] = load_clip(protocol, source, device)
    read = reader(extractor, source, patch, clip)
    blocks = Blocks(out / FEATURES, len(source), about, keep_images=save_npz is not None)
    if rank == 0 and (done := len(blocks) - len(blocks.missing())):
        print(f"{done} of {count(len(blocks), 'block')} of images are in {out} already", file=sys.stderr)
    title = "reading" if "images" in scored.about else "drawing"
    blocks.fill(source, read, batch, title, rank, world)
    if against:
        against.fill(reference_folder or out / REFERENCE, extractor, batch, rank, world, patch)
    if rank:
        return None
    blocks.wait()
    held = against.reference(device) if against else None
    sample = blocks.sample(device, extractor.columns)
    if save_npz:
        write_batch(save_npz, blocks.images(), len(source), size)
    measured = result.measure(protocol.measures, sample, held)
    found = about | {
        "of": scored.of,
        "protocol": protocol.model_dump(mode="json"),
        "images": len(source),
        "reference": {"name": protocol.reference, **against.identity} if against else {},
        "measures": result.as_json(measured),
        "remarks": [
            *(reference.remarks(held, against.replaced, against.enlarged) if against else []),
            *reference.enlarged_remark("that are scored", blocks.told("enlarged")),
            *scored.remarks,
        ],
        "versions": result.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": round(blocks.seconds(), 1),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started)),
    }
    result.write(out / RESULT, found)
    with files.replacing(out / GRID) as beside:
        image_grid(blocks.first_images().float() / 127.5 - 1, width=GRID_WIDTH).save(beside)
    return found


def load_clip(protocol, source, device: torch.device):
    """The CLIP of a protocol, and what its scores depend on, for records. InputError if the images have no captions."""
    from asymflow.evaluation.clip import Clip

    if protocol.clip is None:
        raise InputError(f"the protocol {protocol.name} needs --clip: the folder of a CLIP of transformers")
    if not hasattr(source, "caption"):
        raise InputError("a CLIP score is of images with captions: give a folder of them as --images")
    captions = json.dumps([source.caption(number) for number in range(len(source))])
    clip = Clip(Path(protocol.clip), device)
    return clip, {"sha256": clip.digest, "captions_sha256": hashlib.sha256(captions.encode()).hexdigest()}


def say(found: dict, out: Path) -> None:
    """Print a result for people."""
    from asymflow.evaluation import result

    width, height = reversed(found["size"])
    name = found["protocol"]["name"]
    print(f"{found['of']}: {count(found['images'], 'image')} of {width} x {height} pixels, protocol {name}")
    for line in [*result.lines(found), *(f"remark: {remark}" for remark in found["remarks"])]:
        print(f"  {line}")
    print(f"written: {out / RESULT}, {out / GRID}")
