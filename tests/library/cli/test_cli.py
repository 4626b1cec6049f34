"""The command line: its frame, the Hub, and `import`. What is wrong is one line, and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_models import SIDE, flow, info, publish
from safetensors import safe_open

from asymflow import AsymFlow, Subspace
from asymflow.cli import MODULES, import_, main
from asymflow.cli.common import own_device
from asymflow.model import CONFIG, WEIGHTS
from asymflow.training.start import parse


# ---- The frame -------------------------------------------------------------------------------------------------------
def test_help_shows_every_command_with_an_example(capsys):
    for command in MODULES:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0
        assert f"asymflow {command} " in text.split("\n\n", 1)[1]  # below the usage
        assert max(map(len, text.splitlines())) <= 120
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(re.match(f" +{command}  ", line) for line in lines) for command in MODULES)
    assert len(lines) <= 35
    assert max(map(len, lines)) <= 120


def test_without_a_command_the_help_is_printed_as_an_error(capsys):
    assert main([]) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert "asymflow COMMAND --help" in text.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(
        rf"asymflow (\S+|\(not installed\)), torch {re.escape(torch.__version__)}, Python 3\.\S+\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize(
    ("name", "world", "device"),
    [("cuda", 1, "cuda"), ("cuda", 4, "cuda:1"), ("cuda:2", 4, "cuda:2"), ("cpu", 4, "cpu")],
)
def test_cuda_is_a_gpu_of_its_own_for_each_of_several_processes(monkeypatch, name, world, device):
    for variable, value in {"WORLD_SIZE": world, "RANK": world - 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr("asymflow.cli.common.usable_device", torch.device)  # there may be no GPU
    assert own_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inform"], "inform"),
        (["info"], "MODEL"),
        (["info", "JiT-B/16", "--colour"], "--colour"),
        (["info", "JiT-B/16", "--batch", "0"], "at least 1"),
        (["info", "JiT-B/16", "--image-size", "256x"], "256x384"),
        (["info", "JiT-B/16", "--image-size", "250"], "multiples of 16"),
        (["info", "JiT-B/16", "--precision", "fp8"], "autocast"),
        (["info", "JiT-B/16", "--rank", "769"], "768"),
        (["info", "JiT-XL/16"], "SIZE in tiny, S, B, L, H"),
        (["info", "nowhere"], "nowhere does not exist"),
        (["import", "nowhere.safetensors", "--out", "x"], "nowhere.safetensors does not exist"),
        (["import", "nowhere.safetensors"], "--out"),
    ],
)
def test_mistakes_are_answered_in_one_line(refused, argv, message):
    assert message in refused(*argv)


def test_an_option_of_one_value_is_refused_twice_and_others_add_up(refused, capsys):
    for argv in ("info JiT-B/16 --batch 8 --batch=8", "subspace show x --out a --out b"):
        assert "it is given twice, but can have one value: leave out one of them" in refused(*argv.split())
    assert parse(["--set", "train.steps=1", "--set", "train.seed=2"]).set == ["train.steps=1", "train.seed=2"]
    with pytest.raises(SystemExit):
        parse(["--out", "a", "--out", "b"])
    assert "argument --out: it is given twice" in capsys.readouterr().err


def test_errors_of_the_system_are_answered_in_one_line(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr("asymflow.cli.info.describe", full)
    assert refused("info", "x") == "asymflow info: error: file: No space left on device"


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("asymflow.cli.info.describe", interrupt)
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "\nasymflow info: interrupted\n"


def test_as_a_module_into_a_pipe_that_nobody_reads(tmp_path):
    Subspace.random(48, 5).save(tmp_path / "subspace.safetensors")
    command = [sys.executable, "-m", "asymflow", "info", tmp_path / "subspace.safetensors"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # so that it matters when
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# ---- On the Hub ------------------------------------------------------------------------------------------------------
def test_a_repository_of_the_hub_is_the_folder_that_is_here(run, hub):
    name = "some-org/Some-Model-1.5"
    flow().save_pretrained(hub / name)
    (hub / name / "classes.json").write_text('["cat", "dog", "golden retriever"]')
    remote, here = info(run, name), info(run, hub / name)
    assert remote["classes"] == here["classes"] == ["cat", "dog", "golden retriever"]
    for model in (name, hub / name):
        assert run("info", model, "--classes") == "0 cat\n1 dog\n2 golden retriever\n"
    assert info(run, name, "--classes") == ["cat", "dog", "golden retriever"]
    assert (remote.pop("model"), here.pop("model")) == (name, str(hub / name))
    assert remote == here
    for out, source in (("a", name), ("b", hub / name)):
        run("sample", "--model", source, "--num", "1", "--steps", "1", "--out", hub / out)
    assert (hub / "a/images/000000.png").read_bytes() == (hub / "b/images/000000.png").read_bytes()


def test_a_file_of_the_hub_is_the_file_that_is_here(run, hub):
    name = "some-org/Some-Model-1.5/below/file.safetensors"
    (hub / name).parent.mkdir(parents=True)
    there = publish(flow(), hub / name)
    remote, here = (info(run, model, "--in-context-start", "1") for model in (name, there))
    assert (remote.pop("model"), here.pop("model")) == (name, str(there))
    assert remote == here


def test_what_is_on_the_hub_is_imported_as_what_is_here(run, refused, hub):
    name = "some-org/Some-Model-1.5"
    (hub / name).mkdir(parents=True)
    publish(flow(), hub / name / "file.safetensors")
    for out, source in (("a", f"{name}/file.safetensors"), ("b", hub / name / "file.safetensors")):
        run("import", source, "--out", hub / out, "--in-context-start", 1)
    flow().save_pretrained(hub / name)
    run("import", name, "--out", hub / "c")
    assert not (hub / "c" / "classes.json").exists()
    (hub / name / "classes.json").write_text('["cat", "dog", "owl"]')
    run("import", name, "--out", hub / "named")
    assert (hub / "named" / "classes.json").read_text() == '["cat", "dog", "owl"]'
    contents = [[(hub / out / file).read_bytes() for file in (CONFIG, WEIGHTS)] for out in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert "--weights is for published files" in refused("import", name, "--out", hub / "d", "--weights", "ema1")
    assert "is a folder" in refused("import", hub / name, "--out", hub / "d")  # it is what is wanted already


ASKED = "neither a model here nor one that the Hub gave"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nobody/nothing", ASKED),
        ("nobody/nothing.1", ASKED),
        ("nobody/no/file.safetensors", ASKED),
        ("no/such/folder", ASKED),
        ("/no/such/folder", "does not exist"),
        ("nowhere", "does not exist"),
    ],
)
@pytest.mark.parametrize("command", [["info"], ["sample", "--out", "no", "--model"], ["import", "--out", "no"]])
def test_what_is_neither_here_nor_on_the_hub_is_one_line(refused, command, model, said):
    line = refused(*command, model)
    assert f"{model} " in line
    assert said in line


def test_too_little_memory_is_one_line(refused, monkeypatch):
    def allocate(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 8 TiB")

    monkeypatch.setattr("asymflow.cli.info.describe", allocate)
    assert "too little memory: [enforce fail] DefaultCPUAllocator" in refused("info", "JiT-B/16")
    monkeypatch.setattr("asymflow.cli.info.describe", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", "JiT-B/16"])


# ---- import ----------------------------------------------------------------------------------------------------------
def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_imported_model_is_the_one_that_was_published(run, tmp_path):
    model, out = flow(scale=1.5), tmp_path / "deep" / "model"
    file = publish(model, tmp_path / "file.safetensors")
    lines = run("import", file, "--out", out, "--in-context-start", 1).splitlines()
    assert len(lines) == 3
    assert f"asymflow sample --model {out}" in lines[2]
    assert left_over(out.parent) == ["model"]
    imported = AsymFlow.from_pretrained(out)
    x, sigma, labels = torch.randn(2, 3, SIDE, SIDE), torch.tensor([0.3, 0.9]), torch.tensor([1, 10])
    assert torch.equal(imported(x, sigma, labels=labels), model(x, sigma, labels=labels))


def test_dtype_and_choice_of_weights(run, refused, tmp_path):
    file = publish(flow(rank=0), tmp_path / "jit.pth", subspace=False)
    options = ("--in-context-start", 1, "--dtype", "bfloat16")
    (tmp_path / "empty").mkdir()
    run("import", file, "--out", tmp_path / "empty", "--weights", "ema1", *options)
    with safe_open(tmp_path / "empty" / WEIGHTS, framework="pt") as weights:
        assert weights.get_tensor("backbone.head.linear.weight").dtype == torch.bfloat16
    assert "ema2" in refused("import", file, "--out", tmp_path / "other", "--weights", "ema2", *options)
    assert not (tmp_path / "other").exists()


def test_a_subspace_is_imported_as_a_file(run, refused, tmp_path):
    basis = Subspace.random(48, 5).basis
    torch.save({"proj_mat_p4": basis, "scale_p4": torch.tensor(2.0)}, tmp_path / "theirs.pt")
    assert "must end in .safetensors" in refused("import", tmp_path / "theirs.pt", "--out", tmp_path / "ours")
    out = tmp_path / "ours.safetensors"
    for option in (("--weights", "ema1"), ("--in-context-start", 1), ("--dtype", "bfloat16")):
        assert "is a subspace, " in refused("import", tmp_path / "theirs.pt", "--out", out, *option)
    assert f"asymflow subspace show {out}" in run("import", tmp_path / "theirs.pt", "--out", out)
    assert torch.equal(Subspace.load(out).basis, basis)
    assert left_over(tmp_path) == ["ours.safetensors", "theirs.pt"]


def test_what_is_there_is_refused_before_the_file_is_read(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(import_, "load_published", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for out in (tmp_path / "full", tmp_path / "full" / "mine"):
        assert "not overwritten" in refused("import", "any.safetensors", "--out", out)
    assert (tmp_path / "full" / "mine").read_text() == "kept"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_stays(tmp_path, monkeypatch, error):
    file = publish(flow(), tmp_path / "file.safetensors")

    def save_half(self, folder, **options):
        (folder / CONFIG).write_text("half")
        raise error

    monkeypatch.setattr(AsymFlow, "save_pretrained", save_half)
    code = main(["import", str(file), "--out", str(tmp_path / "model"), "--in-context-start", "1"])
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert left_over(tmp_path) == ["file.safetensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_while_it_writes(tmp_path):
    """A real signal, to a real process, while it holds its temporary folder."""
    file = publish(flow(), tmp_path / "file.safetensors")
    code = "import sys, time; from asymflow.cli import main; from asymflow import AsymFlow; "
    code += "AsymFlow.save_pretrained = lambda *_: time.sleep(1000); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "import", file, "--out", tmp_path / "model", "--in-context-start", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while len(left_over(tmp_path)) == 1 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().endswith("\nasymflow import: interrupted\n")
    assert process.returncode == 130
    assert left_over(tmp_path) == ["file.safetensors"]
