"""`asymflow info`: what it counts of a model, wherever that is."""

import json
import resource
import sys

import pytest
import torch
from cli_models import PATCH, SIDE, flow, info, publish
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor

from asymflow import AsymFlow, Subspace, cost
from asymflow.backbones.jit import JiT, published
from asymflow.cli import info_memory, main
from asymflow.cli.info import as_text
from asymflow.cli.models import is_run
from asymflow.fitting import fit_pca
from asymflow.model import CONFIG, WEIGHTS
from asymflow.training.objectives.cost import class_conditional_step, images


# ---- info ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_same_model_as_a_folder_and_as_a_published_file(run, tmp_path):
    model = flow(scale=1.5)
    model.save_pretrained(tmp_path / "folder")
    file = publish(model, tmp_path / "model.safetensors")
    folder = info(run, tmp_path / "folder", "--batch", 2)
    other = info(run, file, "--batch", 2, "--in-context-start", 1)
    assert folder.pop("kind") != other.pop("kind")
    assert folder.pop("model") != other.pop("model")
    for found in (folder, other):  # what the file does not tell, as the loader has it
        found["config"]["network"]["config"].pop("dropout")
    assert folder == other
    assert folder["config"]["tokens"]["rank"] == 5
    assert folder["scale"] == 1.5

    shape = (3, SIDE, SIDE)
    assert folder["image"] == list(shape)
    assert folder["parameters"] == dict(zip(("total", "trainable"), cost.parameters(model), strict=True))
    assert folder["flops"]["forward"] == cost.forward_flops(model, shape)
    activations = folder["training_memory"]["activations"]
    for name, model.backbone.checkpoint_every in (("kept", 0), ("recomputed", 1)):
        step = cost.count(class_conditional_step(model), lambda step: step(images(2, shape)))
        assert activations[name] == {"kept": step.kept, "peak": step.peak}
        assert (folder["flops"]["training_step"] == step.flops // 2) == (name == "kept")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model in a folder."""
    folder = tmp_path_factory.mktemp("model") / "small"
    flow(depth=1, in_context_start=0).save_pretrained(folder)
    return folder


def test_sampling_costs_99_passes_and_those_guided_twice(run, small):
    """Heun: two evaluations a step but in the last. Of the levels 1, 0.98, ..., 0.02 those from 0.88 down are guided:
    44 where a step starts, and 44 again where the one before ends."""
    flops = info(run, small)["flops"]
    sampling, forward = flops["sampling"], flops["forward"]
    assert sampling["passes"] == {"unguided": 99, "guided": 99 + 44 + 44}
    assert sampling["unguided"] == 99 * forward
    assert sampling["guided"] == 187 * forward


@pytest.mark.slow
def test_options_of_training(run, small):
    one, three = (info(run, small, "--batch", b, "--gpus", 4)["training_memory"] for b in (1, 3))
    assert [(state["gpus"], state["stage"]) for state in one["on_each_gpu"]] == [(4, s) for s in range(4)]
    for few, many in zip(one["on_each_gpu"], three["on_each_gpu"], strict=True):
        assert many["activations"] > few["activations"]
        assert many["total"] - many["activations"] == few["total"] - few["activations"]
    for state in one["on_each_gpu"]:
        kinds = {kind: n for kind, n in state.items() if kind not in ("gpus", "stage", "total")}
        assert state["total"] == sum(kinds.values())
        assert (kinds["gathered"] > 0) == (state["stage"] == 3)
        assert (kinds["buckets"] > 0) == (state["stage"] > 0)
    half = info(run, small, "--batch", 1, "--precision", "bfloat16")["training_memory"]
    assert half["activations"]["kept"]["kept"] < one["activations"]["kept"]["kept"]
    assert half["on_each_gpu"][0]["trained"] < one["on_each_gpu"][0]["trained"]
    assert [half["on_each_gpu"][n]["gpus"] for n in (0, 4, 8)] == [1, 8, 64]


def test_a_name_with_an_image_size_and_a_rank(run):
    found = info(run, "JiT-tiny/32", "--image-size", "256x512", "--rank", 0, "--batch", 1)
    assert found["image"] == [3, 256, 512]
    assert found["grid"] == [8, 16]
    assert found["config"]["tokens"]["rank"] == 0
    assert found["config"]["network"]["config"]["image_size"] == 512  # in training
    assert found["config"]["flow"]["noise_scale"] == 2  # of 512 pixels
    with torch.device("meta"):
        jit = JiT.from_name("tiny/32")
    assert found["flops"]["forward"] == cost.forward_flops(AsymFlow(jit, Subspace.empty(jit.dim)), (3, 256, 512))


def test_text_for_people(run):
    found = info(run, "JiT-tiny/16", "--batch", 1)
    text = as_text(found)
    assert "JiT-tiny/16, float32, width 64, depth 4, heads 2" in text
    assert "rank 8 of 768" in text
    assert f"{found['flops']['forward'] / 2e9:.2g} billion multiply-adds" in text
    assert f"parameters     {found['parameters']['total']:,}\n" in text  # fewer than a million
    assert max(map(len, text.splitlines())) <= 120
    table = text.split("1 images on each\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split()[:2] == ["GPUs", "ZeRO"]
    assert [row.split()[:2] for row in table[1:]] == [[gpus, stage] for gpus in ("1", "8", "64") for stage in "0123"]
    assert len({len(row) for row in table}) == 1  # aligned
    assert "With all blocks recomputed: 0.0 GiB less." in text


def test_the_table_is_the_sum_of_states_and_activations():
    memory = lambda gpus, stage: cost.training_memory((stage + 1) * 2**28 // gpus, stage=stage, bucket=0)
    ways = {"kept": cost.Cost(0, 0, 10 * 2**30), "recomputed": cost.Cost(0, 0, 5 * 2**30)}
    known, unknown = (info_memory.describe(memory, 1, steps) for steps in (ways, {}))
    for found, activations in ((known, ["10.0"]), (unknown, [])):
        *rows, last = info_memory.as_text(found, "title")[2:7]
        states = ["1.0", "1.0", "2.0", "1.0"]  # trained, gradients, optimizer, average
        assert rows[1].split() == ["1", "0", "0.0", *states, *activations, "15.0" if activations else "5.0"]
        assert last.split()[:4] == ["1", "3", "0.0", "4.0"]
    assert "With all blocks recomputed: 5.0 GiB less." in info_memory.as_text(known, "title")
    assert "fits" not in "".join(info_memory.as_text(unknown, "title"))


@pytest.mark.slow
def test_a_subspace_that_was_fitted_is_as_good_as_any(run, tmp_path):
    model = flow()
    for name, subspace in (("random", model.subspace), ("fitted", fit_pca([torch.randn(99, 48)], 5))):
        AsymFlow(model.backbone, subspace).save_pretrained(tmp_path / name)
    found = [info(run, tmp_path / name) for name in ("random", "fitted")]
    for name in ("flops", "parameters", "training_memory"):
        assert found[0][name] == found[1][name]
    assert "rank 5 of 48" in run("info", tmp_path / "fitted")


def test_weights_are_not_read(run, tmp_path):
    """From a file of 2.6 GB that has a header and, on a disk that knows holes, hardly anything else."""
    with torch.device("meta"):
        jit = JiT.from_name(f"tiny/{PATCH}", image_size=SIDE, depth=1, in_context_start=0, num_classes=10**7)
    model = AsymFlow(jit, Subspace.empty(48))
    (tmp_path / CONFIG).write_text(json.dumps(model.config))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        kind = {torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(header["subspace.scale"]["data_offsets"][0], 1)
        file.write(model.state_dict()["subspace.scale"].numpy().tobytes())
        file.truncate(8 + len(text) + end)
    before = peak_memory()
    found = info(run, tmp_path, "--batch", 1)
    assert found["parameters"]["total"] == cost.parameters(model)[0] > 6e8
    assert peak_memory() - before < 0.5e9


def peak_memory():
    """Of this process until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_a_pickle_with_several_sets_of_weights(run, tmp_path, monkeypatch):
    seen, check = [], published.check_jit
    monkeypatch.setattr(
        published,
        "check_jit",
        lambda tensors, *rest, **options: (seen.extend(tensors.values()), check(tensors, *rest, **options)),
    )
    model = flow(rank=0, depth=1, in_context_start=0)
    found = info(run, publish(model, tmp_path / "jit.pth", subspace=False), "--in-context-start", 0, "--batch", 1)
    assert found["kind"] == "a published JiT"
    assert seen
    assert all(isinstance(tensor, FakeTensor) for tensor in seen)  # shapes only: these files can have 10 GB and more
    assert found["parameters"]["total"] == cost.parameters(model)[0]
    assert found["config"]["tokens"]["rank"] == 0


OPTIONS = {"--image-size": 32, "--batch": 3, "--gpus": 4, "--precision": "float32", "--rank": 0, "--lora-rank": 1}
OPTIONS |= {"--in-context-start": 0, "--step": 0, "--ema": "none", "--backbone": "no.such:B", "--text-length": 9}


def test_an_option_changes_what_is_said_or_is_refused(tmp_path, monkeypatch, capsys):
    in_training = lambda model, image, args: (0, {name: getattr(args, name) for name in ("batch", "gpus", "precision")})
    monkeypatch.setattr("asymflow.cli.info.training_step", in_training)  # which takes seconds, as do these
    monkeypatch.setattr("asymflow.cost.forward_flops", lambda model, image: sum(image))
    monkeypatch.setattr("asymflow.cli.info.sampling", lambda forward: forward)
    flow().save_pretrained(tmp_path / "model")
    AsymFlow(Elsewhere(), Subspace.random(48, 5), patch_size=4).save_pretrained(tmp_path / "elsewhere")
    Subspace.random(48, 5).save(tmp_path / "subspace.safetensors")
    file = publish(flow(), tmp_path / "published.safetensors")
    models = [["JiT-tiny/16"], ["config"], ["shapes", "--classes"], [file, "--in-context-start", 1]]
    models += [[tmp_path / name] for name in ("model", "elsewhere", "subspace.safetensors")]

    def said(*argv):
        try:
            code = main(["info", *map(str, argv), "--json"])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    for model in models:
        plain = said(*model)
        assert plain[0] == 0
        assert json.loads(plain[1])
        for option in [*OPTIONS.items(), ("--full",), ("--offload", "weights"), ("--classes",)]:
            if option[0] not in model:
                assert said(*model, *option) != plain, (model, option)


def test_subspace_files_are_recognized(run, tmp_path):
    Subspace.random(48, 5, scale=2.0).save(tmp_path / "ours.safetensors")
    torch.save({"proj_mat_p4": torch.eye(48, 5), "scale_p4": torch.tensor(2.0)}, tmp_path / "theirs.pt")
    for file in (tmp_path / "ours.safetensors", tmp_path / "theirs.pt"):
        assert f"asymflow subspace show {file}" in run("info", file)
        assert info(run, file)["rank"] == 5
        assert info(run, file)["scale"] == 2


class Elsewhere(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.config = torch.nn.Linear(48, 48), {"layers": 1}


def test_a_backbone_from_elsewhere(run, tmp_path):
    AsymFlow(Elsewhere(), Subspace.random(48, 5), patch_size=4).save_pretrained(tmp_path / "model")
    text = run("info", tmp_path / "model")
    assert "Elsewhere" in text
    assert "layers 1" in text
    assert "not counted" in text
    found = info(run, tmp_path / "model")
    assert found["parameters"]["total"] == 48 * 49
    assert "flops" not in found
    assert (
        found["training_memory"]["on_each_gpu"][0]["total"] == 28 * 48 * 49
    )  # weight, gradient, two moments, three averages


def test_a_model_with_the_configuration_of_its_training_beside_it_is_a_model(run, tmp_path):
    flow().save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("base: imagenet256_h16\n")
    assert info(run, tmp_path)["kind"] == "a folder of save_pretrained"
    (tmp_path / "checkpoints").mkdir()
    assert is_run(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / CONFIG).unlink()
    assert is_run(tmp_path)


def test_the_help_says_what_is_downloaded(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert "is downloaded first" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("wrong", [{"class": []}, {"class": 3}, {"config": [1]}, {"class": "Other", "config": [1]}])
def test_a_network_that_is_described_wrongly_is_one_line(refused, tmp_path, wrong):
    flow().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["network"] |= wrong
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert "class must be text and config an object" in refused("info", tmp_path)


def test_an_adapter_says_what_it_is_here_and_on_the_hub(run, refused, hub):
    name = "some-org/Some-Model-1.5"
    tensors = {"proj_buffer": torch.eye(48, 6), "scale_buffer": torch.tensor(0.5), "a.lora_A.weight": torch.ones(4, 9)}
    (hub / name).mkdir(parents=True)
    file = hub / name / "diffusion_pytorch_model.safetensors"
    save_file(tensors, file, {"scale": "0.5", "base": "FLUX.2-klein-base-9B"})
    (hub / name / CONFIG).write_text('{"_class_name": "AsymFlux2Transformer2DModel"}')
    said = "an adapter of a FLUX.2 klein: LoRA of rank 4, subspace of rank 6, scale 0.5, base FLUX.2-klein-base-9B"
    for place in (name, str(hub / name), str(file)):
        assert run("info", place) == f"{place}, {said}\n"
        assert info(run, place)["lora_rank"] == 4
    save_file({"x": torch.zeros(1)}, file)
    assert "proj_buffer" in refused("info", name)


def test_what_cannot_be_described(refused, tmp_path):
    assert "config.json does not exist" in refused("info", tmp_path)
    (tmp_path / CONFIG).write_text('{"format": "asymflow 1", "network": 3}')
    (tmp_path / WEIGHTS).write_bytes(b"cut off")
    assert WEIGHTS in refused("info", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a layout" in refused("info", tmp_path / "other.safetensors")
    file = publish(flow(), tmp_path / "model.safetensors")
    assert "--rank does not go with a published" in refused("info", file, "--rank", 3, "--in-context-start", 1)
    assert "in_context_start" in refused("info", file)
    tensors = load_file(file)
    del tensors["final_layer.linear.bias"]
    save_file(tensors, file)
    assert "final_layer.linear.bias" in refused("info", file, "--in-context-start", 1)
    pickle = publish(flow(), tmp_path / "model.pth")
    assert "asymflow import" in refused("info", pickle, "--in-context-start", 1)
