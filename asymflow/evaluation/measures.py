"""How good samples are, from features: Fréchet distance, KID, Inception Score, precision and recall.

Each is defined as in torch-fidelity, and has its uncertainty: what it would vary by with other samples of the model, as
one standard deviation. Features are read in parts, so that memory does not grow with the number of images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from asymflow.evaluation.frechet import Target, frechet_distance
from asymflow.evaluation.moments import Moments, Statistics
from asymflow.evaluation.rows import Rows
from asymflow.text import count

NEIGHBOURS = 3  # of precision and recall, as in Kynkaanniemi et al. 2019 and ADM
SUBSETS, SUBSET = 100, 1000  # of KID: so many, of so many images
SPLITS = 10  # of the Inception Score
GROUPS = 10  # of samples, for the uncertainty of recall
SEED = 2020  # torch-fidelity's, of subsets and splits
RESAMPLES = 200  # of a bootstrap
QUANTILE = 1.959964  # of a normal distribution: 2.5 % are above
FEW = 5000  # images: of fewer, scores depend much on how many there are


@dataclass(frozen=True)
class Measured:
    """value: None if it cannot be measured. uncertainty: one standard deviation. remarks: what to know before use.

    interval: of a share, the range that holds the true one in 95 of 100 cases (Wilson 1927).
    """

    value: float | None
    uncertainty: float | None = None
    remarks: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None


@dataclass
class Samples:
    """Features of images. logits: of a network that classifies them. device: on which distances are computed.

    middles: the features of the middle of each image. fit: (n, 2), the CLIP score of each, and whether its caption was
    cut. See `features.reader`.

    columns: names of the features, if they are what the oracle of the shapes found (see `features.Oracle`).
    """

    features: Rows
    logits: Rows | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    columns: tuple[str, ...] = ()
    middles: Rows | None = None
    fit: Rows | None = None

    def statistics(self) -> Statistics:
        moments = Moments()
        for part in self.features.chunks():
            moments.add(part)
        return moments.statistics()


@dataclass
class Reference:
    """What samples are held against: mean and covariance of features, and the features of some images if known."""

    statistics: Statistics
    features: Rows | None = None
    middles: Rows | None = None


def frechet(sample: Samples, reference: Reference) -> Measured:
    """The Fréchet distance (Heusel et al. 2017), with Inception's features the FID."""
    own, n = sample.statistics(), len(sample.features)
    _, influence = Target(reference.statistics, sample.device).distance(own)
    effects = torch.cat([influence(part) for part in sample.features.chunks()])
    few = f"no more images ({n:,}) than features ({sample.features.width:,}): compare it with as many only"
    remarks = (few,) if n <= sample.features.width else ()
    return Measured(frechet_distance(own, reference.statistics), float(effects.std() / math.sqrt(n)), remarks)


def patch_frechet(sample: Samples, reference: Reference) -> Measured:
    """The Fréchet distance of the middles of images at full resolution (Lin et al. 2024, arXiv 2402.13929)."""
    if sample.middles is None or reference.middles is None:
        return unknown("the reference has no images, or the middles of images were not read")
    middles = Samples(reference.middles).statistics()
    return frechet(Samples(sample.middles, device=sample.device), Reference(middles))


def clip_score(sample: Samples, reference: Reference | None = None) -> Measured:
    """The mean of the CLIP scores of images and their captions, see `clip.Clip`."""
    if sample.fit is None:
        return unknown("no CLIP was given")
    scores, cut = torch.cat(list(sample.fit.chunks())).double().T
    remarks = (f"{count(int(cut.sum()), 'caption')} cut to what CLIP can read",) if cut.any() else ()
    return Measured(scores.mean().item(), scores.std().item() / math.sqrt(len(scores)), remarks)


