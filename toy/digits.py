"""Does it hold on real data? Handwritten digits: velocity against x0 against asymmetric.

    python -m toy.digits            # a few minutes on two cores; --quick for a look. Needs scikit-learn

The 1,797 digits of scikit-learn, 8 x 8 pixels, D = 64, in [-1, 1], are split by the seed: 897 train the flows, 300
train a judge, 600 are kept to compare with. A residual MLP is trained for every rank r of the PCA basis A of the
training images, P = A A^T, to predict u_a = P eps - x0. Rank 0 is x0-prediction, rank 64 u-prediction. In between,
r = 8 is drawn, fixed beforehand: the rank of the paper, here 85 % of the energy. All of it with a network of width 48,
narrower than the data as every transformer on pixels is, and for comparison with one that is wider, 128.

Sets of 300 samples are held against random halves of the images kept, by

    Frechet     |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with m and C the mean and covariance of the judge's ten
                decision values (an SVM that tells digits apart): are these digits, and all ten of them?
    1-NN        how often the nearest neighbour of a real image (among all others of both sets) is real: 1/2 where
                nothing tells samples from data. Samples are not asked: the nearest neighbour of sheer noise is real
                too, and counting that in, as is usual, would make noise look perfect;
    distance    median distance to the nearest training image, over that of the images kept: well below 1, the flow
                repeats its training images, above 1, it misses.

The floor of each: the other half of the images kept in place of the samples.
"""

import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nano_asymflow import pca_basis, random_stream
from toy.common import generate, main, trained_flow

DIM, BATCH, RANK = 64, 256, 8
MEASURES = {
    "frechet": "Frechet distance of the judge",
    "one_nn": "1-NN: real images with a real neighbour",
    "distance": "distance to the training images, real = 1",
}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the normal distributions fitted to features (n, d) and (m, d)."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()  # tr (C C')^(1/2)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * cross)


def one_nn(samples: Tensor, real: Tensor) -> float:
    """The share of real images (n, D) whose nearest neighbour is real, and not one of the samples (n, D)."""
    own = torch.cdist(real, real).fill_diagonal_(torch.inf).amin(1)
    return (own < torch.cdist(real, samples).amin(1)).double().mean().item()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Median over a (n, D) of the distance to the nearest b (m, D)."""
    return torch.cdist(a, b).min(1).values.median()


def experiment(args) -> tuple[Figure, dict]:
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=random_stream(args.seed, "split"))
    images, labels = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)[order], digits.target[order]
    kept, judging, training = images.split([600, 300, len(images) - 900])
    judge = SVC().fit(judging, labels[600:900])
    generator = random_stream(args.seed, "halves")
    halves = [kept[torch.randperm(600, generator=generator)].split(300) for _ in range(2 if args.quick else 8)]

    def score(sets: list[Tensor]) -> dict:
        """The mean of each measure, over pairs of a set (300, D) and a half of the images kept."""
        rows = [
            (
                frechet(judge.decision_function(x), judge.decision_function(half)),
                one_nn(x, half),
                (distance(x, training) / distance(half, training)).item(),
            )
            for x, (half, _) in zip(sets, halves, strict=True)
        ]
        return dict(zip(MEASURES, np.mean(rows, axis=0).tolist(), strict=True))

    gram = training.double().mT @ training.double()
    energy = torch.linalg.eigvalsh(gram).flip(0).cumsum(0) / gram.trace()
    energy = torch.cat([energy.new_zeros(1), energy])  # of the first r directions
    results = {
        "judge_accuracy": judge.score(kept, labels[:600]),
        "floor": score([rest for _, rest in halves]),
        "runs": [],
    }
    print(f"the judge is right about {results['judge_accuracy']:.1%} of the digits kept\n")
    print("prediction       energy  width  Frechet    1-NN  distance")
    row = "{:16} {:6.1%} {:>6} {frechet:8.3f} {one_nn:7.3f} {distance:9.2f}".format
    print(row("other real half", 1, "", **results["floor"]))
    train_on = training.to(args.device)
    draw = lambda n, generator: train_on[torch.randint(len(training), (n,), generator=generator, device=args.device)]
    narrow, wide = ((0, RANK, DIM), (RANK,)) if args.quick else ((0, 4, RANK, 16, 32, DIM), (0, RANK, DIM))
    samples = {}
    for width, rank in [(48, rank) for rank in narrow] + [(128, rank) for rank in wide]:
        name = {0: "x0", DIM: "u"}.get(rank, f"asym, rank {rank}")
        basis = pca_basis(train_on, rank)
        flow = trained_flow(args, f"{name}, width {width}", draw, DIM, width, basis, BATCH)
        generator = random_stream(args.seed, "sampling", args.device)
        noise = torch.randn(300 * len(halves), DIM, generator=generator, device=args.device)
        samples[width, rank] = generate(flow, noise).cpu().split(300)
        scores = score(samples[width, rank])
        results["runs"].append({"rank": rank, "width": width, "energy": energy[rank].item(), **scores})
        print(row(name, energy[rank].item(), width, **scores), flush=True)
    return picture(kept, samples, results), results


def picture(kept: Tensor, samples: dict[int, tuple[Tensor, ...]], results: dict) -> Figure:
    figure = Figure(figsize=(13, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    shown = {"real digits, kept from training": kept}
    for rank, name in {0: "x0-prediction", RANK: f"asymmetric, rank {RANK}", DIM: "u-prediction"}.items():
        shown[f"{name}, width 48"] = samples[48, rank][0]
    for axis, (title, x) in zip(above.subplots(1, 4), shown.items(), strict=True):
        tiles = torch.nn.functional.pad(x[:64].view(8, 8, 8, 8), (1, 1, 1, 1), value=0.5)
        axis.imshow(tiles.permute(0, 2, 1, 3).reshape(80, 80), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    ranks = [rank for width, rank in samples if width == 48]
    for axis, (key, title) in zip(below.subplots(1, 3), MEASURES.items(), strict=True):
        for width in (48, 128):
            runs = [(ranks.index(run["rank"]), run[key]) for run in results["runs"] if run["width"] == width]
            axis.plot(
                *zip(*runs, strict=True), "o-", color={48: "C3", 128: "C1"}[width], label=f"samples, width {width}"
            )
        axis.axhline(results["floor"][key], color="C0", linestyle="--", label="real against real")
        axis.set_xticks(range(len(ranks)), ranks)
        axis.set(title=title, xlabel="rank (0: x0-prediction, 64: u-prediction)")
        axis.legend()
    figure.suptitle("Handwritten digits, D = 64: what should a network predict that is narrower than that?")
    return figure


if __name__ == "__main__":
    sys.exit(main("digits", experiment, __doc__, steps=6000, quick_steps=500))
