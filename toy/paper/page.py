"""docs/paper.md and its figures, from the JSON file of each run.

The page's words are written by hand. What comes between <!-- NAME --> and <!-- end of NAME --> is made here.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from asymflow import opening
from asymflow.errors import InputError
from asymflow.files import replacing
from toy.paper import best_rank, blocks, further
from toy.paper.experiments import RATE
from toy.paper.figures import finetuning_figure, rank_figure, samples_figure, speed_figure
from toy.paper.summary import runs, summary
from toy.paper.tables import Runs, comparable, read

BLOCKS = {  # how each is made, and of which kinds of runs
    "summary": (summary, []),
    "yardsticks": (blocks.yardsticks, ["shapes-whole"]),
    "rank": (blocks.rank, ["rank-0", "rank-8"]),
    "directions": (further.directions, ["directions-rank-0", "directions-rank-8"]),
    "embedding": (further.embedding, ["rank-0", "rank-8", "rank-0-seeded", "rank-8-unseeded"]),
    "switch": (further.switch, ["rank-8-unseeded", "rank-32-unseeded", further.SWITCHED]),
    "renew": (further.renew, list(further.RENEWING)),
    "guidance": (further.guidance, ["rank-0", "rank-8", "guidance-rank-0", "guidance-rank-8"]),
    "speed": (blocks.speed, ["rank-0", "rank-8"]),
    "clamp": (blocks.clamp, ["rank-0", "rank-8"]),
    "repa": (blocks.repa, ["rank-0", "rank-8", "rank-0-repa", "rank-8-repa"]),
    "rate": (blocks.rate, [searched[RATE] for searched in blocks.SEARCH.values()]),
    "finetuning": (blocks.finetuning, ["finetuning-plain", "finetuning-reduced"]),
    "variance": (blocks.variance, ["finetuning-variance"]),
    "lifted": (blocks.lifted, ["finetuning-start"]),
    "emoji": (blocks.emoji, ["rank-0-emoji", "rank-8-emoji"]),
    "runs": (runs, []),
}
ALONE = {"rate", "switch", "renew", "emoji"}  # whose runs are held against each other, whatever measured others
SPECTRA = "spectra.json"
PICTURES = {"paper_samples", "paper_finetuning"}  # figures of what was drawn, and not of numbers
PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"  # the words


def write(folder: Path, docs: Path) -> list[str]:
    """Write the page to a folder, docs, with the results in another, and the figures. Returns what had no results."""
    kinds = read(folder)
    if not kinds:
        raise InputError(f"{folder} has no results yet: python -m toy.paper rank")
    try:
        text, figures, missing = made(kinds, folder)
    except KeyError as e:
        raise InputError(
            f"a result in {folder} has no {e}: it is of another version of toy.paper; move it away and run it again"
        ) from e
    for name, figure in figures.items():
        with replacing(docs / f"{name}.png") as beside:
            figure.savefig(beside, dpi=80, format="png")
    with replacing(docs / PAGE.name) as beside:
        beside.write_text(text, encoding="utf-8")
    return missing


def made(kinds: Mapping[str, Runs], folder: Path) -> tuple[str, dict[str, Figure], list[str]]:
    """The page, its figures, and what had no results."""
    text, missing, alike = PAGE.read_text(encoding="utf-8"), [], comparable(kinds)
    for name, (make, needed) in BLOCKS.items():
        if missing_here := [kind for kind in needed if kind not in kinds]:
            more = f" and {len(missing_here) - 2} more" if len(missing_here) > 2 else ""
            missing.append(f"{name}, of {' and '.join(missing_here[:2])}{more}")
        text = filled(text, name, "Not run yet." if missing_here else make(kinds if name in ALONE else alike))
    if (folder / SPECTRA).exists():
        spectra = opening.read_json(folder / SPECTRA)["spectra"]
        text = filled(text, "predicted", best_rank.predicted(spectra))
        text = filled(text, "best ranks", best_rank.best_ranks(kinds, spectra))
    else:
        missing.append(f"predicted and best ranks, which stay as they were, of {SPECTRA}")
    figures = {}
    if {"rank-0", "rank-8"} <= kinds.keys():
        figures = {"paper_rank": rank_figure(alike), "paper_speed": speed_figure(alike)}
    pictures = {rank: folder / f"{name}-seed-0.png" for name, rank in blocks.RANKS.items()}
    if pictures := {rank: file for rank, file in pictures.items() if file.exists()}:
        figures["paper_samples"] = samples_figure(pictures)
    if (finetuned := folder / "finetuning-seed-0.png").exists():
        figures["paper_finetuning"] = finetuning_figure(finetuned)
    missing += [f"{name}.png, of the pictures beside the JSON files" for name in sorted(PICTURES - figures.keys())]
    return text, figures, missing


def filled(text: str, name: str, block: str) -> str:
    """The page with a block in its place. InputError if that is not there, once."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise InputError(f"{PAGE} must have {first} and, after it, {last}, each once")
    before, rest = text.split(first)
    return f"{before}{first}\n\n{block}\n\n{last}{rest.split(last)[1]}"
