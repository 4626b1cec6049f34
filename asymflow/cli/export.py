"""`asymflow export` and `asymflow ema`: a model of a training run, as a folder for `from_pretrained`."""

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from asymflow import hub
from asymflow.cli.common import new_folder, replacing_folder, this_process
from asymflow.errors import InputError
from asymflow.model import CONFIG, WEIGHTS, AsymFlow

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
2024, arXiv 2312.02696. What no combination of the snapshots can match is printed.""",
}

MODEL = "folder of save_pretrained, run of train_ddp.py, published file, or ORG/NAME or ORG/NAME/FILE on the Hub"


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
    add_base(p)
    p.add_argument("--out", type=Path, required=True, help="new folder for the model")
    p.set_defaults(run=run_ema)


def add_base(parser: argparse.ArgumentParser) -> None:
    where = "of a finetuning: the base model, if it is no longer where the training found it"
    parser.add_argument("--base", type=Path, help=where)


def add_choice(parser) -> None:
    """The options --step and --ema, by which a checkpoint of a run becomes a model: see `choose`."""
    parser.add_argument("--step", type=int, help="of the checkpoint of a run, if not the newest")
    ema = "of a run: an average by its name, such as 0.9999 or rel-0.050, or none (default: the first)"
    parser.add_argument("--ema", help=ema)


class Choice(NamedTuple):
    """A model of a training run: the weights, or an `average`, of the checkpoint that is in `folder`."""

    run: Path
    folder: Path
    step: int
    average: str

    def weights(self) -> dict[str, Tensor]:
        """By the names of the parameters. InputError unless every byte of the checkpoint is as it was written."""
        from asymflow.training import checkpoint

        reader = whole(self.folder, partial(tqdm, desc="checking", unit="file", leave=False))
        return reader.full("weights" if self.average == "none" else checkpoint.average_kind(self.average))


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()  # asymflow.training.run.CONFIG, whose import needs more than [library]


def find_model(path: Path, step: int | None, ema: str | None) -> Path | Choice:
    """The folder or file of a model that is here or on the Hub; of a run, what --step and --ema mean. InputError.

    What it takes of a run, it says.
    """
    if is_run(path):
        choice = choose(path, step, ema)
        if this_process()[0] == 0:
            print(f"{path} is a training run: step {choice.step}, average {choice.average}", file=sys.stderr)
        return choice
    refuse_choice(path, step, ema)
    return hub.locate(path, CONFIG, WEIGHTS, what="a model")


def refuse_choice(model: object, step: int | None, ema: str | None) -> None:
    if step is not None or ema is not None:
        raise InputError(f"--{'step' if ema is None else 'ema'} is for a training run, but {model} is none")


def choose(folder: Path, step: int | None, ema: str | None) -> Choice:
    """What --step and --ema mean of a run, by default the newest checkpoint and its first average. InputError."""
    from asymflow.training import checkpoint, run

    checkpoints = folder / run.CHECKPOINTS
    steps = checkpoint.steps(checkpoints)
    if not steps:
        raise InputError(f"{checkpoints} holds no whole checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"{checkpoints} has no step {step}: it has {', '.join(map(str, steps))}")
    chosen = checkpoint.folder_of(checkpoints, step)
    averages = list(checkpoint.read_state(chosen)["averages"])
    average = ema or (averages[0] if averages else "none")
    if average not in ("none", *averages):
        raise InputError(
            f"--ema {average} is not in the checkpoint: it has {', '.join(averages) or 'no averages'}, and none"
        )
    return Choice(folder, chosen, step, average)


def run_export(args: argparse.Namespace) -> None:
    new_folder(args.out)
    choice = choose(args.folder, args.step, args.ema)
    save(args, choice.weights(), choice.folder)
    print(f"step {choice.step}, average {choice.average}: {args.out}")


def run_ema(args: argparse.Namespace) -> None:
    from asymflow.training import checkpoint, ema, run

    new_folder(args.out)
    folder = args.folder / run.SNAPSHOTS
    steps = checkpoint.steps(folder)
    if not steps:
        raise InputError(f"{args.folder} has no snapshots: set ema.snapshot_every before training")
    end = steps[-1] if args.step is None else args.step
    snapshots = [
        (step, name, sigma_rel)
        for step in steps
        if step <= end
        for name, sigma_rel in checkpoint.read_state(checkpoint.folder_of(folder, step))["averages"].items()
    ]
    if not snapshots:
        raise InputError(f"{args.folder} has no snapshot up to step {end}: the first is of step {steps[0]}")
    coefficients, unmatched = ema.reconstruction([(step, width) for step, _, width in snapshots], end, args.sigma_rel)
    used = [(step, name, c) for (step, name, _), c in zip(snapshots, coefficients.tolist(), strict=True) if c]
    weights: dict[str, Tensor] = {}
    with tqdm(used, desc="adding up", unit="average", leave=False) as bar:
        for step, terms in groupby(bar, key=lambda term: term[0]):
            reader = whole(checkpoint.folder_of(folder, step))
            for _, name, coefficient in terms:
                for parameter, values in reader.full(checkpoint.average_kind(name)).items():
                    term = coefficient * values.double()
                    weights[parameter] = weights[parameter] + term if parameter in weights else term
    save(args, {name: values.float() for name, values in weights.items()}, reader.folder)
    print(f"sigma_rel {args.sigma_rel:g} at step {end} from {len(used)} averages: {args.out}")
    print(f"of its profile, {unmatched:.2%} (of the norm) could not be matched")


def whole(folder: Path, progress: Callable = iter):
    """Reads a checkpoint. InputError unless every byte of it is as it was written."""
    from asymflow.training import checkpoint

    if reason := checkpoint.fault(folder, progress=progress):
        raise InputError(f"{folder} is damaged ({reason}): move it away, to do without it")
    return checkpoint.Reader(folder)


def save(args: argparse.Namespace, weights: dict[str, Tensor], folder: Path) -> None:
    """Make the model of the weights, the last of which are of the checkpoint in `folder`."""
    config, subspace, state = about(args.folder, folder)
    with replacing_folder(args.out) as beside:
        if config.finetune:
            write_adapter(args, beside, weights, config, subspace, state["base"])
        else:
            make_model(config, subspace, weights).save_pretrained(beside)


def about(run_folder: Path, folder: Path) -> tuple:
    """The configuration and the subspace of a run, and the state of its checkpoint. InputError if they do not fit."""
    from asymflow.subspace import Subspace
    from asymflow.training import checkpoint, run
    from asymflow.training.config.reading import load_config

    subspace, state = Subspace.load(run_folder / run.SUBSPACE), checkpoint.read_state(folder)
    if state["subspace"] != checkpoint.fingerprint(subspace):
        raise InputError(f"{folder} was trained with another subspace than {run_folder / run.SUBSPACE}")
    return load_config(run_folder / run.CONFIG), subspace, state


def model_of_run(choice: Choice, read: bool = True) -> AsymFlow:
    """A model of a run, in eval mode; not `read`, without its numbers. InputError if it is a finetuning."""
    config, subspace, _ = about(choice.run, choice.folder)
    if config.finetune:
        raise InputError(
            f"{choice.run} finetunes {config.finetune.base}: asymflow export --run {shlex.quote(str(choice.run))} "
            "--out ADAPTER makes an adapter of it, for asymflow sample --base BASE --adapter ADAPTER"
        )
    return make_model(config, subspace, choice.weights() if read else None)


def make_model(config, subspace, weights: dict[str, Tensor] | None) -> AsymFlow:
    from asymflow.training.repa import PROJECTOR
    from asymflow.training.start import make_flow

    with torch.device("meta" if weights is None else "cpu"):
        flow: AsymFlow = make_flow(config, subspace)
    if weights is not None:
        own = {name: value for name, value in weights.items() if not name.startswith(PROJECTOR)}
        flow.load_state_dict({**flow.state_dict(), **own})
    return flow.eval()


def write_adapter(
    args: argparse.Namespace, folder: Path, weights: dict[str, Tensor], config, subspace, fingerprint: str
) -> None:
    """Write the weights as an adapter to the latent model that they were made of, in the published layout."""
    from asymflow import adapters
    from asymflow.training.finetuning import published, transformer_config

    base = args.base or Path(config.finetune.base)
    adapters.write_adapter(
        folder, published(weights), subspace, transformer_config(base), fingerprint, base_name=str(base)
    )
