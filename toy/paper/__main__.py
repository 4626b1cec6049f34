"""`python -m toy.paper`: see the package."""

import argparse
import sys
from pathlib import Path

from asymflow.packages import importing, need

with importing("toy.paper"):
    need("deepspeed", "torch_fidelity")
    from asymflow.errors import InputError
    from toy import paper
    from toy.paper.runs import QUICK, Lab, Run, Scale

RANKS = ("8", "0", "random 8", "2", "4", "16", "32", "full")  # the most decisive first
SEEDS = (0, 1, 2)


def rank_sweep(quick: bool) -> list[Run]:
    """Figures 5 and 6 and Table 1: which rank is best, how fast is it, and what does it lose without a clamp?"""
    found = []
    for ranks in (RANKS[:2], RANKS[2:]):
        for seed in SEEDS[:1] if quick else SEEDS:
            for rank in ranks[:2] if quick else ranks:
                random = int(rank.removeprefix("random ")) if rank.startswith("random") else 0
                settings = () if random else (f"subspace.rank={rank}",)
                found.append(Run(f"rank-{rank.replace(' ', '-')}-seed-{seed}", seed, settings, random=random))
    return found


EXPERIMENTS = {"rank": rank_sweep}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("toy.paper", description=paper.__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("what", choices=[*EXPERIMENTS], help="the experiment")
    p.add_argument("--out", type=Path, default=Path("runs/toy/paper"), help="folder of the runs and their JSON files")
    p.add_argument("--only", metavar="A,B", help="runs by their names, such as rank-8-seed-0, for a process of its own")
    p.add_argument("--quick", action="store_true", help="a minute: a look at whether it runs, no results")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    runs = {run.name: run for run in EXPERIMENTS[args.what](args.quick)}
    try:
        names = args.only.split(",") if args.only else list(runs)
        if strange := [name for name in names if name not in runs]:
            raise InputError(f"--only {strange[0]} is none of {', '.join(runs)}")
        lab = Lab(args.out, QUICK if args.quick else Scale())
        for name in names:
            found = lab.result(runs[name])["at the end"]["guided"]
            print(
                f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None),
                flush=True,
            )
    except (InputError, OSError) as e:
        print(f"toy.paper: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
