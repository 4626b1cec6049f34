"""Images: what is found and in which order, pixels that are exactly those of the file, damage that is named."""

import io
import itertools
import os
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asymflow import InputError, patchify
from asymflow.pixels import (
    Entry,
    UnreadableError,
    adm_crop,
    choose,
    find_images,
    find_pairs,
    in_order,
    read_image,
    read_pair,
    read_square,
    samples,
    tensor_to_pil,
    to_rgb,
    to_tensor,
)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, {"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def as_npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def names(entries, folder):
    return [str(entry).removeprefix(f"{folder}/") for entry in entries]


# ---- Finding ---------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_are_found_in_the_order_of_their_names_and_none_is_opened(tmp_path):
    """Links to nowhere: they have a name, and cannot be opened."""
    wanted = ["B.png", "a/10.JPEG", "a/2.jpg", "a/b/c.d.webp", "a.bmp", "z.jpeg"]
    for name in [*reversed(wanted), "a/notes.txt", "a/.hidden.png", ".cache/x.png", "png", "a/x.png.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to("nowhere")
    assert names(find_images([tmp_path]), tmp_path) == ["B.png", *wanted[1:5], "z.jpeg"]


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    write_files(tmp_path, {f"{n}/{m}.png": b"" for n in "cab" for m in "312"})
    expected = find_images([tmp_path])
    assert names(expected, tmp_path) == [f"{n}/{m}.png" for n in "abc" for m in "123"]

    class Shuffled(list):
        __enter__ = lambda self: self
        __exit__ = lambda *_: None

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(reversed(list(scan(path)))))
    assert find_images([tmp_path]) == expected


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    write_files(tmp_path, {"real/1.png": b"", "data/2.png": b""})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "real" / "self").symlink_to(tmp_path / "real")
    found = names(find_images([tmp_path / "data"]), tmp_path)
    assert found[:2] == ["data/2.png", "data/link/1.png"]
    assert len(found) < 10


def test_a_tar_file_has_the_images_that_the_folder_has(tmp_path):
    """To the last byte, from any place in it; long names and folders too."""
    rng = np.random.default_rng(0)
    files = {name: rng.bytes(int(rng.integers(0, 3000))) for name in ["0001.png", "x/0002.jpg", f"{'long' * 60}.webp"]}
    others = {"0001.txt": b"text", "x/._0002.jpg": b"of a Mac", "x/.hidden/3.png": b"in a hidden folder"}
    write_files(tmp_path / "folder", files)
    tar = write_tar(tmp_path / "shard.tar", files | others)
    found = find_images([tar])
    assert {e.member: e.read() for e in found if ".hidden/" not in e.member} == files
    assert {str(e)[len(f"{tmp_path}/folder/") :]: e.read() for e in find_images([tmp_path / "folder"])} == files
    assert str(found[1]) == f"{tar}: x/0002.jpg"


def test_folders_tars_and_files_can_be_mixed_and_keep_their_order(tmp_path):
    write_files(tmp_path, {"z/1.png": b"", "single.png": b""})
    tar = write_tar(tmp_path / "a.tar", {"9.png": b"", "8.png": b""})
    found = find_images([tmp_path / "z", tmp_path / "single.png", tar])
    assert names(found, tmp_path) == ["z/1.png", "single.png", "a.tar: 9.png", "a.tar: 8.png"]


@pytest.mark.parametrize("path", ["nothing", "empty", "text", "text/a.txt", "text.tar"])
def test_what_has_no_images_is_refused_by_its_name(tmp_path, path):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path, {"text/a.txt": b"text"})
    write_tar(tmp_path / "text.tar", {"a.txt": b"text"})
    for find in (find_images, find_pairs):
        with pytest.raises(InputError, match=str(tmp_path / path)) as e:
            find([tmp_path / path])
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 1024, 1100, 1536, 2047, 2048, -10240 + 100])
def test_a_tar_file_that_is_cut_off_is_refused_wherever_the_cut_is(tmp_path, keep):
    """Two members of 512 bytes with a header each, then an end mark; the cut at -10140 leaves a part of it."""
    tar = write_tar(tmp_path / "a.tar", {"1.png": bytes(range(256)) * 2, "2.png": bytes(range(256)) * 2})
    content = tar.read_bytes()
    if keep < 0:
        keep = 2048 + 100
    tar.write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"a\.tar is not a whole"):
        find_images([tar])


@pytest.mark.parametrize("content", [b"", b"no tar file at all", bytes(range(256)) * 40])
def test_what_is_no_tar_file_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar is not a whole"):
        find_images([tmp_path / "a.tar"])


def test_a_compressed_tar_file_is_refused_since_nothing_in_it_has_a_place(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"1.png": bytes(1000)}, mode="w:gz")
    with pytest.raises(InputError, match="decompress"):
        find_images([tar])


