"""`asymflow export` and `asymflow ema`: a model of a training run, as a folder for `from_pretrained`."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from asymflow.averages import Profile
from asymflow.cli import averages
from asymflow.cli.common import new_folder, replacing_folder
from asymflow.cli.models import CLASSES, about, add_backbone, add_choice, choose, make_model
from asymflow.errors import InputError
from asymflow.text import count

EXAMPLES = {
    "export": """\
examples:
  asymflow export --run runs/h16 --out models/h16                          the newest checkpoint, its first average
  asymflow export --run runs/h16 --step 100000 --ema none --out models/raw the weights themselves
  asymflow export --run runs/h16 --ema rel-0.050 --out models/rel05

Any number of processes may have trained it, in any ZeRO stage; one reads it.""",
    "ema": """\
examples:
  asymflow ema --run runs/h16 --sigma-rel 0.05 --out models/rel05
  asymflow ema --run runs/h16 --sigma-rel 0.12 --step 400000 --out models/early

The average is put together from the snapshots of the run (ema.snapshot_every in its configuration), as in Karras et al.
2024, arXiv 2312.02696. What no combination of the snapshots can match is printed, with a remark if it is much.""",
}


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "export",
        description="Make a folder for from_pretrained of a checkpoint of a training run.",
        epilog=EXAMPLES["export"],
    )
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    add_choice(p)
    add_base(p)
    p.add_argument("--out", type=Path, required=True, help="new folder for the model")
    p.set_defaults(run=run_export)
    p = commands.add_parser(
        "ema",
        description="Make a model of the moving average of any length, after training.",
        epilog=EXAMPLES["ema"],
    )
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    p.add_argument(
        "--sigma-rel", type=float, required=True, help="width of the average, as a share of the training time"
    )
    p.add_argument("--step", type=int, help="at which it ends, if not the last snapshot")
    add_backbone(p)
    add_base(p)
    p.add_argument("--out", type=Path, required=True, help="new folder for the model")
    p.set_defaults(run=run_ema)


def add_base(parser: argparse.ArgumentParser) -> None:
    where = "of a finetuning: the base model, if it is no longer where the training found it"
    parser.add_argument("--base", type=Path, help=where)


def run_export(args: argparse.Namespace) -> None:
    new_folder(args.out)
    choice = choose(args.folder, args.step, args.ema)
    save(args, choice.weights, choice.folder)
    print(f"step {choice.step}, average {choice.average}: {args.out}")


def run_ema(args: argparse.Namespace) -> None:
    new_folder(args.out)
    rebuilt = averages.rebuild(args.folder, Profile(sigma_rel=args.sigma_rel), args.step)
    save(args, rebuilt.weights, rebuilt.folder)
    used = len(rebuilt.terms)
    print(f"sigma_rel {args.sigma_rel:g} at step {rebuilt.step} from {count(used, 'average')}: {args.out}")
    print(f"of its profile, {rebuilt.unmatched:.2%} (of the norm) could not be matched")
    rebuilt.warn()


def save(args: argparse.Namespace, weights: Callable[[], dict[str, Tensor]], folder: Path) -> None:
    """Write the model with these weights. folder: the newest checkpoint or snapshot that they are made of."""
    config, subspace, state = about(args.folder, folder)
    if args.base and not config.finetune:
        raise InputError(f"--base is for a finetuning, but {args.folder} was trained from scratch: leave it out")
    if args.backbone and config.finetune:
        raise InputError(f"--backbone is given, but {args.folder} is a finetuning of the base model: leave it out")
    with replacing_folder(args.out) as beside:
        if config.finetune:
            save_adapter(args, beside, weights(), config, subspace, state)
        else:
            make_model(config, subspace, weights(), args.backbone).save_pretrained(beside)
            if (args.folder / CLASSES).is_file():
                shutil.copyfile(args.folder / CLASSES, beside / CLASSES)


def save_adapter(
    args: argparse.Namespace, folder: Path, weights: dict[str, Tensor], config, subspace, state: dict
) -> None:
    """Write the weights of a finetuning as an adapter to its latent model, in the published layout."""
    from asymflow.backbones.flux2.adapter import write_adapter
    from asymflow.training.objectives.finetuning import check_trained, published, transformer_config

    base = args.base or Path(config.finetune.base)
    check_trained(weights, base, config, subspace)
    if "base" not in state:  # of a snapshot that an earlier version made
        state = about(args.folder, choose(args.folder, None, "none").folder)[2]
    name = base.absolute().name  # not the whole path, which is private; the adapter may be published
    more = dict(base_name=name, prompt_length=state.get("prompt_length"))
    write_adapter(folder, published(weights), subspace, transformer_config(base), state["base"], **more)