def kernel_distance(sample: Samples, reference: Reference) -> Measured:
    """KID (Binkowski et al. 2018): the mean over subsets, which has no bias.

    Its uncertainty is that of the distance of all images, and that of which subsets were drawn. (torch-fidelity says
    the spread of single subsets, which depends on their size: 0 if each is of all images.)
    """
    from torch_fidelity.metric_kid import kernel_mmd

    if reference.features is None:
        return unknown("the reference has no images, only their mean and covariance")
    size = min(SUBSET, len(sample.features), len(reference.features))
    rng, values = np.random.RandomState(SEED), []
    for _ in range(SUBSETS):
        chosen = [rng.choice(len(rows), size, replace=False) for rows in (sample.features, reference.features)]
        one, other = sample.features.take(chosen[0]), reference.features.take(chosen[1])
        values.append(kernel_mmd(one.numpy(), other.numpy()))
    remarks = (f"subsets of {size} images, not of {SUBSET:,}",) if size < SUBSET else ()
    influence = kernel_influence(sample.features, reference.features, sample.device)
    error = math.hypot(influence.std().item() / math.sqrt(len(influence)), np.std(values) / math.sqrt(SUBSETS))
    return Measured(float(np.mean(values)), error, remarks)


def kernel_influence(samples: Rows, reference: Rows, device: torch.device) -> Tensor:
    """How much each sample moves the KID of all images, to first order but for a constant: (n,).

    Twice the mean of its kernels with the other samples, less twice that with the reference.
    """
    kernel = lambda products: (products / samples.width + 1).double() ** 3
    summed = lambda part, rows: sum(kernel(part @ others.to(device).mT).sum(1) for others in rows.chunks())
    found = []
    for part in samples.chunks():
        part = part.to(device)
        others = summed(part, samples) - kernel((part * part).sum(1))
        found.append(2 * others / (len(samples) - 1) - 2 * summed(part, reference) / len(reference))
    return torch.cat(found).cpu()


