"""Images of captions: the Fréchet distance of their middles, and CLIP's score, against plain recomputations."""

import json
import shutil
import tarfile

import pytest
import torch
import transformers
from PIL import Image
from test_evaluate import evaluated, pictures, words
from torch_fidelity import calculate_metrics

from asymflow.cli import main
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.features import CLASSIFIER, register_classifier
from asymflow.evaluation.images import Folder

SIZE, PATCH = 320, 299
CAPTIONS = [f"picture {number}" for number in range(11)] + ["a" * 40]  # the last has more letters than places


def make_clip(folder):
    """A tiny CLIP of random weights, with all the files of a real one. A letter is a token."""
    folder.mkdir()
    letters = [chr(number) for number in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = dict(bos_token_id=start, eos_token_id=end, pad_token_id=end, max_position_embeddings=24)
    config = transformers.CLIPConfig(
        text_config=sizes | text | dict(vocab_size=len(tokens)),
        vision_config=sizes | dict(image_size=32, patch_size=8),
        projection_dim=16,
    )
    torch.manual_seed(1)
    transformers.CLIPModel(config).save_pretrained(folder)
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(image, transformers.CLIPTokenizer(*files)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    torch.manual_seed(0)
    Classifier(10, width=8).save(folder / "classifier.safetensors")
    make_clip(folder / "clip")
    for seed, name in enumerate(("one", "other")):
        pictures(folder / name, len(CAPTIONS), seed, size=SIZE, shift=0.3 * seed)
        for caption, image in zip(CAPTIONS, sorted((folder / name).glob("*.png")), strict=True):
            image.with_suffix(".txt").write_text(caption)
    return folder


def scored(made, out, *more, **options):
    usual = dict(images=made / "one", reference=made / "other", protocol="captions", clip=made / "clip")
    return evaluated(made, out, *more, **usual | options)


def middles(folder, out):
    out.mkdir()
    for file in folder.glob("*.png"):
        edge = (SIZE - PATCH) // 2
        Image.open(file).crop((edge, edge, edge + PATCH, edge + PATCH)).save(out / file.name)
    return str(out)


def test_each_measure_is_what_others_compute(made, tmp_path):
    found = scored(made, tmp_path / "out")["measures"]
    register_classifier()
    options = dict(fid=True, cuda=False, verbose=False, cache=False, feature_extractor=CLASSIFIER)
    options["feature_extractor_weights_path"] = str(made / "classifier.safetensors")
    pairs = {
        "frechet_distance": [str(made / name) for name in ("one", "other")],
        "patch_frechet_distance": [middles(made / name, tmp_path / name) for name in ("one", "other")],
    }
    for name, (one, other) in pairs.items():
        expected = calculate_metrics(input1=one, input2=other, **options)["frechet_inception_distance"]
        assert found[name]["value"] == pytest.approx(expected, rel=1e-6), name
    assert found["frechet_distance"]["value"] != pytest.approx(found["patch_frechet_distance"]["value"], rel=0.01)

    model = transformers.CLIPModel.from_pretrained(made / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(made / "clip")
    scores = []
    for caption, file in zip(CAPTIONS, sorted((made / "one").glob("*.png")), strict=True):
        inputs = processor(text=caption, images=Image.open(file), return_tensors="pt", truncation=True, max_length=24)
        scores.append(max(model(**inputs).logits_per_image.item() / model.logit_scale.exp().item(), 0) * 100)
    assert found["clip_score"]["value"] == pytest.approx(sum(scores) / len(scores), rel=1e-3)
    assert found["clip_score"]["value"] > 0
    assert found["clip_score"]["uncertainty"] == pytest.approx(torch.tensor(scores).std().item() / 12**0.5, rel=1e-3)
    assert found["clip_score"]["remarks"] == ["1 caption cut to what CLIP can read"]


def record(made, out):
    """The images as `asymflow sample` leaves them: without captions beside them, but with a record."""
    samples = shutil.copytree(made / "one", out / "images", ignore=shutil.ignore_patterns("*.txt"))
    names = sorted(file.name for file in samples.glob("*.png"))
    entries = [
        {"file": f"images/{name}", "index": i, "prompt": caption}
        for i, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True))
    ]
    (out / "samples.json").write_text(json.dumps({"settings": {"guidance": 4.0}, "images": entries}))
    return samples


def test_neither_the_batch_nor_where_captions_are_written_changes_it(made, tmp_path):
    found = scored(made, tmp_path / "a")
    samples = record(made, tmp_path / "samples")
    again = scored(made, tmp_path / "b", batch=5, images=samples)
    for name, measured in found["measures"].items():
        assert again["measures"][name]["value"] == pytest.approx(measured["value"], rel=1e-4), name
    assert again["clip"] == found["clip"]
    assert found["remarks"][-1] == "how these images were drawn is not known"
    assert again["scored"]["settings"] == {"guidance": 4.0}
    assert "how these images were drawn is not known" not in again["remarks"]


def test_a_tar_is_as_its_folder_and_photographs_are_turned(made, tmp_path):
    turned = shutil.copytree(made / "one", tmp_path / "turned")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for file in turned.glob("*.png"):
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=sideways)
    with tarfile.open(tmp_path / "turned.tar", "w") as tar:
        tar.add(turned, "")
    found = scored(made, tmp_path / "a")["measures"]
    for name, images in (("b", turned), ("c", tmp_path / "turned.tar")):
        again = scored(made, tmp_path / name, images=images)["measures"]
        assert {key: one["value"] for key, one in again.items()} == {key: one["value"] for key, one in found.items()}


