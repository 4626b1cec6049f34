"""asymflow/model.py: files that are damaged or hostile, the Hub, and the record of what a model was fitted on."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from model_backbones import assert_same, change_config, content, jit_flow, jit_inputs, refused
from safetensors.torch import load_file, save_file

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit import JiT


# ---- Files that are damaged ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, str(folder / name), "does not exist")
    (folder / name).mkdir()
    refused(folder, str(folder / name), "folder")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_weights_that_are_cut_off_are_refused_by_name(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, str(path), "not a whole safetensors file")


def test_missing_unexpected_and_misshaped_weights_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.more"] = tensors.pop("backbone.head.linear.bias")
    tensors["backbone.head.linear.weight"] = tensors["backbone.head.linear.weight"][1:].clone()
    save_file(tensors, path)
    refused(
        folder,
        str(path),
        "missing tensors: backbone.head.linear.bias (48,)",
        "unexpected tensors: backbone.more (48,)",
        "wrong shapes: backbone.head.linear.weight has (47, 64), expected (48, 64)",
    )


def test_a_basis_that_is_damaged_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in [("basis", 2 * tensors["subspace.basis"]), ("scale", -tensors["subspace.scale"])]:
        save_file({**tensors, f"subspace.{name}": value}, path)
        refused(folder, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"format": "asymflow 2"}',
        '{"format": ["asymflow 1"]}',
        "\x00",
        "\ufeff{}",
    ],
)
def test_what_is_no_configuration_is_refused_by_name(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, str(folder / "config.json"))


def test_a_configuration_that_is_no_text_is_refused_by_name(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    refused(folder, str(folder / "config.json"), "is not UTF-16-LE")


def test_a_configuration_that_is_too_deep_is_refused(folder):
    (folder / "config.json").write_text("[" * 200_000)
    refused(folder, str(folder / "config.json"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)
PLACES = [("flow",), ("tokens",), ("network",), ("network", "class"), ("network", "config")]
PLACES += [("flow", name) for name in ("patch_size", "token_order", "sigma_min", "noise_scale")]
PLACES += [("tokens", name) for name in ("dim", "rank", "color_space", "fitted_on")]
PLACES += [("network", "config", name) for name in inspect.signature(JiT).parameters if name != "checkpoint_every"]


@settings(max_examples=50)
@given(st.sampled_from(PLACES), JSON, st.booleans())
def test_a_configuration_with_one_changed_value_is_refused_or_runs(saved, place, value, remove):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
        config = json.loads((saved / "config.json").read_text())
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        if remove:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))
        try:
            flow = AsymFlow.from_pretrained(folder)
        except InputError:
            refused(folder)
        else:
            x, sigma, labels = jit_inputs()
            assert flow(x, sigma, labels=labels).shape == x.shape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_ratio", 1e400),
        ("mlp_ratio", -4.0),
        ("dropout", 5.0),
        pytest.param("width", 2**62),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(folder, name, value):
    change_config(folder, lambda config: config["network"]["config"].update({name: value}))
    refused(folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("flow", "sigma_min", -1), ("flow", "token_order", "hwc"), ("flow", "patch_size", 5)],
)
def test_a_value_that_does_not_fit_is_refused_with_the_name_of_the_file(folder, part, name, value):
    change_config(folder, lambda config: config[part].update({name: value}))
    refused(folder, str(folder))


@pytest.mark.parametrize("key", ["flow", "tokens", "network"])
def test_a_key_that_is_missing_is_named(folder, key):
    change_config(folder, lambda config: config.pop(key))
    refused(folder, key)


def test_an_unknown_option_of_the_backbone_is_named(folder):
    change_config(folder, lambda config: config["network"]["config"].update(wings=2))
    refused(folder, "wings")


@pytest.mark.parametrize("name", ["evil.Evil", "evil", "os.system", "__import__", "Subspace", "torch.nn.Linear"])
def test_a_class_named_in_a_file_is_never_imported(folder, monkeypatch, name):
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('it ran').touch()\nclass Evil: ..."
    )
    monkeypatch.syspath_prepend(str(folder))
    change_config(folder, lambda config: config["network"].update({"class": name}))
    refused(folder, name, "backbone=")
    assert "evil" not in sys.modules
    assert not (folder / "it ran").exists()


def test_a_pickle_in_the_place_of_the_weights_is_not_run(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "it ran"),)

    torch.save({"weights": Bomb()}, folder / "model.safetensors")
    refused(folder, "model.safetensors")
    assert not (folder / "it ran").exists()


# ---- The Hub ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["nobody/no-such-model", "no-such-model", "no/such/folder", "/no/such/folder", "not a name"]
)
def test_a_model_that_is_nowhere_is_refused_in_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(name, name, "Hub", cache_dir=tmp_path)


def test_so_it_is_where_a_user_said_offline(tmp_path):
    program = "import asymflow\ntry: asymflow.AsymFlow.from_pretrained('nobody/no-such-model')\n"
    program += "except asymflow.InputError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("nobody/no-such-model ")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that is a folder: `hub / "user" / "model"`, and remembers what it was asked for."""
    root, asked = tmp_path / "hub", []
    signature = inspect.signature(huggingface_hub.hf_hub_download)

    def download(*args, **options):
        request = signature.bind(*args, **options).arguments
        asked.append(request)
        return str(root / request["repo_id"] / request["filename"])

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **options):
            for name, data in content(folder_path).items():
                (root / repo_id).mkdir(parents=True, exist_ok=True)
                (root / repo_id / name).write_bytes(data)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("asymflow.model.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", HfApi)
    return SimpleNamespace(root=root, asked=asked)


