"""The Fréchet distance: that of closed forms, the same by any number of ranks, and never a disturbance."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from processes import Launched, metrics, same_bits, tensors
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from asymflow.errors import InputError
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.features import CLASSIFIER, load_extractor
from asymflow.evaluation.frechet import frechet_distance, load_statistics, save_statistics, statistics
from asymflow.evaluation.measures import Reference
from asymflow.sampling import generate
from asymflow.subspace import Subspace
from asymflow.training import evaluate
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.start import make_flow


def images(count, seed=0, size=32):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    Classifier(16, width=8).save(file)
    return file


# ---- The distance ----------------------------------------------------------------------------------------------------
def test_the_distance_of_normal_distributions_is_the_known_one():
    """|mu - mu'|^2 + sum (s - s')^2, for covariances that commute; 0 from itself; the same both ways."""
    g = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(g.standard_normal((5, 5)))
    one, other = (
        {"mu": g.standard_normal(5), "sigma": rotation @ np.diag(std**2) @ rotation.T}
        for std in (np.array([1, 2, 3, 4, 5.0]), np.array([2, 2, 1, 4, 0.5]))
    )
    expected = np.square(one["mu"] - other["mu"]).sum() + 1 + 0 + 4 + 0 + 4.5**2
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_statistics_are_the_mean_and_the_covariance():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = statistics(features)
    assert np.allclose(found["mu"], features.double().mean(0), rtol=1e-12)
    assert np.allclose(found["sigma"], torch.cov(features.double().T), rtol=1e-12)


def test_inception_from_a_file_has_torch_fidelitys_features(tmp_path, monkeypatch):
    with monkeypatch.context() as m:  # its weights are not to be had here: random ones do
        m.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        m.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    ours = load_extractor("inception-v3-compat", tmp_path / "inception.pth")
    found = ours(images(2))
    assert found.shape == (2, 2048)
    assert torch.equal(found, theirs(images(2))[0])


# ---- What can be wrong -----------------------------------------------------------------------------------------------
def test_what_cannot_be_used_is_one_line(tmp_path, classifier, monkeypatch):
    (tmp_path / "text").write_text("no tensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    monkeypatch.setenv("ASYMFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, weights, said in [
        ("inception", None, "one of inception-v3-compat"),
        ("dinov2-vit-b-14", None, "one of"),
        ("inception-v3-compat", None, "weights of Inception.* Put https"),
        ("inception-v3-compat", tmp_path / "missing", "does not exist"),
        ("inception-v3-compat", tmp_path / "text", "plain tensors"),
        ("inception-v3-compat", tmp_path / "other.pth", "does not hold the weights"),
        (CLASSIFIER, None, "needs weights"),
        (CLASSIFIER, tmp_path / "text", "not a whole safetensors file"),
    ]:
        with pytest.raises(InputError, match=said) as e:
            load_extractor(name, weights)
        assert len(str(e.value).splitlines()) == 1


def test_a_hostile_weights_file_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(InputError):
        load_extractor("inception-v3-compat", tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_statistics_are_kept_as_an_npz_that_others_have_too(tmp_path):
    kept = statistics(torch.randn(20, 3))
    save_statistics(tmp_path / "a.npz", kept, "twenty")
    found, about = load_statistics(tmp_path / "a.npz")
    assert about == "twenty"
    assert frechet_distance(found, kept) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "published.npz", mu=np.float32([0, 1]), sigma=np.eye(2, dtype=np.float32))
    assert load_statistics(tmp_path / "published.npz")[0]["mu"].dtype == np.float64
    for name, arrays in {
        "other": {"mean": [0.0]},
        "shapes": {"mu": [0.0, 1.0], "sigma": np.eye(3)},
        "infinite": {"mu": [math.nan], "sigma": np.eye(1)},
        "object": {"mu": np.array([None], dtype=object), "sigma": np.eye(1)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=f"{name}.npz"):
            load_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(InputError, match="does not exist"):
        load_statistics(tmp_path / "missing.npz")


# ---- The classifier --------------------------------------------------------------------------------------------------
def test_a_classifier_learns_and_its_file_is_whole_or_refused(tmp_path):
    torch.manual_seed(0)
    net = Classifier(2, width=8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x = images(32) // 4
    y = torch.arange(32) % 2
    x[y == 1, 0] += 150  # red
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    net.save(tmp_path / "c.safetensors")
    same = Classifier.load(tmp_path / "c.safetensors")
    assert torch.equal(same(x), net(x))
    assert torch.equal(same.features(x[:4]), net.features(x[:4]))
    content = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(InputError):
        Classifier.load(tmp_path / "cut.safetensors")


# ---- While it trains -------------------------------------------------------------------------------------------------
def settings(classifier, every=2, stage=1):
    return [
        "train.steps=4",
        "checkpoint.every=2",
        f"evaluate.every={every}",
        "evaluate.num=22",
        "evaluate.batch_size=6",
        "evaluate.extractor=classifier",
        f"evaluate.weights={classifier}",
        "sample.steps=2",
        "sample.num=3",
        "data.size=100",
        f"deepspeed.zero_optimization.stage={stage}",
    ]


def run(world, out, *settings):
    launched = Launched(world, out, *settings)
    assert launched.wait() == [0] * world, launched.said()
    return launched


def evaluations(out):
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def distance_of(out, classifier):
    """Between what the first average of the last checkpoint draws and the data, which `reference.npz` is held to."""
    config = load_config(out / "config.yaml")
    data, features = make_dataset(config), load_extractor(CLASSIFIER, classifier)
    reference, _ = load_statistics(out / "reference.npz")
    of_data = statistics(features(torch.stack([data[i].image for i in range(len(data))])))
    assert np.allclose(reference["mu"], of_data["mu"], rtol=1e-5)
    flow = make_flow(config, Subspace.load(out / "subspace.safetensors")).eval()
    average = {name: value for (kind, name), value in tensors(out, 4).items() if kind == "ema-0.5"}
    assert not flow.load_state_dict(average, strict=False).unexpected_keys
    labels = [i % 16 for i in range(22)]
    sampler = dict(steps=2, guidance=config.sample.guidance, interval=(0.0, 1.0), method="heun")
    drawn = torch.cat([generate(flow, labels[i : i + 6], range(i, min(i + 6, 22)), **sampler) for i in range(0, 22, 6)])
    pixels = ((drawn + 1) * 127.5).round().clamp(0, 255).byte()
    return frechet_distance(statistics(features(pixels)), reference)


@pytest.mark.slow
def test_it_is_the_same_on_any_number_of_ranks_and_changes_nothing_else(tmp_path, classifier):
    run(1, tmp_path / "one", *settings(classifier))
    run(2, tmp_path / "two", *settings(classifier, stage=3))
    run(1, tmp_path / "off", *settings(classifier, every="null"))
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [2, 4]
    for a, b in zip(one, two, strict=True):
        assert a["frechet_distance"] == pytest.approx(b["frechet_distance"], rel=2e-2)  # a pixel may round otherwise
        assert a["frechet_distance"] > 0.01
    assert one[-1]["frechet_distance"] == pytest.approx(distance_of(tmp_path / "one", classifier), rel=2e-2)
    (of_one, _), (of_two, _) = (load_statistics(tmp_path / name / "reference.npz") for name in ("one", "two"))
    assert np.allclose(of_one["mu"], of_two["mu"], rtol=1e-5)
    assert np.allclose(of_one["sigma"], of_two["sigma"], rtol=1e-4, atol=1e-7)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "off")
    assert same_bits(tensors(tmp_path / "one", 4), tensors(tmp_path / "off", 4))
    assert not (tmp_path / "off" / "evaluations.jsonl").read_text()


@pytest.mark.parametrize("broken", [0, 1])
def test_samples_that_are_nan_have_no_distance(monkeypatch, broken):
    """Black images would have one."""

    def generate(flow, labels, indices, **options):
        images = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(indices[0])) * 2 - 1
        return images.index_fill(0, torch.arange(broken), torch.nan) if indices[0] == 4 else images

    class Means:
        columns = ()
        both = staticmethod(lambda pixels, labels: (pixels.double().flatten(2).mean(2), None))

    monkeypatch.setattr("asymflow.evaluation.drawn.generate", generate)
    monkeypatch.setattr(evaluate, "all_gather_rows", lambda rows: rows)
    monkeypatch.setattr(evaluate, "rank0_broadcast", lambda function, *_: function())
    evaluation = object.__new__(evaluate.Evaluation)
    evaluation.config = load_config("shapes_tiny", ["evaluate.num=12", "evaluate.batch_size=4"])
    evaluation.protocol, evaluation.features = evaluate.protocol_of(evaluation.config), Means()
    evaluation.method, evaluation.device = evaluation.protocol.method, torch.device("cpu")
    evaluation.reference, evaluation.rank, evaluation.world = Reference(statistics(torch.rand(9, 3))), 0, 1
    found = evaluation.measured(make_flow(evaluation.config, Subspace.random(48, 8)).eval(), lambda: False)
    value = found["frechet_distance"].value
    assert value is None if broken else math.isfinite(value)


@pytest.mark.slow
def test_a_finished_run_can_be_evaluated_and_is_only_once(tmp_path, classifier):
    run(1, tmp_path / "run", *settings(classifier, every="null"))
    launched = run(1, tmp_path / "run", *settings(classifier))
    assert any("22 samples in float32, protocol training" in line for line in launched.said())
    (first,) = evaluations(tmp_path / "run")
    assert (first["step"], first["sample"]["precision"]) == (4, "float32")
    run(1, tmp_path / "run", *settings(classifier))
    assert evaluations(tmp_path / "run") == [first]
    # Of another extractor, the statistics of the data are not those that were kept.
    torch.manual_seed(1)
    Classifier(16, width=8).save(tmp_path / "other.safetensors")
    shutil.move(tmp_path / "run" / "evaluations.jsonl", tmp_path / "earlier.jsonl")
    before = load_statistics(tmp_path / "run" / "reference.npz")[0]["mu"]
    run(1, tmp_path / "run", *settings(tmp_path / "other.safetensors"))
    assert not np.allclose(load_statistics(tmp_path / "run" / "reference.npz")[0]["mu"], before)
    assert evaluations(tmp_path / "run")[0]["frechet_distance"] != first["frechet_distance"]
    # Other settings are another evaluation, and are told beside it.
    run(1, tmp_path / "run", *settings(tmp_path / "other.safetensors"), "sample.precision=bf16")
    one, other = evaluations(tmp_path / "run")
    assert [entry["sample"]["precision"] for entry in (one, other)] == ["float32", "bf16"]
    assert one["frechet_distance"] != other["frechet_distance"]


def stopping():
    """SIGTERM comes as the evaluation of the first rank begins."""
    from asymflow.training.evaluate import Evaluation

    gather = Evaluation.gather

    def replaced(self, images, count, title, stop):
        if self.rank == 0 and title == "evaluating":
            os.kill(os.getpid(), signal.SIGTERM)
        return gather(self, images, count, title, stop)

    Evaluation.gather = replaced


def test_a_signal_ends_an_evaluation_and_nothing_is_lost(tmp_path, classifier):
    launched = Launched(2, tmp_path / "run", *settings(classifier), "checkpoint.every=4", patch=stopping)
    assert launched.wait() == [0, 0], launched.said()
    assert any("SIGTERM: stopped and saved at step 2" in line for line in launched.said("out"))
    assert not (tmp_path / "run" / "evaluations.jsonl").read_text()
    run(2, tmp_path / "run", *settings(classifier), "checkpoint.every=4")
    assert [entry["step"] for entry in evaluations(tmp_path / "run")] == [2, 4]


def failing():
    """The second rank fails at its second batch of samples."""
    from asymflow.training.evaluate import Evaluation

    gather = Evaluation.gather

    def replaced(self, images, count, title, stop):
        def images_until(indices):
            if indices[0] != first:
                raise ValueError("such is life")
            return images(indices)

        first = self.rank * -(-count // self.world)
        return gather(self, images_until if self.rank == 1 and title == "evaluating" else images, count, title, stop)

    Evaluation.gather = replaced


def test_an_evaluation_that_fails_on_one_rank_ends_them_all(tmp_path, classifier):
    """Its weights are those of an average by then: to bring the own ones back, it would have to talk to the others."""
    launched = Launched(2, tmp_path / "run", *settings(classifier), patch=failing)
    assert launched.wait() == [1, 1]
    assert launched.said()[-1] == "train_ddp.py: error: rank 1: ValueError: such is life"


def test_a_published_reference_is_used_and_a_wrong_one_stops_before_the_training(tmp_path, classifier):
    features = load_extractor(CLASSIFIER, classifier)(images(40))
    save_statistics(tmp_path / "reference.npz", statistics(features), "")
    run(1, tmp_path / "run", *settings(classifier, every=4), f"evaluate.reference={tmp_path / 'reference.npz'}")
    assert len(evaluations(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "reference.npz").exists()
    launched = Launched(2, tmp_path / "other", *settings(classifier), "evaluate.reference=missing.npz")
    assert launched.wait() == [2, 2]
    (line,) = launched.said()
    assert "evaluate.reference" in line
    assert "missing.npz" in line
    save_statistics(tmp_path / "wide.npz", statistics(torch.randn(9, 5)), "")
    launched = Launched(1, tmp_path / "other", *settings(classifier), f"evaluate.reference={tmp_path / 'wide.npz'}")
    assert launched.wait() == [2]
    (line,) = launched.said()
    assert "statistics of 5 features" in line


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"extractor": "oracle"}, "the extractor oracle is not for frechet_distance"),
        ({"protocol": "captions"}, "patch_frechet_distance is not measured in a training: see asymflow evaluate"),
    ],
)
def test_measures_that_a_training_cannot_have_are_refused_at_its_start(section, said):
    config = load_config("shapes_tiny", [f"evaluate.{key}={value}" for key, value in section.items()])
    with pytest.raises(InputError, match=said):
        evaluate.protocol_of(config)


@pytest.mark.slow
def test_a_protocol_and_its_measures_are_those_of_the_command(tmp_path, classifier):
    """The same numbers as `asymflow evaluate` finds of the same run."""
    from asymflow.cli import main

    protocol = tmp_path / "mine.yaml"
    measures = "[frechet_distance, kid, inception_score, precision, recall]"
    sampler = "steps: 2\nreference: data\nextractor: classifier"
    protocol.write_text(f"num: 40\nprecision: float32\nmeasures: {measures}\n{sampler}\nweights: {classifier}\n")
    both = ["evaluate.num=10000", "evaluate.extractor=inception-v3-compat", f"evaluate.protocol={protocol}"]
    run(2, tmp_path / "run", *settings(classifier, every=4), *both)
    (entry,) = evaluations(tmp_path / "run")
    words = ["--model", tmp_path / "run", "--protocol", protocol, "--out", tmp_path / "out", "--device", "cpu"]
    words += ["--guidance", 2.0, "--interval", "0,1"]
    assert main(["evaluate", *map(str, words)]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["measures"]
    for name, one in found.items():
        assert entry[name] == pytest.approx(one["value"], rel=2e-2, abs=2e-3), name  # a pixel may round otherwise
        assert entry["uncertainty"][name] == pytest.approx(one["uncertainty"], rel=5e-2, abs=5e-3), name
