"""`asymflow subspace`: what it refuses, what it shows, and how it ends."""

import importlib
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from planted_images import PCA, PROCRUSTES, replaced, write_images

from asymflow import AsymFlow, Subspace
from asymflow.cli import subspace as command


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
        (["--noise-scale=2"], "--noise-scale is for --rank auto, but --rank is 8"),
        (["--rank=auto", "--noise-scale=-2"], "noise_scale must be a positive number, but it is -2"),
        (["--noise-scale=loud"], "loud"),
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
    argv = replaced([*PCA, f"--data={tmp_path}", f"--out={tmp_path}/s.safetensors"], *options)
    assert word in refused(*argv)


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


def test_show_finds_a_model_as_other_commands_do(run, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = run("subspace", "show", "shapes")
    assert code == 0
    assert "8 of 48" in text
    assert err == f"shapes is the model that comes with asymflow: there is no {tmp_path / 'shapes'}"
    assert "neither a model here nor one that the Hub gave" in refused("subspace", "show", "nobody/nothing")


def test_show_runs_code_of_a_backbone_from_elsewhere_only_if_it_is_told(run, refused, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text("import torch\nclass Net(torch.nn.Linear): ...")
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("mynet").Net(12, 12)
    net.config = {"in_features": 12, "out_features": 12}
    AsymFlow(net, Subspace.random(12, 5), patch_size=2).save_pretrained(tmp_path / "model")
    assert "--backbone package.module:Net" in refused("subspace", "show", tmp_path / "model")
    assert "5 of 12" in run("subspace", "show", tmp_path / "model", "--backbone", "mynet:Net")[1]
    Subspace.random(12, 3).save(tmp_path / "s.safetensors")
    line = refused("subspace", "show", tmp_path / "s.safetensors", "--backbone", "mynet:Net")
    assert "--backbone is for the folder of a model" in line


def test_show_refuses_what_it_cannot_show_and_never_overwrites(refused, tmp_path):
    Subspace.random(12, 3, patch_size=2).save(tmp_path / "s.safetensors")
    (tmp_path / "s.png").write_text("precious")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.pt").write_text("text")
    assert "exists already" in refused("subspace", "show", tmp_path / "s.safetensors", "--out", tmp_path / "s.png")
    for name in ("s.jpg", "s"):
        assert "must end in .png" in refused("subspace", "show", tmp_path / "s.safetensors", "--out", tmp_path / name)
    for name in ("text.safetensors", "text.pt", "gone.safetensors", "gone.pt"):
        assert name in refused("subspace", "show", tmp_path / name)


# ---- Help, and processes of its own ----------------------------------------------------------------------------------
@pytest.mark.parametrize("action", ["pca", "procrustes", "show"])
def test_every_option_is_explained(run, action):
    code, text, _ = run("subspace", action, "--help")
    assert code == 0
    explained = re.findall(r"^  (--\S+)[^\n]*?(?: {2,}|\n {10,})\S.{5,}$", text, re.MULTILINE)
    assert explained == re.findall(r"^  (--\S+)", text, re.MULTILINE) != []
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
        while not (shown := process.stderr.readline()).endswith(" left\n"):
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
    assert (tmp_path / "two.png").exists()
