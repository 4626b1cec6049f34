"""Averages of a training that were not tracked: put together from its snapshots, as in Karras et al. 2024."""

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from asymflow import averages, files
from asymflow.averages import MISMATCH, Profile
from asymflow.cli.models import Choice, check_run, verified_reader
from asymflow.errors import InputError
from asymflow.progress import progress_bar
from asymflow.text import count


@dataclass(frozen=True)
class Rebuilt(Choice):
    """A model of a run whose average is put together. terms: (step, name, coefficient) of each average of a snapshot.

    unmatched: the part of the profile that no combination of the snapshots can match, relative to its norm. exact: the
    options that match an average of the newest snapshot.
    """

    terms: tuple[tuple[int, str, float], ...] = ()
    unmatched: float = 0.0
    exact: str = ""

    def weights(self) -> dict[str, Tensor]:
        from asymflow.training.run import checkpoint

        weights: dict[str, Tensor] = {}
        with progress_bar(self.terms, "adding up", "average") as bar:
            for step, terms in groupby(bar, key=lambda term: term[0]):
                reader = verified_reader(checkpoint.folder_of(self.folder.parent, step))
                for _, name, coefficient in terms:
                    for parameter, values in reader.full(checkpoint.average_kind(name)).items():
                        term = coefficient * values.double()
                        weights[parameter] = weights[parameter] + term if parameter in weights else term
        return {name: values.float() for name, values in weights.items()}

    def identity(self) -> dict[str, object]:
        from asymflow.training.run import checkpoint

        used = [checkpoint.folder_of(self.folder.parent, step) for step in sorted({step for step, *_ in self.terms})]
        digest = hashlib.sha256("".join(files.sha256(folder / checkpoint.MANIFEST) for folder in used).encode())
        return {"snapshots_sha256": digest.hexdigest(), "step": self.step, "average": self.average}

    def warn(self) -> None:
        """Say so, if the average is much another than the one that was asked for."""
        if self.unmatched <= MISMATCH:
            return
        print(
            f"remark: that is as much as if the width were off by a tenth, or more. Matched exactly: {self.exact}. To "
            "match others better, train with more frequent snapshots (ema.snapshot_every), "
            "or with widths nearer to them (ema.sigma_rel)",
            file=sys.stderr,
        )


def profile_of(name: str) -> Profile | None:
    """The average that a name means: a decay such as 0.9996, or a width such as 0.07 or rel-0.070; else None."""
    match = re.fullmatch(r"(rel-)?(0?\.[0-9]+|0|1)", name)
    if not match:
        return None
    value = float(match[2])
    widest = (1 / 12) ** 0.5  # of a power function; decays as short as that are of no use
    return Profile(sigma_rel=value) if match[1] or value < widest else Profile(decay=value)


def tracked(known: Mapping[str, float | None], name: str) -> str | None:
    """The average of a checkpoint that a name means otherwise than it is called, such as rel-0.050 by 0.05.

    known: the averages of its state, with their widths, or None for those of constant decay.
    """
    profile = profile_of(name)
    profiles = {own: Profile(sigma_rel=width) if width else Profile(decay=float(own)) for own, width in known.items()}
    return next((own for own in profiles if profiles[own] == profile), None)


def rebuilt(run_folder: Path, name: str, step: int | None, absent: str) -> Rebuilt:
    """The average of a name such as 0.9996 or 0.07, which was not tracked; it is said that it is put together.

    absent: the error that there is none of this name. InputError if the snapshots cannot match it.
    """
    if not (profile := profile_of(name)):
        raise InputError(absent)
    try:
        found = rebuild(run_folder, profile, step)
    except InputError as e:
        raise InputError(f"{absent} ({e})") from None
    if found.unmatched > MISMATCH:
        raise InputError(f"{absent} (of its profile, {found.unmatched:.0%} cannot be matched by the snapshots)")
    said = f"average {found.average} was not tracked: put together from {count(len(found.terms), 'average')}"
    print(f"{said} of snapshots; {found.unmatched:.2%} of its profile could not be matched", file=sys.stderr)
    return found


def rebuild(run_folder: Path, profile: Profile, step: int | None = None) -> Rebuilt:
    """The average of a run after `step`, by default the last snapshot. InputError if its snapshots do not reach it."""
    from asymflow.training.run import checkpoint
    from asymflow.training.run import folder as run

    check_run(run_folder)
    folder = run_folder / run.SNAPSHOTS
    steps = checkpoint.steps(folder)
    if not steps:
        raise InputError(f"{run_folder} has no snapshots: set ema.snapshot_every before training")
    newest = max([*steps, *checkpoint.steps(run_folder / run.CHECKPOINTS)])
    end = steps[-1] if step is None else step
    if end > newest:
        raise InputError(f"--step {end} is beyond step {newest}, to which {run_folder} has come")
    snapshots = [
        (step, name, sigma_rel)
        for step in steps
        if step <= end
        for name, sigma_rel in checkpoint.read_state(checkpoint.folder_of(folder, step))["averages"].items()
    ]
    if not snapshots:
        raise InputError(f"{run_folder} has no snapshot up to step {end}: the first is of step {steps[0]}")
    widths = [(step, width) for step, _, width in snapshots]
    coefficients, unmatched = averages.reconstruction(widths, end, profile)
    terms = tuple((step, name, c) for (step, name, _), c in zip(snapshots, coefficients.tolist(), strict=True) if c)
    last = snapshots[-1][0]
    exact = f"--step {last} --sigma-rel {' or '.join(str(width) for step, width in widths if step == last)}"
    newest_used = checkpoint.folder_of(folder, terms[-1][0])
    name = profile.name if profile.sigma_rel is None else f"rel-{profile.sigma_rel:.10g}"  # not rounded, as there
    return Rebuilt(run_folder, newest_used, end, name, terms, unmatched, exact)