def test_images_of_one_file_keep_their_own_prompts(made, tmp_path):
    """Symbolic links, say of a scorer's folder."""
    samples = record(made, tmp_path / "samples")
    (samples / "0001.png").unlink()
    (samples / "0001.png").symlink_to(samples / "0000.png")
    folder = Folder(samples)
    assert [folder.caption(number) for number in range(len(CAPTIONS))] == CAPTIONS


@pytest.mark.parametrize("content", ["[]", "{", '{"images": [{"file": ["a"]}]}', '{"images": ["a"]}', '{"images": 3}'])
def test_a_file_that_is_no_record_is_left_alone(made, tmp_path, content):
    images = shutil.copytree(made / "one", tmp_path / "images")
    (tmp_path / "samples.json").write_text(content)
    folder = Folder(images)
    assert folder.settings is None
    assert folder.label is None
    assert folder.caption(3) == CAPTIONS[3]


def test_images_smaller_than_the_crop_are_told(made, tmp_path):
    folder = shutil.copytree(made / "one", tmp_path / "images")
    for name in ("0002.png", "0005.png"):
        Image.open(folder / name).resize((40, 60)).save(folder / name)
    for _ in range(2):  # also if features are read again
        found = scored(made, tmp_path / "out", images=folder, reference=folder, crop=SIZE)
        for of in ("that are scored", "of the reference"):
            (remark,) = [said for said in found["remarks"] if said.startswith(f"2 images {of} had fewer pixels")]
            assert remark.endswith("0005.png")


def test_another_processor_of_the_same_weights_is_another_clip(made, tmp_path, capsys):
    clip, options = shutil.copytree(made / "clip", tmp_path / "clip"), dict(images=made / "one", protocol="captions")
    scored(made, tmp_path / "a")
    settings = json.loads((clip / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (clip / "processor_config.json").write_text(json.dumps(settings))
    assert main(words(made, tmp_path / "a", **options, reference=made / "other", clip=clip)) == 2
    assert "holds features of something else (clip" in capsys.readouterr().err
    scored(made, tmp_path / "b", clip=clip)
    assert main(["evaluate", "report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "2 tables" in capsys.readouterr().out


def test_captions_that_change_are_other_scores(made, tmp_path, capsys):
    images = shutil.copytree(made / "one", tmp_path / "images")
    scored(made, tmp_path / "out", images=images)
    (images / "0003.txt").write_text("another one")
    options = dict(images=images, reference=made / "other", protocol="captions", clip=made / "clip")
    assert main(words(made, tmp_path / "out", **options)) == 2
    assert "holds features of something else (clip" in capsys.readouterr().err


def test_what_cannot_be_scored_is_one_line(made, tmp_path, capsys):
    without = shutil.copytree(made / "one", tmp_path / "without")
    (without / "0004.txt").unlink()
    bare = shutil.copytree(made / "clip", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (bare / name).unlink(missing_ok=True)
    plain = shutil.copytree(made / "clip", tmp_path / "plain")
    (plain / "processor_config.json").unlink()
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino/config.json").write_text('{"model_type": "dinov2"}')
    small, single = pictures(tmp_path / "small", 12, size=64), pictures(tmp_path / "single", 1, size=SIZE)
    part = record(made, tmp_path / "part")
    (part / "0003.png").unlink()
    clip = {"clip": made / "clip"}
    for options, expected in [
        ({"clip": None}, "the protocol captions, extractor classifier, num 12 needs --clip"),
        ({"images": without}, "0004.png has no caption: a CLIP score needs the caption of each image"),
        ({"clip": tmp_path / "gone"}, "gone is not a folder: give that of a CLIP"),
        ({"clip": tmp_path / "dino"}, "dino is no CLIP: its model_type is 'dinov2', expected clip"),
        ({"clip": bare}, "has a tokenizer of 2 tokens, but its CLIP was made for 190: is tokenizer.json"),
        ({"clip": plain}, "has neither preprocessor_config.json nor processor_config.json"),
        ({"images": small, "reference": small, "measures": "patch_frechet_distance", "clip": None}, "have 64 x 64"),
        ({"measures": "kid"}, "a CLIP is for the measure clip_score"),
        ({"images": part}, "samples.json lists 12 images, of which 11 are there: run its asymflow sample again"),
        ({"reference": single}, "single has 1 image: a reference needs at least 2"),
    ]:
        given = dict(images=made / "one", reference=made / "other", protocol="captions") | clip | options
        given = {name: value for name, value in given.items() if value is not None}
        assert main(words(made, tmp_path / "out", **given)) == 2, expected
        error = capsys.readouterr().err
        assert expected in error, error
        assert error.count("\n") == 1, error
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
