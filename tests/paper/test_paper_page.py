"""toy.paper page: what the tables say is what was measured."""

import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_results import made_up
from PIL import Image

from asymflow.errors import InputError
from asymflow.pictures import image_grid
from toy.paper import __main__ as paper
from toy.paper import best_rank, blocks, criterion, further, page, summary, tables
from toy.paper.__main__ import EXPERIMENTS
from toy.paper.differences import OPPOSITE
from toy.paper.experiments import PLANS
from toy.paper.measures import LEVELS
from toy.paper.runs import stated

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_variance_of_each_level_is_in_units_of_that_of_the_training(results):
    text = blocks.variance(tables.read(results))
    assert "| before finetuning | variance, plain, that of the training = 1 | 1.00 ± 0.00 | 3.00 ± 0.00 |" in text


def test_tables_have_the_means_and_spreads_of_the_seeds(results, tmp_path):
    kinds = tables.read(results)
    text = blocks.rank(kinds)
    mean, spread = statistics.fmean([1, 1.011, 1.022]), statistics.stdev([1, 1.011, 1.022])
    assert f"| 0 | 3 | {mean:.2f} ± {spread:.2f} |" in text
    assert (
        "| rank 8 is better than rank 0 (x0-prediction) | **+3.0000 ± 0.0000** | **+3.00 ± 0.00** | **+3.0 ± 0.0** |"
        in text
    )


