"""`asymflow sample --base`: the same images as the pipeline, one line for mistakes."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PROMPTS, draw, picture

from asymflow import files
from asymflow.backbones.flux2.adapter import lora_modules
from asymflow.backbones.flux2.pipeline import AsymFlux2KleinPipeline
from asymflow.cli import main, sample_text
from asymflow.cli.sample_text import read_upright
from asymflow.sampling import image_noise
from toy.tiny_flux2 import TEXT_LENGTH, make_base


# ---- The command line ------------------------------------------------------------------------------------------------
def run(base, adapter, out, /, *options, **replaced):
    given = {"base": base, "adapter": adapter, "out": out, "steps": 2, "width": 48, "height": 32, "seed": 3}
    given |= {"max-length": TEXT_LENGTH, "device": "cpu", "precision": "float32", **replaced}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return main(["sample", *words, *options])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


PROMPT = ("--prompt", "a red square")


def test_the_command_draws_each_prompt_and_goes_on_where_it_stopped(base, adapter, pipeline, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(
        "\n".join([*PROMPTS, "", "a green disc"]), encoding="utf-8-sig"
    )  # as Notepad does
    assert run(base, adapter, tmp_path / "a", prompts=tmp_path / "prompts.txt") == 0
    names = [f"images/{i:06d}.png" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "images", "samples.json"]
    assert sorted(f"images/{p.name}" for p in (tmp_path / "a/images").iterdir()) == names
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [entry["prompt"] for entry in record["images"]] == [*PROMPTS, "a green disc"]
    noise = image_noise(3, [1], (3, 32, 48))
    expected = draw(pipeline, noise, prompt=PROMPTS[1], num_inference_steps=2, output_type="np")[0]
    assert np.abs(pixels(tmp_path / "a" / names[1]) - 255 * expected).max() <= 1

    before = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    (tmp_path / "a" / names[1]).unlink()
    assert run(base, adapter, tmp_path / "a", prompts=tmp_path / "prompts.txt") == 0
    assert "2 of 3 images are in" in capsys.readouterr().out
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in names}
    assert run(base, adapter, tmp_path / "a", prompts=tmp_path / "prompts.txt", guidance=2) == 2
    assert "holds images made otherwise (guidance 4.0 there, 2.0 here)" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "used"), [(None, TEXT_LENGTH), (TEXT_LENGTH + 8, TEXT_LENGTH + 8)])
def test_prompts_are_as_long_as_in_the_training_if_nothing_else_is_said(base, adapter, tmp_path, given, used):
    assert run(base, adapter, tmp_path / "a", *PROMPT, **{"max-length": given}) == 0
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["settings"]["max_length"] == used
    assert f"--max-length {used} " in record["make_again"]


def test_the_record_makes_an_image_again(base, adapter, tmp_path):
    picture(1, 64, 80).save(tmp_path / "ref.png")
    names = lora_modules(make_base(PROMPTS).transformer, ["attn.to_q"])
    torch.manual_seed(4)
    style = {
        f"{n}.lora_{x}.weight": torch.randn(2, 64) if x == "A" else torch.randn(64, 2) for n in names for x in "AB"
    }
    AsymFlux2KleinPipeline.save_lora_weights(tmp_path / "style", transformer_lora_layers=style)
    options = [*PROMPT, "--prompt", "two blue circles", "--no-clamp", "--image", str(tmp_path / "ref.png")]
    options += ["--lora", f"{tmp_path / 'style'}:0.5"]
    drawn = dict(width=None, height=None, orthogonal=0.5)
    assert run(base, adapter, tmp_path / "a", *options, num=4, batch=3, **drawn) == 0
    command = json.loads((tmp_path / "a" / "samples.json").read_text())["make_again"]
    words = shlex.split(command.replace("INDEX", "2").replace("FOLDER", str(tmp_path / "b")))
    assert main([*words[1:], "--device", "cpu"]) == 0
    again, first = (pixels(tmp_path / folder / "images/000002.png") for folder in "ba")
    assert first.shape == (80, 64, 3)
    assert np.abs(again - first).max() <= 1
    assert run(base, adapter, tmp_path / "c", *options[:-2], num=4, **drawn) == 0
    assert np.abs(pixels(tmp_path / "c" / "images/000002.png") - first).max() > 1


def test_processes_share_the_work(base, adapter, tmp_path, monkeypatch):
    assert run(base, adapter, tmp_path / "one", *PROMPT, num=3) == 0
    for rank in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert run(base, adapter, tmp_path / "two", *PROMPT, num=3) == 0
        assert (tmp_path / "two" / "grid.png").exists() == (rank == "0")
    for name in ("images/000000.png", "images/000001.png", "images/000002.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "replaced", "message"),
    [
        (PROMPT, {"base": None}, "give one of --model, for images of classes, and --base"),
        (PROMPT, {"model": "m"}, "give one of --model, for images of classes, and --base"),
        (PROMPT, {"step": 0}, "--step: for --model only, but --base is given"),
        (PROMPT, {"classes": "all"}, "--classes: for --model only, but --base is given"),
        ((*PROMPT, "--clamp"), {}, "--clamp: for --model only"),
        (PROMPT, {"base": None, "model": "m"}, "--adapter, --prompt, --width, --height, --max-length: for --base only"),
        (PROMPT, {"adapter": None}, "give --adapter too"),
        (PROMPT, {"base": "no/such/folder"}, "there is no folder no/such/folder"),
        (PROMPT, {"adapter": "no/such/adapter"}, "no/such/adapter is neither an adapter here"),
        ((), {}, "give either --prompt"),
        (PROMPT, {"prompts": "p.txt"}, "give either --prompt"),
        ((), {"prompts": "none.txt"}, "none.txt does not exist"),
        (PROMPT, {"image": "none.png"}, "none.png does not exist"),
        (PROMPT, {"image": __file__}, "is not a whole image"),
        (PROMPT, {"lora": "style.bin"}, "expected a safetensors file"),
        (PROMPT, {"lora": "style.safetensors:nan"}, "and :WEIGHT, a number"),
        (PROMPT, {"lora": "none.safetensors:0.5"}, "none.safetensors does not exist"),
        (PROMPT, {"width": 50}, "32 x 50 pixels"),
        (PROMPT, {"guidance": 0.5}, "--guidance must be at least 1"),
        (PROMPT, {"steps": 0}, "at least 1 step"),
        (PROMPT, {"max-length": 0}, "--max-length must be at least 1"),
    ],
)
def test_mistakes_are_answered_in_one_line_before_a_model_is_read(
    base, adapter, tmp_path, capsys, monkeypatch, options, replaced, message
):
    monkeypatch.setattr(sample_text, "load", None)
    assert run(base, adapter, tmp_path / "out", *options, **replaced) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("asymflow sample: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_offloading_to_the_cpu_is_refused_before_the_model_is_read(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_text, "load", lambda *_: pytest.fail("it took minutes to read the model"))
    assert run(base, adapter, tmp_path / "out", *PROMPT, "--offload") == 2
    assert "--offload moves" in capsys.readouterr().err


def test_a_lora_that_does_not_fit_is_one_line(base, adapter, tmp_path, capsys):
    style = {f"transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    AsymFlux2KleinPipeline.save_lora_weights(tmp_path, transformer_lora_layers=style)
    assert run(base, adapter, tmp_path / "out", *PROMPT, lora=tmp_path) == 2
    assert "does not fit the model" in capsys.readouterr().err.strip().splitlines()[-1]
    files.write_tensors(tmp_path / "unet.safetensors", {f"unet.a.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})
    assert run(base, adapter, tmp_path / "out", *PROMPT, lora=tmp_path / "unet.safetensors") == 2
    assert (
        "does not fit the model: the LoRA cannot be loaded: it has nothing for a layer"
        in capsys.readouterr().err.strip().splitlines()[-1]
    )

    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    assert run(base, adapter, tmp_path / "out", *PROMPT, lora=tmp_path / "cut.safetensors") == 2
    assert "do that again (SafetensorError" in capsys.readouterr().err.strip().splitlines()[-1]


def test_photographs_enter_upright_and_on_white(base, adapter, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(1, 96, 64).save(tmp_path / "phone.jpg", exif=exif)
    assert run(base, adapter, tmp_path / "out", *PROMPT, image=tmp_path / "phone.jpg", width=None, height=None) == 0
    assert Image.open(tmp_path / "out" / "images/000000.png").size == (64, 96)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_upright(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (10, 10)).save(tmp_path / "tiny.png")
    options = [*PROMPT, "--image", str(tmp_path / "phone.jpg"), "--image", str(tmp_path / "tiny.png")]
    assert run(base, adapter, tmp_path / "none", *options) == 2  # also the second one, and before anything is written
    assert not (tmp_path / "none").exists()


def test_too_little_memory_is_one_line(base, adapter, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AsymFlux2KleinPipeline, "__call__", full)
    assert run(base, adapter, tmp_path / "out", *PROMPT) == 2
    assert "cpu has too little memory for this: try --offload" in capsys.readouterr().err


def test_the_command_line_starts_without_diffusers():
    code = "import sys, asymflow.cli.sample; assert not {'diffusers', 'transformers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_that_is_cut_is_said(base, adapter, tmp_path, capsys):
    assert run(base, adapter, tmp_path / "a", "--prompt", "very " * 24, **{"max-length": 24}) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "tokens" in line]
    assert line.startswith("the prompt 'very very ")
    assert line.endswith("tokens, of which 24 are used (--max-length)")