def test_garbage_between_the_members_of_a_tar_file_is_not_taken_for_its_end(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {f"{n}.png": bytes(512) for n in range(3)})
    content = bytearray(tar.read_bytes())
    content[1024:1536] = b"x" * 512  # the second header
    tar.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar"):
        find_images([tar])


def test_files_of_a_sample_share_the_name_up_to_the_first_dot(tmp_path):
    members = ["a.b/1.png", "a.b/1.latent.npy", "a.b/2.PNG", "1.png", "1.txt"]
    entries = [Entry("s.tar", member) for member in members] + [Entry("s2.tar", "1.png"), Entry("d/1.png")]
    found = samples(entries)
    assert {key: set(files) for key, files in found.items()} == {
        "s.tar: a.b/1": {"png", "latent.npy"},
        "s.tar: a.b/2": {"png"},
        "s.tar: 1": {"png", "txt"},
        "s2.tar: 1": {"png"},
        "d/1": {"png"},
    }
    assert found["s.tar: a.b/1"]["latent.npy"] is entries[1]


# ---- Choosing --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 70), st.integers(0, 2**40))
def test_a_choice_is_of_that_many_in_order_and_a_part_of_every_larger_one(n, count, seed):
    items = [f"item {i}" for i in range(n)]
    chosen = choose(items, count, seed)
    assert len(chosen) == min(n, count)
    assert chosen == sorted(chosen, key=items.index)
    assert set(chosen) <= set(choose(items, count + 1, seed))
    assert chosen == choose(items, count, seed)


def test_a_seed_means_the_same_choice_on_every_machine():
    assert choose(list(range(100)), 5, seed=0) == [35, 40, 52, 75, 97]


def test_every_item_is_chosen_equally_often():
    """30 of 100 items for 2,000 seeds: each 600 times, give or take five standard deviations of sqrt(420)."""
    times = np.zeros(100)
    for seed in range(2000):
        times[choose(list(range(100)), 30, seed)] += 1
    assert np.abs(times - 600).max() < 5 * 420**0.5


# ---- Reading, in threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_order_however_long_each_takes(threads):
    def read(n):
        time.sleep(0.002 * (n % 5 == 0))
        if n % 7 == 3:
            raise UnreadableError(f"{n} is bad")
        return n * n

    results = list(in_order(read, range(100), threads))
    assert len(results) == 100
    for n, result in enumerate(results):
        assert str(result) == f"{n} is bad" if n % 7 == 3 else result == n * n


@pytest.mark.parametrize("error", [InputError("sizes"), ValueError("a bug"), KeyboardInterrupt()])
def test_other_errors_are_raised_where_they_belong(error):
    def read(n):
        if n == 40:
            raise error
        return n

    results = in_order(read, range(10_000), 3)
    assert list(itertools.islice(results, 40)) == list(range(40))
    with pytest.raises(type(error)):
        next(results)


def test_reading_runs_in_several_threads_but_only_a_little_ahead():
    seen, used, meeting = [], set(), threading.Barrier(4, timeout=300)

    def read(n):
        used.add(threading.get_ident())
        if n < 4:  # which has to be in four threads at the same time
            meeting.wait()
        return n

    results = in_order(read, (seen.append(n) or n for n in range(1000)), 4)
    for done in range(1, 60):
        next(results)
        assert len(seen) <= done + 4 * 4 + 1
    results.close()
    assert len(used) == 4
    assert len(seen) < 100


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
def test_an_image_that_is_cut_off_is_named(tmp_path, kind, keep):
    content = encoded(noise(40, 40), kind)
    assert read_image(Entry(str(write_files(tmp_path, {"good": content}) / "good"))).size == (40, 40)
    bad = content[: int(keep * len(content))]
    tar = write_tar(tmp_path / "s.tar", {f"a/1.{kind}": content, f"a/2.{kind}": bad})
    (tmp_path / f"2.{kind}").write_bytes(bad)
    for entry, name in (
        (Entry(str(tmp_path / f"2.{kind}")), f"2.{kind}"),
        (find_images([tar])[1], f"s.tar: a/2.{kind}"),
    ):
        with pytest.raises(UnreadableError, match=rf"{name} is not a whole image") as e:
            read_square(entry, 8)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"text", b"\x89PNG\r\n\x1a\n" + bytes(100), b"GIF89a" + bytes(20)])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"a\.png"):
        read_image(Entry(str(tmp_path / "a.png")))


