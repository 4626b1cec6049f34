"""`asymflow export` and `asymflow ema`: a model of a training run, as a folder for `from_pretrained`."""

import argparse
from pathlib import Path

from torch import Tensor

from asymflow.cli.common import new_folder, replacing_folder
from asymflow.errors import InputError
from asymflow.model import AsymFlow

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


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "export",
        help="make a model of a checkpoint of a training run",
        description="Make a folder for from_pretrained of a checkpoint of a training run.",
        epilog=EXAMPLES["export"],
    )
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    p.add_argument("--step", type=int, help="of the checkpoint, if not the newest")
    p.add_argument("--ema", help="an average by its name, such as 0.9999 or rel-0.050, or none (default: the first)")
    p.add_argument("--out", type=Path, required=True, help="new folder for the model")
    p.set_defaults(run=run_export)
    p = commands.add_parser(
        "ema",
        help="make an average of any length after training",
        description="Make a model of the moving average of any length, after training.",
        epilog=EXAMPLES["ema"],
    )
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    p.add_argument(
        "--sigma-rel", type=float, required=True, help="width of the average, as a share of the training time"
    )
    p.add_argument("--step", type=int, help="at which it ends, if not the last snapshot")
    p.add_argument("--out", type=Path, required=True, help="new folder for the model")
    p.set_defaults(run=run_ema)


def run_export(args: argparse.Namespace) -> None:
    from asymflow.training import checkpoint, run

    new_folder(args.out)
    reader = whole(args.folder / run.CHECKPOINTS, args.step)
    averages = reader.state["averages"]
    name = args.ema or (averages[0] if averages else "none")
    if name not in ("none", *averages):
        raise InputError(
            f"--ema {name} is not in the checkpoint: it has {', '.join(averages) or 'no averages'}, and none"
        )
    weights = reader.full("weights" if name == "none" else checkpoint.average_kind(name))
    save(args, weights)
    print(f"step {reader.state['step']}, average {name}: {args.out}")


def run_ema(args: argparse.Namespace) -> None:
    from asymflow.training import checkpoint, ema, run

    new_folder(args.out)
    folder = args.folder / run.SNAPSHOTS
    steps = checkpoint.steps(folder)
    if not steps:
        raise InputError(f"{args.folder} has no snapshots: set ema.snapshot_every before training")
    readers = {step: whole(folder, step) for step in steps}
    snapshots = [(step, name) for step, reader in readers.items() for name in reader.state["averages"]]
    widths = [(step, float(name.removeprefix("rel-"))) for step, name in snapshots]
    step = args.step or steps[-1]
    coefficients, unmatched = ema.reconstruction(widths, step, args.sigma_rel)
    weights: dict[str, Tensor] = {}
    for (taken, name), coefficient in zip(snapshots, coefficients.tolist(), strict=True):
        if coefficient:
            for parameter, values in readers[taken].full(checkpoint.average_kind(name)).items():
                term = coefficient * values.double()
                weights[parameter] = weights[parameter] + term if parameter in weights else term
    save(args, {name: values.float() for name, values in weights.items()})
    print(f"sigma_rel {args.sigma_rel:g} at step {step} from {len(snapshots)} snapshots: {args.out}")
    print(f"of its profile, {unmatched:.2%} (of the norm) could not be matched")


def whole(folder: Path, step: int | None):
    """A checkpoint, if every byte of it is as it was written."""
    from asymflow.training import checkpoint

    steps = checkpoint.steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no whole checkpoint")
    if step is not None and step not in steps:
        raise InputError(f"{folder} has no step {step}: it has {', '.join(map(str, steps))}")
    found = checkpoint.folder_of(folder, steps[-1] if step is None else step)
    if reason := checkpoint.fault(found):
        raise InputError(f"{found} is damaged: {reason}")
    return checkpoint.Reader(found)


def save(args: argparse.Namespace, weights: dict[str, Tensor]) -> None:
    from asymflow.subspace import Subspace
    from asymflow.training import run
    from asymflow.training.config.reading import load_config
    from asymflow.training.repa import PROJECTOR
    from asymflow.training.start import make_flow

    flow: AsymFlow = make_flow(load_config(args.folder / run.CONFIG), Subspace.load(args.folder / run.SUBSPACE))
    own = {name: value for name, value in weights.items() if not name.startswith(PROJECTOR)}
    flow.load_state_dict({**flow.state_dict(), **own})
    with replacing_folder(args.out) as beside:
        flow.eval().save_pretrained(beside)
