"""What reads encoded shards, and Procrustes on them."""

import pickle

import numpy as np
import pytest
import torch
from encoding_runs import LENGTH, SETTINGS, content, two_processes
from PIL import Image

from asymflow import Subspace, patchify
from asymflow.cli import main
from asymflow.cli import subspace as command
from asymflow.color import rgb_to_oklab
from asymflow.data.captioned import find_captioned, json_lines
from asymflow.data.encode import encode
from asymflow.data.encoded import EncodedShards
from asymflow.data.encoders import decode_latents, encode_image
from asymflow.entries import Entry, UnreadableError
from asymflow.errors import InputError


# ---- What the transformer sees ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_those_of_the_stock_pipeline_to_the_bit(pipeline, base, dtype):
    vae = type(pipeline.vae).from_pretrained(base / "vae").to(dtype).eval()
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        stock = type(pipeline)(None, vae, None, None, None)._encode_vae_image(images.to(dtype), None)
    assert torch.equal(encode_image(vae, images), stock)


def test_decoding_is_what_the_stock_pipeline_does_at_its_end(pipeline):
    seen = {}

    def note(_, step, timestep, tensors):
        seen.update(tensors)
        return {}

    pipeline.set_progress_bar_config(disable=True)
    options = dict(height=32, width=48, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    image = pipeline(prompt="a cat", callback_on_step_end=note, generator=torch.Generator().manual_seed(0), **options)[
        0
    ]
    latents = seen["latents"].mT.reshape(1, -1, 2, 3)
    assert torch.allclose(decode_latents(pipeline.vae, latents) / 2 + 0.5, image, atol=1e-7)


def test_decoding_inverts_the_steps_between_vae_and_transformer(pipeline, monkeypatch):
    """With a VAE that passes its latents through."""
    mode = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0)) / 4
    distribution = type("D", (), {"mode": lambda self: mode})()
    monkeypatch.setattr(pipeline.vae, "encode", lambda _: type("E", (), {"latent_dist": distribution}))
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents, return_dict: (latents,))
    latents = encode_image(pipeline.vae, torch.zeros(2, 3, 48, 64))
    assert latents.shape == (2, 16, 3, 4)
    assert torch.allclose(decode_latents(pipeline.vae, latents), mode.clamp(-1, 1), atol=1e-6)


# ---- Reading ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def copy(shards, tmp_path):
    (tmp_path / "copy").mkdir()
    for name, text in content(shards).items():
        (tmp_path / "copy" / name).write_bytes(text)
    return tmp_path / "copy"


def test_a_damaged_sample_is_named_and_the_others_can_be_read(copy):
    found = EncodedShards(copy)
    offset = found.span[5, 2, 0]
    with open(found.shards[found.shard[5]], "r+b") as file:  # noqa: PTH123
        file.seek(offset)
        file.write(b"\xff" * 8)
    for read in (found.__getitem__, found.pair):
        with pytest.raises(UnreadableError, match=r"00001.tar: sample 5 is damaged"):
            read(5)
    assert len([found[i] for i in range(12) if i != 5]) == 11
    with pytest.raises(IndexError):
        found[12]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("00001.tar", "damaged or gone, or its index is: .*00001.tar"),
        ("00001.index.npz", "damaged or gone, or its index is: .*00001.tar"),
        ("empty_prompt.safetensors", "empty_prompt.safetensors does not exist"),
        ("meta.json", "is not a folder of shards made by"),
    ],
)
def test_shards_that_are_not_whole_are_refused(copy, gone, message):
    (copy / gone).unlink()
    with pytest.raises(InputError, match=message):
        EncodedShards(copy)


def test_shards_that_are_cut_off_are_refused(copy):
    with (copy / "00002.tar").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match=r"00002.tar"):
        EncodedShards(copy)


def test_other_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match="asymflow data encode"):
            EncodedShards(path)


