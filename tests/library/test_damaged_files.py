"""Whatever is in a file, reading it ends soon, in little memory, with a result or with one line."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from fuzzing import COUNTS, fuzz
from image_files import encoded, noise, write_tar
from published_files import published, random_jit
from safetensors.torch import save_file

from asymflow import AsymFlow, InputError, Subspace
from asymflow.backbones.jit.published import load_published
from asymflow.cli import drawing, models, sample_text
from asymflow.data import captioned
from asymflow.entries import Entry, find_pairs, tar_entries
from asymflow.evaluation.classifier import Classifier
from asymflow.evaluation.frechet import load_statistics, save_statistics
from asymflow.pixels import in_order, read_pair, read_square

SUBSPACE = Subspace.random(48, 8, patch_size=4, token_order="channel_last", color_space="rgb", fitted_on="noise")


def make_model(folder):
    AsymFlow(random_jit(dtype=torch.float32), SUBSPACE).save_pretrained(folder)
    (folder / "README.md").unlink()


def make_published(folder):
    save_file(
        {n: t.contiguous() for n, t in published(random_jit(dtype=torch.float32), SUBSPACE).items()},
        folder / "a.safetensors",
    )


def make_pth(folder):
    weights = published(random_jit(dtype=torch.float32))
    torch.save({"model": weights, "model_ema1": weights, "args": Namespace(lr=1), "epoch": 3}, folder / "a.pth")


def make_statistics(folder):
    save_statistics(folder / "a.npz", {"mu": np.zeros(4), "sigma": np.eye(4)}, "noise")


def make_pairs(folder):
    for key in "ab":
        noise(8, 12).save(folder / f"{key}.png")
        np.save(folder / f"{key}.latent.npy", np.zeros((2, 3, 5), np.float16))


def make_tar(folder):
    files = {f"{i}.{kind}": encoded(noise(9, 7), kind) for i in range(2) for kind in ("png", "jpg")}
    write_tar(folder / "a.tar", {**files, "a.b.bmp": encoded(noise(9, 7), "bmp")})


def read_tar(folder):
    for image in in_order(lambda entry: read_square(entry, 8), tar_entries(str(folder / "a.tar")), threads=1):
        if isinstance(image, InputError):
            raise image


def make_images(folder):
    kinds = {"png": {}, "jpg": {}, "webp": {}, "bmp": {}, "gif": {}, "tiff": {}}
    for kind in kinds:
        (folder / f"a.{kind}").write_bytes(encoded(noise(9, 7), kind))
    for mode in ("RGBA", "P", "L", "LA", "1", "I;16"):
        noise(9, 7).convert(mode if mode != "I;16" else "L").convert("I;16" if mode == "I;16" else mode).save(
            folder / f"{mode[:2]}.png"
        )


def read_images(folder):
    for path in sorted(folder.iterdir()):
        read_square(Entry(str(path)), 8)
        photo = captioned.Photo(Entry(str(path)), "a cat")
        photo.size(), photo.pixels()


def make_captions(folder):
    for key in "abc":
        noise(8, 8).save(folder / f"{key}.png")
    (folder / "a.txt").write_text("a cat\n")
    (folder / "b.json").write_text(json.dumps({"caption": "a dog", "width": 8}))
    (folder / "c.caption").write_text("a bird")
    rows = ({"file_name": f"{key}.png", "text": f"an {key}"} for key in "abc")
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_captions(folder):
    for photo in (*captioned.find_captioned([str(folder)], 8), *captioned.json_lines(folder / "d.jsonl")):
        photo.caption()


def make_texts(folder):
    (folder / "classes.json").write_text(json.dumps(["cat", "dog"]))
    (folder / "prompts.txt").write_text("a cat\n\na dog\n")
    entries = [{"file": "images/000000.png", "index": 0, "class": 3}]
    (folder / "samples.json").write_text(json.dumps({"model": "a", "settings": {"seed": 0}, "images": entries}))


def read_texts(folder):
    models.class_names(folder)
    sample_text.read_prompts(Namespace(prompt=None, prompts=folder / "prompts.txt"))
    drawing.open_record(Namespace(out=folder), {"seed": 0}, [(0, 3)], {"model": "a"})


def save_classifier(folder):
    Classifier(3, width=8).save(folder / "a.safetensors")


READERS = {
    "subspace": (lambda d: SUBSPACE.save(d / "a.safetensors"), lambda d: Subspace.load(d / "a.safetensors")),
    "model": (make_model, AsymFlow.from_pretrained),
    "published": (make_published, lambda d: load_published(d / "a.safetensors", in_context_start=1)),
    "pth": (make_pth, lambda d: load_published(d / "a.pth", in_context_start=1)),
    "statistics": (make_statistics, lambda d: load_statistics(d / "a.npz")),
    "classifier": (save_classifier, lambda d: Classifier.load(d / "a.safetensors")),
    "pairs": (make_pairs, lambda d: [read_pair(pair, 4) for pair in find_pairs([d])]),
    "tar": (make_tar, read_tar),
    "images": (make_images, read_images),
    "captions": (make_captions, read_captions),
    "texts": (make_texts, read_texts),
}


@COUNTS
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(reader, count, tmp_path):
    make, read = READERS[reader]
    (folder := tmp_path / reader).mkdir()
    make(folder)
    fuzz(folder, read, count)
