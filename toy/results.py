"""How much do guidance, its interval and the moving average matter? Two small models, searched in full on a CPU.

    python -m toy.results shapes                          # an hour on one core; may be stopped and started again
    python -m toy.results emoji64 --data emoji64.tar      # an hour and a half; for the file see docs/emoji64.md
    python -m toy.results write                           # docs/results.md and its figures, from the JSON files

`pip install -e ".[train]"` is needed. Each study is a chain of commands, which are printed: `train_ddp.py` trains a
model, `asymflow evaluate search` looks for its best setting, and `asymflow evaluate` measures usual settings beside it.
All use the features of a small classifier that is trained here first (see toy/emoji64.py): the distances can be
compared with each other, within a study, and are not FIDs."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from asymflow.packages import importing, need

with importing(__name__):
    need("deepspeed", "torch_fidelity")  # of the commands, an hour later

    from asymflow import opening
    from asymflow.cli.evaluate_search import picture
    from asymflow.data.shapes import Shapes
    from asymflow.data.shards import TarShards
    from asymflow.errors import InputError
    from asymflow.evaluation import result
    from asymflow.files import replacing
    from asymflow.text import count
    from toy.common import commit, in_one_line, machine
    from toy.emoji64 import JUDGE, SIZE, floor, judge_in, load

INTRODUCTION = """
# Results on two cores

How much do guidance, its interval and the length of the moving average matter, and does `asymflow evaluate search` find
the best of them? Two small models, searched in full. `python -m toy.results` makes this page from the JSON files that
the commands left.

The distances are in the features of a small classifier of the same images: within a table they can be compared with
each other, and with no FID.
"""
FINDINGS = {  # what came out, in words
    "shapes": """
**Guidance matters most**: from no guidance to a scale of 2, the distance falls from 7.6 to 4.4. A narrower interval
wants a larger scale (3 on [0, 0.7] is as good as 2 on [0, 1]), and by itself gains nothing. **The average matters
next**: of width 0.03, shorter than the configuration's 0.995, it gives 3.86 ± 0.09, against 4.37 ± 0.20. Width 0.2 is
far worse, in a training of 1,500 steps whose beginning it still remembers.

The oracle says what the distance does not. In these three minutes of training the model has learnt to count and to
colour (91 and 95 % right without guidance), but hardly its shapes, so few pictures are right in every respect, with any
setting. Guidance makes edges sharper, and pictures less clean: the residual rises from 19.6 to 24.4 grey levels, and
precision falls. With the average that was found both are somewhat better than with the configuration's.

By so few images many settings cannot be told apart: the found one is one of the best, not the best. (The search stopped
here with a third of its budget left, because it was not enough for all of them; since then it goes on with the best.)

(The ± of recall is here that of other images of the reference, which is too small; since then it is that of other
samples of the model.)
""",
    "emoji64": """
**Guidance matters most**, here too: from 1.61 to about 0.7. **The longer the average, the more guidance it wants**: the
best scale is 2 at width 0.05, 2.25 to 2.5 at 0.08, 2.5 to 2.75 at 0.13. An interval that ends below 1 is clearly worse.

**The search gained nothing over the configuration.** Its setting has 0.76 ± 0.03, the configuration's has 0.63 ± 0.08
in one draw: no difference that chance could not make. The average with decay 0.99 was not among those that were
searched, and is about as long as they are. What would tell is more images: this is a budget of minutes.