def test_what_is_known_of_all_samples_is_in_few_objects(shards):
    assert sum(isinstance(value, list) for value in vars(EncodedShards(shards)).values()) == 2  # shards, buckets
    again = pickle.loads(pickle.dumps(EncodedShards(shards)))
    assert torch.equal(again[3].latent, EncodedShards(shards)[3].latent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_image_and_latent_without_the_prompt(base, shards, tmp_path, monkeypatch, dtype):
    if dtype == torch.bfloat16:
        shards = tmp_path / "s"
        encode(["shapes:3"], base, shards, **{**SETTINGS, "dtype": dtype})
    found, sizes = EncodedShards(shards), []
    samples, read = list(found), Entry.read
    monkeypatch.setattr(Entry, "read", lambda entry: sizes.append(entry.size) or read(entry))
    for i, sample in enumerate(samples):
        image, latent = found.pair(i)
        assert torch.equal(image, sample.image)
        assert torch.equal(latent, sample.latent)
        assert latent.dtype == torch.float32
        whole = found.span[i, -1].sum() - found.span[i, 0, 0]
        assert sizes[i] <= whole - sample.prompt.nbytes + 512


# ---- Procrustes ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "draw_subspace", lambda subspace, file: Image.new("L", (1, 1)).save(file))
        argv = ["subspace", "procrustes", "--device=cpu", "--shards", str(shards)]
        assert main([*argv, "--out", str(out / "s.safetensors")]) == 0
    return out / "s.safetensors"


def test_procrustes_reads_no_prompts(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedShards, "__getitem__", None)
    monkeypatch.setattr(command, "draw_subspace", lambda subspace, file: Image.new("L", (1, 1)).save(file))
    argv = ["subspace", "procrustes", "--device=cpu", "--shards", str(shards)]
    assert main([*argv, "--out", str(tmp_path / "s.safetensors")]) == 0


def tokens_of(shards):
    """Latent and pixel tokens of all samples, by numpy."""
    latents, pixels = [], []
    for sample in EncodedShards(shards):
        r, h, w = sample.latent.shape
        latents.append(sample.latent.reshape(r, h * w).mT.double().numpy())
        image = rgb_to_oklab(sample.image[None].float() / 127.5 - 1)
        pixels.append(patchify(image, 16, "channel_first")[0].double().numpy())
    return np.concatenate(latents), np.concatenate(pixels)


def test_procrustes_is_that_of_numpy_on_the_same_tokens(shards, fitted):
    z, x = tokens_of(shards)
    u, _, vt = np.linalg.svd(z.T @ x, full_matrices=False)
    basis = vt.T @ u.T
    scale = np.sqrt(((x @ basis) ** 2).sum() / (z**2).sum())
    found = Subspace.load(fitted)
    assert np.allclose(found.basis.numpy(), basis, atol=1e-7)
    assert found.scale == pytest.approx(scale, rel=1e-7)
    record = (found.patch_size, found.token_order, found.color_space, found.fitted_on)
    assert record == (16, "channel_first", "oklab", "12 of 12 images of shards, 3 sizes, seed 0")


def test_procrustes_prints_the_error_of_the_lifted_latents_and_warns(shards, fitted, tmp_path, capsys):
    z, x = tokens_of(shards)
    found = Subspace.load(fitted)
    error = ((found.scale * z @ found.basis.numpy().T - x) ** 2).sum() / (x**2).sum()
    argv = ["subspace", "procrustes", "--device=cpu", "--shards", str(shards), "--batch=5"]
    assert main([*argv, "--out", str(tmp_path / "s.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"error        {100 * error:.2f} %" in said
    assert "only 12 images: take at least 1,000" in said
    assert Image.open(tmp_path / "s.png").width > 500


def test_a_latent_model_takes_what_was_fitted_to_its_shards(pipeline, fitted):
    from asymflow.backbones.flux2 import latent_to_pixel

    flow = latent_to_pixel(pipeline.transformer, Subspace.load(fitted))
    prompt = torch.zeros(1, LENGTH, 96)
    with torch.no_grad():
        velocity = flow(torch.zeros(1, 3, 32, 48), torch.ones(1), encoder_hidden_states=prompt)
    assert velocity.shape == (1, 3, 32, 48)


def test_two_processes_fit_what_one_fits(shards, fitted, tmp_path):
    argv = ["subspace", "procrustes", "--device=cpu", "--shards", shards, "--out", tmp_path / "s.safetensors"]
    said = two_processes(tmp_path, *argv)
    one, two = Subspace.load(fitted), Subspace.load(tmp_path / "s.safetensors")
    assert torch.allclose(one.basis, two.basis, atol=1e-9)
    assert one.scale == pytest.approx(two.scale, rel=1e-12)
    assert said.count("error") == 1


def test_shards_and_data_exclude_each_other_and_patch_and_rank_are_theirs(shards, tmp_path, capsys):
    argv = ["subspace", "procrustes", "--device=cpu", "--out", str(tmp_path / "s.safetensors")]
    for more in ([], ["--shards", str(shards), "--data", str(shards)]):
        with pytest.raises(SystemExit):
            main([*argv, *more])
        assert "--shards" in capsys.readouterr().err
    for option in ("--patch-size=8", "--rank=8"):
        assert main([*argv, "--shards", str(shards), option]) == 2
        assert f"{option.replace('=', ' ')} does not fit: it is 16 in" in capsys.readouterr().err


def test_a_caption_that_is_not_utf8_is_not_embedded_as_something_else(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Käfer".encode("latin-1"))
    listed = tmp_path / "list.jsonl"
    listed.write_bytes(b'{"image": "a.png", "caption": "K\xe4fer"}\n{"image": "a.png", "caption": "\\ud800"}\n')
    photos = [*find_captioned([str(tmp_path)], 8), *json_lines(listed)]
    assert len(photos) == 3
    for photo in photos:
        with pytest.raises(UnreadableError, match="UTF-8"):
            photo.caption()
