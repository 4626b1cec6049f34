"""`asymflow subspace`: it finds the subspace that was planted, says what it did, and refuses in one line."""

import re
import shlex
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from asymflow import Subspace, patchify
from asymflow.cli import main
from asymflow.cli import subspace as command
from asymflow.color import rgb_to_oklab
from asymflow.pixels import find_images, read_square, tensor_to_pil

PCA = ["subspace", "pca", "--patch-size=4", "--image-size=8", "--device=cpu"]
PROCRUSTES = ["subspace", "procrustes", "--patch-size=4", "--device=cpu"]


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns (exit code, stdout, stderr without progress bars)."""

    def run(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        err = [line.rpartition("\r")[2] for line in text.err.split("\n")]  # a terminal shows no more
        assert "Traceback" not in text.err
        return code, text.out, "\n".join(line for line in err if line.strip())

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that is to end with exit code 2, one line and no new file; returns that line."""

    def refused(*argv):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*argv)
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refused


def write_images(folder, n=40, size=8, seed=0):
    """Images whose 4 x 4 patches lie in three directions, but for the rounding to 8 bits."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(3, 48, generator=torch.Generator().manual_seed(99)).mT).Q.mT
    count = (size // 4) ** 2
    weights = (torch.rand(n, count, 3, generator=g) * 2 - 1) * torch.tensor([2.0, 1.0, 0.7])
    tokens = (weights @ directions).clamp(-1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for i, t in enumerate(tokens):
        image = t.reshape(size // 4, size // 4, 4, 4, 3).permute(4, 0, 2, 1, 3).reshape(3, size, size)
        tensor_to_pil(image).save(folder / f"{i:03}.png")
    return folder


def overlap(a, b):
    """The cosine of the largest angle between two subspaces: 1 if they are the same."""
    return torch.linalg.svdvals(a.double().mT @ b.double()).min().item()


@pytest.fixture
def quick(monkeypatch):
    """Pictures of one pixel, for tests that are not about them."""
    monkeypatch.setattr(command, "draw_subspace", lambda subspace, file: Image.new("L", (1, 1)).save(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


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
    assert rank in (1, 2)
    (line,) = [line for line in text.splitlines() if line.startswith("rank auto")]
    assert str(rank) in line
    assert "energy" in line


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
    argv = [*PROCRUSTES, "--out", tmp_path / "s.safetensors", "--data", tmp_path / "d"]
    assert "4.latent.npy has latent tokens of dimension 3" in refused(*argv)
    assert ".png has" in refused(*argv, "--patch-size=2")


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


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_):
        raise AssertionError("read before it was refused")

    for name in ("find_images", "find_pairs", "read_square", "read_pair"):
        monkeypatch.setattr(command, name, read)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rank=2000"], "--rank 2000 is more than the 48"),
        (["--rank=49"], "--rank 49"),
        (["--rank=-1"], "--rank"),
        (["--rank=8.5"], "--rank"),
        (["--rank=many"], "many"),
        (["--image-size=10"], "--image-size 10 is not a multiple of --patch-size 4"),
        (["--patch-size=0"], "--patch-size"),
        (["--image-size=0"], "--image-size"),
        (["--images=0"], "--images"),
        (["--batch=0"], "--batch"),
        (["--seed=-1"], "--seed"),
        (["--seed=x"], "--seed"),
        (["--color=lab"], "--color"),
        (["--token-order=rows"], "--token-order"),
        (["--device=nonsense"], "--device"),
        (["--device=cuda:99"], "--device"),
        (["--out=OUT.pt"], "must end with .safetensors"),
        (["--out=FILE/s.safetensors"], "cannot be written"),
        (["--nonsense"], "nonsense"),
    ],
)
@pytest.mark.usefixtures("nothing_is_read")
def test_what_makes_no_sense_is_refused_before_anything_is_read(refused, tmp_path, options, word):
    (tmp_path / "FILE").write_text("precious")
    options = [re.sub("OUT|FILE", lambda m: str(tmp_path / m[0]), option) for option in options]
    assert word in refused(*PCA, "--data", tmp_path, "--out", tmp_path / "s.safetensors", *options)


@pytest.mark.parametrize("existing", ["s.safetensors", "s.png"])
@pytest.mark.parametrize("argv", [PCA, PROCRUSTES])
@pytest.mark.usefixtures("nothing_is_read")
def test_files_that_exist_are_refused_before_anything_is_read(refused, tmp_path, existing, argv):
    (tmp_path / existing).write_text("precious")
    assert f"{existing} exists already" in refused(*argv, "--data", tmp_path, "--out", tmp_path / "s.safetensors")
    assert (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("argv", [PCA, PROCRUSTES])
def test_data_that_is_not_there_or_empty_or_damaged_is_refused_in_one_line(refused, tmp_path, argv):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    for name, word in (
        ("empty", "no images"),
        ("text", "no images"),
        ("bad.tar", "tar file"),
        ("gone", "does not exist"),
    ):
        line = refused(*argv, "--data", tmp_path / name, "--out", tmp_path / "new" / "s.safetensors")
        assert name in line
        assert word in line


@pytest.mark.parametrize("argv", [["subspace"], ["subspace", "nonsense"], ["subspace", "pca"], ["subspace", "show"]])
def test_a_command_that_is_not_whole_is_refused(refused, argv):
    assert "--help" in refused(*argv)


@pytest.mark.parametrize("where", ["read_square", "fit_pca", "draw_subspace"])
def test_ctrl_c_leaves_nothing(run, images, tmp_path, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, where, interrupted)
    code, out, err = run(*PCA, "--data", images, "--out", tmp_path / "s.safetensors")
    assert (code, out) == (130, "")
    assert "interrupted" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_if_the_subspace_cannot_be_written_there_is_no_picture_of_it(run, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "s.safetensors")

    monkeypatch.setattr(Subspace, "save", full)
    code, _, err = run(*PCA, "--data", images, "--out", tmp_path / "s.safetensors")
    assert (code, "No space" in err) == (2, True)
    assert not list(tmp_path.iterdir())


# ---- Showing ---------------------------------------------------------------------------------------------------------


def test_show_tells_all_there_is_to_know(run, tmp_path):
    spectrum = torch.zeros(192)
    spectrum[:40] = 1  # 1 / 40 of the energy in each of 40 directions
    subspace = Subspace.random(
        192,
        20,
        scale=0.123,
        patch_size=8,
        token_order="channel_first",
        color_space="oklab",
        fitted_on="my photos",
        spectrum=spectrum,
    )
    subspace.save(tmp_path / "s.safetensors")
    code, text, err = run("subspace", "show", tmp_path / "s.safetensors", "--out", tmp_path / "s.png")
    assert (code, err) == (0, "")
    for fact in (
        "20 of 192",
        "channel_first",
        "oklab",
        "my photos",
        "0.123",
        "1: 2.5 %, 8: 20.0 %, 20: 50.0 %, 32: 80.0 %",
    ):
        assert fact in text
    assert re.search(r"patch size +8", text)
    assert float(re.search(r"orthonormal +to (\S+)", text)[1]) < 1e-6
    assert Image.open(tmp_path / "s.png").width > 500


def test_show_measures_how_orthonormal_a_basis_is(run, tmp_path):
    basis = torch.eye(12)[:, :3]
    basis[5, 0] = 5e-5
    basis[5, 1] = 1
    basis[1, 1] = 0
    Subspace(basis).save(tmp_path / "s.safetensors")
    _, text, _ = run("subspace", "show", tmp_path / "s.safetensors")
    assert float(re.search(r"orthonormal +to (\S+)", text)[1]) == pytest.approx(5e-5, rel=0.02)


def test_show_says_what_is_not_recorded(run, refused, tmp_path):
    Subspace.random(12, 0).save(tmp_path / "s.safetensors")
    code, text, _ = run("subspace", "show", tmp_path / "s.safetensors")
    assert code == 0
    assert text.count("not recorded") == 5
    assert "patch size" in refused("subspace", "show", tmp_path / "s.safetensors", "--out", tmp_path / "s.png")


def test_show_reads_the_files_of_the_reference(run, tmp_path):
    basis = torch.linalg.qr(torch.randn(192, 10, generator=torch.Generator().manual_seed(0))).Q
    torch.save({"proj_mat_p8": basis, "scale_p8": torch.tensor(0.25)}, tmp_path / "s.pt")
    code, text, _ = run("subspace", "show", tmp_path / "s.pt", "--out", tmp_path / "s.png")
    assert code == 0
    assert "10 of 192" in text
    assert re.search(r"scale +0.25", text)
    assert Image.open(tmp_path / "s.png").width > 300


def test_show_refuses_what_it_cannot_show_and_never_overwrites(refused, tmp_path):
    Subspace.random(12, 3, patch_size=2).save(tmp_path / "s.safetensors")
    (tmp_path / "s.png").write_text("precious")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.pt").write_text("text")
    assert "exists already" in refused("subspace", "show", tmp_path / "s.safetensors", "--out", tmp_path / "s.png")
    for name in ("text.safetensors", "text.pt", "gone.safetensors", "gone.pt"):
        assert name in refused("subspace", "show", tmp_path / name)


# ---- Help, and processes of its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["pca", "procrustes", "show"])
def test_every_option_is_explained(run, action):
    code, text, _ = run("subspace", action, "--help")
    assert code == 0
    for option, explanation in re.findall(r"^  (--\S+)[^\n]*?(?:\s{2,})(\S.*)$", text, re.MULTILINE):
        assert len(explanation) > 5, option
    assert "asymflow subspace pca --data" in run("subspace", "--help")[1]


def start(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    """While one large image is read under 10,000 names, for a minute or more."""
    write_images(tmp_path / "data", n=1, size=1000)
    for i in range(1, 10_000):
        (tmp_path / "data" / f"{i:03}.png").hardlink_to(tmp_path / "data" / "000.png")
    out = tmp_path / "out" / "s.safetensors"
    with start("asymflow", *PCA, "--data", tmp_path / "data", "--out", out) as process:
        while "image/s" not in (shown := process.stderr.read(40)):
            assert shown, "it ended by itself"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not out.parent.exists()


def test_what_several_processes_have_read_is_added_up(monkeypatch):
    tallies = [
        {"images": 3, "tokens": 12, "sizes": {(8, 8), (8, 4)}, "unreadable": ["a"]},
        {"images": 2, "tokens": 6, "sizes": {(8, 8), (4, 4)}, "unreadable": ["b", "c"]},
        {"images": 0, "tokens": 0, "sizes": set(), "unreadable": []},
    ]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, own: out.__setitem__(slice(None), tallies))
    total = {"images": 5, "tokens": 18, "sizes": {(8, 8), (8, 4), (4, 4)}, "unreadable": ["a", "b", "c"]}
    assert command.added_up(tallies[1], 3) == total


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run, tmp_path):
    data = write_images(tmp_path / "images", n=201)
    (data / "050a.png").write_bytes(b"no image")
    (data / "zzz.png").write_bytes(b"no image")  # one in each share
    options = ["--data", data, "--rank=3", "--batch=10"]
    assert run(*PCA, *options, "--out", tmp_path / "one.safetensors")[0] == 0
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "asymflow"]
    with start(*torchrun, *PCA, *options, "--out", tmp_path / "two.safetensors") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one, two = (Subspace.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert torch.allclose(one.spectrum, two.spectrum, rtol=1e-10, atol=1e-14)
    assert torch.allclose(one.basis, two.basis, atol=1e-9)
    assert one.fitted_on == two.fitted_on == "201 of 203 images of images, 8 x 8 pixels, seed 0"
    assert out.count("wrote") == 1
    assert "tokens       804" in out
    assert err.count("2 images could not be read") == 1
    assert ("/102 [" in err, "/101 [" in err) == (True, False)  # one progress bar
    assert (tmp_path / "two.png").exists()