@given(st.sets(st.sampled_from(["rank-0", "rank-8", "speed-rank-0", "rank-8-emoji"])), st.integers(0, 2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=4, deadline=None)
def test_what_another_classifier_measured_is_in_no_table(results, strange, seed):
    """Distances in its features do not compare. All else that was measured of the same samples stays."""
    whole, changed = tables.read(results), [results / f"{kind}-seed-{seed}.json" for kind in strange]
    before = {file: file.read_text() for file in changed}
    for file, text in before.items():
        file.write_text(json.dumps({**json.loads(text), "classifier": "another"}))
    try:
        kinds = tables.comparable(tables.read(results))
    finally:
        for file, content in before.items():
            file.write_text(content)
    for kind, runs in kinds.items():
        for number, run in runs.items():
            parts = [*run["on the way"].values(), *run["at the end"].values()]
            theirs = [*whole[kind][number]["on the way"].values(), *whole[kind][number]["at the end"].values()]
            for found, known in zip(parts, theirs, strict=True):
                if kind in strange and number == seed:
                    known = known | dict.fromkeys(tables.CLASSIFIED & known.keys())
                assert found == known
    ranks = len(strange & {"rank-0", "rank-8"})
    assert (f"recall of {ranks} run" in blocks.rank(kinds)) == (ranks > 0)
    assert ("2 of 3 seeds" in blocks.rank(kinds)) == (ranks > 0)


def test_emoji_have_no_column_of_the_oracle_and_yardsticks_of_their_own(results):
    kinds = tables.read(results)
    for name, runs in kinds.items():
        if "emoji" in name:
            for run in runs.values():
                guided = run["at the end"][tables.GUIDED]
                run["at the end"] = {tables.GUIDED: {key: guided[key] for key in ("frechet_distance", "patches")}}
    kinds["emoji-whole"] = kinds["rank-8-emoji"]
    kinds["rank-48-emoji"] = {s: run | {"at the end": {}} for s, run in kinds["rank-8-emoji"].items()}
    text = blocks.emoji(kinds)
    assert "|  | seeds | Fréchet distance | patches |" in text
    assert "| other pictures | 3 |" in text
    assert text.count("\n| 48 |") == 1  # its losses, of no samples


def test_without_any_distance_that_compares_the_page_is_made_of_the_rest(results):
    for file in results.glob("shapes-whole-seed-*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "classifier": "another"}))
    text, figures, _ = page.made(tables.read(results), results)
    assert "| **+3.0000 ± 0.0000** | - | **+3.0 ± 0.0** |" in text
    assert figures.keys() >= {"paper_rank", "paper_speed"}


def test_guidance_that_the_runs_were_drawn_with_stands_between_that_of_the_experiment(results):
    row = "| Fréchet distance | 8 | 4.01 ± 0.01 | 2.00 ± 0.00 | 4.01 ± 0.01 | 9.00 ± 0.00 |"
    assert row in further.guidance(tables.read(results))


def test_losses_inside_and_outside_have_a_row_for_each_rank(results):
    text = further.directions(tables.read(results))
    mean = statistics.fmean(LEVELS)
    assert f"| inside | 0 | {mean + 0.01:.4f} ± 0.0100 | 0.0600 ± 0.0100 |" in text
    assert f"| outside | random 8 | {mean + 5.01:.4f} ± 0.0100 |" in text


def test_what_starts_elsewhere_is_sooner_or_later_than_what_does_not(results):
    """Of two curves that fall alike, the higher one is later wherever both have been."""
    kinds = tables.read(results)
    low, high = (kinds[name] for name in ("rank-8", "rank-8-unseeded"))
    for seed in range(3):
        for run, factor in ((low[seed], 1.0), (high[seed], 2.0)):
            run["on the way"] = {str(step): {"held_out": {"0.5": factor * 4 / step, "0.6": 0}} for step in (1, 2, 4)}
    text = further.embedding(kinds)
    assert "| rank 8 is better with its start than without | 50% ± 0% | 50% ± 0% |" in text
    assert text.count("| 8, random start | 3 |") == 2


def test_what_two_ranks_drew_together_stands_between_what_each_drew(results):
    kinds = tables.read(results)
    rows = [line.split(" | ")[:2] for line in further.switch(kinds).splitlines()[2:10]]
    between = {"rank 32 to 0.9, then rank 8": 9, "rank 32 to 0.7, then rank 8": 7, "rank 32 to 0.4, then rank 8": 4}
    between |= {"rank 8 to 0.9, then rank 32": 19, "rank 8 to 0.7, then rank 32": 17, "rank 8 to 0.4, then rank 32": 14}
    between = {f"| {title}": f"{value:.2f} ± 0.00" for title, value in between.items()}
    distance = tables.at_the_end("frechet_distance", tables.UNGUIDED)
    alone = [tables.by_seed(kinds[f"rank-{rank}-unseeded"], distance) for rank in (8, 32)]
    first, last = (tables.shown(values, "{:.2f}") for values in alone)
    assert dict(rows) == {"| rank 8": first, **between, "| rank 32": last}
    assert alone[0] != alone[1]


def test_each_rank_is_drawn_with_new_noise_and_without(results):
    lines = further.renew(tables.read(results)).splitlines()[2:8]
    expected = [
        (f"| {how}", rank, f"{new + 10 * i + 0.01:.2f} ± 0.01")
        for new, how in enumerate(("the same noise", "new noise"))
        for i, rank in enumerate(("0", "8", "32"))
    ]
    assert [tuple(line.split(" | ")[:3]) for line in lines] == expected


def test_what_helps_one_more_than_the_other_is_the_difference_of_the_differences(results):
    """Ranks 0 and 8 are kinds number 0 and 3, with alignment 9 and 8: it costs rank 8 five, and rank 0 nine."""
    four = "**-4.0000 ± 0.0000** | **-4.00 ± 0.00** | **-4.0 ± 0.0** | **-4.0000 ± 0.0000**"
    row = f"| with alignment rank 8 gains more than rank 0, or loses less | {four} | shown | shown |"
    assert row in blocks.repa(tables.read(results))
    kinds = tables.read(results)
    for seed, run in kinds["rank-8-repa"].items():
        run["run"]["repa"], run["teacher"] = True, "abc" if seed else "def"
    assert "aligned with 2 networks" in blocks.repa(kinds)
    for rank in ("0", "8"):
        for seed in range(3):
            found = made_up(f"rank-{rank}-repa-weak", seed, 10.0 + 0.01 * seed)
            (results / f"rank-{rank}-repa-weak-seed-{seed}.json").write_text(json.dumps(found))
    three = "**-3.0000 ± 0.0000** | **-3.00 ± 0.00** | **-3.0 ± 0.0** | **-3.0000 ± 0.0000**"
    claim = "with a tenth of the weight of alignment † rank 8 gains more than rank 0, or loses less"
    assert f"| {claim} | {three} | shown | shown |" in blocks.repa(tables.read(results))


def test_a_rank_whose_best_rate_is_that_of_all_stands_with_its_runs_at_that_rate(results):
    """Losses are larger the later a kind is in `results`: the search finds 3e-4, but not for rank 0 here."""
    for seed in range(3):
        file = results / f"rank-0-rate-0.0006-seed-{seed}.json"
        file.write_text(json.dumps(made_up("rank-0-rate-0.0006", seed, 0.0)))
    kinds = tables.read(results)
    text = blocks.rate(kinds)
    assert re.search(r"\| 0 \| \d+\.\d+ ± \d\.\d+ \| \*\*0\.0000 ± 0\.0000\*\* \|", text)
    losses = (map(tables.held_out, kinds[kind].values()) for kind in ("rank-8-own-rate", "rank-0"))
    first, other = map(statistics.fmean, losses)
    assert f"rank 8 is better than rank 0 (x0-prediction) | **{first - other:+.4f}" in text
    assert "The search ends at the best rate of 8, 768, random 8." in text


def test_runs_at_their_own_rates_are_held_against_each_other_by_the_classifier_of_most(results):
    for file in results.glob("*-own-rate-seed-*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "classifier": "another"}))
    kinds = tables.read(results)
    distances = [kinds[f"rank-{rank}-own-rate"][0]["at the end"][tables.GUIDED]["frechet_distance"] for rank in (8, 0)]
    claim = "| rank 8 is better than rank 0 (x0-prediction) |"
    row = next(line for line in blocks.rate(kinds).splitlines() if line.startswith(claim))
    assert row.split(" | ")[2] == f"**{distances[0] - distances[1]:+.2f} ± 0.00**"
    for runs in kinds.values():
        runs[1]["classifier"] = "of another machine"  # at each seed the two sides compare
    row = next(line for line in blocks.rate(kinds).splitlines() if line.startswith(claim))
    assert row.split(" | ")[2] == f"**{distances[0] - distances[1]:+.2f} ± 0.00**"
    assert "These three are by 2 classifiers" in blocks.rate(kinds)
    own = kinds["rank-8-own-rate"]
    own[0], kept = {**own[0], "classifier": "a third"}, own[0]
    row = next(line for line in blocks.rate(kinds).splitlines() if line.startswith(claim))
    assert "2 seeds" in row.split(" | ")[2]
    assert own[0]["at the end"] == kept["at the end"]


@given(st.floats(0, 3), st.floats(0, 3))
def test_the_loss_as_trained_is_linear_and_hardly_sees_the_lowest_levels(loss, low):
    run = lambda *losses: {"on the way": {"1": {"held_out": dict(zip(map(str, LEVELS), losses, strict=True))}}}
    assert tables.as_trained(run(*[loss] * 11)) == pytest.approx(loss)
    assert tables.as_trained(run(low, *[0] * 10)) <= 0.01 * low
    assert tables.held_out(run(low, *[0] * 10)) == pytest.approx(low / 11)


def test_a_curve_reaches_a_level_between_two_measurements():
    assert [blocks.reached([10, 20, 30], [4.0, 2.0, 1.0], level) for level in (5.0, 3.0, 1.5, 1.0)] == [10, 15, 25, 30]
    assert blocks.reached([10, 20], [float("inf"), 1.0], 2.0) == 20  # nothing was recognized after 10


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=6))
def test_sooner_is_later_the_other_way_round(values):
    """However noisy two curves are: both are held against what both have reached."""
    steps = [10 * (i + 1) for i in range(len(values))]
    first, other = ((steps, list(column)) for column in zip(*values, strict=True))
    found = blocks.sooner(first, other, steps[-1])
    assert found == -blocks.sooner(other, first, steps[-1])
    assert -1 < found < 1
    assert blocks.sooner(first, first, steps[0]) == 0
    if min(other[1][:-1], default=10.0) > other[1][-1] >= first[1][-1]:  # as a loss is: the last is the lowest
        assert found == 1 - blocks.reached(*first, other[1][-1]) / steps[-1]


def test_guided_samples_on_the_way_go_on_to_those_at_the_end(results):
    """Rank 8 is at 4, 3.5 and 3, and at its end at 4.001 or so; rank 0 at 8, 4 and 2, and at its end at 1.001.

    Who was sooner before the first of them, nobody has measured.
    """
    text = blocks.speed(tables.read(results))
    assert "| what both have after | 1 steps | 2 steps | 3 steps | 4 steps |" in text
    assert re.search(r"\| residual, guided \|  \| 50% ± 0% \| -17% ± 0% \| 25% ± 0% \|", text)


def test_the_summary_has_every_claim_with_the_verdict_of_its_section(results):
    """Ranks 0 and 8 are kinds 0 and 3: by all that is made up, rank 8 is worse."""
    kinds = tables.read(results)
    text = summary.summary(kinds)
    assert "not run yet" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    claims = {row[1]: row[2:] for row in rows}
    assert summary.PUBLISHED.keys() <= claims.keys()
    published, ours, *verdicts = claims["rank 8 is better than rank 0 (x0-prediction)"]
    assert published == "FID 2.34, 2.68"
    assert ours.startswith("held-out loss 4.0100, 1.0100; Fréchet distance 4.01, 1.01")
    assert verdicts == [OPPOSITE, OPPOSITE]
    sections = (blocks.rank, blocks.clamp, blocks.repa, blocks.finetuning)
    below = "\n".join(make(kinds) for make in sections).splitlines()
    for claim, (_, _, *verdicts) in claims.items():
        if found := [line for line in below if line.startswith(f"| {claim} |")]:
            assert found[0].rstrip(" |").endswith(" | ".join(filter(None, verdicts)))
    assert len(claims) == len(rows)
    assert claims["rank 8 has sooner what both have at the end †"][1].startswith("held-out loss 4 steps, 1 steps; ")
    apart = {"rank-0": {0: kinds["rank-0"][0]}, "rank-8": {1: kinds["rank-8"][1]}}
    assert "| held-out loss -, -; " in summary.summary(kinds | apart)
    for kind in ("rank-8-repa", "finetuning-start"):
        del kinds[kind]
    assert summary.summary(kinds).count("not run yet") == 2


def test_every_run_is_of_one_experiment_in_the_table_of_hours(results):
    kinds = tables.read(results)
    rows = [line.strip("| ").split(" | ") for line in summary.runs(kinds).splitlines()[2:-2]]
    assert {"rank", "rate", "own-rate"} < {row[0].strip("`") for row in rows[:-1]} <= {*EXPERIMENTS}
    total, *counts = (int(row[1]) for row in (rows[-1], *rows[:-1]))
    assert total == sum(counts) == sum(map(len, kinds.values()))
    assert float(rows[-1][2]) == sum(float(row[2]) for row in rows[:-1]) == total
    assert next(row for row in rows if row[0] == "`finetuning`")[1] == str(3 * (len(blocks.FINETUNED) + 1))


@pytest.mark.parametrize("what", PLANS)
def test_the_table_of_hours_knows_the_runs_of_each_experiment(what, tmp_path):
    for run in PLANS[what](tmp_path):
        found = made_up("", 0, 1.0) | {"run": stated(run)}
        assert f"| `{what}` | 1 |" in summary.runs({run.name: {0: found}})


def test_whatever_is_still_missing_the_page_is_made_of_the_rest(results):
    """Without a kind of run, or without one or two seeds of it."""
    kinds = tables.read(results)
    for (kind, runs), left in zip(kinds.items(), itertools.cycle([set(), {1, 2}, {0}]), strict=False):
        fewer = {k: v for k, v in (kinds | {kind: {s: runs[s] for s in left}}).items() if v}
        for make, needed in page.BLOCKS.values():
            if all(name in fewer for name in needed):
                assert make(fewer)


def test_the_page_keeps_the_words_and_replaces_the_tables(results, tmp_path):
    words = ["page", "--out", str(results), "--docs", str(tmp_path)]
    assert paper.main(words) == 0
    first = (tmp_path / "paper.md").read_text()
    assert "Not run yet." not in first
    assert all((tmp_path / f"paper_{name}.png").stat().st_size > 5000 for name in ("rank", "speed"))
    assert paper.main(words) == 0
    assert (tmp_path / "paper.md").read_text() == first
    assert by_hand(first) == by_hand((DOCS / "paper.md").read_text())


def by_hand(text: str) -> str:
    return re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)


