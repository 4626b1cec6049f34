"""`python -m toy.paper`: see the package."""

import argparse
import json
import sys
from pathlib import Path

from asymflow.packages import importing, need

with importing(__name__):
    need("deepspeed", "torch_fidelity")
    from asymflow.data.shapes import Shapes
    from asymflow.errors import InputError
    from asymflow.files import replacing
    from toy import paper
    from toy.common import in_one_line
    from toy.emoji64 import load
    from toy.paper import page
    from toy.paper.criterion import spectrum
    from toy.paper.data import PATCH, SIZE, EmojiData, ShapesData
    from toy.paper.experiments import PLANS
    from toy.paper.page import SPECTRA
    from toy.paper.runs import COMMIT, QUICK, Lab, Scale, in_words

EXPERIMENTS = (*PLANS, "finetuning")
FURTHER = {"repa": ["transformers"], "finetuning": ["diffusers", "lpips"]}  # packages that others do without
OUT = "runs/toy/paper"
PICTURES = 4000  # whose spectrum is taken; of the emoji, all in the training


def arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("toy.paper", description=paper.__doc__, formatter_class=form, allow_abbrev=False)
    p.add_argument("what", choices=[*EXPERIMENTS, "predict", "all", "page"])
    p.add_argument("--out", type=Path, help=f"folder of the runs and their JSON files (default: {OUT}, or {OUT}-quick)")
    p.add_argument("--docs", type=Path, help="folder that the page, paper.md, goes to (default: --out)")
    p.add_argument("--only", metavar="A,B", help="runs by their names, such as rank-8-seed-0, for a process of its own")
    p.add_argument("--data", type=Path, metavar="TAR", help="emoji64.tar, for emoji")
    p.add_argument("--quick", action="store_true", help="a minute: a look at whether it runs, no results")
    args = p.parse_args(argv)
    takes = {"data": ("emoji", "predict", "all"), "docs": ("page", "all"), "only": (*PLANS, "finetuning")}
    for option, which in takes.items():
        if getattr(args, option) and args.what not in which:
            raise InputError(f"--{option} does not go with {args.what}, but with {', '.join(which)}")
    args.out = (args.out or Path(f"{OUT}-quick" if args.quick else OUT)).resolve()
    return args


def experiment(what: str, args: argparse.Namespace) -> None:
    """All runs of an experiment, or those of --only; with --quick, the first three."""
    if what == "finetuning":
        from toy.paper.finetuning import finetuning

        return finetuning(args)
    runs = {run.name: run for run in PLANS[what](args.out)}
    names = args.only.split(",") if args.only else list(runs)[: 3 if args.quick else None]
    if strange := [name for name in names if name not in runs]:
        raise InputError(f"--only {strange[0]} is none of {', '.join(runs)}")
    data = EmojiData(args.data, args.out) if what == "emoji" else ShapesData()
    lab = Lab(args.out, QUICK if args.quick else Scale(), data)
    lab.yardsticks()
    for name in names:
        found = lab.result(runs[name])["at the end"].get("guided", {})
        print(f"{name}: {in_words(found) or 'done'}", flush=True)


def predict(out: Path, emoji: EmojiData) -> None:
    """The spectra of the data that is trained on, of which the page's prediction is made."""
    pictures = {"shapes": Shapes(PICTURES, SIZE), "emoji": emoji.judged_by(PICTURES)}
    found = {"commit": COMMIT, "pictures": {name: len(data) for name, data in pictures.items()}}
    found["spectra"] = {
        name: [float(f"{v:.5g}") for v in spectrum(load(data)[0], PATCH)] for name, data in pictures.items()
    }
    with replacing(out / SPECTRA) as beside:
        beside.write_text(json.dumps(found) + "\n")
    print(f"wrote {out / SPECTRA}")


def make_page(out: Path, docs: Path) -> None:
    missing = page.write(out, docs)
    print("\n".join([f"wrote {docs / 'paper.md'}", *(f"no results yet for {name}" for name in missing)]))


def run(args: argparse.Namespace) -> None:
    doing = [args.what]
    if args.what == "all":
        doing = ["predict", *EXPERIMENTS, *(["page"] if not args.quick else [])]
    if not args.data and {"emoji", "predict"} & set(doing):
        raise InputError(f"{args.what} needs --data emoji64.tar: docs/emoji64.md says how to make it")
    with importing(__name__):
        for what in doing:  # before the first of them, which may take hours
            need(*FURTHER.get(what, ()))
    for what in doing:
        if what == "page":
            make_page(args.out, args.docs or args.out)
        elif what == "predict":
            predict(args.out, EmojiData(args.data, args.out))
        else:
            experiment(what, args)


def main(argv: list[str] | None = None) -> int:
    return in_one_line("toy.paper", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
