"""The tables of docs/paper.md: a function for each, from what was measured of the runs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from toy.paper.damage import DAMAGES
from toy.paper.experiments import RATE, RATES, best_rate
from toy.paper.tables import (
    COLUMNS,
    GUIDED,
    UNCLAMPED,
    Measure,
    Runs,
    Sides,
    Values,
    all_measures,
    all_samples,
    as_trained,
    at_the_end,
    by_one_classifier,
    by_seed,
    claims,
    held_out,
    loss_as_trained,
    mean_loss,
    minus,
    remarks,
    samples,
    shown,
    table,
)

Kinds = Mapping[str, Runs]
RANDOM = "random 8"
RANKS = {f"rank-{rank}": str(rank) for rank in (0, 2, 4, 8, 16, 32)} | {"rank-full": "768", "rank-random-8": RANDOM}
YARDSTICKS = {name: title for name, (title, _) in DAMAGES.items()}  # in place of samples
QUALITY: dict[str, tuple[Measure, str]] = {
    "held-out loss": (held_out, "{:.4f}"),
    "Fréchet distance": (at_the_end("frechet_distance"), "{:.2f}"),
    "residual": (at_the_end("residual"), "{:.1f}"),
    "held-out loss, as trained †": (as_trained, "{:.4f}"),
}
BY = {"verdict": (0, 1), "by loss and residual †": (0, 2)}  # which of them; the page says why there are two


def of(kinds: Kinds, name: str, measures: Mapping[str, tuple[Measure, str]] = QUALITY) -> list[Values]:
    """The values of each measure of a kind of run."""
    return [by_seed(kinds[name], measure) for measure, _ in measures.values()]


def sides(kinds: Kinds, pairs: Mapping[str, tuple[str, str]], measures=QUALITY) -> Sides:
    """Both sides of each claim that the first kind of a pair is better, where both kinds have been run."""
    return {
        claim: (of(kinds, first, measures), of(kinds, other, measures))
        for claim, (first, other) in pairs.items()
        if first in kinds and other in kinds
    }


def forms(measures: Mapping[str, tuple[Measure, str]]) -> dict[str, str]:
    return {name: form for name, (_, form) in measures.items()}


def compared(kinds: Kinds, pairs: Mapping[str, tuple[str, str]], measures=QUALITY, verdicts=BY) -> str:
    return claims(sides(kinds, pairs, measures), forms(measures), verdicts)


# ---- Figure 5 --------------------------------------------------------------------------------------------------------
RANK_CLAIMS = {
    "rank 8 is better than rank 0 (x0-prediction)": ("rank-8", "rank-0"),
    "rank 8 is better than rank 768 (u-prediction)": ("rank-8", "rank-full"),
    "rank 8 by PCA is better than a random subspace of rank 8": ("rank-8", "rank-random-8"),
    "a random subspace of rank 8 is better than rank 0 (in the paper: not shown)": ("rank-random-8", "rank-0"),
    "rank 8 is better than rank 2": ("rank-8", "rank-2"),
    "rank 8 is better than rank 32": ("rank-8", "rank-32"),
}


def yardsticks(kinds: Kinds) -> str:
    return samples(kinds, {f"shapes-{name}": title for name, title in YARDSTICKS.items()})


def rank(kinds: Kinds) -> str:
    measured = all_measures(kinds, RANKS | {"shapes-whole": YARDSTICKS["whole"]})
    return "\n\n".join([compared(kinds, RANK_CLAIMS), measured, *remarks(kinds, list(RANKS))])


# ---- Figure 6 --------------------------------------------------------------------------------------------------------
ON_THE_WAY = {  # of the held-out pictures
    "held-out loss": mean_loss,
    "held-out loss, as trained †": loss_as_trained,
}
OF_SAMPLES = {
    "Fréchet distance": lambda found: found["frechet_distance"],
    "residual": lambda found: math.inf if found["residual"] is None else found["residual"],
}
Curve = tuple[Sequence[int], Sequence[float]]  # steps, and what is measured after each


def speed(kinds: Kinds) -> str:
    """How much sooner rank 8 reaches what both have reached after each quarter of the steps."""
    rows, points = [], []
    all_slow, all_fast = (curves(kinds, name) for name in ("rank-0", "rank-8"))
    for title in filter(all_fast.__contains__, all_slow):
        slow, fast = ({s: found[title][s] for s in sorted(found[title])} for found in (all_slow, all_fast))
        seeds = [s for s in slow if s in fast]
        steps = next(iter(slow.values()))[0]
        points = [step for step in steps if 4 * step % steps[-1] == 0]
        known = [seeds if point > steps[0] else [] for point in points]  # before the first nothing was measured
        saved = [{s: sooner(fast[s], slow[s], p) for s in these} for p, these in zip(points, known, strict=True)]
        rows.append([title, *(shown(values, "{:.0%}") for values in saved)])
    made = table(["what both have after", *(f"{point:,} steps" for point in points)], rows)
    return "\n\n".join([made, *remarks(kinds, ["rank-0", "rank-8", "speed-rank-0", "speed-rank-8"])])


def curves(kinds: Kinds, name: str) -> dict[str, dict[int, Curve]]:
    """All that is measured on the way, by seed. Of guided samples the last is among the results of `rank`."""
    runs, further = kinds.get(name, {}), kinds.get(f"speed-{name}", {})
    ways = {"unguided": {s: run["on the way"] for s, run in runs.items()}}
    ends = {s: {max(run["on the way"], key=int): run["at the end"][GUIDED]} for s, run in runs.items()}
    ways["guided"] = {s: found["at the end"] | ends[s] for s, found in further.items() if s in ends}
    found = {title: (ways["unguided"], measure) for title, measure in ON_THE_WAY.items()}
    found |= {f"{title}, {how}": (way, measure) for how, way in ways.items() for title, measure in OF_SAMPLES.items()}
    made = {}
    for title, (seeds, measure) in found.items():
        if whole := {s: c for s, way in seeds.items() if None not in (c := curve(way, measure))[1]}:
            made[title] = whole
    return made


JUDGED = ("held-out loss", "Fréchet distance, guided", "residual, guided", "held-out loss, as trained †")
SOONER = dict.fromkeys(JUDGED, "{:,.0f} steps")


def speed_sides(kinds: Kinds) -> Sides:
    """After how many steps each has what both have at the end."""
    slow, fast = (curves(kinds, name) for name in ("rank-0", "rank-8"))
    first, other = [], []
    for title in SOONER:
        curves_of = (fast.get(title, {}), slow.get(title, {}))
        times = {s: both_reached(*(part[s] for part in curves_of)) for s in curves_of[1] if s in curves_of[0]}
        first.append({s: found[0] for s, found in times.items()})
        other.append({s: found[1] for s, found in times.items()})
    return {"rank 8 has sooner what both have at the end †": (first, other)}


def sooner(fast: Curve, slow: Curve, step: int | None = None) -> float:
    """The share of `step`, by default the last, by which the first curve is sooner where both are. Below 0: later."""
    step = slow[0][-1] if step is None else step
    first, other = both_reached(*(tuple(part[: curve[0].index(step) + 1] for part in curve) for curve in (fast, slow)))
    return (other - first) / step


def both_reached(first: Curve, other: Curve) -> tuple[float, float]:
    """The steps at which two curves first come to the higher of the two values that they end at."""
    level = max(first[1][-1], other[1][-1])
    return reached(*first, level), reached(*other, level)


def curve(way: Mapping[str, dict], measure: Callable[[dict], float]) -> Curve:
    return [int(step) for step in way], [measure(found) for found in way.values()]


def reached(steps: Sequence[int], values: Sequence[float], level: float) -> float:
    """The first step at which a curve that ends there or below has come to a level, on straight lines between steps."""
    i = next(i for i, value in enumerate(values) if value <= level)
    if i == 0 or math.isinf(values[i - 1]):
        return steps[i]
    return steps[i] - (level - values[i]) / (values[i - 1] - values[i]) * (steps[i] - steps[i - 1])


# ---- Table 1 ---------------------------------------------------------------------------------------------------------
PAPER_CLAMP = {"rank-8": 2.28 - 1.76, "rank-0": 3.27 - 1.90}  # by how much its FID rises without a clamp
CLAMPED = {"Fréchet distance": "frechet_distance", "residual": "residual"}
LOST = dict.fromkeys(CLAMPED, "{:.2f}")


def clamp(kinds: Kinds) -> str:
    found = clamp_sides(kinds)
    (lost,) = found.values()
    rows = [
        [f"rank {RANKS[name]}", f"{paper:.2f}", *map(shown, values, LOST.values())]
        for (name, paper), values in zip(PAPER_CLAMP.items(), lost, strict=True)
    ]
    head = ["lost without a clamp", "the paper: FID", *(f"ours: {title}" for title in CLAMPED)]
    titles = {name: RANKS[name] for name in PAPER_CLAMP}
    measured = all_samples(kinds, titles, (UNCLAMPED,))
    return "\n\n".join([table(head, rows), claims(found, LOST), measured])


def clamp_sides(kinds: Kinds) -> Sides:
    values = lambda name, key, how: by_seed(kinds[name], at_the_end(key, how))
    first, other = (
        [minus(values(name, key, UNCLAMPED), values(name, key, GUIDED)) for key in CLAMPED.values()]
        for name in PAPER_CLAMP
    )
    return {"rank 8 loses less than rank 0": (first, other)}


# ---- Table 2 ---------------------------------------------------------------------------------------------------------
ALIGNMENT = {"-repa": "alignment", "-repa-weak": "a tenth of the weight of alignment †"}
ALIGNED = {"rank-0": "0", "rank-8": "8"}
ALIGNED |= {f"rank-{r}{mark}": f"{r}, with {title}" for mark, title in ALIGNMENT.items() for r in (0, 8)}


def repa(kinds: Kinds) -> str:
    aligned = [name for name in ALIGNED if name not in RANKS]
    parts = [claims(repa_sides(kinds), forms(QUALITY), BY), all_measures(kinds, ALIGNED), *remarks(kinds, aligned)]
    return "\n\n".join(parts)


def repa_sides(kinds: Kinds) -> Sides:
    found = {}
    for mark, title in ALIGNMENT.items():
        pairs = {f"rank {r} is better with {title}": (f"rank-{r}{mark}", f"rank-{r}") for r in (8, 0)}
        found |= (helped := sides(kinds, pairs))
        if len(helped) == 2:
            first, other = ([minus(*both) for both in zip(*pair, strict=True)] for pair in helped.values())
            found[f"with {title} rank 8 gains more than rank 0, or loses less"] = (first, other)
    return found


# ---- Each with its own learning rate ---------------------------------------------------------------------------------
RATED = {"rank-0": "0", "rank-8": "8", "rank-full": "768", "rank-random-8": RANDOM}
SEARCH = {name: {rate: f"{name}-rate-{rate:g}" for rate in RATES} for name in RATED}


def rate(kinds: Kinds) -> str:
    """The search, its lowest losses in bold; then the runs of each rank at the rate that has its lowest."""
    rows, own, open_ended = [], {}, []
    for name, searched in SEARCH.items():
        found = {rate: by_seed(kinds.get(kind, {}), held_out) for rate, kind in searched.items()}
        best = best_rate({rate: statistics.fmean(values.values()) for rate, values in found.items() if values})
        words = {rate: shown(values, "{:.4f}") for rate, values in found.items()}
        if best is not None:
            words[best] = f"**{words[best]}**"
            own[name] = name if best == RATE else f"{name}-own-rate"
            open_ended += [RATED[name]] * (best in (min(RATES), max(RATES)))
        rows.append([RATED[name], *words.values()])
    pairs = {claim: tuple(map(own.get, pair)) for claim, pair in RANK_CLAIMS.items() if own.keys() >= set(pair)}
    titles = {kind: RATED[name] for name, kind in own.items()}
    found = by_one_classifier(kinds, list(titles))
    parts = ["Held-out loss after 1,000 steps, of a seed of its own; the lowest in bold:"]
    parts += [table(["rank", *map("{:g}".format, RATES)], rows)]
    if open_ended:
        parts += [f"*The search ends at the best rate of {', '.join(open_ended)}.*"]
    parts += [compared(found, pairs), all_measures(found, titles)] if found else []
    return "\n\n".join([*parts, *remarks(found, list(found))])


# ---- Table 3 and Figure 4 --------------------------------------------------------------------------------------------
FINETUNED = {  # its title, and the paper's HPSv3 and FID
    "latent": ("the latent model", "", ""),
    "start": ("lifted, before any training", "", ""),
    "latent-finetuned": ("the latent model, finetuned", "10.70", "15.0"),
    "plain": ("pixels, plain loss", "12.03", "20.2"),
    "reduced": ("pixels, variance-reduced", "12.99", "18.5"),
    "perceptual": ("pixels, variance-reduced and perceptual", "13.06", "19.1"),
    "perceptual-weak": ("pixels, variance-reduced and a fifth of the perceptual term", "", ""),
    "scratch": ("pixels, from scratch", "", ""),
}
OF_CAPTIONS = {"position": ("position", "{:.1%}"), "all": COLUMNS["right"], "measured": ("recognized", "{:.1%}")}
ORDER = ("count", "color", "shape", *OF_CAPTIONS, "sharpness", "residual", "frechet_distance", "precision", "recall")
DRAWN = {
    title: (lambda run, key=key: run["at the end"][key], form)
    for key in (*ORDER, "patches", "spectrum", "seams")
    for title, form in [(COLUMNS | OF_CAPTIONS)[key]]
}
FAULTS = {"residual": DRAWN["residual"], "share not right": (lambda run: 1 - run["at the end"]["all"], "{:.1%}")}
FINETUNING_CLAIMS = {
    "plain is better than the latent model, finetuned": ("finetuning-plain", "finetuning-latent-finetuned"),
    "variance-reduced is better than plain": ("finetuning-reduced", "finetuning-plain"),
    "with the perceptual term it is better than without": ("finetuning-perceptual", "finetuning-reduced"),
    "with a fifth of the term it is better than without †": ("finetuning-perceptual-weak", "finetuning-reduced"),
    "variance-reduced is better than from scratch": ("finetuning-reduced", "finetuning-scratch"),
    "plain is better than from scratch": ("finetuning-plain", "finetuning-scratch"),
}


def finetuning(kinds: Kinds) -> str:
    names = {f"finetuning-{model}": FINETUNED[model] for model in FINETUNED if f"finetuning-{model}" in kinds}
    rows = [
        [title, hps, fid, *(shown(by_seed(kinds[name], measure), form) for measure, form in DRAWN.values())]
        for name, (title, hps, fid) in names.items()
    ]
    head = ["", "the paper: HPSv3", "its FID", *DRAWN]
    parts = [compared(kinds, FINETUNING_CLAIMS, FAULTS, None), table(head, rows), *remarks(kinds, list(names))]
    return "\n\n".join(parts)


def variance(kinds: Kinds) -> str:
    """Of the gradient, by the noise level of all images of a batch."""
    runs, rows = kinds["finetuning-variance"], []
    levels = list(next(iter(runs.values()))["at the end"]["start"])
    for weights, title in (("start", "before finetuning"), ("plain", "after it, with the plain loss")):
        at = lambda level, key, weights=weights: by_seed(runs, lambda run: run["at the end"][weights][level][key])
        whole = at("as trained", "plain")
        share = lambda level, at=at, whole=whole: {seed: v / whole[seed] for seed, v in at(level, "plain").items()}
        measures = {
            "variance, plain, that of the training = 1": share,
            "variance, plain / reduced": partial(at, key="ratio"),
            "cosine of the mean gradients": partial(at, key="cosine_of_means"),
        }
        rows += [
            [title, words, *(shown(values(level), "{:.2f}") for level in levels)] for words, values in measures.items()
        ]
    return table(["weights", "", *levels], rows)


LIFTED = {"1 - correlation": "{:.2f}", "share not read alike": "{:.1%}"}


def lifted_sides(kinds: Kinds) -> Sides:
    """How little of what the latent model drew the lifted one draws, and pictures of other captions."""
    both = (("correlation", "read alike"), ("correlation of strangers", "strangers read alike"))
    missed = lambda key: by_seed(kinds["finetuning-start"], lambda run: 1 - run["at the end"][key])
    first, other = ([missed(key) for key in keys] for keys in both)
    return {"the lifted model draws what the latent model drew †": (first, other)}


def lifted(kinds: Kinds) -> str:
    titles = {
        "correlation": "correlation with what the latent model draws from the same noise",
        "correlation of strangers": "with that of another caption, from other noise",
        "correlation with the lifted latents": "with the same latents, lifted by the basis in place of decoded",
        "read alike": "the oracle reads the same as in what the latent model draws from the same noise",
        "strangers read alike": "as in that of another caption",
    }
    found = {key: by_seed(kinds["finetuning-start"], lambda run, key=key: run["at the end"][key]) for key in titles}
    rows = [[title, shown(found[key], "{:.1%}")] for key, title in titles.items()]
    made = table(["what the lifted model draws, before any training", ""], rows)
    return "\n\n".join([claims(lifted_sides(kinds), LIFTED), made])


# ---- Emoji -----------------------------------------------------------------------------------------------------------
EMOJI = {f"rank-{rank}-emoji": str(rank) for rank in (0, 4, 8, 16, 32, 48)}
EMOJI |= {"rank-full-emoji": "768", "rank-random-8-emoji": RANDOM}


def emoji(kinds: Kinds) -> str:
    whole = {f"emoji-{name}": title for name, title in YARDSTICKS.items()}
    kinds = by_one_classifier(kinds, [*EMOJI, *whole])
    pairs = {claim: tuple(f"{name}-emoji" for name in pair) for claim, pair in RANK_CLAIMS.items()}
    quality = {name: QUALITY[name] for name in ("held-out loss", "Fréchet distance")}
    loss = {"held-out loss": QUALITY["held-out loss"]}
    drawn = {claim: pair for claim, pair in pairs.items() if all(has_samples(kinds, name) for name in pair)}
    others = {claim: pair for claim, pair in pairs.items() if claim not in drawn}
    parts = [compared(kinds, drawn, quality, None), compared(kinds, others, loss, None)]
    return "\n\n".join([*parts, all_measures(kinds, EMOJI | whole), *remarks(kinds, [*EMOJI, *whole])])


def has_samples(kinds: Kinds, name: str) -> bool:
    return any(run["at the end"] for run in kinds.get(name, {}).values())
