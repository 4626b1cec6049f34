"""`asymflow data encode`, what reads its shards, and Procrustes on them: they hold what the stock pipeline computes."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import environment_of
from safetensors.torch import load_file, save_file

from asymflow import Subspace, files, patchify
from asymflow.cli import main
from asymflow.cli import subspace as command
from asymflow.color import rgb_to_oklab
from asymflow.data import encode as encoding
from asymflow.data import writing
from asymflow.data.buckets import buckets, enlargement, fill, nearest_bucket
from asymflow.data.captioned import find_captioned, json_lines
from asymflow.data.encode import encode
from asymflow.data.encoded import EncodedShards
from asymflow.data.encoders import PARTS, decode_latents, encode_image, folder_digest
from asymflow.data.shapes import Shapes
from asymflow.errors import InputError
from asymflow.pixels import Entry, UnreadableError
from toy.tiny_flux2 import make_base

LENGTH = 48  # of prompts here: a caption of shapes in the chat template is shorter
SETTINGS = dict(size=64, per_shard=4, batch=3, max_length=LENGTH, dtype=torch.float32, threads=2)


@pytest.fixture(scope="module")
def pipeline():
    """With statistics of the batch norm that are not those of a new one."""
    pipeline = make_base(Shapes(50, 32)[i].caption for i in range(50))
    g = torch.Generator().manual_seed(0)
    pipeline.vae.bn.running_mean.normal_(generator=g)
    pipeline.vae.bn.running_var.uniform_(0.5, 2, generator=g)
    return pipeline


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 photographs of three shapes and noise, with captions, in folders."""
    folder, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        width, height = [(90, 90), (128, 70), (64, 100)][i % 3]
        small = Image.fromarray(g.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"set{i % 2}" / f"p{i}.v1.{'jpg' if i % 4 == 0 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        small.resize((width, height), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"  photo {i}, grün\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shards(base, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shards"
    encode([photos], base, out, **SETTINGS)
    return out


def content(folder):
    """Every file, hidden ones too, but the locks, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


# ---- Buckets ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.sampled_from([1, 8, 16]), st.floats(1, 4))
def test_buckets_are_symmetric_and_of_one_area(side, multiple, max_aspect):
    area = (side * multiple) ** 2
    found = buckets(area, multiple, max_aspect)
    assert (side * multiple, side * multiple) in found
    assert len(set(found)) == len(found)
    assert sorted((w, h) for h, w in found) == sorted(found)
    for h, w in found:
        assert h % multiple == w % multiple == 0
        assert max(h, w) <= max_aspect * min(h, w)
        assert abs(h * w - area) <= multiple * min(h, w) / 2  # no other multiple is closer
    ratios = [h / w for h, w in found]
    assert ratios == sorted(ratios)
    for h, w in found:
        assert found[nearest_bucket(found, 3 * w, 3 * h)] == (h, w)


def test_buckets_of_a_megapixel_are_as_documented():
    found = buckets(1024**2, 16, 2)
    assert (len(found), found[0], found[18], found[-1]) == (37, (736, 1424), (1024, 1024), (1424, 736))
    assert max(abs(h * w / 1024**2 - 1) for h, w in found) < 0.007
    assert found[nearest_bucket(found, 1024, 100)] == (736, 1424)
    with pytest.raises(InputError, match="no size"):
        buckets(100, 16, 2)


def test_an_image_that_lies_on_its_side_comes_into_the_bucket_that_lies_on_its_side():
    found = buckets(64**2, 16, 2)
    for width in range(100, 200):
        h, w = found[nearest_bucket(found, width, 100)]
        assert found[nearest_bucket(found, 100, width)] == (w, h)


@pytest.mark.parametrize(("width", "height"), [(200, 90), (90, 200), (61, 50), (80, 48)])
def test_what_fills_a_bucket_is_the_centre_undistorted(width, height):
    """A ramp in x and one in y, resized by any filter that is symmetric, is a ramp but for the edges."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    picture = np.stack([255 * x / width, 255 * y / height, 0 * x], axis=-1)
    bucket = (48, 80)
    found = np.asarray(fill(Image.fromarray(picture.round().astype(np.uint8)), bucket)).astype(float)
    scale = enlargement(bucket, width, height)
    assert found.shape == (48, 80, 3)
    columns, rows = np.arange(80) + 0.5 - 40, np.arange(48) + 0.5 - 24
    inner = slice(6, -6)
    assert abs(found[:, inner, 0] - 255 * (0.5 + columns[inner] / scale / width)).max() < 2
    assert abs(found[inner, :, 1] - 255 * (0.5 + rows[inner] / scale / height)[:, None]).max() < 2


def test_an_image_of_the_size_of_its_bucket_is_not_touched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    assert fill(image, (48, 80)).tobytes() == image.tobytes()


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


# ---- The shards ------------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_stock_pipeline_makes_of_images_and_captions(shards, photos, pipeline):
    found = EncodedShards(shards)
    assert len(found) == 12
    assert found.buckets == [(48, 80), (64, 64), (80, 48)]
    names = set()
    for i, sample in enumerate(found):
        size = found.buckets[found.bucket[i]]
        original = Image.open(sample.name)
        names.add(sample.name)
        number = int(sample.name.rpartition("/p")[2].partition(".")[0])
        assert size == [(64, 64), (48, 80), (80, 48)][number % 3]
        assert sample.caption == f"photo {number}, grün"
        assert sample.image.permute(1, 2, 0).numpy().tobytes() == fill(original, size).tobytes()
        pixels = sample.image[None].float() / 127.5 - 1
        # In a batch of another size, float32 is rounded in another order.
        assert torch.allclose(sample.latent, encode_image(pipeline.vae, pixels)[0], atol=1e-5)
        with torch.no_grad():
            prompt = pipeline.encode_prompt(sample.caption, max_sequence_length=LENGTH)[0][0]
        assert sample.prompt.shape == prompt.shape == (LENGTH, 96)
        assert torch.allclose(sample.prompt, prompt, atol=1e-4, rtol=1e-4)
    assert len(names) == 12
    with torch.no_grad():
        empty = pipeline.encode_prompt("", max_sequence_length=LENGTH)[0][0]
    assert torch.allclose(found.empty_prompt, empty, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.empty_prompt, found[0].prompt, atol=0.1)


def test_what_is_recorded(shards, base):
    meta = json.loads((shards / "meta.json").read_text())
    assert all(meta[part] == folder_digest(base / part) for part in PARTS)
    facts = {"images": 12, "shards": 3, "left_out": 0, "rank": 16, "patch_size": 16, "prompt_shape": [LENGTH, 96]}
    assert meta.items() >= {**facts, "images_in_bucket": [4, 4, 4], "dtype": "float32"}.items()
    with tarfile.open(shards / "00000.tar") as tar:
        members = tar.getnames()
        fact = json.load(tar.extractfile(members[1]))
    assert [name.partition(".")[2] for name in members] == ["png", "json", "safetensors"] * 4
    assert fact.keys() == {"caption", "name", "width", "height", "bucket"}
    assert (fact["width"], fact["height"], fact["bucket"]) == (128, 70, [48, 80])
    assert not list(shards.glob("problems*"))


def test_shapes_are_data_too_in_bfloat16_and_webp(base, tmp_path, capsys):
    argv = ["--size=32", f"--max-length={LENGTH}", "--format=webp", "--device=cpu", "--data", "shapes:5"]
    assert main(["data", "encode", "--base", str(base), "--out", str(tmp_path / "s"), *argv]) == 0
    assert "5 images of one size" in capsys.readouterr().out
    found, shapes = EncodedShards(tmp_path / "s"), Shapes(5, 32)
    samples = {sample.name: sample for sample in found}
    for i in range(5):
        sample = samples[f"shapes/{i}"]
        assert torch.equal(sample.image, shapes[i].image)
        assert sample.caption == shapes[i].caption
        assert (sample.latent.dtype, sample.prompt.dtype) == (torch.float32, torch.bfloat16)


@pytest.fixture
def without_models(monkeypatch):
    """Latents and prompts that are 0: for what is not about them."""
    monkeypatch.setattr(encoding, "load_encoders", lambda *_: type("P", (), {"vae": None}))
    zeros = lambda vae, images: torch.zeros(len(images), 16, *(n // 16 for n in images.shape[2:]))
    monkeypatch.setattr(encoding, "encode_image", zeros)
    monkeypatch.setattr(encoding, "encode_prompts", lambda pipeline, texts, n: torch.zeros(len(texts), n, 96))


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("form", ["jsonl", "tar", "json in a folder of tars"])
def test_the_same_images_from_elsewhere_are_the_same_samples(shards, base, photos, tmp_path, form):
    images = sorted(photos.rglob("*.??g"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in images]
    data = tmp_path / "elsewhere"
    data.mkdir()
    if form == "jsonl":
        names = itertools.cycle(itertools.product(("image", "file_name", "path"), ("caption", "text", "prompt")))
        rows = [{i: str(p.name), c: text} for p, text, (i, c) in zip(images, captions, names, strict=False)]
        for path in images:
            (data / path.name).symlink_to(path)
        (data / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        data = data / "list.jsonl"
    else:
        with tarfile.open(data / "a.tar", "w") as tar:
            for i, (path, text) in enumerate(zip(images, captions, strict=True)):
                tar.add(path, f"x/{i:02}{path.suffix}")
                kind, text = ("txt", text) if form == "tar" else ("json", json.dumps({"caption": text, "id": i}))
                member = tarfile.TarInfo(f"x/{i:02}.{kind}")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
        data = data / "a.tar" if form == "tar" else data
    encode([data], base, tmp_path / "s", **SETTINGS)
    one, other = EncodedShards(shards), EncodedShards(tmp_path / "s")
    as_dict = lambda ds: {sample.caption: sample.image.numpy().tobytes() for sample in ds}
    assert as_dict(one) == as_dict(other)
    assert len(as_dict(one)) == 12


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    (photo,) = find_captioned([tmp_path], 64)
    assert photo.size() == photo.pixels().size == (20, 40)
    assert np.asarray(photo.pixels())[5].max() < 30 < 200 < np.asarray(photo.pixels())[35].min()


def test_headers_that_are_long_are_read_to_their_end(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.save(tmp_path / "a.jpg", icc_profile=bytes(200_000))
    image.save(tmp_path / "b.webp", lossless=True)
    assert [photo.size() for photo in find_captioned([tmp_path], 64)] == [(40, 20), (40, 20)]


@pytest.mark.usefixtures("without_models")
def test_what_is_bad_is_left_out_and_listed_with_the_reason(base, photos, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("good", "cut", "mute", "empty", "nothing"):
        noise.save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a caption" if name != "empty" else " \n")
    (data / "mute.txt").unlink()
    (data / "nothing.png").write_bytes(b"no image")
    (data / "cut.png").write_bytes((data / "cut.png").read_bytes()[:6000])  # its header is whole
    noise.resize((23, 64)).save(data / "small.png")
    (data / "small.txt").write_text("a caption")
    with pytest.raises(InputError, match=r"4 of 6 images .* --allow-bad is 1 %"):
        encode([data], base, tmp_path / "s", **SETTINGS)
    assert len((tmp_path / "s" / "problems.log").read_text().splitlines()) == 4
    with pytest.raises(InputError, match=r"5 of 6 images"):  # the cut one is found when it is read
        encode([data], base, tmp_path / "s", allow_bad=70, **SETTINGS)
    assert not list((tmp_path / "s").glob("*.tar"))
    meta = encode([data], base, tmp_path / "s", allow_bad=90, **SETTINGS)
    assert (meta["images"], meta["left_out"], len(EncodedShards(tmp_path / "s"))) == (1, 5, 1)
    problems = (tmp_path / "s" / "problems.log").read_text().splitlines()
    reasons = ["cut.png is not a whole image", "empty.png has an empty caption", "mute.png has no caption"]
    reasons += ["nothing.png is not a whole image", "small.png is too small: 23 x 64"]
    assert len(problems) == 5
    assert all(reason in problem for reason, problem in zip(reasons, problems, strict=True))


DEEP = "[" * 100_000
LINES = ["no json", "[]", '{"caption": "a"}', '{"image": 3}', '{"image": ""}', '{"image": "\\0"}']
LINES += ['{"image": "\\ud800.png"}', DEEP]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_json_lines_that_are_none_are_refused_by_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2: expected"):
        find_captioned([tmp_path / "a.jsonl"], 64)


def test_json_lines_are_read_one_by_one(tmp_path):
    row = {"image": "a.png", "caption": "a\u2028b\r", "more": 2000 * "x"}
    text = "\r\n\n".join([json.dumps(row, ensure_ascii=False)] * 1000)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    tracemalloc.start()
    found = find_captioned([tmp_path / "a.jsonl"], 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [photo.text for photo in found] == ["a\u2028b\r"] * 1000
    assert peak < len(text) / 2


def test_a_list_that_is_a_link_keeps_its_name_and_its_folder(tmp_path):
    (tmp_path / "blob").write_text('{"image": "a.png", "caption": "a"}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "blob")
    (photo,) = find_captioned([encoding.one_name(str(tmp_path / "data" / "a.jsonl"))], 64)
    assert str(photo) == str(tmp_path / "data" / "a.png")


def test_captions_that_are_no_text_are_problems(tmp_path):
    rows = [{"image": "a.png"}, {"image": "a.png", "caption": ["a"]}, {"image": "a.png", "caption": "\ud800 b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    none, other, half = find_captioned([tmp_path / "a.jsonl"], 64)
    for photo in (none, other):
        with pytest.raises(UnreadableError, match="no caption"):
            photo.caption()
    with pytest.raises(UnreadableError, match="not text in UTF-8"):
        half.caption()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "b.json").write_text(DEEP)
    with pytest.raises(UnreadableError, match="is not JSON"):
        find_captioned([tmp_path], 64)[0].caption()


def copy_of(base, folder):
    for path in base.rglob("*.*"):
        (folder / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(base)).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("text_encoder/model.safetensors", "layers.3.mlp.up_proj.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight"),
    ],
)
def test_a_base_that_lacks_weights_is_refused_by_their_names(base, tmp_path, file, tensor):
    file = copy_of(base, tmp_path / "base") / file
    (name,) = (name for name in load_file(file) if name.endswith(tensor))
    whole = load_file(file)
    for wrong in ({}, {name: torch.zeros(3, 5)}):
        save_file({key: value for key, value in whole.items() if key != name} | wrong, file, {"format": "pt"})
        with pytest.raises(InputError, match=f"{file.parent.name} .*{tensor}"):
            encode(["shapes:3"], tmp_path / "base", tmp_path / "s", **SETTINGS)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("head", [True, False])
def test_the_text_encoder_needs_no_head(pipeline, base, tmp_path, head):
    """Large ones have one that is not tied to the embedding, small ones none in their file."""
    file = copy_of(base, tmp_path / "base") / "text_encoder" / "model.safetensors"
    config = json.loads(file.with_name("config.json").read_text()) | {"tie_word_embeddings": False}
    file.with_name("config.json").write_text(json.dumps(config))
    tensors = load_file(file)
    more = {"lm_head.weight": torch.ones_like(tensors["model.embed_tokens.weight"])} if head else {}
    save_file(tensors | more, file, {"format": "pt"})
    loaded = encoding.load_encoders(tmp_path / "base", torch.bfloat16, "cpu")
    stock = {name: value.bfloat16() for name, value in pipeline.text_encoder.model.state_dict().items()}
    found = loaded.text_encoder.state_dict()
    assert found.keys() == stock.keys()
    assert all(torch.equal(found[name], stock[name]) for name in stock)


def test_data_that_is_not_there_is_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for data, word in (("empty", "has no images"), ("gone", "does not exist"), ("a.txt", "neither")):
        with pytest.raises(InputError, match=word):
            encode([tmp_path / data], base, tmp_path / "s", **SETTINGS)
    with pytest.raises(InputError, match="not a folder of FLUX"):
        encode(["shapes:3"], tmp_path / "empty", tmp_path / "s", **SETTINGS)
    other = copy_of(base, tmp_path / "base")
    (other / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model", "hidden_size": 32}')
    with pytest.raises(InputError, match=r"no FLUX.2 klein: .* its text_encoder clip_text_model"):
        encode(["shapes:3"], other, tmp_path / "s", **SETTINGS)
    with pytest.raises(InputError, match="multiple of 16"):
        encode(["shapes:3"], base, tmp_path / "s", **{**SETTINGS, "size": 40})
    with pytest.raises(InputError, match="inside of --data"):
        encode([tmp_path], base, tmp_path / "s", **SETTINGS)
    assert not (tmp_path / "s").exists()


# ---- Again, interrupted, together ------------------------------------------------------------------------------------


def test_where_it_was_interrupted_it_goes_on(shards, base, photos, tmp_path, monkeypatch):
    out, calls, really = tmp_path / "s", itertools.count(), encoding.encode_image

    def interrupted(*arguments):
        if next(calls) == 3:  # in the second batch of the second shard
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(encoding, "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode([photos], base, out, **SETTINGS)
    assert content(out).keys() == {"00000.tar", "00000.index.npz", "meta.json", "empty_prompt.safetensors"}
    with pytest.raises(InputError, match="not finished"):
        EncodedShards(out)
    encode([photos], base, out, **SETTINGS)
    assert next(calls) == 4 + 4  # the first shard was not made again
    assert content(out) == content(shards)
    monkeypatch.setattr(encoding, "load_encoders", None)  # what is done needs no models
    encode([photos], base, out, **SETTINGS)
    assert content(out) == content(shards)


@pytest.mark.usefixtures("without_models")
def test_killed_as_its_first_shard_comes_or_as_it_is_cleared_away_it_goes_on(base, photos, tmp_path, monkeypatch):
    out, save, unlink = tmp_path / "s", writing.save_index, Path.unlink
    other = {**SETTINGS, "max_length": 32}  # as nothing was made, it may be begun again with other settings
    encode([photos], base, tmp_path / "whole", **other)

    def killed(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_index", killed)
        with pytest.raises(KeyboardInterrupt):
            encode([photos], base, out, **SETTINGS)
    assert content(out).keys() == {"00000.index.npz", "meta.json", "empty_prompt.safetensors"}
    for number in range(3):
        calls = itertools.count()

        def killed_later(path, calls=calls, number=number, **options):
            if next(calls) == number:
                raise KeyboardInterrupt
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed_later)
            with pytest.raises(KeyboardInterrupt):
                encode([photos], base, out, **other)
    assert content(out).keys() == {"meta.json", "empty_prompt.safetensors"}
    encode([photos], base, out, **other)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.usefixtures("without_models")
def test_the_same_folder_by_another_name_is_the_same(base, photos, tmp_path, monkeypatch):
    encode([photos], base, tmp_path / "s", **SETTINGS)
    before = content(tmp_path / "s")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for name in (".", f"../{photos.name}/", f"{photos}/set0/..", tmp_path / "link"):
        encode([name], base, tmp_path / "s", **SETTINGS)
    assert content(tmp_path / "s") == before


@pytest.mark.usefixtures("without_models")
def test_what_was_left_out_stays_so_and_what_has_changed_is_refused(base, photos, tmp_path, capsys):
    data, settings = copy_of(photos, tmp_path / "data"), {**SETTINGS, "allow_bad": 40}
    caption, other = (data / "set0" / f"p{i}.v1.txt" for i in (6, 8))
    text = caption.read_text(encoding="utf-8")
    caption.unlink()
    encode([data], base, tmp_path / "s", **settings)
    before = content(tmp_path / "s")
    caption.write_text(text, encoding="utf-8")  # as if the file system had only stumbled
    capsys.readouterr()
    assert encode([data], base, tmp_path / "s", **settings)["left_out"] == 1
    assert "1 of the images that could not be used" in capsys.readouterr().err
    assert content(tmp_path / "s") == before
    other.write_text("another")
    with pytest.raises(InputError, match="sizes or captions of images in --data have changed"):
        encode([data], base, tmp_path / "s", **settings)
    other.unlink()
    with pytest.raises(InputError, match=r"p8.* has no caption, but it could be used when"):
        encode([data], base, tmp_path / "s", **settings)
    (data / "set0" / "p8.v1.jpg").unlink()
    with pytest.raises(InputError, match="--data had 12 images, and now has 11"):
        encode([data], base, tmp_path / "s", **settings)
    assert content(tmp_path / "s") == before


def test_other_settings_are_refused_by_name(shards, base, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "load_encoders", None)
    before = content(shards)
    for change, word in (
        ({"size": 128}, "--size was 64"),
        ({"max_length": 32}, "--max-length was 48"),
        ({"image_format": "webp"}, "--format was png"),
        ({"dtype": torch.bfloat16}, "--dtype was float32"),
        ({"data": [photos / "set0"]}, "--data was"),
    ):
        given = {"data": [photos], **SETTINGS, **change}
        with pytest.raises(InputError, match=word):
            encode(given.pop("data"), base, shards, **given, allow_bad=99)
    other = copy_of(base, tmp_path / "base")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="sha256 of vae"):
        encode([photos], other, shards, **SETTINGS)
    assert content(shards) == before


@pytest.mark.usefixtures("without_models")
def test_a_folder_that_is_someone_elses_is_left_alone(base, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(InputError, match="no `data encode` began it"):
        encode(["shapes:3"], base, tmp_path, **SETTINGS)
    assert content(tmp_path) == {"precious": b""}


def one_of_two(rank, environment, argv, log):
    import sys

    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(log, "w") as sys.stderr, open(f"{log}.out", "w") as sys.stdout:  # noqa: PTH123
        code = main(argv)
    os._exit(code)


def two_processes(tmp_path, *argv, code=0):
    """Run a command in two processes, forked from this one, which has imported everything; returns what they print.

    code: with which both are to end."""
    context, environment = multiprocessing.get_context("fork"), environment_of(2)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    jobs = [context.Process(target=one_of_two, args=(r, environment, list(map(str, argv)), logs[r])) for r in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
        job.kill()
    assert [job.exitcode for job in jobs] == [code, code], [log.read_text() for log in logs]
    return "".join((tmp_path / f"{rank}.log{end}").read_text() for rank in range(2) for end in ("", ".out"))


def test_two_processes_make_the_same_shards(shards, base, photos, tmp_path):
    options = ["--size=64", "--per-shard=4", "--batch=3", f"--max-length={LENGTH}", "--dtype=float32", "--device=cpu"]
    out = tmp_path / "s"
    said = two_processes(tmp_path, "data", "encode", "--base", base, "--data", photos, "--out", out, *options)
    assert content(out) == content(shards)
    assert "12 images of 3 sizes" in said


@pytest.mark.usefixtures("without_models")
def test_processes_that_find_other_images_are_refused(base, photos, tmp_path, monkeypatch):
    def another_first(data, side):  # where one image has another name
        found = find_captioned(data, side)
        return found[1:] + found[:1] if os.environ["RANK"] == "1" else found

    monkeypatch.setattr(encoding, "find_captioned", another_first)
    argv = ["data", "encode", "--base", base, "--data", photos, "--out", tmp_path / "s", "--device=cpu"]
    assert two_processes(tmp_path, *argv, code=2).count("do not find the same images in --data") == 2
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_in_which_another_is_at_work_is_refused(base, photos, tmp_path, monkeypatch, rank):
    out, answers = tmp_path / "s", multiprocessing.get_context("fork").SimpleQueue()
    encode([photos], base, out, **SETTINGS)
    (out / "meta.json").write_text((out / "meta.json").read_text().replace('"shards"', '"begun"'))
    (out / "00002.tar").unlink()
    (out / ".00002.tar").write_text("half")

    def another():
        try:
            answers.put(encode([photos], base, out, **SETTINGS))
        except InputError as e:
            answers.put(str(e))

    with files.hold(out / f".lock{rank}", "is held"):
        before = content(out)
        job = multiprocessing.get_context("fork").Process(target=another)
        job.start()
        job.join(300)
        said = answers.get()
    assert f"{out} is being written to by process {os.getpid()} on " in said
    assert content(out) == before
    assert encode([photos], base, out, **SETTINGS)["images"] == 12


def test_processes_that_do_not_know_which_they_are_are_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = ["data", "encode", "--base", str(base), "--data", "shapes:3", "--out", str(tmp_path / "s"), "--device=cpu"]
    assert main(argv) == 2
    assert "SLURM_STEP_NUM_TASKS 8" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_who_is_done_before_the_others_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asymflow.cli.data.encode", lambda *_, **__: None)
    argv = ["data", "encode", "--base", "b", "--data", "shapes:3", "--out", str(tmp_path / "s"), "--device=cpu"]
    assert main(argv) == 0
    assert "run the same command again" in capsys.readouterr().out


@pytest.mark.usefixtures("without_models")
def test_who_is_done_first_leaves_the_end_to_the_others(base, photos, tmp_path, monkeypatch):
    look, out = encoding.inspect_all, tmp_path / "s"
    monkeypatch.setattr(encoding, "inspect_all", lambda items, sizes, threads, *_: look(items, sizes, threads, 0, 1))
    begin = lambda shards, *given, beside: setattr(shards, "meta", shards.take(*given, beside))
    monkeypatch.setattr(writing.Writer, "begin", begin)
    monkeypatch.setattr(writing, "gathered", lambda work, world: [work()] * world)
    assert encode([photos], base, out, rank=1, world=2, **SETTINGS) is None
    assert sorted(path.name for path in out.glob("*.tar")) == ["00001.tar"]
    with pytest.raises(InputError, match="not finished"):
        EncodedShards(out)
    assert encode([photos], base, out, rank=0, world=2, **SETTINGS)["images"] == len(EncodedShards(out)) == 12


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


@pytest.mark.parametrize("gone", ["00001.tar", "00001.index.npz", "empty_prompt.safetensors", "meta.json"])
def test_shards_that_are_not_whole_are_refused(copy, gone):
    (copy / gone).unlink()
    with pytest.raises(InputError, match=r"00001.tar|empty_prompt|not a folder of shards"):
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
