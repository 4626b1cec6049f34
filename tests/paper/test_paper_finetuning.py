"""toy.paper's finetuning and its two networks that are trained on the spot."""

import json

import pytest
import torch
from torchvision.models import vgg16, vgg16_bn

from asymflow.color import rgb_to_oklab
from asymflow.data.shapes import Shapes
from asymflow.errors import InputError
from asymflow.training.objectives.variance import PerceptualLoss
from toy.paper import __main__ as paper
from toy.paper import finetuning, teacher


def test_folded_batch_normalization_computes_the_same_in_torchvision_s_layout():
    torch.manual_seed(0)
    features = vgg16_bn().features.eval()
    for layer in features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            for value, low, high in ((layer.running_mean, -1, 1), (layer.running_var, 0.5, 2), (layer.weight, 0.5, 2)):
                torch.nn.init.uniform_(value, low, high)
    images = torch.randn(2, 3, 32, 32)
    folded = finetuning.folded(features)
    plain = vgg16().features.eval()
    plain.load_state_dict(folded.state_dict())  # the same names and shapes
    with torch.no_grad():
        expected = features(images)
        assert (plain(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_perceptual_network_is_read_by_the_perceptual_loss(tmp_path):
    file = tmp_path / "vgg16.safetensors"
    finetuning.perceptual_net(file, steps=1)
    written = file.read_bytes()
    finetuning.perceptual_net(file, steps=1)
    assert file.read_bytes() == written
    with pytest.raises(InputError, match=r"vgg16.safetensors has not learnt for 2 steps: choose another --out"):
        finetuning.perceptual_net(file, steps=2)
    images = rgb_to_oklab(torch.stack([Shapes(2, 32)[i].image for i in range(2)]) / 127.5 - 1)
    loss = PerceptualLoss(str(file), "cpu")
    weight = torch.ones(2, 1, 32, 32)
    assert loss(images, images, weight).abs().max() < 1e-6
    assert loss(images, images.flip(0), weight).min() > 1e-4


def test_every_model_that_is_trained_has_a_title():
    assert set(finetuning.PERCEPTUAL) < set(finetuning.LOSSES) < set(finetuning.MODELS)


def test_correlation_is_about_the_mean_image():
    """Images with a strong common part, and else unlike each other, are alike in nothing that tells them apart."""
    generator = torch.Generator().manual_seed(0)
    images = 10 + torch.randn(40, 3, 8, 8, generator=generator)
    others = 10 + torch.randn(40, 3, 8, 8, generator=generator)
    assert finetuning.correlation(images, images) == pytest.approx(1)
    assert finetuning.correlation(images, -2 * images) == pytest.approx(-1)
    assert abs(finetuning.correlation(images, others)) < 0.05


def test_the_teacher_sees_what_it_is_to_learn(tmp_path):
    """Of each picture, the share of each patch that is covered: as much in all as a third of a cell for each shape."""
    images, labels, covered = teacher.batch(Shapes(64, 64), 0, 4)
    assert images.shape == (64, 3, 56, 56)
    assert labels.tolist() == [Shapes(64, 64).label(i) for i in range(64)]
    assert covered.shape == (64, 16)
    assert 0.01 < covered.mean(1).min() <= covered.mean(1).max() < 0.2


@pytest.mark.slow
def test_all_models_are_trained_measured_and_compared_once(tmp_path, capsys):
    words = ["finetuning", "--quick", "--out", str(tmp_path)]
    assert paper.main(words) == 0
    files = [tmp_path / f"finetuning-{model}-seed-0.json" for model in finetuning.MODELS]
    found = {file.name: json.loads(file.read_text()) for file in files}
    ends = {name.split("-seed")[0]: one["at the end"] for name, one in found.items()}
    assert ends["finetuning-latent"]["correlation"] == pytest.approx(1)
    assert ends["finetuning-start"]["correlation with the lifted latents"] == pytest.approx(1, abs=1e-3)
    assert ends["finetuning-latent"]["correlation with the lifted latents"] < 0.999
    latent, start = (found[f"finetuning-{model}-seed-0.json"]["hours"]["training"] for model in ("latent", "start"))
    assert latent > start == 0
    assert found["finetuning-perceptual-weak-seed-0.json"]["loss"]["perceptual"] == 0.2
    assert ends["finetuning-plain"] != ends["finetuning-reduced"] != ends["finetuning-perceptual"]
    variance = json.loads((tmp_path / "finetuning-variance-seed-0.json").read_text())["at the end"]
    at = lambda weights: [found["plain"] for found in variance[weights].values()]
    assert variance["start"].keys() == {"as trained", "0.9"}
    assert all(first != after for first, after in zip(at("start"), at("plain"), strict=True))
    assert (tmp_path / "finetuning-seed-0.png").stat().st_size > 5000
    written = [file.stat().st_mtime_ns for file in files]
    assert paper.main(words) == 0
    assert [file.stat().st_mtime_ns for file in files] == written
    assert paper.main(words[:1] + words[2:] + ["--only", "finetuning-seed-0"]) == 2
    assert "is of another scale: choose another --out" in capsys.readouterr().err
