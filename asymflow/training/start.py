"""From the command line to a running training: parse, build, resume, run."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from asymflow import packages, streams
from asymflow.data.encode import folder_digest
from asymflow.data.encoded import EncodedShards
from asymflow.errors import InputError, out_of_memory
from asymflow.extensions import called, find
from asymflow.fitting import fit_pca
from asymflow.model import AsymFlow
from asymflow.parser import Parser
from asymflow.patches import patchify
from asymflow.subspace import Subspace
from asymflow.training.config.derived import make_backbone, patch_size
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.loop import Training
from asymflow.training.objectives import Objective
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.objectives.encoded_batches import rare_buckets
from asymflow.training.objectives.latent_to_pixel import LatentToPixel
from asymflow.training.objectives.repa import Encoder
from asymflow.training.objectives.variance import Perceptual, torchvision_vgg
from asymflow.training.run import folder as run
from asymflow.training.run.lifeline import Lifeline, show
from asymflow.training.run.ranks import AgreedError, each, join, meet, on_first, only_first, take_place, together
from asymflow.training.zero import internals as deepspeed_internals
from asymflow.training.zero.settings import deepspeed_config


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="train_ddp.py", description="Train a pixel transformer as an asymmetric flow, with DeepSpeed.")
    p.add_argument("--config", default="shapes_tiny", help="name of a shipped configuration, or a YAML file")
    p.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/NAME)")
    p.add_argument(
        "--resume", default="auto", help="auto: from the newest whole checkpoint; never; or a checkpoint folder"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key: see `asymflow info config`"
    )
    p.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)  # by the launcher
    args = p.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.config).stem
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a training. Returns the exit code: 0 when done or stopped by a signal, 2 for what a user got wrong.

    Whatever goes wrong is said once, by the process of rank 0, which ends all others: see `Lifeline`.
    """
    rank, lifeline = 0, None
    try:
        rank = take_place()
        with nullcontext() if rank == 0 else quiet():
            args = parse(argv)
        store = meet()
        lifeline = Lifeline(store)
        training = build(args, join(store))
        stopped_by = training.fit()
        lifeline.close()
    except (Exception, KeyboardInterrupt) as e:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of a worker that died, DataLoader would go on telling
        text, code = answer(e, rank)
        if lifeline:
            return lifeline.fail(text, code)
        show(text)
        return code
    else:
        if rank == 0:
            ending = f"{stopped_by}: stopped and saved" if stopped_by else "done"
            print(f"{ending} at step {training.step} of {training.config.train.steps}: {args.out}")
            if stopped_by:
                print("the same command continues")
        return 0
    finally:  # after a failure, only a process that is alone comes here
        if dist.is_initialized():  # threads of a group that is left open may abort the process as it exits
            dist.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def answer(e: BaseException, rank: int) -> tuple[str, int]:
    """What to say of it, and the exit code. What is no fault of ours is one line; the rest has a traceback."""
    if isinstance(e, KeyboardInterrupt):
        return "train_ddp.py: interrupted; the same command continues from the last checkpoint", 130
    by = "" if isinstance(e, AgreedError) or os.environ.get("WORLD_SIZE") == "1" else f"rank {rank}: "
    if isinstance(e, RuntimeError) and str(e).startswith("DataLoader worker"):
        hint = "is there enough memory, also in /dev/shm? Fewer processes read with --set data.workers=N"
        return f"train_ddp.py: error: {by}{' '.join(str(e).split())} ({hint})", 1
    if out_of_memory(e):
        hint = "train.micro_batch_size, model.checkpoint_every and finetune.checkpointing can make it take less"
        return f"train_ddp.py: error: {by}too little memory: {' '.join(str(e).split())} ({hint})", 1
    if isinstance(e, ModuleNotFoundError) and (text := packages.advice(e)):
        return f"train_ddp.py: error: {by}{text}", 2
    if isinstance(e, InputError | OSError):
        return f"train_ddp.py: error: {by}{e}", 2 if isinstance(e, InputError) else 1
    return f"{''.join(traceback.format_exception(e))}train_ddp.py: error: {by}{type(e).__name__}: {e}", 1


