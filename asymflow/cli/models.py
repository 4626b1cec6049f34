"""Finding the model of a command: a folder, a file, a training run, or a name on the Hugging Face Hub."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from asymflow import files, hub, opening
from asymflow.backbones.jit.published import load_published
from asymflow.cli.common import this_process
from asymflow.errors import InputError
from asymflow.extensions import find, is_own
from asymflow.model import CLASSES, CONFIG, WEIGHTS, AsymFlow
from asymflow.progress import progress_bar

MODEL = (
    "folder of save_pretrained, run of train_ddp.py, published file, ORG/NAME or ORG/NAME/FILE on the Hub, or shapes, "
    "which comes with this program"
)


def add_choice(parser) -> None:
    """Add --step and --ema, which choose a model of a training run (see `choose`), and --backbone."""
    parser.add_argument("--step", type=int, help="of the checkpoint of a run, if not the newest")
    ema = (
        "of a run: an average by its name, such as 0.9999 or rel-0.050, or none (default: the first); or any other "
        "decay or width, such as 0.07, which is put together from the snapshots of the run"
    )
    parser.add_argument("--ema", help=ema)
    add_backbone(parser)


def add_backbone(parser) -> None:
    own = "the class of the model, package.module:Class, if it is not of this library: that code is run"
    parser.add_argument("--backbone", metavar="NAME", help=own)


@dataclass(frozen=True)
class Choice:
    """A model of a training run. folder: of the checkpoint. average: the name of one of its averages, or "none"."""

    run: Path
    folder: Path
    step: int
    average: str

    def weights(self) -> dict[str, Tensor]:
        """The weights by their names. InputError unless every byte of the checkpoint is as it was written."""
        from asymflow.training.run import checkpoint

        reader = verified_reader(self.folder, partial(progress_bar, desc="checking", unit="file"))
        return reader.full("weights" if self.average == "none" else checkpoint.average_kind(self.average))

    def identity(self) -> dict[str, object]:
        """What determines the weights. The checksum is of the manifest, which has the checksums of all files."""
        from asymflow.training.run.checkpoint import MANIFEST

        checksum = files.sha256(self.folder / MANIFEST)
        return {"checkpoint_sha256": checksum, "step": self.step, "average": self.average}


def class_names(folder: Path) -> list[str]:
    """The names of the classes of a run or model, by number; empty if they are not known. InputError if damaged."""
    folder = hub.packaged(folder)
    if not (folder / CLASSES).is_file():
        return []
    try:
        names = opening.read_json(folder / CLASSES, list)
        if not all(isinstance(name, str) for name in names):
            raise ValueError
    except ValueError:
        raise InputError(f"{folder / CLASSES} must be a list of names in JSON: remove it to do without names") from None
    return names


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run. A saved model may have a config.yaml too, that of its training."""
    # The names of asymflow.training.run, spelled out: its import needs more than the extra [library] installs.
    is_model = (folder / CONFIG).is_file() and not (folder / "checkpoints").is_dir()
    return (folder / "config.yaml").is_file() and not is_model


def find_model(path: Path, step: int | None, ema: str | None) -> Path | Choice:
    """The folder or file of a model, downloaded if it is on the Hub. For a training run, what --step and --ema choose.

    It prints which step and average of a run were chosen. Raises InputError if there is no such model.
    """
    if is_run(path):
        choice = choose(path, step, ema)
        if this_process()[0] == 0:
            print(f"{path} is a training run: step {choice.step}, average {choice.average}", file=sys.stderr)
        return choice
    refuse_choice(path, step, ema)
    refuse_checkpoint(path)
    if hub.packaged(path) != path and this_process()[0] == 0:
        print(f"{path} is the model that comes with asymflow: there is no {path.absolute()}", file=sys.stderr)
    return hub.locate(path, CONFIG, WEIGHTS, what="a model", perhaps=[CLASSES])


def refuse_checkpoint(path: Path) -> None:
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        raise InputError(f"{path} is a checkpoint: give its run, {path.parent.parent}, and --step {int(path.name)}")


def check_run(folder: Path) -> None:
    """Raises InputError if the folder is no training run."""
    refuse_checkpoint(folder)
    if not is_run(folder):
        raise InputError(f"{folder} is no run of train_ddp.py: there is no config.yaml of a training in it")


def refuse_choice(model: object, step: int | None, ema: str | None) -> None:
    if step is not None or ema is not None:
        raise InputError(f"--{'step' if ema is None else 'ema'} is for a training run, but {model} is none")


