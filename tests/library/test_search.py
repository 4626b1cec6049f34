"""The search: it finds what is known to be best, and shares what trajectories share without changing a bit."""

import csv
import itertools
import json
import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import GUARD
from test_cli_sample import save_model
from test_evaluate import evaluated, pictures

from asymflow.backbones.jit import JiT
from asymflow.cli import main
from asymflow.cli.evaluate_search import intervals, values
from asymflow.errors import InputError
from asymflow.evaluation.branches import Branches, Guidance
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.drawn import Drawn
from asymflow.evaluation.frechet import Target, statistics
from asymflow.evaluation.protocol import load_protocol
from asymflow.evaluation.search import Score, coarse, search
from asymflow.model import AsymFlow
from asymflow.sampling import sigma_grid
from asymflow.subspace import Subspace


# ---- A flow of which the quality is known ----------------------------------------------------------------------------
class NormalFlow:
    """Data that is normal, and a model of it that is too broad, the more so the farther its average is from 0.08.

    Guidance away from a still broader model makes up for that, but not for a mean that is wrong in the last dimension:
    so the best distance is not 0, as it never is. All velocities are linear, so the samples are normal,
    with a mean and a covariance that are known but for rounding: the samples of 0 and of the unit vectors.
    """

    lengths, scales, highs = np.geomspace(0.02, 0.25, 5), np.arange(1, 2.6, 0.1), np.arange(0.3, 1.01, 0.05)
    data, broad = torch.tensor([1.5, 0.6, 0.2, 0.3]).double(), torch.tensor([1.05, 1.15, 1.3, 1.0]).double()
    mean = torch.tensor([0.0, 0.0, 0.0, 0.2]).double()
    without = torch.tensor([2.2, 1.2, 0.4, 0.3]).double()
    offset = torch.tensor([0.6, 0.2, 0.0, 0.2]).double()
    levels = sigma_grid(8).tolist()

    def __init__(self):
        self.sizes = (len(self.lengths), len(self.scales), len(self.highs))
        self.target = Target({"mu": np.zeros(4), "sigma": torch.diag(self.data**2).numpy()})

    def velocity(self, mean, std, x, sigma):
        """The mean of eps - x0 at x, for x0 normal."""
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        centered = (x - (1 - sigma) * mean) / variance
        return sigma * centered - mean - (1 - sigma) * std**2 * centered

    def draw(self, x, point):
        length, scale, high = self.lengths[point[0]], self.scales[point[1]], self.highs[point[2]]
        own = self.data * self.broad * (1 + 0.15 * math.log(length / 0.08) ** 2)

        def u(x, sigma):
            guided = self.velocity(self.mean, own, x, sigma)
            if sigma <= high:
                guided = guided + (scale - 1) * (guided - self.velocity(self.offset, self.without, x, sigma))
            return guided

        for sigma, target in zip(self.levels, self.levels[1:], strict=False):
            slope = u(x, sigma)
            if target > 0:
                slope = (slope + u(x + (target - sigma) * slope, target)) / 2
            x = x + (target - sigma) * slope
        return x

    @cache  # noqa: B019 (there is one, for as long as the tests run)
    def line(self, point):
        """A sample is mean + noise @ matrix, for these two."""
        mean = self.draw(torch.zeros(1, 4).double(), point)[0]
        return mean, self.draw(torch.eye(4).double(), point) - mean

    def truth(self):
        """The distance of each setting, of infinitely many samples."""
        found = np.empty(self.sizes)
        for point in np.ndindex(self.sizes):
            mean, matrix = self.line(point)
            found[point] = self.target.distance({"mu": mean.numpy(), "sigma": (matrix.mT @ matrix).numpy()})[0]
        return found

    def scorer(self, seed):
        noise = torch.randn(2**16, 4, generator=torch.Generator().manual_seed(seed)).double()

        def score(points, images):
            found = {}
            for point in points:
                mean, matrix = self.line(point)
                samples = mean + noise[:images] @ matrix
                value, influence = self.target.distance(statistics(samples))
                found[point] = Score(value, influence(samples).numpy())
            return found

        return score


@pytest.fixture(scope="module")
def normal():
    flow = NormalFlow()
    return flow, flow.truth()


