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
    from toy.emoji64 import load
    from toy.paper import page
    from toy.paper.criterion import spectrum
    from toy.paper.data import SIZE, EmojiData, ShapesData
    from toy.paper.experiments import PLANS
    from toy.paper.page import SPECTRA
    from toy.paper.runs import PATCH, QUICK, Lab, Scale, in_words

EXPERIMENTS = (*PLANS, "finetuning")
FURTHER = {"repa": ["transformers"], "finetuning": ["diffusers", "lpips"]}  # packages that others do without
PICTURES = 4000  # whose spectrum is taken; of the emoji, all in the training
DOCS = Path(__file__).resolve().parents[2] / "docs"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("toy.paper", description=paper.__doc__, formatter_class=form, allow_abbrev=False)
    p.add_argument("what", choices=[*EXPERIMENTS, "predict", "all", "page"])
    p.add_argument("--out", type=Path, default=Path("runs/toy/paper"), help="folder of the runs and their JSON files")
    p.add_argument("--docs", type=Path, default=DOCS, help="folder of the page, paper.md")
    p.add_argument("--only", metavar="A,B", help="runs by their names, such as rank-8-seed-0, for a process of its own")
    p.add_argument("--data", type=Path, metavar="TAR", help="emoji64.tar, for emoji")
    p.add_argument("--quick", action="store_true", help="a minute: a look at whether it runs, no results")
    return p.parse_args(argv)


def experiment(what: str, args: argparse.Namespace) -> None:
    """All runs of an experiment, or those of --only; with --quick, the first three."""
    with importing(__name__):
        need(*FURTHER.get(what, ()))
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
    spectra = {
        name: [float(f"{v:.5g}") for v in spectrum(load(dataset)[0], PATCH)] for name, dataset in pictures.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / SPECTRA) as beside:
        beside.write_text(json.dumps(spectra) + "\n")
    print(f"wrote {out / SPECTRA}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.what in ("emoji", "predict", "all") and not args.data:
            raise InputError(f"{args.what} needs --data emoji64.tar: docs/emoji64.md says how to make it")
        if args.what == "page":
            missing = page.write(args.out, args.docs)
            print("\n".join([f"wrote {args.docs / 'paper.md'}", *(f"no results yet for {name}" for name in missing)]))
        elif args.what == "predict":
            predict(args.out, EmojiData(args.data, args.out))
        else:
            for what in EXPERIMENTS if args.what == "all" else [args.what]:
                experiment(what, args)
    except (InputError, OSError) as e:
        print(f"toy.paper: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntoy.paper: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
