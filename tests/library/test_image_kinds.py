"""Images as people have them: of any kind, depth and orientation, with hidden colours, of extreme shapes."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from asymflow import InputError
from asymflow.data.captioned import find_captioned
from asymflow.data.folder import ImageFolder
from asymflow.entries import IMAGES, Entry, UnreadableError
from asymflow.pixels import adm_crop, read_image

TURNS = {  # the orientation in EXIF, and what makes the image upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.fliplr(a), -1),
    8: np.rot90,
}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def as_png(rows, depth, color, *between, behind=()):
    """A PNG of rows of bytes, with chunks before and behind the pixels. color: 0 grey, 2 RGB."""
    height, width = len(rows), 8 * len(rows[0]) // depth // (3 if color == 2 else 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + body + b"".join(behind) + chunk(b"IEND", b"")


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes().removeprefix(b"Exif\0\0")


def write(path, content, caption=True):
    path.write_bytes(content)
    if caption:
        path.with_suffix(".txt").write_text("a caption")
    return path


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_png_is_turned_as_its_exif_says(tmp_path, orientation, where):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    turn = chunk(b"eXIf", exif(orientation))
    content = as_png(
        [row.tobytes() for row in pixels], 8, 2, *[turn][where != "before" :], behind=[turn][where != "behind" :]
    )
    write(tmp_path / "a.png", content)
    (photo,) = find_captioned([tmp_path], 8)
    expected = TURNS[orientation](pixels)
    assert np.array_equal(np.asarray(photo.pixels()), expected)
    assert photo.size() == expected.shape[1::-1]


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_is_read_and_has_its_caption(tmp_path, kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    name = {"jpg": "jpeg", "jfif": "jpeg", "tif": "tiff"}.get(kind, kind)
    out = io.BytesIO()
    Image.new("RGB", (9, 5), (200, 30, 60)).save(out, name)
    write(tmp_path / f"a.{kind}", out.getvalue())
    (photo,) = find_captioned([tmp_path], 8)
    assert (photo.caption(), photo.size()) == ("a caption", (9, 5))
    assert np.abs(np.asarray(photo.pixels()).astype(int) - (200, 30, 60)).max() < 12


def test_what_is_not_read_is_named_and_what_systems_put_beside_is_none(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, "png")
    for name in ("c/a.png", "c/b.heic", "c/@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/x.png", "@eaDir/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, out.getvalue() if name.endswith("g") else b"heic")
    good, other = find_captioned([tmp_path], 8)
    assert good.size() == (9, 9)
    with pytest.raises(UnreadableError, match=r"b\.heic is not a whole image"):
        other.size()
    data = ImageFolder(tmp_path, 8)
    assert (len(data), data.classes) == (1, ["c"])
    assert data.remarks == [
        f"passed over, of a kind that is not read: 1 image ({tmp_path}/c/b.heic). Convert such files to png or jpg"
    ]


@pytest.mark.parametrize("name", ["b.tar", "b.zip", "c/b.tar", "c/d/b.TGZ"])
def test_an_archive_among_classes_or_images_of_one_is_said(tmp_path, name):
    (tmp_path / "c" / "d").mkdir(parents=True)
    write(tmp_path / name, b"")
    said = f"not opened: 1 archive ({tmp_path}/{name}). Unpack what has images in it"
    if name.startswith("c"):
        with pytest.raises(InputError) as e:
            ImageFolder(tmp_path, 8)
        assert str(e.value) == f"{tmp_path}/c has no images, but each folder in {tmp_path} is a class: {said}"
    Image.new("RGB", (9, 9)).save(tmp_path / "c" / "a.png")
    assert ImageFolder(tmp_path, 8).remarks == [said]


def test_a_class_on_a_disk_that_is_not_mounted_is_no_class_less(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "c" / "a.png")
    (tmp_path / "c" / "2019").symlink_to(tmp_path / "gone")
    said = f"left out, since they lead nowhere (is a disk not mounted?): 1 link ({tmp_path}/c/2019)"
    assert ImageFolder(tmp_path, 8).remarks == [said]
    assert len(find_captioned([tmp_path], 8)) == 1
    assert capsys.readouterr().err == said + "\n"
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="b is a link to nothing"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("kind", ["txt", "TXT"])
def test_captions_of_classes_lie_beside_in_any_case(tmp_path, kind):
    (tmp_path / "c").mkdir()
    for name in ("a", "b.v2"):
        Image.new("RGB", (9, 9)).save(tmp_path / "c" / f"{name}.png")
    write(tmp_path / "c" / f"b.v2.{kind}", b"a caption")
    data = ImageFolder(tmp_path, 8)
    assert [data[i].caption for i in range(2)] == ["", "a caption"]
    assert data.part([1]).caption(0) == "a caption"


@pytest.mark.parametrize("name", ["a.TXT", "a.caption", "a.Caption", "a.JSON"])
def test_captions_lie_beside_in_any_case(tmp_path, name):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    text = json.dumps({"caption": "a caption"}) if name.lower().endswith("json") else "a caption"
    (tmp_path / name).write_text(text)
    assert find_captioned([tmp_path], 8)[0].caption() == "a caption"


TABLES = ["metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json", "annotations/captions_val2017.json"]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_captions_is_not_passed_over(tmp_path, name):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / name).write_text('{"file_name": "a.jpg", "text": "a cat"}')
    with pytest.raises(InputError, match=rf"has its captions in {name}: "):
        find_captioned([tmp_path], 8)
    if name.endswith("jsonl"):
        assert find_captioned([tmp_path / name], 8)[0].caption() == "a cat"
    else:
        with pytest.raises(InputError, match=r"written to a \.jsonl file"):
            find_captioned([tmp_path / name], 8)
    (tmp_path / "a.txt").write_text("a dog")
    assert find_captioned([tmp_path], 8)[0].caption() == "a dog"


@pytest.mark.parametrize(
    ("depth", "rows", "transparent", "expected"),
    [
        (2, [0b00011011], 1, [0, 255, 170, 255]),
        (4, [0x0F, 0x81], 8, [0, 255, 255, 17]),
        (8, [0, 7, 8, 255], 7, [0, 255, 8, 255]),
        (16, [0, 0, 1, 44, 1, 45, 255, 255], 300, [0, 255, 1, 255]),
    ],
)
def test_grey_of_any_depth_is_white_where_it_is_transparent(tmp_path, depth, rows, transparent, expected):
    content = as_png([bytes(rows)], depth, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
    image = np.asarray(read_image(Entry(str(write(tmp_path / "a.png", content, caption=False)))))
    assert image[0, :, 0].tolist() == expected
    assert (image == image[..., :1]).all()


def test_colours_of_16_bits_are_white_where_they_are_transparent(tmp_path):
    rows = [struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1000, 0x2000, 0x3000)]
    content = as_png(rows, 16, 2, chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    image = np.asarray(read_image(Entry(str(write(tmp_path / "a.png", content, caption=False)))))
    assert image.tolist() == [[[255, 255, 255], [0x10, 0x20, 0x30]]]


def test_floating_point_numbers_are_refused_by_name(tmp_path):
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableError, match=r"a\.tif is not a whole image \(its pixels are floating point numbers\)"):
        read_image(Entry(str(tmp_path / "a.tif")))


@pytest.mark.parametrize("shape", [(30000, 1), (1, 30000), (2, 9000)])
def test_of_an_extreme_shape_the_middle_alone_is_enlarged(monkeypatch, shape):
    image = Image.new("RGB", shape, "red")
    image.paste("blue", tuple(max(side // 2 - 8, 0) for side in shape) + tuple(side // 2 + 8 for side in shape))
    areas, really = [], Image.Image.resize

    def resize(self, size, *more):
        areas.append(size[0] * size[1])
        return really(self, size, *more)

    monkeypatch.setattr(Image.Image, "resize", resize)
    square = adm_crop(image, 64)
    assert square.size == (64, 64)
    assert max(areas) <= 16 * 64 * 64
    assert square.getpixel((32, 32)) == (0, 0, 255)


@pytest.mark.parametrize("shape", [
    *[(160, 10), (33, 57), (256, 256), (10, 155)],
    *[(31, 31), (47, 32), (32, 33), (150, 67), (20, 9), (64, 63)],  # what halving, scaling and the middle round
])  # fmt: skip
def test_other_shapes_are_cropped_as_by_adm_to_the_bit(shape):
    """As the code of guided-diffusion does it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8))
    expected = image
    while min(expected.size) >= 2 * 16:
        expected = expected.resize(tuple(side // 2 for side in expected.size), resample=Image.Resampling.BOX)
    scale = 16 / min(expected.size)
    expected = expected.resize(tuple(round(side * scale) for side in expected.size), resample=Image.Resampling.BICUBIC)
    array = np.array(expected)
    top, left = (array.shape[0] - 16) // 2, (array.shape[1] - 16) // 2
    assert np.array_equal(np.array(adm_crop(image, 16)), array[top : top + 16, left : left + 16])