def build(args: argparse.Namespace, device: torch.device) -> Training:
    """Everything up to the first step, by all ranks together. Raises AgreedError if something cannot be used."""
    rank = dist.get_rank()
    configs = together(lambda: load_config(args.config, args.set))
    config = configs[rank]
    for other, theirs in enumerate(configs):
        if theirs != configs[0]:
            there = "; ".join(differences(configs[0], theirs)) or "settings that may change"
            raise AgreedError(f"rank {other} has another configuration than rank 0: {there}")
    if os.environ["LOCAL_RANK"] == "0":  # of each machine; before anything of DeepSpeed's is used
        for remark in deepspeed_internals.remarks():
            print(remark, file=sys.stderr)
    each(lambda: deepspeed_config(config, dist.get_world_size()))
    dataset = on_first(lambda: make_dataset(config))
    each(lambda: rank and hasattr(dataset, "check") and dataset.check())  # each machine may have a copy of its own
    if config.loss.perceptual and config.loss.perceptual.vgg is None:  # one process of a machine, for all of them
        each(lambda: torchvision_vgg() if os.environ["LOCAL_RANK"] == "0" else None)
    objective_for = each(lambda: make_objective(config, dataset, device))
    brought = each(lambda: bring_subspace(config, args.out, args.resume), "the subspace")
    if config.finetune:
        each(lambda: check_shards(config, dataset.meta, brought))
    lock = only_first(lambda: run.open_run(args.out, config))  # only now: what cannot begin leaves no folder
    folder, remarks = run.to_resume(args.out, args.resume)
    subspace = get_subspace(config, dataset, args.out, folder, brought, device)
    torch.manual_seed(config.train.seed)
    flow = each(lambda: make_flow(config, subspace))
    training = Training(config, args.out, flow, dataset, device, objective_for(flow))
    training.held = lock  # of the folder, as long as there is a training
    if folder is not None:
        training.restore(folder)
    if config.finetune:
        remarks += rare_buckets(dataset, config.train.global_batch_size)
        remarks += only_first(lambda: other_encoders(Path(config.finetune.base), dataset)) or []
    if rank == 0:
        for remark in remarks:
            print(remark, file=sys.stderr)
        if folder is not None:
            print(f"continuing from {folder}{training.how_resumed}", file=sys.stderr)
    training.open_journals()
    return training


def make_flow(config: Config, subspace: Subspace) -> AsymFlow:
    if config.finetune:
        from asymflow.training.objectives.finetuning import make_finetuned  # needs diffusers and peft

        return make_finetuned(config, subspace)
    c = config.model
    backbone = make_backbone(c)
    if subspace.rank < subspace.dim and hasattr(backbone, "seed_patch_embedding"):
        backbone.seed_patch_embedding(subspace)  # u-prediction, as others know it, starts from no directions
    return AsymFlow(backbone, subspace, sigma_min=c.sigma_min, noise_scale=c.noise_scale)


def make_objective(config: Config, dataset, device: torch.device) -> Callable[[AsymFlow], Objective]:
    """The objective of a model, with what is read from files already."""
    if config.loss.objective:
        own = find(config.loss.objective, {}, "loss.objective")
        return lambda flow: called(own, "loss.options", config.loss.options, config=config, flow=flow)
    if not config.finetune:
        encoder = make_encoder(config, device)
        return lambda flow: ClassConditional(config, flow, encoder)
    perceptual = None
    if config.loss.perceptual:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        perceptual = Perceptual(config.loss.perceptual.vgg, device, dtype)
    return lambda flow: LatentToPixel(config, dataset, device, perceptual)


def make_encoder(config: Config, device: torch.device) -> Encoder | None:
    """DINOv2, if tokens are to be aligned with it (REPA)."""
    if config.loss.repa is None:
        return None
    side = config.model.image_size // patch_size(config.model)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    try:
        return Encoder(config.loss.repa.model, (side, side), device, dtype)
    except InputError as e:
        raise InputError(f"loss.repa.model: {e}") from None


# ---- The subspace ----------------------------------------------------------------------------------------------------
def check_shards(config: Config, meta: dict, subspace: Subspace | None) -> None:
    """InputError if encoded shards are of another base than the one to finetune, or of another subspace."""
    from asymflow.training.objectives.finetuning import transformer_config  # needs diffusers and peft

    c = transformer_config(Path(config.finetune.base))
    pairs = [
        ("prompts of width", meta["prompt_shape"][1], c.get("joint_attention_dim")),
        ("latents of rank", meta["rank"], c.get("in_channels")),
    ]
    pairs += [("patches of side", meta["patch_size"], subspace.patch_size or 16)] if subspace else []
    for what, theirs, needed in pairs:
        if theirs != needed:
            where = f"{config.data.path} has {what} {theirs}, but finetune needs {needed}"
            raise InputError(f"{where}: encode the images with finetune.base, and fit finetune.subspace to the shards")


def other_encoders(base: Path, dataset: EncodedShards) -> list[str]:
    """A remark, if the VAE or the tokenizer of the base, where it has them, are not the files that made the shards.

    No error: diffusers writes other files when it saves the same model again. The text encoder has 16 GB: to read it
    would keep a training waiting.
    """
    parts = [part for part in ("vae", "tokenizer") if (base / part).is_dir()]
    other = [part for part in parts if folder_digest(base / part) != dataset.meta[part]]
    if not other:
        return []
    return [
        f"{dataset.path} was encoded with other files of {' and '.join(other)} than those in {base}: unless it is the "
        "same model saved again, encode the images with it"
    ]


