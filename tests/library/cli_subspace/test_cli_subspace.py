"""`asymflow subspace` finds the subspace that was planted, and says what it did."""

import re
import shlex
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from planted_images import PCA, PROCRUSTES, replaced, write_images

from asymflow import Subspace, patchify
from asymflow.color import rgb_to_oklab
from asymflow.entries import find_images
from asymflow.pixels import read_square, tensor_to_pil


def overlap(a, b):
    """The cosine of the largest angle between two subspaces: 1 if they are the same."""
    return torch.linalg.svdvals(a.double().mT @ b.double()).min().item()


# ---- PCA -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("token_order", "color"), [("channel_last", "rgb"), ("channel_first", "oklab")])
def test_pca_is_that_of_the_patches_and_is_recorded(run, images, tmp_path, token_order, color):
    """Held against singular vectors of all patches at once, in float64."""
    out = tmp_path / "new folder" / "s.safetensors"
    code, text, err = run(
        *PCA, "--data", images, "--out", out, "--rank=3", "--token-order", token_order, "--color", color
    )
    assert (code, err) == (0, "")
    found = Subspace.load(out)
    record = (found.patch_size, found.token_order, found.color_space, found.rank, found.dim, found.scale)
    assert record == (4, token_order, color, 3, 48, 1)
    assert found.fitted_on == "40 of 40 images of images, 8 x 8 pixels, seed 0"
    pixels = torch.stack([read_square(entry, 8) for entry in find_images([images])])
    pixels = rgb_to_oklab(pixels) if color == "oklab" else pixels
    tokens = patchify(pixels, 4, token_order).flatten(0, 1).double()
    _, s, vt = torch.linalg.svd(tokens, full_matrices=False)
    assert overlap(found.basis, vt[:3].mT) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(found.spectrum, s.square() / len(tokens), rtol=1e-6, atol=1e-12)
    share = (100 * s[:3].square().sum() / s.square().sum()).item()
    assert f"3: {share:.1f} %" in text
    assert "160" in re.search(r"tokens +(.*)", text)[1]
    assert sorted(f.name for f in out.parent.iterdir()) == ["s.png", "s.safetensors"]
    assert Image.open(out.with_suffix(".png")).width > 500


def test_what_was_printed_last_shows_it_again(run, images, tmp_path):
    out = tmp_path / "it's mine.safetensors"
    _, text, _ = run(*PCA, "--data", images, "--out", out, "--rank=3")
    words = shlex.split(text.splitlines()[-1].partition("again: ")[2])
    assert words[0] == "asymflow"
    code, shown, _ = run(*words[1:])
    assert code == 0
    facts = [
        line
        for line in text.splitlines()
        if line.split()[0] in ("rank", "patch", "colour", "scale", "fitted", "energy")
    ]
    assert len(facts) == 6
    assert set(facts) <= set(shown.splitlines())


@pytest.mark.usefixtures("quick")
def test_a_planted_subspace_is_found(run, images, tmp_path):
    run(*PCA, "--data", images, "--out", tmp_path / "s.safetensors", "--rank=3")
    found = Subspace.load(tmp_path / "s.safetensors")
    other = write_images(tmp_path / "other", seed=1)
    tokens = patchify(torch.stack([read_square(e, 8) for e in find_images([other])]), 4).double()
    rest = tokens - tokens @ found.basis.double() @ found.basis.double().mT
    assert rest.square().sum() < 0.01 * tokens.square().sum()


