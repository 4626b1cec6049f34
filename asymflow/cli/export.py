"""`asymflow export` and `asymflow ema`: a model of a training run, as a folder for `from_pretrained`."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

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
2024, arXiv 2312.02696. What no combination of the snapshots can match is printed, with a remark if it is much.""",
}


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser(
        "export",
        description="Make a folder for from_pretrained of a checkpoint of a training run.",
        epilog=EXAMPLES["export"],
    )
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    p.add_argument("--step", type=int, help="of the checkpoint, if not the newest")
    p.add_argument("--ema", help="an average by its name, such as 0.9999 or rel-0.050, or none (default: the first)")
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


def run_export(args: argparse.Namespace) -> None:
    from asymflow.training import checkpoint, run

    new_folder(args.out)
    folder = args.folder / run.CHECKPOINTS
    steps = checkpoint.steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no whole checkpoint")
    step = steps[-1] if args.step is None else args.step
    if step not in steps:
        raise InputError(f"{folder} has no step {step}: it has {', '.join(map(str, steps))}")
    reader = whole(folder, step, partial(tqdm, desc="checking", unit="file", leave=False))
    averages = list(reader.state["averages"])
    name = args.ema or (averages[0] if averages else "none")
    if name not in ("none", *averages):
        raise InputError(
            f"--ema {name} is not in the checkpoint: it has {', '.join(averages) or 'no averages'}, and none"
        )
    weights = reader.full("weights" if name == "none" else checkpoint.average_kind(name))
    save(args, weights, reader)
    print(f"step {reader.state['step']}, average {name}: {args.out}")


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
            reader = whole(folder, step)
            for _, name, coefficient in terms:
                for parameter, values in reader.full(checkpoint.average_kind(name)).items():
                    term = coefficient * values.double()
                    weights[parameter] = weights[parameter] + term if parameter in weights else term
    save(args, {name: values.float() for name, values in weights.items()}, reader)
    print(f"sigma_rel {args.sigma_rel:g} at step {end} from {len(used)} averages: {args.out}")
    print(f"of its profile, {unmatched:.2%} (of the norm) could not be matched")
    if unmatched > ema.MISMATCH:
        last = snapshots[-1][0]
        widths = " or ".join(str(width) for step, _, width in snapshots if step == last)
        print(
            f"remark: that is as much as if the width were off by a tenth, or more. Matched exactly: --step {last} "
            f"--sigma-rel {widths}. To match others better, train with more frequent snapshots (ema.snapshot_every), "
            "or with widths nearer to them (ema.sigma_rel)",
            file=sys.stderr,
        )


def whole(folder: Path, step: int, progress: Callable = iter):
    """Reads a checkpoint. InputError unless every byte of it is as it was written."""
    from asymflow.training import checkpoint

    found = checkpoint.folder_of(folder, step)
    if reason := checkpoint.fault(found, progress=progress):
        raise InputError(f"{found} is damaged ({reason}): move it away, to do without it")
    return checkpoint.Reader(found)


def save(args: argparse.Namespace, weights: dict[str, Tensor], reader) -> None:
    """Make the model of the weights, of which `reader` read the last."""
    from asymflow.subspace import Subspace
    from asymflow.training import checkpoint, run
    from asymflow.training.config.reading import load_config
    from asymflow.training.repa import PROJECTOR
    from asymflow.training.start import make_flow

    subspace = Subspace.load(args.folder / run.SUBSPACE)
    if reader.state["subspace"] != checkpoint.fingerprint(subspace):
        raise InputError(f"{reader.folder} was trained with another subspace than {args.folder / run.SUBSPACE}")
    config = load_config(args.folder / run.CONFIG)
    if config.finetune:
        save_adapter(args, weights, subspace, config, reader.state["base"])
        return
    flow: AsymFlow = make_flow(config, subspace)
    own = {name: value for name, value in weights.items() if not name.startswith(PROJECTOR)}
    flow.load_state_dict({**flow.state_dict(), **own})
    with replacing_folder(args.out) as beside:
        flow.eval().save_pretrained(beside)


def save_adapter(args: argparse.Namespace, weights: dict[str, Tensor], subspace, config, base: str) -> None:
    """Write the weights as an adapter to the latent model that they were made of, in the published layout."""
    from asymflow.adapters import write_adapter
    from asymflow.training.finetuning import published, transformer_config

    with replacing_folder(args.out) as beside:
        about = transformer_config(args.base or Path(config.finetune.base))
        write_adapter(beside, published(weights), subspace, about, base)
