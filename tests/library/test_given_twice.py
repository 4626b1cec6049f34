"""Images with captions that are given twice, by whatever way: encoded once."""

import os
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from image_files import write_files, write_tar

from asymflow.data.captioned import each_once, find_captioned
from asymflow.passed_over import PassedOver

CAPTIONED = {  # what each has, as image and caption
    "d": ["1a", "2b", "1o", "3c"],
    "d/x": ["2b", "3c"],
    "link": ["1a", "2b", "1o", "3c"],
    "d/a.jsonl": ["1A", "1B", "2B"],
    "other/b.jsonl": ["1A", "2C"],
    "d/x/s.tar": ["3c"],
}


@given(st.lists(st.sampled_from([*CAPTIONED]), min_size=1, max_size=5), st.booleans())
def test_an_image_with_the_same_caption_is_encoded_once_however_often_it_is_given(tmp_path_factory, ways, relative):
    """In a folder with a link beside it, through a link to the folder, in lists; with other captions, it is another."""
    top = tmp_path_factory.mktemp("ways")
    write_files(top, {"d/1.png": b"1", "d/1.txt": b"a", "d/x/2.png": b"2", "d/x/2.txt": b"b", "d/own.txt": b"o"})
    write_tar(top / "d" / "x" / "s.tar", {"3.png": b"3", "3.txt": b"c"})
    for name, target in {"link": "d", "d/beside.png": "1.png", "d/beside.txt": "1.txt", "d/own.png": "1.png"}.items():
        (top / name).symlink_to(target)
    row = lambda name, caption: f'{{"image": "{name}", "text": "{caption}"}}\n'.encode()
    rows = [row("1.png", "A"), row("./1.png", "A"), row("1.png", "B"), row("beside.png", "B"), row("x/2.png", "B")]
    others = [row("../link/1.png", "A"), row(f"{top}/d/x/2.png", "C")]
    write_files(top, {"d/a.jsonl": b"".join(rows), "other/b.jsonl": b"".join(others)})
    passed, start = PassedOver(), Path.cwd()
    paths = [os.path.relpath(top / way, start) if relative else str(top / way) for way in ways]
    found = find_captioned(paths, 8, passed)
    kept = each_once(found, passed)
    read = Counter(photo.file.read().decode() + photo.caption() for photo in kept)
    expected = {one for way in ways for one in CAPTIONED[way]}
    beside = "d/a.jsonl" in ways and not {"d", "link"} & {*ways}  # a link that no folder shows
    assert read == Counter(expected) + Counter({"1B": 1} if beside else {})
    assert len(passed.again) >= len(found) - len(kept)
