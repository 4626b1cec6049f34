"""`asymflow evaluate`: equal to torch-fidelity on the same folders; the same however the work is shared or stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli_sample import save_model
from torch_fidelity import calculate_metrics

from asymflow.cli import main
from asymflow.cli.card import metrics_of
from asymflow.cli.card import table as card_table
from asymflow.cli.evaluate_report import comparable
from asymflow.cli.evaluate_report import table as report_table
from asymflow.data.shapes import Shapes
from asymflow.errors import InputError
from asymflow.evaluation import assets, result
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.features import CLASSIFIER, register_classifier
from asymflow.evaluation.images import Batch
from asymflow.pixels import tensor_to_pil


def pictures(folder, count, seed=0, size=16, shift=0):
    """Smooth random images, which a random classifier can tell apart."""
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        small = torch.rand(1, 3, 3, 3, generator=g) * 2 - 1 + shift
        image = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")[0]
        tensor_to_pil(image).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    Classifier(10, width=8).save(folder / "classifier.safetensors")
    save_model(folder / "model")
    pictures(folder / "one", 70)
    pictures(folder / "other", 90, seed=1, shift=0.3)
    return folder


def words(made, out, *more, **options):
    given = {"out": out, "extractor": "classifier", "weights": made / "classifier.safetensors", "device": "cpu"}
    given |= options
    pairs = (word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value)))
    return ["evaluate", *pairs, *more]


def evaluated(made, out, *more, **options):
    assert main(words(made, out, *more, **options)) == 0
    return json.loads((out / "result.json").read_text())


def drawn(made, out, *more, **options):
    usual = dict(model=made / "model", reference=made / "other", num=300, steps=1, guidance=1.5)
    return evaluated(made, out, *more, **usual | options)


def values(result):
    return {name: found["value"] for name, found in result["measures"].items()}


# ---- Against torch-fidelity ------------------------------------------------------------------------------------------
def theirs(made, extractor, weights, size):
    return calculate_metrics(
        input1=str(made / "one"),
        input2=str(made / "other"),
        **dict(isc=True, fid=True, kid=True, prc=True, cuda=False, verbose=False, cache=False),
        kid_subset_size=size,
        feature_extractor=extractor,
        feature_extractor_weights_path=str(weights),
        feature_layer_prc="pooled" if extractor == CLASSIFIER else "2048",
    )


def check_equal(found, expected):
    for name, key in {
        "frechet_distance": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }.items():
        assert found[name] == pytest.approx(expected[key], rel=1e-6), name


def test_it_is_what_torch_fidelity_calculates_of_the_same_folders(made, tmp_path):
    register_classifier()
    found = evaluated(made, tmp_path / "out", images=made / "one", reference=made / "other")
    check_equal(values(found), theirs(made, CLASSIFIER, made / "classifier.safetensors", 70))
    assert found["images"] == 70
    assert found["protocol"]["name"] == "quick, extractor classifier, num 70"
    assert (tmp_path / "out" / "grid.png").exists()


@pytest.mark.slow
def test_so_it_is_with_the_features_of_inception(made, tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as m:  # its weights are not to be had here: random ones do
        m.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        m.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    weights = tmp_path / "cache" / "evaluation" / assets.ASSETS["inception-v3-compat"].name
    weights.parent.mkdir(parents=True)
    torch.save(inception.state_dict(), weights)
    monkeypatch.setenv("ASYMFLOW_CACHE", str(tmp_path / "cache"))  # where it is found without being named
    few = {name: pictures(tmp_path / name, 14, seed, shift=0.3 * seed) for seed, name in enumerate(("one", "other"))}
    options = ["--images", few["one"], "--reference", few["other"], "--out", tmp_path / "out"]
    assert main(["evaluate", *map(str, options)]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    check_equal(values(found), theirs(tmp_path, "inception-v3-compat", weights, 14))
    assert "no more images (14) than features (2,048)" in found["measures"]["frechet_distance"]["remarks"][0]


# ---- The same, however it is done ------------------------------------------------------------------------------------
def test_neither_the_batch_nor_the_number_of_processes_changes_anything(made, tmp_path, monkeypatch):
    whole = drawn(made, tmp_path / "whole", "--save-npz", str(tmp_path / "whole.npz"), batch=64, num=300)
    for rank in (1, 0):  # the first one measures
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        more = ["--save-npz", str(tmp_path / "two.npz")]
        options = dict(model=made / "model", reference=made / "other", num=300, steps=1, guidance=1.5, batch=7)
        assert main(words(made, tmp_path / "two", *more, **options)) == 0
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    one, other = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("whole.npz", "two.npz"))
    assert one.shape == (300, 16, 16, 3)
    assert abs(one - other).max() <= 1  # another batch rounds otherwise
    assert (one != other).mean() < 1e-3
    for name, value in values(whole).items():
        assert values(two)[name] == pytest.approx(value, rel=1e-3, abs=2e-3), name
    ignored = ("seconds", "written", "measures")
    assert {k: v for k, v in whole.items() if k not in ignored} == {k: v for k, v in two.items() if k not in ignored}


def test_samples_in_a_file_score_as_when_they_were_drawn(made, tmp_path):
    own = drawn(made, tmp_path / "own", "--save-npz", str(tmp_path / "samples.npz"), num=300)
    read = evaluated(made, tmp_path / "read", images=tmp_path / "samples.npz", reference=made / "other")
    assert values(read) == values(own)
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        archive.extractall(tmp_path / "there")
    np.savez_compressed(tmp_path / "small.npz", arr_0=np.load(tmp_path / "there" / "arr_0.npy"))
    assert torch.equal(Batch(tmp_path / "small.npz").read(250, 300), Batch(tmp_path / "samples.npz").read(250, 300))
    own = ["own", "read"]
    assert main(["evaluate", "report", *(str(tmp_path / name) for name in own)]) == 0


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_and_counts_no_image_twice(made, tmp_path):
    whole = drawn(made, tmp_path / "whole", num=1500)
    options = dict(model=made / "model", reference=made / "other", num=1500, steps=1, guidance=1.5)
    command = [sys.executable, "-m", "asymflow", *words(made, tmp_path / "out", **options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    features = tmp_path / "out" / "features"
    while process.poll() is None and len(list(features.glob("*.safetensors"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in features.glob("*.safetensors")}
    assert before
    assert values(drawn(made, tmp_path / "out", num=1500)) == pytest.approx(values(whole), rel=1e-6)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


# ---- Protocols -------------------------------------------------------------------------------------------------------
def test_different_protocols_are_in_different_tables(made, tmp_path, capsys):
    drawn(made, tmp_path / "a", num=20)
    drawn(made, tmp_path / "b", num=20, guidance=1.0)
    drawn(made, tmp_path / "c", num=20, steps=2)
    capsys.readouterr()
    assert main(["evaluate", "report", *(str(tmp_path / name) for name in "abc")]) == 0
    said = capsys.readouterr().out
    assert "2 tables: numbers of different protocols cannot be compared" in said
    tables = said.split("\n\nprotocol ")
    assert [table.count(str(made / "model")) for table in tables] == [2, 1]
    assert main(["evaluate", "report", str(made / "model")]) == 2


def test_a_result_with_anything_missing_or_of_another_kind_is_told_in_one_line_or_not_needed(made, tmp_path, capsys):
    whole = drawn(made, tmp_path / "a", num=20)
    broken = tmp_path / "broken.json"

    def changed(found, path=()):
        for key in found:
            without = {k: v for k, v in found.items() if k != key}
            yield (*path, key), without
            for other in (None, 3, "x", [], {}, True):
                yield (*path, key, json.dumps(other)), found | {key: other}
            if isinstance(found[key], dict):
                yield from ((where, found | {key: inner}) for where, inner in changed(found[key], (*path, key)))

    refused = set()
    for path, other in changed(whole):
        broken.write_text(json.dumps(other))
        capsys.readouterr()
        try:
            read = result.read(broken)
        except InputError:
            refused.add(path)
        else:
            report_table([read]), card_table(read), list(metrics_of([read], "data")), comparable(read)
    assert {("measures",), ("images",), ("extractor", "weights_sha256"), ("reference", "name", "3")} <= refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num: 1", "num is 1: input should be greater than or equal to 2"),
        ("numb: 10", "unknown key numb: did you mean num?"),
        ("precision: fp8\nnum: 5", "precision is 'fp8'"),
        ("- 5", "must be a section of keys"),
        ("num: 10\nmeasures: [fid]", "measures is 'fid'"),
        ("about: x", "num is missing"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_one_line(tmp_path, made, capsys, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(words(made, tmp_path / "out", model=made / "model", protocol=tmp_path / "mine.yaml")) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_the_oracle_reads_what_is_right_by_the_same_command(tmp_path, capsys):
    """Generated pictures, of which a few are said to be of another class; and the model that comes with the code."""
    pictures, out = Shapes(30, 32, seed=3), tmp_path / "samples"
    (out / "images").mkdir(parents=True)
    entries = []
    for i in range(30):
        tensor_to_pil(pictures[i].image.float() / 127.5 - 1).save(out / "images" / f"{i:06d}.png")
        wrong = 1 if i < 6 else 0  # the next colour
        label = pictures[i].label
        entries.append({"file": f"images/{i:06d}.png", "index": i, "class": label - label % 4 + (label + wrong) % 4})
    (out / "samples.json").write_text(json.dumps({"settings": {}, "images": entries}))
    words = ["--images", str(out / "images"), "--protocol", "shapes", "--out"]
    assert main(["evaluate", *words, str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["measures"]
    assert [found[name]["value"] for name in ("count", "color", "shape", "right")] == [1, 0.8, 1, 0.8]
    low, high = found["color"]["interval"]
    assert (low, high) == pytest.approx((0.627, 0.905), abs=1e-3)  # Wilson's, of 24 of 30
    assert 0 < found["count"]["interval"][0] < 1
    assert found["sharpness"]["value"] > 0.9
    assert found["residual"]["value"] < 3
    capsys.readouterr()
    shutil.move(out / "samples.json", tmp_path)
    assert main(["evaluate", *words, str(tmp_path / "again")]) == 2
    assert "the oracle needs the class of each image" in capsys.readouterr().err
    model = ["--model", "shapes", "--num", "16", "--steps", "8", "--out", str(tmp_path / "m")]
    assert main(["evaluate", *model, "--protocol", "shapes"]) == 0
    drawn = json.loads((tmp_path / "m" / "result.json").read_text())["measures"]
    assert drawn["right"]["value"] > 0.3


# ---- What cannot be scored -------------------------------------------------------------------------------------------
def batch_file(path, array):
    np.savez(path, arr_0=array)
    return path


def test_what_cannot_be_scored_is_one_line(made, tmp_path, capsys):
    mixed = shutil.copytree(made / "one", tmp_path / "mixed")
    Image.new("RGB", (100, 40)).save(mixed / "grid.png")
    damaged = shutil.copytree(made / "one", tmp_path / "damaged")
    (damaged / "0003.png").write_bytes((damaged / "0003.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    single = pictures(tmp_path / "single", 1)
    large = pictures(tmp_path / "large", 12, size=32)
    rgb = np.zeros((5, 16, 16, 3), np.uint8)
    (tmp_path / "cut.npz").write_bytes(batch_file(tmp_path / "rgb.npz", rgb).read_bytes()[:-400])
    np.savez(tmp_path / "mu.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "none.npz", x=np.zeros(7))
    (tmp_path / "mu.txt").write_text("mu")
    for images, reference, expected in [
        (tmp_path / "empty", made / "one", "no images"),
        (tmp_path / "gone", made / "one", "gone does not exist"),
        (tmp_path / "mu.txt", made / "one", "is not a folder"),
        (single, made / "one", "1 image"),
        (mixed, made / "one", "grid.png has 100 x 40 pixels"),
        (damaged, made / "one", "0003.png is not a whole image"),
        (batch_file(tmp_path / "grey.npz", rgb[..., :1]), made / "one", "must be uint8 (n, height, width, 3)"),
        (batch_file(tmp_path / "float.npz", rgb.astype(np.float32)), made / "one", "must be uint8"),
        (batch_file(tmp_path / "no.npz", rgb[:0]), made / "one", "it is not whole"),
        (tmp_path / "cut.npz", made / "one", "is not an npz file"),
        (tmp_path / "mu.npz", made / "one", "has no array arr_0"),
        (made / "one", large, "have 32 x 32 pixels (width x height), but those to be scored 16 x 16"),
        (made / "one", tmp_path / "mu.npz", "has statistics of 7 features, but the extractor has 32"),
        (made / "one", tmp_path / "none.npz", "has neither mu and sigma"),
        (made / "one", "data", "give --model RUN"),
        (made / "one", "adm-imagenet", "has references of 256 and 512 pixels"),
    ]:
        assert main(words(made, tmp_path / "out", images=images, reference=reference)) == 2
        error = capsys.readouterr().err
        assert expected in error, error
        assert error.count("\n") == 1, error
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_features_that_are_not_finite_and_other_settings_are_refused(made, tmp_path, capsys, monkeypatch):
    drawn(made, tmp_path / "out", num=20)
    capsys.readouterr()
    usual = dict(model=made / "model", reference=made / "other", num=20, steps=1)
    assert main(words(made, tmp_path / "out", **usual, guidance=2)) == 2
    assert "holds features of something else (scored" in capsys.readouterr().err
    nan = lambda flow, labels, *_, **__: torch.full((len(labels), 3, 16, 16), torch.nan)
    monkeypatch.setattr("asymflow.evaluation.drawn.generate", nan)
    assert main(words(made, tmp_path / "nan", **usual, guidance=1.5)) == 2
    assert "image 0, of class 0, has numbers that are NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["num=70", "first=1", "seed=0", "steps=10", "guidance=2.3", "interval=0,0.88", "backbone=a:B"]
)
def test_options_of_drawing_are_refused_where_nothing_is_drawn(made, tmp_path, capsys, option):
    """They would not be followed, and the name of the protocol would say that they were."""
    given = words(made, tmp_path / "out", f"--{option}", images=made / "one", reference=made / "other")
    assert main(given) == 2
    assert (
        f"--{option.partition('=')[0]} is for drawing, and --images are scored as they are" in capsys.readouterr().err
    )


# ---- What others publish ---------------------------------------------------------------------------------------------
class Answer:
    """What urlopen gives: some bytes, of which the headers promise more."""

    def __init__(self, content, promised):
        self.content, self.headers = content, {"Content-Length": str(promised)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, most):
        part, self.content = self.content[:most], self.content[most:]
        return part


def test_a_file_that_is_not_here_is_downloaded_whole_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYMFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"JiT's statistics .* Put https://.*jit_in256_stats.npz into .*evaluation"):
        assets.find("jit-imagenet256")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    answers = [Answer(b"abc", 10), Answer(b"abcdefghij", 10)]
    monkeypatch.setattr(assets.urllib.request, "urlopen", lambda *a, **k: answers.pop(0))
    with pytest.raises(ValueError, match="it ended after 3 of 10 bytes"):
        assets.find("jit-imagenet256")
    assert not list(tmp_path.rglob("*.npz"))
    assert assets.find("jit-imagenet256").read_bytes() == b"abcdefghij"
    assert assets.find("jit-imagenet256").read_bytes() == b"abcdefghij"  # and not downloaded again
    answers.append(Answer(b"others", 6))
    with pytest.raises(ValueError, match="its checksum is"):
        assets.find("vgg16")