def choose(folder: Path, step: int | None, ema: str | None) -> Choice:
    """The model of a run that --step and --ema mean; by default the newest checkpoint and its first average.

    Raises InputError if there is none.
    """
    from asymflow.training.run import checkpoint
    from asymflow.training.run import folder as run

    check_run(folder)
    checkpoints = folder / run.CHECKPOINTS
    steps = checkpoint.steps(checkpoints)
    if not steps:
        raise InputError(f"{checkpoints} holds no whole checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"{checkpoints} has no step {step}: it has {', '.join(map(str, steps))}")
    chosen = checkpoint.folder_of(checkpoints, step)
    averages = checkpoint.read_state(chosen)["averages"]
    average = ema or next(iter(averages), "none")
    if average in ("none", *averages):
        return Choice(folder, chosen, step, average)
    from asymflow.cli.averages import rebuilt, tracked

    if name := tracked(averages, average):
        return Choice(folder, chosen, step, name)
    has = f"it has {', '.join(averages) or 'no averages'}, and none"
    return rebuilt(folder, average, step, f"--ema {average} is not in the checkpoint: {has}")


def verified_reader(folder: Path, progress: Callable = iter):
    """A checkpoint's Reader. Reads all of it first; InputError unless every byte is as it was written."""
    from asymflow.training.run import checkpoint

    if reason := checkpoint.fault(folder, progress=progress):
        raise InputError(f"{folder} is damaged ({reason}): move it away, to do without it")
    return checkpoint.Reader(folder)


def about(run_folder: Path, folder: Path) -> tuple:
    """(configuration, subspace, state): of a run, and of its checkpoint in `folder`. InputError if they do not fit."""
    from asymflow.subspace import Subspace
    from asymflow.training.config.reading import load_config
    from asymflow.training.run import checkpoint
    from asymflow.training.run import folder as run

    subspace, state = Subspace.load(run_folder / run.SUBSPACE), checkpoint.read_state(folder)
    if state["subspace"] != checkpoint.fingerprint(subspace):
        raise InputError(f"{folder} was trained with another subspace than {run_folder / run.SUBSPACE}")
    return load_config(run_folder / run.CONFIG), subspace, state


def model_of_run(choice: Choice, backbone: str | None, read: bool = True) -> AsymFlow:
    """A model of a run, in eval mode. InputError if the run is a finetuning.

    backbone: the option --backbone. read: False leaves its weights on the meta device.
    """
    config, subspace, _ = about(choice.run, choice.folder)
    if config.finetune:
        raise InputError(
            f"{choice.run} finetunes {config.finetune.base}: asymflow export --run {shlex.quote(str(choice.run))} "
            "--out ADAPTER makes an adapter of it, for asymflow sample --base BASE --adapter ADAPTER"
        )
    return make_model(config, subspace, choice.weights() if read else None, backbone)


def load_model(found: Path | Choice, device: torch.device, backbone: str | None) -> AsymFlow:
    """The model, with weights in float32, in eval mode. found: of `find_model`. backbone: the option --backbone."""
    if isinstance(found, Choice):
        flow = model_of_run(found, backbone)
    elif found.is_dir():
        own = own_backbone(backbone)
        return AsymFlow.from_pretrained(found, backbone=own, dtype=torch.float32, device=device)
    else:
        flow = load_published(found)
        if not isinstance(flow, AsymFlow):
            raise InputError(f"{found} is a subspace, not a model: see asymflow subspace show {found}")
    flow.backbone.float()
    return flow.to(device).eval()


def identity(found: Path | Choice) -> dict[str, object]:
    """What determines a model: for a run its checkpoint, for a file its checksum, for a folder those of both files."""
    if isinstance(found, Choice):
        return found.identity()
    if not found.is_dir():
        return {"model_sha256": files.sha256(found)}
    return {"model_sha256": files.sha256(found / WEIGHTS), "config_sha256": files.sha256(found / CONFIG)}


def own_backbone(name: str | None):
    """The class that --backbone names; None if it is not given."""
    return find(name, {}, "--backbone") if name else None


def make_model(config, subspace, weights: dict[str, Tensor] | None, backbone: str | None) -> AsymFlow:
    """The model of a configuration, in eval mode. weights: None leaves them on the meta device.

    backbone: the option --backbone. A run may come from somebody else, so code that only its files name is not run.
    """
    from asymflow.training.objectives.repa import PROJECTOR
    from asymflow.training.start import make_flow

    named = config.model.backbone
    if is_own(named) and backbone != named:
        raise InputError(
            f"the model is a {named}, which is not of this library: add --backbone {named} to run that code"
        )
    if backbone and backbone != named:
        raise InputError(f"--backbone {backbone} is given, but the model is a {named}: leave it out")
    if is_own(named):  # nothing is trained here, so its blocks need no wrapping for recomputation
        config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint_every": 0})})
    with torch.device("meta" if weights is None else "cpu"):
        flow: AsymFlow = make_flow(config, subspace)
    if weights is not None:
        own = {name: value for name, value in weights.items() if not name.startswith(PROJECTOR)}
        shapes = {name: tuple(parameter.shape) for name, parameter in flow.named_parameters()}
        opening.check_tensors(own, shapes, "the checkpoint, with the config.yaml of its run,")
        flow.load_state_dict({**flow.state_dict(), **own})
    return flow.eval()
