"""The crop of ADM, and pairs of images and latents."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import encoded, noise, write_files, write_tar
from PIL import Image

from asymflow import InputError, patchify
from asymflow.entries import UnreadableError, find_pairs
from asymflow.pixels import adm_crop, read_pair


def as_npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


# ---- The crop of ADM -------------------------------------------------------------------------------------------------
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 48))
def test_a_crop_is_a_square_of_that_size(width, height, size):
    image = Image.new("RGB", (width, height), (10, 200, 30))
    crop = adm_crop(image, size)
    assert crop.size == (size, size)
    assert crop.getcolors() == [(size * size, (10, 200, 30))]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 31), (16, 40), (31, 16), (40, 16)])
def test_of_the_longer_side_the_middle_is_kept_to_the_pixel(height, width):
    image = noise(height, width)
    pixels, top, left = np.asarray(image), (height - 16) // 2, (width - 16) // 2
    assert (np.asarray(adm_crop(image, 16)) == pixels[top : top + 16, left : left + 16]).all()


@pytest.mark.parametrize("times", [2, 4, 8])
def test_large_images_are_halved_by_averaging_from_twice_the_size_on(times):
    """To the rounding of each halving, half a level for rows and for columns. Bicubic weights miss it by tens."""
    image = noise(times * 12, times * 12)
    mean = np.asarray(image, float).reshape(12, times, 12, times, 3).mean((1, 3))
    assert np.abs(np.asarray(adm_crop(image, 12)) - mean).max() <= np.log2(times) + 1e-9


# ---- Pairs of images and latents -------------------------------------------------------------------------------------
def pair_files(key="k", grid=(2, 3), rank=5, patch=4, dtype=np.float32, kind="png"):
    """Each patch has one grey level, and each latent token starts with it."""
    levels = np.random.default_rng(0).integers(0, 256, grid)
    pixels = levels.repeat(patch, 0).repeat(patch, 1).astype(np.uint8)[..., None].repeat(3, 2)
    latents = np.zeros((*grid, rank), dtype)
    latents[..., 0] = levels / 127.5 - 1
    return {f"{key}.{kind}": encoded(Image.fromarray(pixels), kind), f"{key}.latent.npy": as_npy(latents)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_latent_token_covers_the_patch_of_the_same_place(tmp_path, dtype, form):
    files = pair_files("x/0001", dtype=dtype)
    data = write_files(tmp_path / "d", files) if form == "folder" else write_tar(tmp_path / "d.tar", files)
    (pair,) = find_pairs([data])
    latents, image = read_pair(pair, 4)
    assert latents.shape == (2, 3, 5)
    assert image.shape == (3, 8, 12)
    assert latents.dtype == image.dtype == torch.float32
    assert torch.allclose(patchify(image[None], 4)[0].mean(-1), latents.flatten(0, 1)[:, 0], atol=1e-3)


def test_pairs_are_the_samples_that_have_both_wherever_the_files_lie(tmp_path, capsys):
    files = pair_files("b") | pair_files("a", kind="bmp") | {"c.png": b"", "d.latent.npy": b"", "a.txt": b""}
    tar = write_tar(tmp_path / "s.tar", dict(reversed(files.items())))
    write_files(tmp_path / "d", files)
    expected = [("a.bmp", "a.latent.npy"), ("b.png", "b.latent.npy")]
    assert [(p.member, q.member) for p, q in find_pairs([tar])] == expected
    without_latents, without_image = capsys.readouterr().err.splitlines()
    assert without_latents.endswith(f": 1 image ({tar}: c.png)")
    assert without_image.endswith(f"without an image beside: 1 latent file ({tar}: d.latent.npy)")
    assert [tuple(e.path.rpartition("/")[2] for e in pair) for pair in find_pairs([tmp_path / "d"])] == expected
    singles = [tmp_path / "d" / name for name in ("b.latent.npy", "b.png")]
    assert len(find_pairs(singles)) == 1
    assert len(find_pairs([tar, tmp_path / "d"])) == 4


def test_a_sample_with_two_images_is_refused(tmp_path):
    write_files(tmp_path, pair_files("a") | pair_files("a", kind="jpg"))
    with pytest.raises(InputError, match="more than one image"):
        find_pairs([tmp_path])


@pytest.mark.parametrize("patch", [2, 3, 5, 8])
def test_a_size_that_does_not_fit_is_refused_with_the_name_of_the_sample(tmp_path, patch):
    (pair,) = find_pairs([write_files(tmp_path, pair_files("k"))])
    with pytest.raises(InputError, match=r"k\.png has 12 x 8 pixels .* 3 x 2 latent tokens") as e:
        read_pair(pair, patch)
    assert not isinstance(e.value, UnreadableError)


@pytest.mark.parametrize(
    "latents",
    [
        np.zeros((2, 3)),
        np.zeros((1, 2, 3, 5)),
        np.zeros((2, 3, 5), np.int64),
        np.full((2, 3, 5), np.nan),
        np.zeros((2, 3, 5), complex),
    ],
)
def test_latents_of_another_form_are_refused_with_their_name(tmp_path, latents):
    files = pair_files("k") | {"k.latent.npy": as_npy(latents)}
    (pair,) = find_pairs([write_files(tmp_path, files)])
    with pytest.raises(InputError, match=r"k\.latent\.npy"):
        read_pair(pair, 4)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content", [b"", b"text", as_npy(np.zeros((2, 3, 5)))[:-8], as_npy(np.array([Harmful()]), allow_pickle=True)]
)
def test_a_file_that_is_no_array_is_unreadable_and_nothing_in_it_is_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (pair,) = find_pairs([write_files(tmp_path / "d", pair_files("k") | {"k.latent.npy": content})])
    with pytest.raises(UnreadableError, match=r"k\.latent\.npy"):
        read_pair(pair, 4)
    assert not (tmp_path / "harm").exists()


def test_an_archive_of_arrays_is_refused(tmp_path):
    file = io.BytesIO()
    np.savez(file, z=np.zeros((2, 3, 5)))
    (pair,) = find_pairs([write_files(tmp_path, pair_files("k") | {"k.latent.npy": file.getvalue()})])
    with pytest.raises(InputError, match="archive"):
        read_pair(pair, 4)
