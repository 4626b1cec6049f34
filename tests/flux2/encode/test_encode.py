"""`asymflow data encode`: its buckets, and shards that hold what the stock pipeline computes."""

import io
import itertools
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from encoding_runs import LENGTH, SETTINGS, copy_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from asymflow.cli import main
from asymflow.data import encode as encoding
from asymflow.data.buckets import buckets, enlargement, fill, nearest_bucket, share_kept
from asymflow.data.captioned import Photo, find_captioned
from asymflow.data.encode import encode
from asymflow.data.encoded import EncodedShards
from asymflow.data.encoders import PARTS, encode_image, folder_digest
from asymflow.data.shapes import Shapes
from asymflow.entries import UnreadableError
from asymflow.errors import InputError


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


@given(st.integers(1, 400), st.integers(1, 400))
def test_the_share_that_a_bucket_keeps_is_that_of_the_area_that_fill_crops(width, height):
    for bucket in buckets(64**2, 16, 2):
        kept = share_kept(bucket, width, height)
        assert kept == pytest.approx(min((h := bucket[0] / height), (w := bucket[1] / width)) / max(h, w))
        assert (kept == pytest.approx(1)) == (bucket[0] * width == bucket[1] * height)


def test_an_image_of_the_size_of_its_bucket_is_not_touched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    assert fill(image, (48, 80)).tobytes() == image.tobytes()


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


def photograph(kind, orientation):
    """An image file of 40 x 20 pixels, the left half black, with its orientation noted in one of several ways."""
    image, file = Image.new("RGB", (40, 20), "white"), io.BytesIO()
    image.paste("black", (0, 0, 20, 20))
    exif, info = Image.Exif(), PngInfo()
    exif[0x0112] = orientation
    xmp = f'<x tiff:Orientation="{orientation}"/>'
    if kind == "png xmp":
        info.add_itxt("XML:com.adobe.xmp", xmp)
    elif kind == "png text":
        info.add_text("XML:com.adobe.xmp", xmp, zip=True)
    elif kind == "png profile":
        info.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n")
    options = {"pnginfo": info} if " " in kind else {"exif": exif}
    if kind == "jpeg xmp":
        options = {"xmp": xmp.encode()}
    if kind == "tiff xmp":
        options = {"tiffinfo": {700: xmp.encode()}}
    image.save(file, kind.partition(" ")[0], **options)
    return file.getvalue()


KINDS = ("jpeg", "png", "tiff", "webp", "jpeg xmp", "png xmp", "png text", "png profile", "tiff xmp")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_photographs_are_turned_upright(tmp_path, kind, orientation):
    """What Pillow does not read in one of its versions does not turn the size either."""
    (tmp_path / f"a.{kind.partition(' ')[0]}").write_bytes(photograph(kind, orientation))
    (photo,) = find_captioned([tmp_path], 64)
    pixels = photo.pixels()
    assert photo.size() == pixels.size
    if " " not in kind:
        dark = np.asarray(pixels).mean(2) < 128
        assert pixels.size == ((20, 40) if orientation > 4 else (40, 20))
        expected = {1: dark[:, :20], 4: dark[:, :20], 5: dark[:20], 6: dark[:20], 7: dark[20:], 8: dark[20:]}
        assert expected.get(orientation, dark[:, 20:]).all()
        assert dark.mean() == 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("png")])
def test_a_note_behind_the_pixels_of_a_png_counts_too(tmp_path, kind):
    content = photograph(kind, 6)
    first, last = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    before, pixels, after = content[:33], content[first:last], content[last:]
    (tmp_path / "a.png").write_bytes(before + pixels + content[33:first] + after)
    (photo,) = find_captioned([tmp_path], 64)
    assert photo.size() == photo.pixels().size


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


@pytest.mark.usefixtures("without_models")
def test_pixels_of_another_size_than_the_header_says_are_left_out(base, photos, tmp_path, monkeypatch):
    said = Photo.size
    monkeypatch.setattr(Photo, "size", lambda self: said(self)[:: -1 if "p2.v1" in str(self) else 1])
    meta = encode([photos], base, tmp_path / "s", allow_bad=10, **SETTINGS)
    assert (meta["images"], meta["left_out"]) == (11, 1)
    (problem,) = (tmp_path / "s" / "problems.log").read_text().splitlines()
    assert problem.endswith("p2.v1.png has 64 x 100 pixels, where its header says 100 x 64")


@pytest.mark.usefixtures("without_models")
def test_images_that_lose_more_than_half_are_counted_and_said(base, tmp_path, capsys):
    """A bucket for 64^2 pixels is at most 5 : 3, here: of a strip of 3.2 : 1 it keeps more than half, of 4 : 1 less."""
    data = tmp_path / "data"
    data.mkdir()
    for name, size in {"a": (64, 64), "b": (320, 100), "c": (400, 100), "d": (100, 900)}.items():
        Image.new("RGB", size).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a caption")
    meta = encode([data], base, tmp_path / "s", **SETTINGS)
    assert (meta["images"], meta["mostly_cropped"]) == (4, 2)
    assert f"2 images (the first: {data}/c.png) more than half of which is cropped away" in capsys.readouterr().err
    assert len(EncodedShards(tmp_path / "s")) == 4


@pytest.mark.usefixtures("without_models")
def test_what_is_given_twice_is_encoded_once_and_said(base, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64)).save(data / "a.png")
    (data / "a.txt").write_text("a caption")
    for name in ("png", "txt"):
        (data / f"b.{name}").symlink_to(data / f"a.{name}")
    (data / "list.jsonl").write_text('{"image": "a.png", "text": "another caption"}\n')
    meta = encode([data, data / "list.jsonl", data / "list.jsonl"], base, tmp_path / "s", **SETTINGS)
    assert meta["images"] == meta["files"] == 2
    assert f"not read twice: 2 paths (the first: {data}/b.png)" in capsys.readouterr().err


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
