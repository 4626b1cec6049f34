"""From the command line to a running training: parse, build, resume, run."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from asymflow import packages, streams
from asymflow.data.described import class_names
from asymflow.data.encoded import EncodedShards
from asymflow.data.encoders import folder_digest
from asymflow.errors import InputError, out_of_memory
from asymflow.extensions import called, find, is_own
from asymflow.fitting import fit_pca, normal_quantiles
from asymflow.flow_matching import noise_level
from asymflow.model import AsymFlow
from asymflow.parser import Parser
from asymflow.patches import patchify
from asymflow.progress import progress_bar
from asymflow.subspace import Subspace
from asymflow.training.config.derived import make_backbone, patch_size
from asymflow.training.config.differences import differences
from asymflow.training.config.objectives import TABLE as OBJECTIVES
from asymflow.training.config.reading import Config, load_config
from asymflow.training.datasets import make_dataset, said
from asymflow.training.evaluate import protocol_of
from asymflow.training.loop import Training
from asymflow.training.objectives import Objective
from asymflow.training.objectives.encoded_batches import rare_buckets
from asymflow.training.objectives.variance import torchvision_vgg
from asymflow.training.run import folder as run
from asymflow.training.run.checkpoint import fingerprint
from asymflow.training.run.lifeline import Lifeline, show
from asymflow.training.run.progress import say
from asymflow.training.run.ranks import (
    AgreedError,
    all_or_raise,
    gather,
    join_group,
    open_store,
    rank0_broadcast,
    rank0_only,
    resolve_rank,
)
from asymflow.training.zero import internals as deepspeed_internals
from asymflow.training.zero.settings import deepspeed_config


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="train_ddp.py", description="Train a pixel transformer as an asymmetric flow, with DeepSpeed.")
    config = "name of a shipped configuration, or a YAML file"
    p.add_argument("--config", type=os.path.expanduser, default="shapes_tiny", help=config)
    p.add_argument("--out", type=Path, default=None, help="folder of the run (default: runs/NAME)")
    resume = "auto: from the newest whole checkpoint; never; or a checkpoint folder"
    p.add_argument("--resume", type=os.path.expanduser, default="auto", help=resume)
    p.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a key: see `asymflow info config`"
    )
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    args = p.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.config).stem
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a training. Returns the exit code: 0 if it ended or a signal stopped it, 2 for a user's mistake, else 1.

    If any rank fails, rank 0 prints the error, once, and all processes end: see `Lifeline`.
    """
    rank, lifeline, again = 0, None, "the same command"
    try:
        rank = resolve_rank()
        with nullcontext() if rank == 0 else quiet():
            args = parse(argv)
        again += " without --resume never" if args.resume == "never" else ""
        store = open_store()
        lifeline = Lifeline(store)
        training = build(args, join_group(store))
        stopped_by = training.fit()
        lifeline.close()
    except (Exception, KeyboardInterrupt) as e:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else DataLoader raises once more for a worker that died
        text, code = error_message(e, rank, again)
        if lifeline:
            return lifeline.fail(text, code)
        show(text)
        return code
    else:
        if rank == 0:
            ending = f"{stopped_by}: stopped and saved" if stopped_by else "done"
            print(f"{ending} at step {training.step} of {training.config.train.steps}: {args.out}")
            if stopped_by:
                print(f"{again} continues")
        return 0
    finally:  # after a failure, `lifeline.fail` does not return, unless this is the only process
        if dist.is_initialized():  # else threads of the group may abort the process as it exits
            dist.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def error_message(e: BaseException, rank: int, again: str) -> tuple[str, int]:
    """The text to print for an error, and the exit code. Users' errors are one line; bugs have a traceback.

    again: what continues the training.
    """
    if isinstance(e, KeyboardInterrupt):
        return f"train_ddp.py: interrupted; {again} continues from the last checkpoint", 130
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
    """Build everything that the first step needs. Called by all ranks; raises AgreedError if something is wrong."""
    rank = dist.get_rank()
    configs = gather(lambda: load_config(args.config, args.set))
    config = configs[rank]
    for other, theirs in enumerate(configs):
        if theirs != configs[0]:
            there = "; ".join(differences(configs[0], theirs)) or "settings that may change"
            raise AgreedError(f"rank {other} has another configuration than rank 0: {there}")
    if os.environ["LOCAL_RANK"] == "0":  # once on each machine, before DeepSpeed is used
        for remark in deepspeed_internals.remarks():
            print(remark, file=sys.stderr)
    all_or_raise(lambda: deepspeed_config(config, dist.get_world_size()))
    all_or_raise(lambda: config.evaluate.every and protocol_of(config))
    all_or_raise(lambda: config.model and patch_size(config.model))  # whether there is such a backbone
    say("looking through the data")
    dataset = rank0_broadcast(lambda: make_dataset(config))
    # The other ranks got rank 0's list of files, and their machines may have copies of their own.
    first = rank > 0 and os.environ["LOCAL_RANK"] == "0"
    all_or_raise(lambda: first and hasattr(dataset, "check") and dataset.check())
    if config.loss.perceptual and config.loss.perceptual.vgg is None:  # one process of each machine downloads it
        all_or_raise(lambda: torchvision_vgg() if os.environ["LOCAL_RANK"] == "0" else None)
    objective_for = all_or_raise(lambda: make_objective(config, dataset, device))
    all_or_raise(lambda: run.check_resume(args.out, args.resume, config))
    initial = all_or_raise(lambda: initial_subspace(config, args.out, args.resume), "the subspace")
    if config.finetune:
        all_or_raise(lambda: check_shards(config, dataset.meta, initial))
    # The folder is made only after the checks above, so that a training that cannot begin leaves none behind.
    lock = rank0_only(lambda: run.open_run(args.out, config))
    folder, remarks = run.checkpoint_to_resume(args.out, args.resume)
    remarks += said(dataset, config)
    if device.type == "cpu" and config.train.precision == "bf16":
        remarks.append("train.precision is bf16: many CPUs are ten times slower with it than with fp32")
    subspace = get_subspace(config, dataset, args.out, folder, initial, device)
    say("making the model" + ", whose blocks are compiled in the first step: minutes" * config.train.compile)
    torch.manual_seed(config.train.seed)
    flow = all_or_raise(lambda: make_flow(config, subspace))
    training = Training(config, args.out, flow, dataset, device, objective_for(flow))
    training.held = lock  # the folder stays locked as long as this object exists
    if folder is not None:
        training.restore(folder)
    rank0_only(lambda: run.write_about(args.out, config, class_names(dataset)))  # a start that is refused changes none
    if config.finetune:
        remarks += rare_buckets(dataset, config.train.global_batch_size)
        remarks += rank0_only(lambda: other_encoders(Path(config.finetune.base), dataset)) or []
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
        backbone.seed_patch_embedding(subspace)  # not at full rank: plain u-prediction starts from random weights
    return AsymFlow(backbone, subspace, sigma_min=c.sigma_min, noise_scale=c.noise_scale)