def get_subspace(
    config: Config, dataset, out: Path, resumed: Path | None, brought: Subspace | None, device: torch.device
) -> Subspace:
    """That of the run, if it has one already; else what it was `brought`; else it is made, by all ranks together.

    resumed: the checkpoint that the training continues from. Raises AgreedError.
    """
    path = out / run.SUBSPACE
    if on_first(lambda: path.exists()):
        return each(lambda: load_subspace(path, config), "the subspace")
    if brought:
        subspace = brought
    elif resumed is not None:
        raise AgreedError(f"{resumed.parent.parent / run.SUBSPACE} is missing: {resumed} fits no other subspace")
    elif config.subspace.rank in ("full", 0):
        patch = patch_size(config.model)
        make = Subspace.empty if config.subspace.rank == 0 else Subspace.full
        subspace = make(3 * patch**2, patch_size=patch)
    else:
        subspace = each(lambda: fit_subspace(config, dataset, device), "the subspace cannot be fitted")
    only_first(lambda: subspace.save(path), "the subspace could not be saved")
    return subspace


def bring_subspace(config: Config, out: Path, resume: str) -> Subspace | None:
    """What a new run begins with: the subspace of the run whose checkpoint `resume` is, or subspace.file."""
    other = None if resume in ("auto", "never") else Path(resume).parent.parent / run.SUBSPACE
    if other is not None and other.exists():
        return load_subspace(other, config)
    file = config.finetune.subspace if config.finetune else config.subspace.file
    return load_subspace(Path(file), config) if file and not (out / run.SUBSPACE).exists() else None


def load_subspace(path: Path, config: Config) -> Subspace:
    """Raises InputError if it is not the one that the configuration speaks of."""
    subspace = Subspace.load(path)
    if config.finetune:  # whether it fits the latent model, `latent_to_pixel` sees
        if (subspace.token_order, subspace.color_space) != ("channel_first", "oklab"):
            raise InputError(f"{path} is not of channel_first tokens in oklab: make it by asymflow subspace procrustes")
        return subspace
    patch = patch_size(config.model)
    if subspace.dim != 3 * patch**2 or subspace.patch_size not in (None, patch):
        cut = f", of patches of {subspace.patch_size}" if subspace.patch_size else ""
        size = f"model.size {config.model.size}" if config.model.size else config.model.backbone
        raise InputError(
            f"{path} is for tokens of dimension {subspace.dim}{cut}, but those of {size} have "
            f"3 x {patch} x {patch} = {3 * patch**2}: fit another, or choose another size"
        )
    if subspace.token_order not in (None, "channel_last"):
        raise InputError(f"{path} is for {subspace.token_order} tokens, but those of a JiT are channel_last")
    wanted = {"full": subspace.dim, "auto": subspace.rank}.get(config.subspace.rank, config.subspace.rank)
    if subspace.rank != wanted:
        raise InputError(
            f"{path} has the rank {subspace.rank}, but subspace.rank is {config.subspace.rank}: set "
            f"subspace.rank={subspace.rank}, or begin with another subspace"
        )
    return subspace


def fit_subspace(config: Config, dataset, device: torch.device) -> Subspace:
    """By PCA of images that are drawn at random, each rank its share. Called by all ranks; raises InputError."""
    count, patch = min(config.subspace.images, len(dataset)), patch_size(config.model)
    mine = streams.permutation(config.train.seed, 0, len(dataset))[:count][dist.get_rank() :: dist.get_world_size()]
    bar = tqdm(mine, desc="fitting the subspace", unit="image", leave=False, disable=dist.get_rank() > 0 or None)
    tokens = (patchify(image.to(device), patch) for image in readable(dataset, bar))
    options = dict(patch_size=patch, token_order="channel_last", noise_scale=config.model.noise_scale)
    return fit_pca(tokens, config.subspace.rank, **options)


def readable(dataset, indices: Collection[int]) -> Iterator[Tensor]:
    """The images, (1, 3, H, W) in [-1, 1], but for those that cannot be read: training will count them.

    Raises InputError, with the last of the reasons, if there is none that can be.
    """
    problems = []
    for i in indices:
        try:
            yield dataset[int(i)].image[None].double() / 127.5 - 1
        except (InputError, OSError) as e:
            problems.append(e)
    if problems and len(problems) == len(indices):
        raise InputError(f"none of {len(indices)} images could be read; the last: {problems[-1]}")