def test_a_file_that_has_gone_is_named(tmp_path):
    with pytest.raises(UnreadableError, match=r"gone\.png cannot be read"):
        read_image(Entry(str(tmp_path / "gone.png")))


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_tensors_and_images_are_inverse_for_all_256_values():
    pixels = np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert (np.asarray(tensor_to_pil(tensor)) == pixels).all()
    assert torch.allclose(tensor[1], torch.from_numpy(pixels[..., 1] / 127.5 - 1).float(), atol=1e-7)


@given(st.floats(-2, 2, width=32), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_pixel_is_the_nearest_of_the_256_values(x, dtype):
    tensor = torch.full((3, 1, 1), x, dtype=dtype)
    (level, *_), *_ = np.asarray(tensor_to_pil(tensor)).reshape(-1, 3)
    exact = (min(max(tensor[0].item(), -1), 1) + 1) * 127.5
    assert abs(level - exact) <= 0.5 + 1e-5


def test_what_no_pixel_can_be_is_clamped():
    tensor = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1.001]).expand(3, 1, -1)
    assert np.asarray(tensor_to_pil(tensor))[0, :, 0].tolist() == [255, 0, 0, 255, 0, 255]


def test_transparent_pixels_are_white_whatever_colour_they_hide():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(200, 10, 30, 0), (200, 10, 30, 255), (200, 10, 30, 51)]  # 51 is a fifth
    expected = [[255, 255, 255], [200, 10, 30], [244, 206, 210]]
    image = Image.fromarray(pixels)
    assert np.abs(np.asarray(to_rgb(image))[0].astype(int) - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(np.full((1, 3), 100, np.uint8)), image.getchannel("A")])
    assert np.asarray(to_rgb(grey))[0, :, 0].tolist()[:2] == [255, 100]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_stands_for_transparent_is_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([9, 9, 9, 200, 100, 50])
        image.putpixel((1, 0), 1)
        transparent, seen = 0, (200, 100, 50)
    else:
        image = Image.new(mode, (2, 1), 9 if mode == "L" else (9, 9, 9))
        image.putpixel((1, 0), 77 if mode == "L" else (77, 77, 77))
        transparent, seen = (9 if mode == "L" else (9, 9, 9)), (77, 77, 77)
    (tmp_path / "a.png").write_bytes(encoded(image, transparency=transparent))
    read = read_image(Entry(str(tmp_path / "a.png")))
    assert read.mode == "RGB"
    assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == ((255, 255, 255), seen)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(levels)))
    pixels = np.asarray(read_image(Entry(str(tmp_path / "a.png"))))
    assert pixels.shape == (1, 256, 3)
    assert (pixels == np.arange(256)[None, :, None]).all()
    wide = Image.fromarray(np.array([[0, 65535, 32768]], np.int32))  # mode I, as Pillow 10 and older read such files
    assert np.asarray(to_rgb(wide))[0, :, 2].tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    ("mode", "value", "seen"), [("L", 77, (77,) * 3), ("1", 1, (255,) * 3), ("CMYK", (0, 255, 255, 0), (255, 0, 0))]
)
def test_other_kinds_of_images_become_rgb(mode, value, seen):
    assert to_rgb(Image.new(mode, (2, 2), value)).getpixel((1, 1)) == seen


def test_the_orientation_of_exif_is_not_applied_as_in_adm(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "a.jpg").write_bytes(encoded(noise(10, 20), "jpg", exif=exif))
    assert read_image(Entry(str(tmp_path / "a.jpg"))).size == (20, 10)


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


@pytest.mark.parametrize(
    ("height", "width", "halvings"), [(31, 31, 0), (32, 47, 1), (33, 32, 1), (67, 150, 2), (9, 20, 0), (63, 64, 1)]
)
def test_the_crop_is_that_of_the_protocol(height, width, halvings):
    """Written out for these sizes: so many halvings that round down, one bicubic step, the middle rounded down."""
    expected = image = noise(height, width)
    for _ in range(halvings):
        expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    shorter = min(expected.size)
    expected = expected.resize(
        (round(expected.width * 16 / shorter), round(expected.height * 16 / shorter)), Image.Resampling.BICUBIC
    )
    x, y = (expected.width - 16) // 2, (expected.height - 16) // 2
    assert (np.asarray(adm_crop(image, 16)) == np.asarray(expected)[y : y + 16, x : x + 16]).all()


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


def test_pairs_are_the_samples_that_have_both_wherever_the_files_lie(tmp_path):
    files = pair_files("b") | pair_files("a", kind="bmp") | {"c.png": b"", "d.latent.npy": b"", "a.txt": b""}
    tar = write_tar(tmp_path / "s.tar", dict(reversed(files.items())))
    write_files(tmp_path / "d", files)
    expected = [("a.bmp", "a.latent.npy"), ("b.png", "b.latent.npy")]
    assert [(p.member, q.member) for p, q in find_pairs([tar])] == expected
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