def inception_score(sample: Samples, reference: Reference | None = None) -> Measured:
    """The Inception Score (Salimans et al. 2016): the mean over splits, and a bootstrap over the images."""
    if sample.logits is None:
        return unknown("the extractor has no classes")
    n, classes = len(sample.logits), sample.logits.width
    if n < SPLITS:
        return unknown(f"{n} images cannot be split into {SPLITS}")
    place = np.empty(n, np.int64)
    place[np.random.RandomState(SEED).permutation(n)] = np.arange(n)  # where an image is after the shuffle
    split = torch.from_numpy(np.searchsorted(np.array([i * n // SPLITS for i in range(1, SPLITS)]), place, "right"))
    # In each split: exp of the mean over images of sum p log p, minus sum q log q with q the mean of p. The first row
    # of weights is of all images once; the others are of a bootstrap, in which each comes as often as Poisson says.
    generator = torch.Generator().manual_seed(SEED)
    weight, own = torch.zeros(1 + RESAMPLES, SPLITS), torch.zeros(1 + RESAMPLES, SPLITS, dtype=torch.float64)
    mean, done = torch.zeros(1 + RESAMPLES, SPLITS, classes, dtype=torch.float64), 0
    for logits in sample.logits.chunks(512):
        p = logits.double().softmax(1)
        information = (p * logits.double().log_softmax(1)).sum(1)
        drawn = torch.poisson(torch.ones(1 + RESAMPLES, len(p)), generator=generator).double()
        drawn[0] = 1
        for number in range(SPLITS):
            inside = split[done : done + len(p)] == number
            weight[:, number] += drawn[:, inside].sum(1)
            own[:, number] += drawn[:, inside] @ information[inside]
            mean[:, number] += drawn[:, inside] @ p[inside]
        done += len(p)
    mean /= weight[..., None]
    scores = (own / weight - torch.xlogy(mean, mean).sum(2)).exp().mean(1)
    resampled = scores[1:][scores[1:].isfinite()]  # of few images, a split of a resample may be empty
    remarks = (f"of {n:,} images: with fewer it is lower, so compare it with as many only",) if n < FEW else ()
    return Measured(scores[0].item(), resampled.std().item() if len(resampled) > 1 else None, remarks)


def precision(sample: Samples, reference: Reference) -> Measured:
    """The share of samples that lie among the images of the reference (Kynkaanniemi et al. 2019)."""
    return inside(sample.features, reference.features, sample.device)


def recall(sample: Samples, reference: Reference) -> Measured:
    """The share of images of the reference that lie among the samples."""
    points, balls = reference.features, sample.features
    found = inside(points, balls, sample.device)
    if found.value is None:
        return found
    if len(balls) < GROUPS * (NEIGHBOURS + 1):
        few = f"{count(len(balls), 'image')} are too few for its uncertainty"
        return replace(found, uncertainty=None, interval=None, remarks=(*found.remarks, few))
    return replace(found, uncertainty=spread_by_balls(points, balls, sample.device), interval=None)


def inside(points: Rows | None, balls: Rows | None, device: torch.device) -> Measured:
    """The share of points within any ball. The uncertainty is that of other points."""
    if points is None or balls is None:
        return unknown("the reference has no images, only their mean and covariance")
    if len(balls) <= NEIGHBOURS:
        return unknown(f"{len(balls)} images are too few for {NEIGHBOURS} neighbours")
    few = len(points) < FEW or len(balls) < FEW
    remarks = (f"of {len(points):,} and {len(balls):,} images: compare it with as many only",) if few else ()
    return share_of(within(points, balls, device), remarks)


def spread_by_balls(points: Rows, balls: Rows, device: torch.device) -> float:
    """By how much the share of points within any ball varies with other balls: one standard deviation.

    It is found from groups of the balls, each by itself. Points that are in the same balls vary together: that part of
    the variance is as much less as there are more balls. The part that each point has alone stays.
    """
    groups = np.array_split(np.random.RandomState(SEED).permutation(len(balls)), GROUPS)
    hits = torch.stack([within(points, Rows([balls.take(group)]), device) for group in groups]).double()
    alone = hits.var(0).mean() / len(points)
    together = hits.mean(1).var() - alone
    return (alone + together / GROUPS).sqrt().item()


def within(points: Rows, balls: Rows, device: torch.device) -> Tensor:
    """Whether each point is nearer to the centre of any ball than that to its third nearest neighbour: (n,), bool."""
    radii = [nearest(part.to(device), balls, device) for part in balls.chunks()]
    hits = []
    for part in points.chunks():
        part = part.to(device)
        hit = torch.zeros(len(part), dtype=torch.bool, device=device)
        for centers, radius in zip(balls.chunks(), radii, strict=True):
            hit |= (torch.cdist(part, centers.to(device)) <= radius).any(1)
        hits.append(hit.cpu())
    return torch.cat(hits)


def share_of(hits: Tensor, remarks: tuple[str, ...] = ()) -> Measured:
    """The share of hits (n,), which are 0 or 1, with Wilson's interval."""
    n, share = len(hits), hits.double().mean().item()
    middle, z = (share + QUANTILE**2 / (2 * n)) / (1 + QUANTILE**2 / n), QUANTILE
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Measured(share, math.sqrt(share * (1 - share) / n), remarks, (middle - half, middle + half))


def of_oracle(name: str, share: bool) -> "Measure":
    """A measure of pictures of shapes: the mean of what the oracle found in those in which it found it."""

    def measure(samples: Samples, reference: Reference | None = None) -> Measured:
        if name not in samples.columns:
            return unknown("the extractor is not the oracle")
        column = samples.columns.index(name)
        found = torch.cat([part[:, column] for part in samples.features.chunks()]).double()
        known = found[found >= 0]
        if len(known) < 2:
            return unknown("no shape was recognized")
        if share:
            return share_of(known)
        remark = f"of the {len(known):,} of {len(found):,} images in which a shape was recognized"
        return Measured(known.mean().item(), known.std().item() / math.sqrt(len(known)), (remark,))

    return measure


def nearest(part: Tensor, everyone: Rows, device: torch.device) -> Tensor:
    """The distance of each row to its third nearest other one."""
    kept = None
    for others in everyone.chunks():
        distances = torch.cdist(part, others.to(device))
        together = distances if kept is None else torch.cat([kept, distances], 1)
        kept = together.topk(min(NEIGHBOURS + 1, together.shape[1]), largest=False).values  # itself is one of them
    return kept[:, NEIGHBOURS]


def unknown(why: str) -> Measured:
    return Measured(None, None, (f"not measured: {why}",))


Measure = Callable[[Samples, Reference], Measured]
FEATURES = {
    "frechet_distance": frechet,
    "kid": kernel_distance,
    "inception_score": inception_score,
    "precision": precision,
    "recall": recall,
}
"""Measures of features, by their names."""
ORACLE = {name: of_oracle(name, share=True) for name in ("count", "color", "shape", "right")}
ORACLE |= {name: of_oracle(name, share=False) for name in ("sharpness", "residual")}
"""Measures of generated pictures of shapes, which need no reference."""
CAPTIONS = {"patch_frechet_distance": patch_frechet, "clip_score": clip_score}
"""Measures of images of captions."""
MEASURES = FEATURES | ORACLE | CAPTIONS
