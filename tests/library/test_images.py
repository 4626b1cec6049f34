"""Images: what is found and in which order, pixels that are exactly those of the file, damage that is named."""

import io
import itertools
import os
import threading
import time
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import encoded, noise, write_files, write_tar
from PIL import Image

from asymflow import InputError
from asymflow.data.captioned import find_captioned
from asymflow.entries import Entry, UnreadableError, choose, find_images, find_pairs, samples
from asymflow.passed_over import PassedOver
from asymflow.pixels import in_order, read_image, read_square, tensor_to_pil, to_rgb, to_tensor


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


@given(st.dictionaries(st.text("abc", min_size=1), st.sampled_from(("png", "heic", "RAW", "csv", "mp4")), max_size=5))
def test_images_of_kinds_that_are_not_read_are_said(tmp_path_factory, kinds):
    folder = write_files(tmp_path_factory.mktemp("d"), {f"{name}.{kind}": b"" for name, kind in kinds.items()})
    write_files(folder, {"z.png": b""})
    with redirect_stderr(io.StringIO()) as said:
        assert len(find_images([folder])) == 1 + [*kinds.values()].count("png")
    others = sorted(f"{name}.{kind}" for name, kind in kinds.items() if kind in ("heic", "RAW"))
    if others:
        what = f"1 image ({folder}/" if len(others) == 1 else f"{len(others)} images (the first: {folder}/"
        expected = f"passed over, of a kind that is not read: {what}{others[0]}). Convert such files to png or jpg\n"
    assert said.getvalue() == (expected if others else "")


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
    assert names(find_images([tmp_path / "data"]), tmp_path) == ["data/2.png", "data/link/1.png"]


def test_a_tar_file_has_the_images_that_the_folder_has(tmp_path):
    """To the last byte, from any place in it; long names and folders too."""
    rng = np.random.default_rng(0)
    files = {name: rng.bytes(int(rng.integers(0, 3000))) for name in ["0001.png", "x/0002.jpg", f"{'long' * 60}.webp"]}
    others = {"0001.txt": b"text", "x/._0002.jpg": b"of a Mac", "x/.hidden/3.png": b"in a hidden folder"}
    others |= {"@eaDir/1.png/THUMB.png": b"of a NAS", ".4.png": b"hidden"}
    write_files(tmp_path / "folder", files | others)
    tar = write_tar(tmp_path / "shard.tar", files | others)
    found = find_images([tar])
    assert {e.member: e.read() for e in found} == files
    assert {str(e)[len(f"{tmp_path}/folder/") :]: e.read() for e in find_images([tmp_path / "folder"])} == files
    assert str(found[1]) == f"{tar}: x/0002.jpg"


def test_folders_tars_and_files_can_be_mixed_and_keep_their_order(tmp_path):
    write_files(tmp_path, {"z/1.png": b"", "single.png": b""})
    tar = write_tar(tmp_path / "a.tar", {"9.png": b"", "8.png": b""})
    found = find_images([tmp_path / "z", tmp_path / "single.png", tar])
    assert names(found, tmp_path) == ["z/1.png", "single.png", "a.tar: 9.png", "a.tar: 8.png"]


def test_a_tar_file_in_a_folder_is_read_as_if_it_was_given(tmp_path):
    """As `asymflow data encode` and `evaluate` always did."""
    data = write_files(tmp_path, {"1.png": b"", "z/2.png": b"", "z/2.latent.npy": b""})
    (tmp_path / "b").mkdir()
    tar = write_tar(tmp_path / "b" / "shard.TAR", {"8.png": b"", "3.png": b"", "3.latent.npy": b""})
    assert names(find_images([data]), data) == ["1.png", "b/shard.TAR: 8.png", "b/shard.TAR: 3.png", "z/2.png"]
    assert find_images([tar.parent]) == find_images([tar])
    assert find_pairs([tar.parent]) == find_pairs([tar])
    assert len(find_pairs([data])) == 2


WAYS = ["d", "d/x", "d/s.tar", "d/x/t.tar", "d/1.png", "d/x/2.png", "link", "link/x/../x", "other.tar", "d/l.tar"]


@given(st.lists(st.sampled_from(WAYS), min_size=1, max_size=5))
def test_however_often_an_image_is_given_it_is_read_once(tmp_path_factory, ways):
    top = tmp_path_factory.mktemp("ways")
    write_files(top / "d", {"1.png": b"1", "x/2.png": b"2"})
    write_tar(top / "d" / "s.tar", {"3.png": b"3"})
    write_tar(top / "d" / "x" / "t.tar", {"4.png": b"4"})
    (top / "link").symlink_to(top / "d")
    (top / "other.tar").symlink_to(top / "d" / "s.tar")
    (top / "d" / "l.tar").symlink_to(top / "d" / "s.tar")
    inside = {"d": "1234", "d/x": "24", "d/s.tar": "3", "d/x/t.tar": "4", "d/1.png": "1", "d/x/2.png": "2"}
    inside |= {"link": "1234", "link/x/../x": "24", "other.tar": "3", "d/l.tar": "3"}
    passed = PassedOver()
    read = sorted(entry.read().decode() for entry in find_images([top / way for way in ways], passed))
    assert read == sorted(set("".join(inside[way] for way in ways)))
    if sum(len(inside[way]) for way in ways) > len(read):
        assert passed.again


@pytest.mark.parametrize("name", ["a.zip", "x/A.TAR.GZ", "a.tgz", "x/a.tar.zst", "a.7z"])
def test_archives_that_are_not_opened_are_said(tmp_path, capsys, name):
    write_files(tmp_path, {"x/1.png": b"", "a.tar.json": b"", "zip": b""})
    find_images([tmp_path])
    assert capsys.readouterr().err == ""
    write_files(tmp_path, {name: b"PK"})
    for find in (lambda: find_images([tmp_path]), lambda: find_captioned([tmp_path], 8)):
        assert len(find()) == 1
        said = f"not opened: 1 archive ({tmp_path}/{name}). Unpack what has images in it\n"
        assert capsys.readouterr().err == said


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
    with pytest.raises(UnreadableError, match=r"gone\.png does not exist"):
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