def found_by(flow, seed):
    same = lambda point: (*point[:2], 0) if point[1] == 0 else point
    full = math.prod(flow.sizes) * 8192  # images, if each setting had as many as the close ones get
    found = search(flow.sizes, flow.scorer(seed), start=512, budget=full // 10, same=same)
    assert found.images <= full // 10
    assert len(found.scores) < math.prod(flow.sizes) / 2
    return found.best


def is_found(truth, point):
    """Whether it is the best, or as good but for 5 %: the mean of the grid is several times as far from the data."""
    return truth[point] <= 1.05 * truth.min()


@pytest.mark.slow
def test_the_best_setting_is_found_for_a_tenth_of_the_images(normal):
    flow, truth = normal
    best = np.unravel_index(truth.argmin(), truth.shape)
    assert all(0 < at < size - 1 for at, size in zip(best, flow.sizes, strict=True))  # within, not at an edge
    assert truth.mean() > 4 * truth.min()
    assert is_found(truth, found_by(flow, 0))


@pytest.mark.slow
def test_so_it_is_in_nineteen_of_twenty_seeds(normal):
    flow, truth = normal
    assert sum(is_found(truth, found_by(flow, seed)) for seed in range(20)) >= 19


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(0, 2**20))
def test_without_chance_the_lowest_point_of_a_bowl_is_found(sizes, seed):
    rng = np.random.default_rng(seed)
    bottom, widths = [rng.integers(size) for size in sizes], rng.uniform(0.5, 2, len(sizes))
    height = lambda point: float(sum(w * (a - b) ** 2 for w, a, b in zip(widths, point, bottom, strict=True)))
    score = lambda points, images: {point: Score(height(point), np.zeros(images)) for point in points}
    found = search(sizes, score, start=2, budget=10**9)
    assert found.best == tuple(bottom)
    assert found.complete
    assert found.rivals == [found.best]
    tight = search(sizes, score, start=2, budget=1)
    assert tight.best in tight.scores  # the first grid is drawn whatever the budget


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(2, 5000), st.integers(0, 2**20))
def test_what_is_left_of_a_budget_goes_to_the_best_of_those_that_cannot_be_told_apart(sizes, budget, seed):
    """Settings that are all alike but for chance: they would take any number of images."""
    rng = np.random.default_rng(seed)
    noise = {point: rng.standard_normal(2**13) for point in itertools.product(*map(range, sizes))}
    score = lambda points, n: {p: Score(1 + float(noise[p][:n].mean()), noise[p][:n]) for p in points}
    found = search(sizes, score, start=4, budget=budget)
    assert found.images == sum(len(one.influence) for one in found.scores.values())
    assert found.images <= max(budget, 4 * len(coarse(tuple(sizes))))
    assert found.best == found.rivals[0]
    most = max(len(one.influence) for one in found.scores.values())
    assert len(found.scores[found.best].influence) == most
    if not found.complete and most > 4:  # not two more could be afforded, or one is left
        close = [point for point in found.rivals if len(found.scores[point].influence) == most]
        assert len(close) == 1 or budget - found.images < 2 * most


# ---- Shared trajectories ---------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 3.0]), st.floats(0.01, 1)), min_size=1, max_size=5, unique=True),
    st.sampled_from(["heun", "euler"]),
    st.integers(1, 6),
)
def test_shared_trajectories_are_those_drawn_alone_bit_for_bit(settings_, method, steps):
    torch.manual_seed(0)
    jit = JiT.from_name("tiny/4", image_size=8, num_classes=3, width=32, depth=1, heads=2, in_context_start=0)
    for weight in jit.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    flow = AsymFlow(jit, Subspace.random(48, 4)).eval()
    protocol = load_protocol("quick", {"steps": steps, "method": method})
    branches, numbers = Branches(Drawn(flow, protocol, "float32", {})), [3, 5]
    chosen = [Guidance(scale, 0.0, high) for scale, high in settings_]
    found, sizes = branches.draw(numbers, chosen), []
    for guidance in chosen:
        options = {"guidance": guidance.scale, "interval": (guidance.low, guidance.high)}
        alone = Drawn(flow, protocol, "float32", options)
        calls = jit.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
        expected = alone.draw(numbers)
        calls.remove()
        assert torch.equal(found[guidance], expected)
    assert branches.alone.total() == sum(sizes)
    assert branches.spent.total() <= branches.alone.total()


