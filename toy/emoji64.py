"""Does it hold for a transformer on real images? 3,781 emoji of 64 x 64 pixels: velocity against x0 against asymmetric.

    python -m toy.emoji64 --data emoji64.tar       # hours on a CPU; may be stopped and started again

docs/emoji64.md says how to make emoji64.tar, and `pip install -e ".[train]"` is needed. For every seed and rank,
`train_ddp.py --config emoji64` trains the same JiT (width 256, depth 6, patch 16: D = 768) on the same images in the
same order with the same noise; only `subspace.rank` differs: 0 is x0-prediction, "full" u-prediction. Each run is
judged by its loss, the flow-matching loss of the recovered velocity, and by the Fréchet distance between its samples
(without guidance) and the images.

The features for that distance are those of a small classifier (asymflow/evaluation/classifier.py), which is trained
here first, on the same images: Inception has never seen an emoji, and FIDs by fewer samples than it has features mean
little. So these distances can be compared with each other, not with anybody's FID. The floor is that of a model which
repeats the images: as many of them as there are samples, drawn with repetition, against all."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from asymflow.packages import importing, need

with importing(__name__):
    need("deepspeed", "torch_fidelity")  # of the trainings and their evaluation, an hour later
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from torch import Tensor
    from tqdm import tqdm

    from asymflow import AsymFlow, opening
    from asymflow.cli.common import at_least
    from asymflow.data.shards import TarShards
    from asymflow.errors import InputError
    from asymflow.evaluation.classifier import Classifier
    from asymflow.evaluation.frechet import frechet_distance, statistics
    from asymflow.pictures import image_grid
    from asymflow.sampling import generate
    from toy.common import in_one_line, keep_earlier

SIZE, CLASSES, KEPT = 64, 9, 381  # pixels; classes; images kept from the classifier
JUDGE = "classifier.safetensors"
NAMES = {"0": "x0-prediction", "full": "u-prediction"}
COLORS = {"0": "C1", "full": "C3", "8": "C0", "32": "C2"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("toy.emoji64", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--data", type=Path, required=True, help="emoji64.tar: see docs/emoji64.md")
    p.add_argument(
        "--out", type=Path, default=Path("runs/toy/emoji64"), help="folder for the runs, figures and results"
    )
    p.add_argument("--ranks", default="8,0,full", help="of the subspace: 0 is x0-, full is u-prediction")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--steps", type=at_least(1), default=1500, help="of each training")
    p.add_argument("--samples", type=at_least(2), default=2000, help="for the Fréchet distance")
    p.add_argument("--epochs", type=at_least(1), default=12, help="of the classifier")
    p.add_argument("--set", action="append", default=[], metavar="a.b=c", help="passed on to train_ddp.py")
    return p.parse_args(argv)


# ---- The judge -------------------------------------------------------------------------------------------------------
def load(dataset) -> tuple[Tensor, Tensor]:
    """All images (n, 3, H, W), uint8, and their classes (n,)."""
    samples = [dataset[i] for i in tqdm(range(len(dataset)), desc="reading", unit="image", leave=False)]
    return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> tuple[Classifier, float]:
    """A classifier in eval mode, and its accuracy on `KEPT` images that it has not seen (fewer, if there are few).

    InputError if there are too few images for one batch.
    """
    torch.manual_seed(0)
    count = min(KEPT, len(images) // 5)
    kept, used = torch.randperm(len(images)).split([count, len(images) - count])
    classifier = Classifier(int(labels.max()) + 1)
    side = images.shape[-1]
    far = side // 10  # pixels that an image is shifted by at most
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    if len(used) < 64:
        raise InputError(f"{len(images)} images are too few to train a classifier with: it takes 79")
    steps = epochs * (len(used) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", unit="step"):
        if step % (len(used) // 64) == 0:
            order = used[torch.randperm(len(used))]
        batch = order[step % (len(used) // 64) * 64 :][:64]
        x, y = torch.randint(0, 2 * far + 1, (2,)).tolist()
        shifted = F.pad(images[batch], (far, far, far, far), value=255)[:, :, y : y + side, x : x + side]
        loss = F.cross_entropy(classifier(shifted), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval().requires_grad_(False)
    right = [classifier(images[part]).argmax(1) == labels[part] for part in kept.split(64)]
    return classifier, torch.cat(right).double().mean().item()


def judge_in(folder: Path, dataset, images: Tensor, labels: Tensor, epochs: int) -> tuple[Classifier, float]:
    """The classifier that is kept in a folder, and its accuracy; it is trained if there is none.

    InputError if it was trained on other images, or for another number of epochs: distances would not compare.
    """
    about = {"data": dataset.digest, "epochs": epochs}
    if not (folder / JUDGE).exists():
        classifier, accuracy = train_classifier(images, labels, epochs)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "classifier.json").write_text(json.dumps({"accuracy": accuracy, **about}) + "\n")
        classifier.save(folder / JUDGE)
    there = opening.read_json(folder / "classifier.json")
    if differing := [key for key, value in about.items() if there.get(key, value) != value]:
        raise InputError(f"{folder} has a classifier of other {' and '.join(differing)}: choose another --out")
    return Classifier.load(folder / JUDGE), there["accuracy"]


def floor(classifier: Classifier, images: Tensor, count: int) -> float:
    """The Fréchet distance between `count` of the images, drawn with repetition, and all; the mean of 8."""
    features = torch.cat([classifier.features(part) for part in images.split(64)])
    distances = []
    for seed in range(8):
        drawn = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(seed))
        distances.append(frechet_distance(statistics(features[drawn]), statistics(features)))
    return float(np.mean(distances))


# ---- The runs --------------------------------------------------------------------------------------------------------
def train(args: argparse.Namespace, rank: str, seed: str, weights: Path) -> dict:
    """One run of train_ddp.py, continued or left alone if it is there already: its losses and its distance."""
    run = args.out / f"rank-{rank}-seed-{seed}"
    settings = {
        "data.path": args.data,
        "subspace.rank": rank,
        "train.seed": seed,
        "train.steps": args.steps,
        "sample.guidance": 1.0,
        "sample.steps": 25,
        "evaluate.every": args.steps,
        "evaluate.num": args.samples,
        "evaluate.extractor": "classifier",
        "evaluate.weights": weights,
        "evaluate.labels": "data",
    }
    options = [f"--set={key}={value}" for key, value in settings.items()] + [f"--set={option}" for option in args.set]
    command = [sys.executable, "train_ddp.py", "--config", "emoji64", "--out", str(run), *options]
    print(" ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"the training in {run} failed; see above")
    metrics, evaluations = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    asked = (args.steps, args.samples)
    distances = [e["frechet_distance"] for e in evaluations if (e["step"], e["evaluate"]["num"]) == asked]
    if len(metrics) != args.steps or not distances:
        raise InputError(f"{run} has {len(metrics)} steps, not {args.steps}: choose another --out")
    distance = float("nan") if distances[-1] is None else distances[-1]  # samples that are not finite
    return {
        "rank": rank,
        "seed": seed,
        "loss": [entry["loss"] for entry in metrics],
        "images_per_second": float(np.median([entry["images_per_second"] for entry in metrics])),
        "frechet_distance": distance,
    }


def grid(args: argparse.Namespace, rank: str, seed: str) -> np.ndarray:
    """Samples of a run, with guidance: 36 images, of the same classes from the same noise for each run."""
    run = args.out / f"rank-{rank}-seed-{seed}"
    model = run / f"model-{args.steps}"
    if not model.exists():
        words = [sys.executable, "-m", "asymflow", "export", "--run", run, "--out", model]
        if subprocess.run(words, check=False).returncode:
            raise InputError(f"{run} could not be exported; see above")
    labels = [i % CLASSES for i in range(36)]
    return np.asarray(image_grid(generate(AsymFlow.from_pretrained(model).eval(), labels, steps=25, guidance=2.0)))


def name(rank: str) -> str:
    return NAMES.get(rank, f"asymmetric, rank {rank}")


def picture(ranks: list[str], runs: list[dict], grids: dict[str, np.ndarray], results: dict) -> Figure:
    figure = Figure(figsize=(3.6 * len(grids), 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    for axis, (title, image) in zip(above.subplots(1, len(grids)), grids.items(), strict=True):
        axis.imshow(image)
        axis.set_title(title)
        axis.set_axis_off()
    loss, distance = below.subplots(1, 2)
    for i, rank in enumerate(ranks):
        own = [run for run in runs if run["rank"] == rank]
        window = min(50, len(own[0]["loss"]))
        smooth = np.array([np.convolve(run["loss"], np.ones(window) / window, "valid") for run in own])
        steps, color = np.arange(window, window + smooth.shape[1]), COLORS.get(rank, f"C{4 + i}")
        loss.plot(steps, smooth.mean(0), color=color, label=name(rank))
        loss.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.25, linewidth=0)
        distance.plot([i] * len(own), [run["frechet_distance"] for run in own], "o", color=color)
    loss.set(yscale="log", xlabel="step", title="flow-matching loss (mean of 50 steps; band: the seeds)")
    loss.legend()
    distance.axhline(results["floor"], linestyle="--", color="0.5", label="a model that repeats the images")
    distance.set(yscale="log", title="Fréchet distance in the classifier's features, each seed")
    distance.set_xticks(range(len(ranks)), [name(rank) for rank in ranks])
    distance.legend()
    return figure


def study(args: argparse.Namespace) -> None:
    ranks, seeds = args.ranks.split(","), args.seeds.split(",")
    images, labels = load(dataset := TarShards(args.data, SIZE))
    if dataset.num_classes > CLASSES:
        raise InputError(f"{dataset.path} has {dataset.num_classes} classes, and this is for {CLASSES}")
    classifier, accuracy = judge_in(args.out, dataset, images, labels, args.epochs)
    results = {"steps": args.steps, "samples": args.samples, "classifier_accuracy": accuracy}
    results["floor"] = floor(classifier, images, args.samples)
    print(f"the classifier is right about {accuracy:.1%} of the images that were kept from it", flush=True)
    print(f"floor of the Fréchet distance: {results['floor']:.3f}", flush=True)
    runs = [train(args, rank, seed, args.out / JUDGE) for seed in seeds for rank in ranks]
    table = []
    for rank in ranks:
        own = [run for run in runs if run["rank"] == rank]
        last = [float(np.mean(run["loss"][-100:])) for run in own]
        distances = [run["frechet_distance"] for run in own]
        table.append({"rank": rank, "loss_of_last_100": last, "frechet_distance": distances})
        shown = " ".join(f"{d:8.3f}" for d in distances), " ".join(f"{loss:.4f}" for loss in last)
        print(f"{name(rank):22} Fréchet distance {shown[0]}   loss of the last 100 steps {shown[1]}")
    shown_first = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:36]
    grids = {"images": np.asarray(image_grid(images[shown_first].float() / 127.5 - 1))}
    grids |= {name(rank): grid(args, rank, seeds[0]) for rank in ranks}
    figure, file = (keep_earlier(args.out / f"emoji64.{kind}") for kind in ("png", "json"))
    picture(ranks, runs, grids, results).savefig(figure, dpi=110)
    file.write_text(json.dumps({**results, "table": table, "runs": runs}) + "\n")
    print(f"wrote {figure} and {file}")


def main(argv: list[str] | None = None) -> int:
    return in_one_line("toy.emoji64", lambda: study(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
