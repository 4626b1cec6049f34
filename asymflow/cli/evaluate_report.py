"""`asymflow evaluate report`: several results in one table."""

import argparse
import json
from pathlib import Path

from asymflow.text import count

ABOUT = """A table of results of asymflow evaluate. Numbers of different protocols are never in one table."""
UNCOMPARED = ("name", "about", "weights", "reference", "first", "clip")
OF_PAPER = ("adm", 50_000, [256, 256], "adm-imagenet", "inception-v3-compat")  # what results of `PAPER` are of
PAPER = {  # arXiv 2605.12964
    "AsymFlow-H/16, rank 8, 600 epochs": {"frechet_distance": 1.76, "inception_score": 312.0},
    "JiT-H/16, 600 epochs": {"frechet_distance": 1.90, "inception_score": 300.8},
    "AsymFlow-H/16 with REPA": {"frechet_distance": 1.57},
}


def add_command(commands) -> None:
    p = commands.add_parser("report", description=ABOUT)
    p.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="result.json, or the folder with it")
    p.add_argument("--json", action="store_true", help="print JSON instead")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from asymflow.evaluation import result

    groups: dict[str, list[dict]] = {}
    for one in map(result.read, args.results):
        groups.setdefault(comparable(one), []).append(one)
    if args.json:
        print(json.dumps(list(groups.values()), indent=1, ensure_ascii=False))
        return
    print("\n\n".join(table(group) for group in groups.values()))
    if len(groups) > 1:
        print(f"\n{count(len(groups), 'table')}: numbers of different protocols cannot be compared")


def comparable(one: dict) -> str:
    """What must be equal for two results to be in one table: protocol, extractor, reference, size and captions."""
    from asymflow.evaluation.result import besides

    protocol = {name: value for name, value in one["protocol"].items() if name not in UNCOMPARED}
    reference = {name: value for name, value in one["reference"].items() if name != "name"}
    parts = [protocol, one["extractor"]["weights_sha256"], reference, one["size"], one.get("clip")]
    return json.dumps(parts + besides(one["scored"]), sort_keys=True)


def table(group: list[dict]) -> str:
    from asymflow.evaluation import result

    first = group[0]
    names, extractor = list(first["measures"]), first["extractor"]["name"]
    rows = [["", *(result.title(name, extractor) for name in names), "guidance", "average", "interval"]]
    for one in group:
        cells = [result.shown(name, found["value"], found["uncertainty"]) for name, found in one["measures"].items()]
        of = one["scored"]
        interval = ",".join(map(str, of.get("interval", [])))
        rows.append([one["of"], *cells, str(of.get("guidance", "")), str(of.get("average", "")), interval])
    reference = first["reference"].get("name")
    if (first["protocol"]["name"], first["images"], first["size"], reference, extractor) == OF_PAPER:
        for title, figures in PAPER.items():
            rows.append([f"{title} (published)", *(str(figures.get(name, "")) for name in names), "", "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1:1] = [["-" * width for width in widths]]
    size = "{1} x {0}".format(*first["size"])
    about = [f"protocol {first['protocol']['name']}", f"{count(first['images'], 'image')} of {size} pixels"]
    about += [f"against {Path(reference).name}"] if reference else []
    lines = [", ".join(about + result.besides(first["scored"])), ""]
    for row in rows:
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    remarks = sorted({f"{n}: {r}" for one in group for n, found in one["measures"].items() for r in found["remarks"]})
    return "\n".join([*lines, *(f"remark: {remark}" for remark in remarks)])
