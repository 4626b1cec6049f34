"""`python -m toy.paper`: see the package."""

import argparse
import sys
from pathlib import Path

from asymflow.packages import importing, need

with importing("toy.paper"):
    need("deepspeed", "torch_fidelity")
    from asymflow.errors import InputError
    from toy import paper
    from toy.paper import page
    from toy.paper.experiments import PLANS
    from toy.paper.runs import QUICK, Lab, Scale, in_words

EXPERIMENTS = (*PLANS, "finetuning")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("toy.paper", description=paper.__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("what", choices=[*EXPERIMENTS, "all", "page"], help="an experiment, all of them, or their page")
    p.add_argument("--out", type=Path, default=Path("runs/toy/paper"), help="folder of the runs and their JSON files")
    p.add_argument("--docs", type=Path, default=DOCS, help="folder of the page, paper.md")
    p.add_argument("--only", metavar="A,B", help="runs by their names, such as rank-8-seed-0, for a process of its own")
    p.add_argument("--quick", action="store_true", help="a minute: a look at whether it runs, no results")
    return p.parse_args(argv)


def experiment(what: str, args: argparse.Namespace) -> None:
    """All runs of an experiment, or those of --only; with --quick, the first two."""
    if what == "finetuning":
        from toy.paper.finetuning import finetuning  # of the extra `flux2`, which no other experiment needs

        return finetuning(args)
    runs = {run.name: run for run in PLANS[what](args.out)}
    names = args.only.split(",") if args.only else list(runs)[: 2 if args.quick else None]
    if strange := [name for name in names if name not in runs]:
        raise InputError(f"--only {strange[0]} is none of {', '.join(runs)}")
    lab = Lab(args.out, QUICK if args.quick else Scale())
    for name in names:
        found = lab.result(runs[name])["at the end"].get("guided", {})
        print(f"{name}: {in_words(found) or 'done'}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.what == "page":
            missing = page.write(args.out, args.docs)
            print("\n".join([f"wrote {args.docs / 'paper.md'}", *(f"no results yet for {name}" for name in missing)]))
        else:
            for what in EXPERIMENTS if args.what == "all" else [args.what]:
                experiment(what, args)
    except (InputError, OSError) as e:
        print(f"toy.paper: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
