"""Results of toy.paper as `Lab.result` writes them, made up."""

from toy.paper import tables
from toy.paper.measures import LEVELS


def made_up(kind: str, seed: int, loss: float) -> dict:
    """A result as `Lab.result` writes it; all its numbers follow from one."""
    samples = dict.fromkeys(tables.COLUMNS, loss + 0.001 * seed)
    way = {str(k): {"held_out": {str(x): loss * 4 / k for x in LEVELS}, **samples} for k in (1, 2, 4)}
    end = dict.fromkeys((tables.GUIDED, tables.UNGUIDED, tables.UNCLAMPED), samples)
    about = {"run": {"name": f"{kind}-seed-{seed}", "seed": seed}, "scale": {}, "commit": "abc", "machine": "a CPU"}
    return {
        **about,
        "hours": {"training": 1.0, "measuring": 0.5},
        "losses": [loss],
        "on the way": way,
        "at the end": end,
    }
