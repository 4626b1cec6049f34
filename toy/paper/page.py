"""docs/paper.md and its figures, from the JSON file of each run.

The page's words are written by hand. What comes between <!-- NAME --> and <!-- end of NAME --> is made here.
"""

from pathlib import Path

from asymflow import opening
from asymflow.files import replacing
from toy.paper import best_rank, blocks
from toy.paper.figures import rank_figure, samples_figure, speed_figure
from toy.paper.summary import summary
from toy.paper.tables import read

BLOCKS = {  # how each is made, and of which kinds of runs
    "summary": (summary, ["rank-0", "rank-8"]),
    "yardsticks": (blocks.yardsticks, ["shapes-whole"]),
    "rank": (blocks.rank, ["rank-0", "rank-8"]),
    "directions": (blocks.directions, ["directions-rank-0", "directions-rank-8"]),
    "guidance": (blocks.guidance, ["rank-0", "rank-8", "guidance-rank-0", "guidance-rank-8"]),
    "speed": (blocks.speed, ["rank-0", "rank-8"]),
    "clamp": (blocks.clamp, ["rank-0", "rank-8"]),
    "repa": (blocks.repa, ["rank-0", "rank-8", "rank-0-repa", "rank-8-repa"]),
    "rate": (blocks.rate, [kind for searched in blocks.SEARCH.values() for kind in searched.values()]),
    "finetuning": (blocks.finetuning, ["finetuning-plain", "finetuning-reduced"]),
    "variance": (blocks.variance, ["finetuning-variance"]),
    "lifted": (blocks.lifted, ["finetuning-start"]),
    "emoji": (blocks.emoji, ["rank-0-emoji", "rank-8-emoji"]),
}
SPECTRA = "spectra.json"


def write(folder: Path, docs: Path) -> list[str]:
    """Put the results in a folder into docs/paper.md, and the figures beside it. Returns what had no results."""
    kinds, missing = read(folder), []
    page = docs / "paper.md"
    text = page.read_text(encoding="utf-8")
    for name, (make, needed) in BLOCKS.items():
        if missing_here := [kind for kind in needed if kind not in kinds]:
            further = f" and {len(missing_here) - 2} more" if len(missing_here) > 2 else ""
            missing.append(f"{name}, of {' and '.join(missing_here[:2])}{further}")
        text = filled(text, name, "Not run yet." if missing_here else make(kinds))
    if (folder / SPECTRA).exists():
        spectra = opening.read_json(folder / SPECTRA)
        text = filled(text, "predicted", best_rank.predicted(spectra))
        text = filled(text, "best ranks", best_rank.best_ranks(kinds, spectra))
    else:
        missing.append(f"predicted and best ranks, which stay as they were, of {SPECTRA}")
    figures = {}
    if {"rank-0", "rank-8"} <= kinds.keys():
        figures = {"paper_rank": rank_figure(kinds), "paper_speed": speed_figure(kinds)}
    pictures = {rank: folder / f"{name}-seed-0.png" for name, rank in blocks.RANKS.items()}
    if pictures := {rank: file for rank, file in pictures.items() if file.exists()}:
        figures["paper_samples"] = samples_figure(pictures)
    for name, figure in figures.items():
        with replacing(docs / f"{name}.png") as beside:
            figure.savefig(beside, dpi=80, format="png")
    with replacing(page) as beside:
        beside.write_text(text, encoding="utf-8")
    return missing


def filled(text: str, name: str, block: str) -> str:
    """The page with a block in its place, which must be there."""
    before, _, rest = text.partition(f"<!-- {name} -->")
    after = rest.partition(f"<!-- end of {name} -->")[2]
    return f"{before}<!-- {name} -->\n\n{block}\n\n<!-- end of {name} -->{after}"
