"""`asymflow card`: the README of a model on the Hugging Face Hub, from the run that it was trained by."""

import argparse
import json
import re
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from asymflow import files, opening
from asymflow.cli.averages import profile_of, rebuild
from asymflow.cli.common import new_folder, replacing_folder
from asymflow.cli.models import about, choose
from asymflow.cli.plot import draw, read_run
from asymflow.errors import InputError
from asymflow.text import count

ABOUT = """Write the card of a model: its README for the Hugging Face Hub, with the configuration, the curves, the
newest samples, and results of asymflow evaluate, as text and as metadata (model-index)."""
EXAMPLES = """\
examples:
  asymflow card --run runs/h16 --result evals/h16 --name my/asymflow-h16 --license apache-2.0 --out card
  asymflow export --run runs/h16 --out models/h16 && cp card/* models/h16

OUT has README.md and config.yaml, and as far as the run has any, curves.png and samples.png. Paths of this machine are
not in it. Read it before you publish it: what the data is, and who may use the model for what, only you can say."""
METRICS = {"frechet_distance": "fid", "kid": "kid", "inception_score": "inception_score"}
TASK = "unconditional-image-generation"  # the Hub has no name for images of classes


def add_command(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("card", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the training run")
    p.add_argument("--result", type=Path, action="append", default=[], help="of asymflow evaluate; several times")
    p.add_argument("--name", help="of the model (default: that of the folder)")
    p.add_argument("--license", metavar="ID", help="as the Hub names it, such as apache-2.0")
    p.add_argument("--data-name", metavar="NAME", help="of the data, for the metadata, such as imagenet-1k")
    p.add_argument("--out", type=Path, required=True, help="new folder for the card")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    new_folder(args.out)
    choice = choose(args.folder, None, None)
    config, subspace, state = about(choice.run, choice.folder)
    if config.finetune:
        raise InputError(f"{args.folder} finetunes a FLUX.2, and cards are of models from scratch")
    results = [read_result(path, args.folder, state["step"]) for path in args.result]
    name = args.name or args.folder.resolve().name
    curves = read_run(args.folder, name)
    for remark in curves.remarks:
        print(remark, file=sys.stderr)
    with replacing_folder(args.out) as folder:
        if curves.steps:
            draw([curves]).savefig(folder / "curves.png", format="png")
        if curves.samples:
            curves.samples.save(folder / "samples.png")
        (folder / "config.yaml").write_text(published(args.folder / "config.yaml"))
        text = card(args, name, config, subspace, state, curves, results)
        (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"written: {', '.join(str(args.out / file) for file in sorted(p.name for p in args.out.iterdir()))}")


def read_result(path: Path, run_folder: Path, step: int) -> dict:
    """A result of asymflow evaluate. InputError if it is of a checkpoint or of snapshots that the run does not have.

    step: of the model of the card. Another one is said.
    """
    from asymflow.evaluation import result
    from asymflow.training.run import checkpoint, folder

    found = result.read(path)
    scored = found["scored"]
    if checksum := scored.get("checkpoint_sha256"):
        manifests = (run_folder / folder.CHECKPOINTS).glob(f"*/{checkpoint.MANIFEST}")
        if checksum not in map(files.sha256, manifests):
            raise InputError(f"{path} is of a checkpoint that is not, or no longer, in {run_folder}")
    elif checksum := scored.get("snapshots_sha256"):
        if checksum != snapshots_sha256(run_folder, scored):
            raise InputError(f"{path} is of snapshots that are not, or no longer, in {run_folder}")
    else:
        print(f"{path} is of {found['of']}: that this was made of {run_folder} cannot be checked", file=sys.stderr)
    if scored.get("step", step) != step:
        print(f"{path} is of step {scored['step']}, but the card is of step {step}", file=sys.stderr)
    return found


def snapshots_sha256(run_folder: Path, scored: dict) -> object:
    """The checksum of the snapshots that the run puts the same average together from; None if it cannot."""
    try:
        return rebuild(run_folder, profile_of(scored["average"]), scored["step"]).identity()["snapshots_sha256"]
    except (InputError, KeyError, TypeError, AttributeError):  # no snapshots, or no average of that name
        return None


def published(path: Path) -> str:
    """The configuration, without the paths of this machine: of each only its last part stays."""
    from asymflow import yaml12

    def short(value: object) -> object:
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [short(inner) for inner in value]
        is_path = isinstance(value, str) and ("/" in value or "\\" in value) and Path(value).expanduser().is_absolute()
        return Path(value).name if is_path else value

    values = yaml12.parse(opening.read_text(path), lambda line: f"{path}, line {line + 1}").values
    return yaml12.in_yaml(short(values), default_flow_style=False) + "\n"


def card(args: argparse.Namespace, name: str, config, subspace, state: dict, curves, results: list[dict]) -> str:
    """The text of README.md."""
    data = args.data_name or Path(config.data.path or config.data.kind).name
    metadata = ModelCardData(
        license=args.license,
        library_name="asymflow",
        tags=["asymflow", "image-generation", "flow-matching"],
        model_name=name,
        eval_results=list(metrics_of(results, data)) or None,
    )
    m, t = config.model, config.train
    kinds = {0: "x0-prediction", subspace.dim: "u-prediction"}
    prediction = kinds.get(subspace.rank, f"asymmetric prediction of rank {subspace.rank} of {subspace.dim}")
    averages = ", ".join(state["averages"]) or "none"
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"{m.backbone} {m.size or ''}".strip() + f" in {prediction}: images of {m.image_size} x {m.image_size} pixels, "
        f"{count(m.num_classes, 'class')}. Trained with [asymflow](https://arxiv.org/abs/2605.12964) for "
        f"{state['step']:,} of {t.steps:,} steps of {t.global_batch_size} images on {data} "
        f"({count(state['images'], 'image')}). Moving averages: {averages}. The whole configuration is in config.yaml.",
    ]
    if curves.samples:
        lines += [f"![Samples of step {curves.samples_step:,}](samples.png)"]
    lines += ["## To draw from it", f"```sh\nasymflow sample --model {name} --out samples\n```"]
    if results:
        lines += ["## Results", *map(table, results)]
    if curves.steps:
        lines += ["## Training", "![Curves of the training](curves.png)"]
    return "\n\n".join(lines) + "\n"


def table(result: dict) -> str:
    """A result for people, with what is needed to repeat it."""
    from asymflow.evaluation.result import shown, title

    extractor = result["extractor"]["name"]
    rows = []
    for key, found in result["measures"].items():
        value = shown(key, found["value"], found["uncertainty"])
        rows.append(f"| {title(key, extractor)} | {value} | {'; '.join(found['remarks'])} |")
    words = f"Protocol {result['protocol']['name']}: {', '.join([count(result['images'], 'image'), *drawn(result)])}."
    protocol = {key: value for key, value in result["protocol"].items() if key not in ("weights", "clip")}
    reference = result["reference"] | {"name": Path(result["reference"].get("name") or "none").name}
    protocol["reference"] = reference["name"]  # paths of this machine are nobody's business
    others = ("scored", "extractor", "clip", "versions")
    whole = {"protocol": protocol, "reference": reference} | {key: result[key] for key in others if key in result}
    whole = json.dumps(whole, ensure_ascii=False)
    details = f"<details><summary>All that these numbers depend on</summary>\n\n```json\n{whole}\n```\n\n</details>"
    return "\n".join([words, "", "| measure | value | remarks |", "|---|---|---|", *rows, "", details])


def drawn(result: dict) -> list[str]:
    """How the images were drawn, such as ["step 1000", "average 0.9999", "guidance 2.3"]."""
    from asymflow.evaluation.result import besides

    of = result["scored"]
    keys = ("step", "average", "guidance", "interval", *(["orthogonal"] if of.get("orthogonal") else []))
    return [f"{key} {of[key]}" for key in keys if key in of] + besides(of)


def metrics_of(results: list[dict], data: str):
    """The measures for the metadata. A Fréchet distance is called FID only in the features of Inception."""
    from asymflow.evaluation.result import title

    for result in results:
        extractor = result["extractor"]["name"]
        settings = ", ".join([f"protocol {result['protocol']['name']}", *drawn(result)])
        for key, found in result["measures"].items():
            if found["value"] is None:
                continue
            plain = extractor == "inception-v3-compat" and METRICS.get(key)
            yield EvalResult(
                task_type=TASK,
                dataset_type=slug(data),
                dataset_name=data,
                metric_type=plain or slug(title(key, extractor)),
                metric_value=found["value"],
                metric_name=f"{title(key, extractor)} ({settings})",
            )


def slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