# ---- The command -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    Classifier(10, width=8).save(folder / "classifier.safetensors")
    save_model(folder / "model")
    pictures(folder / "other", 90, seed=1, shift=0.3)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("asymflow.cli.evaluate_store.UNIT", 32)


def words(made, out, *more):
    options = {"--model": made / "model", "--reference": made / "other", "--device": "cpu", "--out": out}
    options |= {"--extractor": "classifier", "--weights": made / "classifier.safetensors"}
    options |= {"--steps": 4, "--guidance": "1:2:0.5", "--interval": "0,0.4:1:0.6"}
    options |= {"--start": 64, "--final": 40, "--repeats": 2, **dict(zip(more[::2], more[1::2], strict=True))}
    return ["evaluate", "search", *map(str, itertools.chain.from_iterable(options.items()))]


def test_the_command_finds_a_setting_and_goes_on(made, tmp_path, capsys):
    assert main(words(made, tmp_path / "out", "--budget", 600)) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    with (tmp_path / "out" / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["settings"] == 5  # without guidance both intervals are one
    assert found["forward_passes"] < found["forward_passes_if_each_were_drawn_alone"]
    assert "forward passes" in said
    assert (tmp_path / "out" / "search.png").exists()
    folders = json.loads((tmp_path / "out" / "search.json").read_text())["final"]["folders"]
    finals = [json.loads((tmp_path / "out" / folder / "result.json").read_text()) for folder in folders]
    distances = [one["measures"]["frechet_distance"]["value"] for one in finals]
    assert found["final"]["values"] == distances
    assert found["final"]["mean"] == pytest.approx(np.mean(distances))
    assert len({one["protocol"]["first"] for one in finals}) == 2
    assert {one["protocol"]["order"] for one in finals} == {"in turn"}
    # The best is what asymflow evaluate finds of the same setting and images.
    best, options = found["best"], dict(model=made / "model", reference=made / "other", steps=4)
    options |= dict(guidance=best["guidance"], interval=",".join(map(str, best["interval"])))
    images = max(int(row["images"]) for row in rows)
    least = min((row for row in rows if int(row["images"]) == images), key=lambda row: float(row["value"]))
    assert (float(least["guidance"]), float(least["high"])) == (best["guidance"], best["interval"][1])
    (tmp_path / "shuffled.yaml").write_text("num: 64\norder: shuffled\n")
    alone = evaluated(made, tmp_path / "alone", **options, num=images, protocol=tmp_path / "shuffled.yaml")
    value = alone["measures"]["frechet_distance"]["value"]
    assert float(least["value"]) == pytest.approx(value, rel=1e-3, abs=1e-5)
    # Again, with nothing to draw; then with a larger budget.
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert main(words(made, tmp_path / "out", "--budget", 600)) == 0
    again = json.loads((tmp_path / "out" / "search.json").read_text())
    assert (again["best"], again["scores"]) == (found["best"], found["scores"])
    assert all(path.stat().st_mtime_ns == then for path, then in features.items())
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["adm", "jit", "edm2-dino", "quick"])
def test_few_images_are_of_as_many_classes_by_every_protocol(made, tmp_path, monkeypatch, capsys, name):
    def as_it_begins(sizes, score, start, *_):
        store = score.__self__
        labels = list(map(store.tried(None).source.label, range(50)))
        assert [len(set(labels[i : i + 10])) for i in range(0, 50, 10)] == [10] * 5  # as often as each other
        assert labels[:10] != labels[10:20] != sorted(labels[10:20])
        before = load_protocol(name, {"steps": 4, "extractor": "classifier"})
        assert (store.protocol.order, store.protocol.num) == (before.order, before.num)
        assert store.identity(None)["protocol"]["order"] == "shuffled"
        raise InputError("enough")

    monkeypatch.setattr("asymflow.evaluation.search.search", as_it_begins)
    monkeypatch.setattr("asymflow.cli.evaluate_store.UNIT", 8)
    assert main(words(made, tmp_path / "out", "--protocol", name, "--start", 8)) == 2
    assert "the first 8 images have 8 of 10 classes\n" in (said := capsys.readouterr().err)
    assert said.endswith("error: enough\n")