def make_objective(config: Config, dataset, device: torch.device) -> Callable[[AsymFlow], Objective]:
    """A function from the model to the objective of its training. All files that it needs are read here."""
    found = find(config.objective, OBJECTIVES, "loss.objective")
    if is_own(config.objective):
        return lambda flow: called(found, "loss.options", config.loss.options, config=config, flow=flow)
    return found.prepare(config, dataset, device)


# ---- The subspace ----------------------------------------------------------------------------------------------------
def check_shards(config: Config, meta: dict, subspace: Subspace | None) -> None:
    """InputError if the shards were encoded with another base model than the one to finetune, or fit no `subspace`."""
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
    """A remark, if the files of the base's VAE or tokenizer differ from those that encoded the shards.

    Not an error, because diffusers writes other files when it saves the same model again. The text encoder is not
    compared: reading its 16 GB would delay the start.
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
    config: Config, dataset, out: Path, resumed: Path | None, initial: Subspace | None, device: torch.device
) -> Subspace:
    """The subspace in the folder of the run; else `initial`; else a new one, fitted by all ranks together.

    initial: see `initial_subspace`. resumed: the checkpoint that the training continues from. A new subspace is saved
    in the folder. Called by all ranks; raises AgreedError.
    """
    path = out / run.SUBSPACE
    if rank0_broadcast(lambda: path.exists()):
        return all_or_raise(lambda: load_subspace(path, config), "the subspace")
    if initial:
        subspace = initial
    elif resumed is not None:
        raise AgreedError(f"{resumed.parent.parent / run.SUBSPACE} is missing: {resumed} fits no other subspace")
    elif config.subspace.rank in ("full", 0):
        patch = patch_size(config.model)
        make = Subspace.empty if config.subspace.rank == 0 else Subspace.full
        subspace = make(3 * patch**2, patch_size=patch)
    else:
        subspace = all_or_raise(lambda: fit_subspace(config, dataset, device), "the subspace cannot be fitted")
    rank0_only(lambda: subspace.save(path), "the subspace could not be saved")
    return subspace


def initial_subspace(config: Config, out: Path, resume: str) -> Subspace | None:
    """The subspace that a run is given: that of the run from whose checkpoint it resumes, or subspace.file.

    None if it is given none, or if the run has a subspace already; the file may be gone then. InputError if the file
    holds another one than either run.
    """
    own, file = out / run.SUBSPACE, config.finetune.subspace if config.finetune else config.subspace.file
    other = own if resume in ("auto", "never") else Path(resume).parent.parent / run.SUBSPACE
    copies = {path: load_subspace(path, config) for path in (other, own) if path.exists()}
    given = load_subspace(Path(file), config) if file and (Path(file).exists() or not own.exists()) else None
    for path, copy in copies.items():
        if given and fingerprint(given) != fingerprint(copy):
            raise InputError(f"{file} is another subspace than {path}, with which the training began: give that one")
    return None if own.exists() else copies.get(other, given)


def load_subspace(path: Path, config: Config) -> Subspace:
    """Read a subspace. Raises InputError if it does not fit the configuration."""
    subspace = Subspace.load(path)
    if config.finetune:  # `latent_to_pixel` checks whether it fits the latent model
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
    if subspace.color_space not in (None, "rgb") and not is_own(config.objective):
        raise InputError(
            f"{path} is for tokens in {subspace.color_space}, but a training from scratch is in rgb: fit another by "
            "asymflow subspace pca --color rgb"
        )
    wanted = {"full": subspace.dim, "auto": subspace.rank}.get(config.subspace.rank, config.subspace.rank)
    if subspace.rank != wanted:
        raise InputError(
            f"{path} has the rank {subspace.rank}, but subspace.rank is {config.subspace.rank}: set "
            f"subspace.rank={subspace.rank}, or begin with another subspace"
        )
    return subspace


def fit_subspace(config: Config, dataset, device: torch.device) -> Subspace:
    """Fit a subspace by PCA to random images, of which each rank reads a share. Called by all ranks."""
    count, patch = min(config.subspace.images, len(dataset)), patch_size(config.model)
    mine = streams.permutation(config.train.seed, 0, len(dataset))[:count][dist.get_rank() :: dist.get_world_size()]
    bar = progress_bar(mine, "fitting the subspace", "image", silent=dist.get_rank() > 0)
    tokens = (patchify(image.to(device), patch) for image in readable(dataset, bar))
    c = config.loss
    sigma = noise_level(normal_quantiles(), c.sigma_mean, c.sigma_std, c.sigma_shift)
    options = dict(patch_size=patch, token_order="channel_last", noise_scale=config.model.noise_scale, sigma=sigma)
    return fit_pca(tokens, config.subspace.rank, **options)


def readable(dataset, indices: Iterable[int]) -> Iterator[Tensor]:
    """The images, (1, 3, H, W) in [-1, 1]. Those that cannot be read are left out here; training will report them.

    Raises InputError, with the last reason, if none can be read.
    """
    problems, tried = [], 0
    for i in indices:
        tried += 1
        try:
            yield dataset[int(i)].image[None].double() / 127.5 - 1
        except (InputError, OSError) as e:
            problems.append(e)
    if problems and len(problems) == tried:
        raise InputError(f"none of {tried} images could be read; the last: {problems[-1]}")
