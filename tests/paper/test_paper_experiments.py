"""toy.paper's plans: every run has a name of its own, and what is compared differs in one thing."""

import json
import tarfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymflow.errors import InputError
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from toy.paper import experiments, page
from toy.paper.damage import DAMAGES
from toy.paper.data import HELD_OUT, KEPT, EmojiData, ShapesData, code_point, of_classes
from toy.paper.experiments import PLANS, RATES, SEEDS, best_rate
from toy.paper.finetuning import MODELS, VARIANCE
from toy.paper.runs import EMBEDDED, HERE


@pytest.fixture
def searched(tmp_path):
    """A folder with the results of the search for learning rates: each rank likes the largest best."""
    for run in PLANS["rate"](tmp_path):
        rate = float(next(s for s in run.settings if s.startswith("optimizer.lr=")).partition("=")[2])
        (tmp_path / f"{run.name}.json").write_text(json.dumps({"on the way": {"1": {"held_out": {"0.5": -rate}}}}))
    return tmp_path


def test_names_are_unique_and_configurations_are_valid(searched):
    runs = [run for plan in PLANS.values() for run in plan(searched)]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        settings = [*run.settings, f"train.seed={run.seed}"]
        settings += ["loss.repa.model=teacher"] * run.repa + ["data.path=emoji64.tar"] * (run.config == "emoji64")
        config = load_config(HERE / f"{run.config}.yaml", settings)
        assert config.train.seed == run.seed
        assert config.model.options["depth"] == 6


def test_what_is_compared_has_the_same_seeds_and_differs_in_what_its_name_says(searched):
    rank, aligned, own, started = (PLANS[name](searched) for name in ("rank", "repa", "own-rate", "embedding"))
    plain = {run.name: run for run in rank}
    assert {run.seed for run in [*rank, *aligned, *own]} == set(SEEDS)
    for run in aligned:
        twin = plain[run.name.replace("-repa", "").replace("-weak", "")]
        weight = {"loss.repa.weight=0.05"} if "-weak" in run.name else set()
        assert set(run.settings) - set(twin.settings) == {"loss.repa.after=2", "loss.repa.hidden=512"} | weight
    for run in started:
        twin = plain[run.name.replace("-seeded", "").replace("-unseeded", "")]
        assert set(run.settings) - set(twin.settings) == {f"model.backbone={EMBEDDED}", "model.size=null"}
        assert bool(run.given) == ("-seeded" in run.name)
    for run in own:
        twin = plain[run.name.replace("-own-rate", "")]
        assert set(run.settings) - set(twin.settings) == {"optimizer.lr=0.0096"}
        assert run.random == twin.random
    assert {f"rank-{name}-own-rate" for name in ("8", "0", "full", "random-8")} == {
        run.name.rpartition("-seed-")[0] for run in own
    }


def test_where_the_search_finds_the_rate_of_the_configuration_nothing_runs_again(searched):
    file = searched / "rank-8-rate-0.0006-seed-3.json"
    file.write_text(json.dumps({"on the way": {"1": {"held_out": {"0.5": -1.0}}}}))
    assert load_config(HERE / "shapes64.yaml").optimizer.lr == experiments.RATE
    own = experiments.own_rate(searched)
    assert len(own) == 9
    assert not any(run.name.startswith("rank-8") for run in own)


def test_every_kind_on_the_page_is_in_a_plan(searched):
    kinds = {run.name.rpartition("-seed-")[0] for plan in PLANS.values() for run in plan(searched)}
    kinds |= {f"{data}-{damage}" for data in ("shapes", "emoji") for damage in DAMAGES}
    kinds |= {f"finetuning-{model}" for model in (*MODELS, VARIANCE)}
    needed = {kind for _, kinds in page.BLOCKS.values() for kind in kinds}
    assert needed <= kinds


@given(st.dictionaries(st.sampled_from(RATES), st.floats(0, 1)))
def test_a_rate_is_the_best_only_if_the_next_higher_one_is_worse_or_none_is_tried(losses):
    found, lowest = best_rate(losses), min(losses.values(), default=None)
    tried = [rate in losses for rate in RATES]
    first = next((i for i, rate in enumerate(RATES) if losses.get(rate) == lowest), None)
    if found is None:
        assert first is None or not all(tried[: first + 2])
    else:
        assert losses[found] == lowest
        assert all(tried[: RATES.index(found) + 2])


def test_without_a_search_no_rate_is_taken_for_the_best(tmp_path, capsys):
    assert experiments.own_rate(tmp_path) == []
    assert "rank 8 has no learning rate of its own yet: python -m toy.paper rate" in capsys.readouterr().out


# ---- Data ------------------------------------------------------------------------------------------------------------
def test_held_out_shapes_are_in_no_training():
    config = load_config(HERE / "shapes64.yaml")
    images, labels = ShapesData().held_out(3)
    data = make_dataset(config)
    seen = torch.stack([data[i].image for i in range(50)])
    assert config.data.size <= HELD_OUT
    assert images.shape == (3, 3, 64, 64)
    assert labels.shape == (3,)
    assert not any(torch.equal(a, b) for a in images for b in seen)


def test_other_pictures_have_the_classes_that_are_asked_for_and_come_once_while_there_are_enough():
    theirs = torch.tensor([0, 1, 2, 0, 1, 0])
    images = torch.arange(6)
    asked = torch.tensor([1, 0, 0, 1, 2, 0, 1])
    chosen = of_classes(asked, images, theirs)
    assert theirs[chosen].tolist() == asked.tolist()
    assert chosen.tolist() == [1, 0, 3, 4, 2, 5, 1]


def test_emoji_of_one_code_point_are_all_kept_or_all_trained_on(tmp_path):
    """400 code points with 1 to 3 emoji each, as those with skin colours have several."""
    from io import BytesIO

    from PIL import Image

    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for point in range(400):
            for variant in range(point % 3 + 1):
                image = BytesIO()
                Image.new("RGB", (64, 64), (point % 256, variant, point // 256)).save(image, "PNG")
                for kind, content in (("png", image.getvalue()), ("cls", b"1")):
                    info = tarfile.TarInfo(f"{point:04x}-{variant}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    data = EmojiData(tmp_path / "all.tar", tmp_path / "out")
    parts = [names_in(data.part(name)) for name in ("training", "held-out")]
    points = [{code_point(file) for file in part} for part in parts]
    assert not points[0] & points[1]
    assert sorted([*parts[0], *parts[1]]) == sorted(names_in(tmp_path / "all.tar"))
    assert KEPT <= len(parts[1]) / 2 < KEPT + 3
    with tarfile.open(tmp_path / "other.tar", "w"):
        pass
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(InputError, match=r"text.tar cannot be read as a tar file"):
        EmojiData(tmp_path / "text.tar", tmp_path / "new").part("training")
    with pytest.raises(InputError, match=r"has the parts of another file than .*other.tar: choose another --out"):
        EmojiData(tmp_path / "other.tar", tmp_path / "out").part("training")
    assert len(data.judged_by(0)) == len(parts[0]) / 2
    assert data.held_out(5)[0].shape == data.others(torch.ones(5)).shape == (5, 3, 64, 64)


def names_in(file):
    with tarfile.open(file) as tar:
        return tar.getnames()