def test_the_page_here_is_what_the_results_here_give(tmp_path):
    assert paper.main(["page", "--out", str(DOCS / "paper"), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "paper.md").read_text() == (DOCS / "paper.md").read_text()


def test_what_has_no_results_is_said(tmp_path, capsys):
    assert paper.main(["page", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} has no results yet: python -m toy.paper rank" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    (tmp_path / "rank-2-seed-0.json").write_text(json.dumps(made_up("rank-2", 0, 1.0)))
    assert paper.main(["page", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no results yet for rank, of rank-0 and rank-8" in said
    assert "no results yet for paper_samples.png, of the pictures beside the JSON files" in said
    assert "no results yet for predicted and best ranks, which stay as they were, of spectra.json" in said
    assert (tmp_path / "paper.md").read_text().count("Not run yet.") == len(page.BLOCKS) - 2
    assert "not run yet: rank-0, rank-8" in (tmp_path / "paper.md").read_text()  # the summary says it of each part


def test_a_result_or_a_picture_of_another_version_is_one_line(results, capsys):
    words = ["page", "--out", str(results)]
    image_grid(torch.zeros(9 * 8, 3, 32, 32), 8).save(results / "finetuning-seed-0.png")
    assert paper.main(words) == 2
    assert "finetuning-seed-0.png has not 11 rows: it is of another version" in capsys.readouterr().err
    file = results / "finetuning-start-seed-0.json"
    found = json.loads(file.read_text())
    del found["at the end"]["strangers read alike"]
    file.write_text(json.dumps(found))
    assert paper.main(words) == 2
    assert "has no 'strangers read alike': it is of another version of toy.paper" in capsys.readouterr().err
    assert not (results / "paper.md").exists()


@pytest.mark.parametrize("text", ["a <!-- b --> c", "a <!-- end of b --> c", "<!-- end of b --> <!-- b -->", "none"])
def test_a_page_without_the_place_of_a_block_is_not_written(text):
    with pytest.raises(InputError, match="must have <!-- b --> and, after it, <!-- end of b -->, each once"):
        page.filled(text, "b", "the block")


def test_a_quick_look_does_not_come_into_the_page(results, tmp_path, capsys):
    file = results / "rank-2-seed-1.json"
    file.write_text(json.dumps(made_up("rank-2", 1, 1.0) | {"scale": {"held_out": 16}}))
    assert paper.main(["page", "--out", str(results), "--docs", str(tmp_path)]) == 2
    assert f"{file} is of a quick look" in capsys.readouterr().err
    file.write_text('{"loss": 1}')
    assert paper.main(["page", "--out", str(results), "--docs", str(tmp_path)]) == 2
    assert f"{file} is no result of toy.paper" in capsys.readouterr().err
    assert not (tmp_path / "paper.md").exists()


def test_the_figure_of_samples_has_the_data_and_each_rank_that_was_drawn(results, tmp_path):
    images = torch.full((20, 3, 64, 64), -1.0)
    for rank, columns in (("0", 8), ("full", 16)):
        image_grid(images, columns).save(results / f"rank-{rank}-seed-0.png")
    assert paper.main(["page", "--out", str(results), "--docs", str(tmp_path)]) == 0
    with Image.open(tmp_path / "paper_samples.png") as figure:
        black = (np.asarray(figure.convert("L")) < 10).mean(1)
    rows = np.flatnonzero(np.diff((black > 0.5).astype(int)) == 1)
    assert len(rows) == 2
    assert rows[0] > len(black) / 4  # above are the data, which are light


def test_the_prediction_is_written_and_its_best_ranks_are_bold(tmp_path):
    """Of eight directions with much variance each is worth predicting noise in, and no more, if there is room."""
    (tmp_path / "rank-2-seed-0.json").write_text(json.dumps(made_up("rank-2", 0, 1.0)))
    spectra = dict.fromkeys(("shapes", "emoji"), [30.0] * 8 + [0.01] * 90)
    (tmp_path / page.SPECTRA).write_text(json.dumps({"spectra": spectra}))
    assert paper.main(["page", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "paper.md").read_text().partition("<!-- predicted -->")[2].partition("<!-- end")[0]
    rows = [line.split(" | ") for line in text.splitlines() if "| shapes |" in line or "| emoji |" in line]
    assert len(rows) == 12
    assert all(row[3 + criterion.RANKS.index(8)] == "**1.00**" for row in rows)
    assert sum("**" in cell for row in rows for cell in row) == len(rows)


def test_losses_that_are_burdens_correlate_with_them_fully(tmp_path):
    values = [20.0 / (k + 1) for k in range(60)]
    spectra, kinds = {"shapes": values, "emoji": values}, {}
    for rank, value in best_rank.burdens(spectra, "shapes", 64).items():
        found = made_up(f"rank-{rank}", 0, 1.0)
        found["on the way"] = {"4": {"held_out": dict.fromkeys(("0.4", "0.6", "0.8"), 0.1 + 0.01 * value)}}
        kinds[f"rank-{rank}"] = {0: found, 1: found}
    text = best_rank.best_ranks(kinds, spectra)
    assert re.search(r"\| shapes \| 192 \| the bottleneck, 64 \| (\d+) \| \1 \| 1\.00 \| 1\.00 \|", text)
    assert "| shapes | 192 | nothing |" in text
    assert not re.search(r"\| nothing \| (\d+) \| \1 \|", text)
    few = kinds | {"rank-1": {0: made_up("rank-1", 0, 0.0)}}  # a rank of fewer seeds is compared with none
    others, _, compared = best_rank.best_ranks(few, spectra).rpartition("\n\n")
    assert others != text.rpartition("\n\n")[0]
    assert compared.count("| shapes |") == 3
    assert re.search(r"\| shapes \| 192 \| the bottleneck, 64 \| (\d+) \| \1 \| 1\.00 \| 1\.00 \|", compared)