@pytest.mark.slow
def test_scores_of_other_images_are_never_used(made, tmp_path, capsys):
    assert main(words(made, tmp_path / "out", "--budget", 600)) == 0
    save_model(tmp_path / "model", seed=1)
    for options, differing in [
        (("--guidance", "1:3:0.5"), "guidance"),
        (("--steps", 5), "protocol"),
        (("--orthogonal", 0.5), "model, orthogonal"),
        (("--model", tmp_path / "model"), "model"),
    ]:
        capsys.readouterr()
        assert main(words(made, tmp_path / "out", "--budget", 600, *options)) == 2
        assert f"has a search of other {differing}: choose another --out" in capsys.readouterr().err
    # The final is drawn anew if its number of images changes, and the counts are of what is used.
    assert main(words(made, tmp_path / "out", "--budget", 600, "--final", 64, "--start", 32)) == 0
    less = json.loads((tmp_path / "out" / "search.json").read_text())
    assert less["final"]["images"] == 64
    assert less["images"] == sum(row["images"] for row in less["scores"])
    passes = 4 * 2 * 2 - 2  # of an image with guidance: two passes an evaluation, and the last step has one evaluation
    assert less["forward_passes_if_each_were_drawn_alone"] <= passes * less["images"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_two_processes_search_as_one(made, tmp_path, monkeypatch):
    import threading

    from asymflow.cli import evaluate_store

    ranks = threading.local()
    for module in ("evaluate_store", "evaluate_search", "evaluate", "common"):
        place = lambda: (getattr(ranks, "rank", 0), getattr(ranks, "world", 1))
        monkeypatch.setattr(f"asymflow.cli.{module}.this_process", place)
    monkeypatch.setattr(evaluate_store.time, "sleep", lambda seconds: threading.Event().wait(0.01))

    def one(rank):
        ranks.rank, ranks.world = rank, 2
        assert main(words(made, tmp_path / "two", "--budget", 600)) == 0

    assert main(words(made, tmp_path / "one", "--budget", 600)) == 0
    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()
    found, expected = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("two", "one"))
    assert found["best"] == expected["best"]
    assert [row["value"] for row in found["scores"]] == [row["value"] for row in expected["scores"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:2:0.25", (1, 1.25, 1.5, 1.75, 2)),
        ("1:3:0.75", (1, 1.75, 2.5, 3)),
        ("0.7:1:0.08", (0.7, 0.78, 0.86, 0.94, 1)),
        ("2:1:-0.5", (1, 1.5, 2)),
        ("1:2:-0.5", None),
        ("2,1", (1, 2)),
        ("0.9996", (0.9996,)),
        ("1:1:0", None),
        ("a", None),
        ("1,1", None),
        ("nan", None),
        ("1:1e9:1", None),
    ],
)
def test_ranges(text, expected):
    if expected is None:
        with pytest.raises(Exception, match="it must be START:STOP:STEP"):
            values(text)
    else:
        assert values(text) == expected
    widths = values("0.02:0.25")
    assert len(widths) == 8
    assert (widths[0], widths[-1]) == (0.02, 0.25)
    assert np.diff(np.log(widths)) == pytest.approx(np.log(12.5) / 7, abs=1e-4)
    assert intervals("0,0.7:0.8:0.05") == ((0, 0.7), (0, 0.75), (0, 0.8))
    with pytest.raises(Exception, match="it must be LOW,START:STOP:STEP"):
        intervals("0.5,0.4")


@pytest.mark.parametrize("measures", ["[kid]", "[frechet_distance, clip_score]"])
def test_a_protocol_without_what_a_search_is_by_is_refused(made, tmp_path, capsys, measures):
    (tmp_path / "mine.yaml").write_text(f"num: 40\nmeasures: {measures}\n")
    assert main(words(made, tmp_path / "out", "--protocol", tmp_path / "mine.yaml")) == 2
    error = capsys.readouterr().err
    assert "a search is by frechet_distance, of images of classes, but the protocol mine" in error
    assert error.count("\n") == 1