def test_twice_the_same_bits_from_a_folder_or_a_tar_file_in_any_threads(run, images, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for file in sorted(images.iterdir()):
            tar.add(file, f"some/{file.name}")
    found, drawn = [], []
    for name, data, cores in (("a", images, 1), ("b", images, 8), ("c", tmp_path / "images.tar", 3)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert run(*PCA, "--data", data, "--out", tmp_path / f"{name}.safetensors", "--rank=5", "--images=20")[0] == 0
        found.append(Subspace.load(tmp_path / f"{name}.safetensors"))
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    for other in found[1:]:
        assert torch.equal(found[0].basis, other.basis)
        assert torch.equal(found[0].spectrum, other.spectrum)
    assert found[0].fitted_on == found[1].fitted_on == "20 of 40 images of images, 8 x 8 pixels, seed 0"
    assert found[2].fitted_on == "20 of 40 images of images.tar, 8 x 8 pixels, seed 0"
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("quick")
def test_folders_may_come_together_or_one_at_a_time(run, images, tmp_path):
    other = write_images(tmp_path / "other", seed=1)
    for name, data in (("a", ["--data", images, other]), ("b", ["--data", images, "--data", other])):
        assert run(*PCA, *data, "--out", tmp_path / f"{name}.safetensors", "--rank=3")[0] == 0
    a, b = (Subspace.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.fitted_on == b.fitted_on == "80 of 80 images of images, other, 8 x 8 pixels, seed 0"
    assert torch.equal(a.basis, b.basis)


@pytest.mark.usefixtures("quick")
def test_the_seed_chooses_the_images_and_the_batch_changes_nothing_but_rounding(run, images, tmp_path):
    def spectrum(name, *options):
        assert run(*PCA, "--data", images, "--out", tmp_path / f"{name}.safetensors", "--images=10", *options)[0] == 0
        return Subspace.load(tmp_path / f"{name}.safetensors").spectrum

    first = spectrum("a", "--seed=1")
    assert torch.allclose(spectrum("b", "--seed=1", "--batch=3"), first, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(spectrum("c", "--seed=2"), first, rtol=1e-3)


@pytest.mark.usefixtures("quick")
def test_the_automatic_rank_is_printed_with_its_reason(run, images, tmp_path):
    """Weights in [-2, 2] have the energy 4/3 and pay off; those in [-0.7, 0.7] have 0.16, and do not."""
    code, text, _ = run(*PCA, "--data", images, "--out", tmp_path / "s.safetensors", "--rank=auto")
    rank = Subspace.load(tmp_path / "s.safetensors").rank
    assert code == 0
    assert rank == 1
    (line,) = [line for line in text.splitlines() if line.startswith("rank auto")]
    assert str(rank) in line
    assert "energy" in line
    run(*PCA, "--data", images, "--out", tmp_path / "loud.safetensors", "--rank=auto", "--noise-scale=100")
    assert Subspace.load(tmp_path / "loud.safetensors").rank == 0


@pytest.mark.usefixtures("quick")
def test_images_that_are_enlarged_are_counted(run, images, tmp_path):
    assert run(*PCA, "--data", images, "--out", tmp_path / "a.safetensors")[2] == ""
    words = [*replaced(PCA, "--image-size=12"), "--data", images, "--images=20"]
    code, _, err = run(*words, "--out", tmp_path / "b.safetensors")
    assert code == 0
    assert "smaller than --image-size 12, and enlarged: 20 images (the first: " in err


@pytest.mark.parametrize("rank", [0, 48])
def test_the_rank_may_be_none_or_all(run, images, tmp_path, rank):
    code, text, _ = run(*PCA, "--data", images, "--out", tmp_path / "s.safetensors", f"--rank={rank}")
    assert (code, Subspace.load(tmp_path / "s.safetensors").rank) == (0, rank)
    assert f"{rank}: {100 * (rank > 0):.1f} %" in text


# ---- Procrustes ------------------------------------------------------------------------------------------------------
def write_pairs(folder, n=60, scale=0.35, rank=5, grids=((2, 2), (1, 3))):
    """Latents z and images s A z, but for the rounding to 8 bits; A is returned. Tokens channel first, patch 4."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(48, rank, generator=g)).Q
    folder.mkdir(parents=True)
    for i in range(n):
        h, w = grids[i % len(grids)]
        z = torch.rand(h, w, rank, generator=g) * 2 - 1
        image = (scale * z @ basis.mT).reshape(h, w, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, 4 * h, 4 * w)
        assert image.abs().max() < 1
        tensor_to_pil(image).save(folder / f"{i}.png")
        np.save(folder / f"{i}.latent.npy", z.numpy())
    return basis


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("batch", [1, 7])
def test_procrustes_finds_the_lift_that_was_planted(run, tmp_path, batch):
    """Rounding to 8 bits is noise of 1 / 255 / sqrt(3) beside pixels of 0.35 / sqrt(3) sqrt(5 / 48): 3 % a number, of
    which 1 / sqrt(210 tokens) stays in each direction, and of its square as much in the scale as falls inside."""
    basis = write_pairs(tmp_path / "d")
    out = tmp_path / "s.safetensors"
    code, text, err = run(*PROCRUSTES, "--data", tmp_path / "d", "--out", out, "--color=rgb", f"--batch={batch}")
    assert (code, err) == (0, "")
    found = Subspace.load(out)
    assert (found.rank, found.dim, found.token_order, found.color_space) == (5, 48, "channel_first", "rgb")
    assert torch.allclose(found.basis.float(), basis, atol=0.02)
    assert found.scale == pytest.approx(0.35, rel=0.005)
    assert found.fitted_on == "60 of 60 images of d, 2 sizes, seed 0"
    assert "tokens       210" in text
    assert out.with_suffix(".png").exists()


@pytest.mark.usefixtures("quick")
def test_procrustes_works_in_oklab_unless_told_otherwise(run, tmp_path):
    write_pairs(tmp_path / "d", grids=[(2, 3)])
    assert run(*PROCRUSTES, "--data", tmp_path / "d", "--out", tmp_path / "s.safetensors", "--images=30")[0] == 0
    found = Subspace.load(tmp_path / "s.safetensors")
    assert (found.color_space, found.fitted_on) == ("oklab", "30 of 60 images of d, 12 x 8 pixels, seed 0")


def test_latents_that_do_not_fit_each_other_or_the_image_are_refused_by_name(refused, tmp_path):
    write_pairs(tmp_path / "d", n=5)
    np.save(tmp_path / "d" / "4.latent.npy", np.zeros((2, 2, 3), np.float32))
    files = ["--out", tmp_path / "s.safetensors", "--data", tmp_path / "d"]
    assert "4.latent.npy has latent tokens of dimension 3" in refused(*PROCRUSTES, *files)
    assert ".png has" in refused(*replaced(PROCRUSTES, "--patch-size=2"), *files)


# ---- Damaged images --------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("quick")
def test_a_few_damaged_images_are_left_out_and_named(run, images, tmp_path):
    """3 of 300, 1 %: as if they were not there."""
    data = write_images(tmp_path / "images", n=297, size=8)
    assert run(*PCA, "--data", data, "--out", tmp_path / "good.safetensors")[0] == 0
    for name in ("000a.png", "100a.png", "zzz.png"):
        (data / name).write_bytes(b"no image")
    code, text, err = run(*PCA, "--data", data, "--out", tmp_path / "s.safetensors")
    assert code == 0
    assert err.startswith("3 images could not be read and were left out: ")
    assert all(name in err for name in ("000a.png", "100a.png", "zzz.png"))
    good, found = (Subspace.load(tmp_path / f"{name}.safetensors") for name in ("good", "s"))
    assert torch.allclose(found.spectrum, good.spectrum, rtol=1e-12, atol=1e-15)
    assert "297 of 300 images" in found.fitted_on
    assert "tokens       1,188" in text


def test_more_than_one_percent_is_an_error_that_names_the_first(refused, tmp_path):
    data = write_images(tmp_path / "images", n=150)
    for name in ("000a.png", "100a.png"):
        (data / name).write_bytes(b"no image")
    line = refused(*PCA, "--data", data, "--out", tmp_path / "s.safetensors")
    assert "more than 1 %" in line
    assert "000a.png" in line