(The ± of recall is here that of other images of the reference, which is too small; since then it is that of other
samples of the model.)
""",
}
DATA = {"shapes": "", "emoji64": " --data emoji64.tar"}
COLUMNS = {
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "right": "all right",
    "sharpness": "sharpness",
    "residual": "residual",
}
DOCS = Path(__file__).resolve().parent.parent / "docs"
ABOUT, PROTOCOL = "about.json", "protocol.yaml"
USUAL = {  # beside the setting that the search finds; all with the average that the configuration names first
    "no guidance": (1.0, "0,1"),
    "guidance 2, as in the configuration": (2.0, "0,1"),
    "guidance 2.3 on [0, 0.88], as in the paper": (2.3, "0,0.88"),
}


@dataclass(frozen=True)
class Study:
    """A model and its search. settings: of the training. steps: of the sampler. num: images of each result. ranges and
    budget: of the search. oracle: whether the truth is known."""

    title: str
    config: str
    settings: tuple[str, ...]
    steps: int
    num: int
    ranges: tuple[str, str, str]
    budget: int
    oracle: bool


STUDIES = {
    "shapes": Study(
        "Generated shapes, 32 x 32",
        "shapes_tiny",
        (),
        8,
        2048,
        ("0.02,0.03,0.05,0.08,0.13,0.2", "1:3:0.25", "0,0.5:1:0.1"),
        30_000,
        True,
    ),
    "emoji64": Study(
        "Emoji, 64 x 64",
        "emoji64",
        ("train.precision=fp32", "train.steps=1500", "sample.every=null", "data.workers=1"),
        6,
        1024,
        ("0.03,0.05,0.08,0.13", "1:3:0.25", "0,0.6:1:0.2"),
        15_000,
        False,
    ),
}
QUICK = ("0.1", "1,2", "0,0.5,1")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("toy.results", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("what", choices=[*STUDIES, "write"], help="a study, or to write the page from what they left")
    p.add_argument("--data", type=Path, help="emoji64.tar, for emoji64")
    p.add_argument("--out", type=Path, default=Path("runs/toy/results"), help="folder of the studies")
    p.add_argument("--docs", type=Path, help=f"folder of the page, for write (default: {DOCS})")
    p.add_argument("--quick", action="store_true", help="minutes: a look at whether it runs, no results")
    args = p.parse_args(argv)
    used = {"data": args.what == "emoji64", "docs": args.what == "write", "quick": args.what != "write"}
    for option, taken in used.items():
        if getattr(args, option) and not taken:
            raise InputError(f"--{option} does not go with {args.what}")
    return args


# ---- A study ---------------------------------------------------------------------------------------------------------
def study(args: argparse.Namespace) -> None:
    """All commands of a study. Each goes on where it was stopped, and leaves alone what is there."""
    plan, folder, started = STUDIES[args.what], args.out / args.what, time.time()
    if args.what == "emoji64" and args.data is None:
        raise InputError("emoji64 needs --data emoji64.tar")
    pictures, num, epochs = (300, 64, 1) if args.quick else (10_000, plan.num, 12)
    data = TarShards(args.data, SIZE) if args.data else Shapes(pictures, 32)
    images, labels = load(data)
    classifier, accuracy = judge_in(folder, data, images, labels, epochs)
    print(f"the classifier is right about {accuracy:.1%} of the images that were kept from it", flush=True)
    protocol = {
        "name": f"{args.what}, {num:,} images",
        "about": f"{num:,} images, of classes as in the training, in the features of a small classifier",
        "num": num,
        "classes": "data",
        "steps": plan.steps,
        "precision": "float32",
        "extractor": "classifier",
        "weights": str((folder / JUDGE).resolve()),
        "reference": "data",
    }
    with replacing(folder / PROTOCOL) as beside:
        beside.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in protocol.items()))

    run, commands = folder / "run", []
    settings = [*plan.settings, f"data.path={args.data}" if args.data else f"data.size={pictures}"]
    settings += ["train.steps=20", "ema.snapshot_every=5", "sample.every=null"] if args.quick else []
    asked = [sys.executable, "train_ddp.py", "--config", plan.config, "--out", run]
    command(commands, *asked, *(f"--set={setting}" for setting in settings))
    common = ["--model", run, "--protocol", folder / PROTOCOL]
    budget, start = (512, 64) if args.quick else (plan.budget, 128)
    ranges = zip(("--ema", "--guidance", "--interval"), QUICK if args.quick else plan.ranges, strict=True)
    options = [word for pair in ranges for word in pair]
    evaluate = [sys.executable, "-m", "asymflow", "evaluate"]
    search = [*evaluate, "search", *common, *options, "--budget", budget, "--start", start]
    command(commands, *search, "--out", folder / "search")
    best = opening.read_json(folder / "search" / "search.json")["best"]
    usual = dict(list(USUAL.items())[:1]) if args.quick else USUAL
    settings = usual | {"the search's": (best["guidance"], ",".join(map(str, best["interval"])))}
    for number, (name, (guidance, interval)) in enumerate(settings.items()):
        chosen = ["--guidance", guidance, "--interval", interval]
        ema = ["--ema", best["average"]] if name not in USUAL else []
        if name in USUAL:
            command(commands, *evaluate, *common, *chosen, "--out", folder / f"usual-{number}")
        if plan.oracle:
            oracle = ["--protocol", "shapes", "--steps", plan.steps, "--num", num, "--precision", "float32"]
            command(commands, *evaluate, "--model", run, *oracle, *chosen, *ema, "--out", folder / f"oracle-{number}")
    about = {
        "settings": settings,
        "accuracy": accuracy,
        "floor": floor(classifier, images, num),
        "commands": commands,
        "commit": commit(),
        "machine": machine(),
        "quick": args.quick,
        "hours": [round((time.time() - started) / 3600, 2)],  # of each start
    }
    if (folder / ABOUT).exists():
        about["hours"] = opening.read_json(folder / ABOUT)["hours"] + about["hours"]
    with replacing(folder / ABOUT) as beside:
        beside.write_text(json.dumps(about, indent=1) + "\n")


def command(commands: list[str], *words) -> None:
    """Run a command, and add it to those that the page shows. InputError if it failed."""
    words = [str(word) for word in words]
    shown = ["python" if word == sys.executable else word for word in words]
    commands.append(" ".join(shown).replace("python -m asymflow", "asymflow"))
    print(commands[-1], flush=True)
    if subprocess.run(words, check=False).returncode:
        raise InputError("this command failed; see above")


# ---- The page --------------------------------------------------------------------------------------------------------
def write(args: argparse.Namespace) -> None:
    """docs/results.md, and a map for each study, from the JSON files of the studies."""
    docs, parts = args.docs or DOCS, [paragraphs(INTRODUCTION)]
    for name in STUDIES:
        if not (about := args.out / name / ABOUT).exists():
            raise InputError(f"{args.out} has no study {name}: python -m toy.results {name}{DATA[name]} makes it")
        if opening.read_json(about)["quick"]:
            raise InputError(f"{args.out / name} is a quick look, whose figures are no results: choose another --out")
    for name in STUDIES:
        summary = opening.read_json(args.out / name / "search" / "search.json")
        with replacing(docs / f"results_{name}.png") as beside:
            picture(summary, "Fréchet distance").savefig(beside, dpi=80, format="png")
        parts.append(section(name, args.out / name, summary))
    with replacing(docs / "results.md") as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {docs / 'results.md'}")


def paragraphs(text: str) -> str:
    """Each paragraph in one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def section(name: str, folder: Path, summary: dict) -> str:
    """What the page says of a study."""
    plan, about = STUDIES[name], opening.read_json(folder / ABOUT)
    rows = []
    for number, (title, (guidance, interval)) in enumerate(about["settings"].items()):
        own = title not in USUAL
        final = summary["final"]
        one = result.read(folder / "search" / final["folders"][0] if own else folder / f"usual-{number}")
        measures = dict(one["measures"])
        if (folder / f"oracle-{number}").exists():
            measures |= result.read(folder / f"oracle-{number}")["measures"]
        cells = {key: result.shown(key, m["value"], m["uncertainty"]) for key, m in measures.items() if key in COLUMNS}
        if own:
            cells["frechet_distance"] = f"**{final['mean']:.3f}** ± {final['spread']:.3f}"
            title = (
                f"**found**: guidance {guidance:g} on [{', '.join(f'{float(end):g}' for end in interval.split(','))}]"
            )
        rows.append([title, one["scored"]["average"], *(cells[key] for key in COLUMNS if key in measures)])
    head = ["", "average", *(title for key, title in COLUMNS.items() if key in measures)]
    table = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    spared = 1 - summary["forward_passes"] / summary["forward_passes_if_each_were_drawn_alone"]
    tied = len(summary["cannot_be_told_apart"]) - 1
    budget = "" if summary["budget_was_enough"] else ", when the budget was spent"
    lines = [
        f"## {plan.title}",
        "\n".join(table),
        f"*{one['images']:,} images a row, {plan.steps} Heun steps; the found setting three times, of images that the "
        f"search has not seen: mean and spread. ± is one standard deviation by chance. Floor, {one['images']:,} of the "
        f"training images, drawn with repetition: {about['floor']:.3f}. The classifier is right about "
        f"{about['accuracy']:.1%} of the images that were kept from it.*",
        f"![Maps of the Fréchet distance over guidance and interval, for each average](results_{name}.png)",
        f"*The search: {summary['settings']:,} of {summary['of']:,} settings, {summary['images']:,} images in all; "
        f"{count(tied, 'other setting')} could not be told apart from the best one{budget}. Shared beginnings of "
        f"trajectories spared {spared:.0%} of the forward passes.*",
        paragraphs(FINDINGS[name]),
        "\n".join(["```sh", f"python -m toy.results {name}{DATA[name]}   # runs:", *about["commands"], "```"]),
        f"{about['machine']}, {sum(about['hours']):.1f} hours beside other work, at commit {about['commit']}.",
    ]
    return "\n\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        args = arguments(argv)
        write(args) if args.what == "write" else study(args)

    return in_one_line("toy.results", run)


if __name__ == "__main__":
    sys.exit(main())