def test_a_model_goes_to_the_hub_and_comes_back(hub):
    flow = jit_flow()
    flow.push_to_hub("user/model")
    assert set(content(hub.root / "user/model")) == {"config.json", "model.safetensors", "README.md"}
    assert_same(AsymFlow.from_pretrained("user/model", revision="v1"), flow)
    assert {request["filename"] for request in hub.asked} == {"config.json", "model.safetensors"}
    assert {request["revision"] for request in hub.asked} == {"v1"}
    card = (hub.root / "user/model/README.md").read_text()
    assert "library_name: asymflow" in card
    assert "2605.12964" in card


def test_a_model_can_be_saved_and_pushed_in_one_go(hub, tmp_path):
    jit_flow().save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="user/there")
    assert content(hub.root / "user/there") == content(tmp_path / "there")


HUB_CONFIGURATIONS = {
    "of another kind of model": '{"_class_name": "Flux"}',
    "of a model with a patch size": '{"patch_size": 2}',
    "that is not JSON": "{",
    "that is a list": "[]",
}


@pytest.mark.parametrize("name", HUB_CONFIGURATIONS)
def test_a_repository_of_something_else_is_refused_in_one_line(hub, name):
    (hub.root / "user/other").mkdir(parents=True)
    (hub.root / "user/other/config.json").write_text(HUB_CONFIGURATIONS[name])
    refused("user/other", "config.json")


def test_what_the_hub_lacks_is_said(monkeypatch):
    def download(*args, **options):
        message = "404 Client Error. (Request ID: abc)\n\nEntry Not Found for url: https://there/config.json."
        raise HfHubHTTPError(message, response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("asymflow.model.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    refused("user/model", "Entry Not Found", "config.json")


@pytest.mark.slow
def test_a_proxy_that_refuses_is_said():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:  # which knows no CONNECT: 501
        Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}"
        words = [sys.executable, "-m", "asymflow", "info", "user/model/model.safetensors"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HTTPS_PROXY": address, "https_proxy": address}
        found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100, check=False)
        proxy.shutdown()
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert "user/model/model.safetensors is neither" in found.stderr
    assert "501" in found.stderr


# ---- The record ------------------------------------------------------------------------------------------------------
def test_the_configuration_says_all_but_the_tensors():
    flow = jit_flow(sigma_min=0.1, noise_scale=2.0)
    assert json.loads(json.dumps(flow.config)) == flow.config
    assert flow.config["flow"] == {
        "patch_size": 4,
        "token_order": "channel_last",
        "sigma_min": 0.1,
        "noise_scale": 2.0,
    }
    assert flow.config["tokens"] == {"dim": 48, "rank": 5, "color_space": "sRGB", "fitted_on": "nothing"}
    assert flow.config["network"] == {"class": "JiT", "config": flow.backbone.config}


def test_the_spectrum_of_its_subspace_stays_with_a_model(tmp_path):
    flow = jit_flow()
    flow.subspace.spectrum = torch.linspace(3, 0, 48, dtype=torch.float64)
    flow.save_pretrained(tmp_path)
    loaded = AsymFlow.from_pretrained(tmp_path)
    assert torch.equal(loaded.subspace.spectrum, flow.subspace.spectrum)
    assert loaded.state_dict().keys() == jit_flow().state_dict().keys()  # a model with it goes into one without
    assert_same(loaded, flow)
    assert loaded.to("meta").subspace.spectrum.is_meta


@pytest.mark.parametrize("shape", [(0,), (5,), (99,)])
def test_a_spectrum_of_any_length_comes_back(tmp_path, shape):
    flow = jit_flow()
    flow.subspace.spectrum = torch.rand(shape)
    flow.save_pretrained(tmp_path)
    assert torch.equal(AsymFlow.from_pretrained(tmp_path).subspace.spectrum, flow.subspace.spectrum)


def test_a_spectrum_that_is_no_row_of_numbers_is_refused(tmp_path):
    flow = jit_flow()
    flow.subspace.spectrum = torch.rand(4, 2)
    flow.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"subspace\.spectrum"):
        AsymFlow.from_pretrained(tmp_path)


def test_an_option_that_does_not_exist_is_not_passed_over(tmp_path):
    jit_flow().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dtpye"):
        AsymFlow.from_pretrained(tmp_path, dtpye=torch.bfloat16)


def test_the_noise_scale_is_that_of_the_backbone_unless_given():
    for size, expected in ((256, 1.0), (512, 2.0)):
        backbone = JiT.from_name("tiny/32", image_size=size)
        assert AsymFlow(backbone, Subspace.empty(backbone.dim)).noise_scale == expected
    assert AsymFlow(backbone, Subspace.empty(backbone.dim), noise_scale=1.5).noise_scale == 1.5
