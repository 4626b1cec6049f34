"""A folder of results of all kinds on the page."""

import json

import pytest
from made_up_results import made_up

from toy.paper import blocks, further, tables
from toy.paper.measures import LEVELS
from toy.paper.runs import EULER, SWITCHED_AT


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    others = [kind for searched in blocks.SEARCH.values() for kind in searched.values()]
    others += [f"{name}-own-rate" for name in blocks.RATED]
    others += [f"{name}-emoji" for name in blocks.RANKS] + [f"shapes-{name}" for name in blocks.YARDSTICKS]
    others += [name for name in further.STARTS if name not in blocks.RANKS]
    for number, kind in enumerate([*blocks.RANKS, "rank-8-repa", "rank-0-repa", *others]):
        for seed in range(3):
            found = made_up(kind, seed, 1 + number + 0.01 * seed)
            (folder / f"{kind}-seed-{seed}.json").write_text(json.dumps(found))
    for kind, level in (("guidance-rank-0", 3.0), ("guidance-rank-8", 2.0)):
        for seed in range(3):
            found = made_up(kind, seed, level)
            guided = found["at the end"][tables.GUIDED]
            found["at the end"] = {"guidance 1.5": guided, "guidance 3": dict.fromkeys(guided, 9.0)}
            (folder / f"{kind}-seed-{seed}.json").write_text(json.dumps(found))
    for kind, levels in (("speed-rank-0", (8.0, 4.0, 2.0)), ("speed-rank-8", (4.0, 3.5, 3.0))):
        for seed in range(3):
            found = made_up(kind, seed, 1.0)
            found["at the end"] = {
                str(step): dict.fromkeys(tables.COLUMNS, level) for step, level in zip((1, 2, 3), levels, strict=True)
            }
            (folder / f"{kind}-seed-{seed}.json").write_text(json.dumps(found))
    for number, name in enumerate(("rank-0", "rank-8", "rank-random-8")):
        for seed in range(3):
            found = made_up(f"directions-{name}", seed, 1.0)
            parts = [{str(level): i + number + level + 0.01 * seed for level in LEVELS} for i in (0, 3)]
            found["at the end"] = dict(zip(("inside", "outside"), parts, strict=True))
            (folder / f"directions-{name}-seed-{seed}.json").write_text(json.dumps(found))
    for seed in range(3):
        found = made_up(further.SWITCHED, seed, 1.0)
        ways = {f"{side} {level:g}": level + (side == "below") for level in SWITCHED_AT for side in ("above", "below")}
        found["at the end"] = {how: dict.fromkeys(tables.COLUMNS, 10 * value) for how, value in ways.items()}
        (folder / f"{further.SWITCHED}-seed-{seed}.json").write_text(json.dumps(found))
    for number, kind in enumerate(further.RENEWING):
        for seed in range(3):
            found = made_up(kind, seed, 1.0)
            levels = {how: i + 10 * number + 0.01 * seed for i, how in enumerate(EULER)}
            found["at the end"] = {how: dict.fromkeys(tables.COLUMNS, level) for how, level in levels.items()}
            (folder / f"{kind}-seed-{seed}.json").write_text(json.dumps(found))
    for number, model in enumerate(blocks.FINETUNED):
        for seed in range(3):
            found = made_up(f"finetuning-{model}", seed, 0.1 * number)
            keys = {"all", "measured", "position", "correlation", "correlation of strangers", *tables.COLUMNS}
            keys |= {"correlation with the lifted latents", "read alike", "strangers read alike"}
            found["at the end"] = dict.fromkeys(keys, 0.1 * number + 0.001 * seed)
            (folder / f"finetuning-{model}-seed-{seed}.json").write_text(json.dumps(found))
    for seed in range(3):
        found = made_up("finetuning-variance", seed, 1.0)
        at = lambda plain: {"ratio": 1.5, "cosine_of_means": 0.9, "plain": plain, "draws": 64}
        levels = {"as trained": at(2.0 + seed), "0.1": at(6.0 + 3 * seed)}
        found["at the end"] = {"start": levels, "plain": levels}
        (folder / f"finetuning-variance-seed-{seed}.json").write_text(json.dumps(found))
    return folder
