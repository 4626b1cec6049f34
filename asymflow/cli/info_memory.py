"""The memory of a training in `asymflow info`: a row for each number of GPUs and ZeRO stage, a column for each kind."""

from collections.abc import Callable, Sequence

from asymflow.cost import Cost

GPUS, STAGES = (1, 8, 64), (0, 1, 2, 3)
CARD = 80 * 10**9  # bytes of a GPU of 80 GB, 74.5 GiB; drivers show some more
COLUMNS = {  # the columns of the table, and the kinds of memory that each adds up
    "weights": ("weights", "gathered"),
    "trained": ("trained",),
    "gradients": ("gradients", "buckets"),
    "optimizer": ("optimizer",),
    "EMA": ("ema",),
    "activations": ("activations",),
    "total": ("total",),
    "on host": ("host",),
}


def describe(
    memory: Callable[[int, int], dict[str, int]],
    gpus: int | None,
    steps: dict[str, Cost],
    stages: Sequence[int] = STAGES,
) -> dict:
    """All numbers of the table. memory: of (GPUs, stage), as `asymflow.cost.training_memory` counts it.

    steps: the cost of a step for each way of keeping activations, the first as in the table. Empty: it is not known.
    """
    activations = {way: {"kept": step.kept, "peak": step.peak} for way, step in steps.items()}
    peak, states = next(iter(activations.values()), {"peak": 0})["peak"], []
    for n in [gpus] if gpus else GPUS:
        for stage in stages:
            kinds = memory(n, stage)
            total = sum(kinds.values()) - kinds["host"] + peak
            states.append({"gpus": n, "stage": stage, **kinds, "activations": peak, "total": total})
    fits = [fit(states, n) for n in dict.fromkeys(state["gpus"] for state in states)]
    return {"activations": activations, "on_each_gpu": states, "fits_80_gb": fits if activations else None}


def fit(states: list[dict], gpus: int) -> dict:
    """The lowest stage at which a training step fits, or else the one that takes least; then to_spare is negative."""
    spare = {state["stage"]: CARD - state["total"] for state in states if state["gpus"] == gpus}
    stage = next((stage for stage, bytes in spare.items() if bytes >= 0), max(spare, key=spare.get))
    return {"gpus": gpus, "stage": stage, "fits": spare[stage] >= 0, "to_spare": spare[stage]}


# ---- For people ------------------------------------------------------------------------------------------------------
def as_text(found: dict, title: str) -> list[str]:
    ways, lines = list(found["activations"].items()), ["", title, *table(found["on_each_gpu"]), ""]
    if len(ways) == 2:
        (_, shown), (name, other) = ways
        more = other["peak"] - shown["peak"]
        lines.append(f"With all blocks {name.replace('_', ' ')}: {gib(abs(more))} {'more' if more > 0 else 'less'}.")
    return [*lines, *verdicts(found["fits_80_gb"])] if ways else lines[:-1]


def table(states: list[dict]) -> list[str]:
    shown = [n for n in COLUMNS if n not in ("on host", "activations") or any(s[COLUMNS[n][0]] for s in states)]
    rows = [["GPUs", "ZeRO", *shown]]
    for state in states:
        cells = [f"{sum(state[kind] for kind in COLUMNS[name]) / 2**30:,.1f}" for name in shown]
        rows.append([str(state["gpus"]), str(state["stage"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def verdicts(fits: list[dict]) -> list[str]:
    """A line for each number of GPUs, up to the first on which a training step fits."""
    lines = []
    for one in fits:
        where = f"{one['gpus']} GPU{'s' * (one['gpus'] > 1)} of 80 GB ({gib(CARD)})"
        if one["fits"]:
            return [*lines, f"A step fits {where} at ZeRO {one['stage']}, with {gib(one['to_spare'])} to spare."]
        lines.append(f"A step does not fit {where}: ZeRO {one['stage']} takes {gib(-one['to_spare'])} too much.")
    return lines


def few(x: float) -> str:
    """A number with two digits at least, such as 363.9 or 0.032."""
    return f"{x:,.1f}" if x >= 10 else f"{x:.2g}"


def many(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} million" if parameters >= 10**6 else f"{parameters:,}"


def gib(bytes: int) -> str:
    return f"{bytes / 2**30:,.1f} GiB"
