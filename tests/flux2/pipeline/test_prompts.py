"""Prompts from files, and the folders that the public scorers read."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli_sample_text import pixels, run

from asymflow.cli.prompts import Prompt, read_prompts
from asymflow.cli.sample_text import digest
from asymflow.errors import InputError
from asymflow.text import is_blank

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda s: not is_blank(s)
)
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"},
]


def lines(rows, **options):
    return "\n".join(json.dumps(row, **options) for row in rows)


# ---- Reading ---------------------------------------------------------------------------------------------------------
@given(texts=st.lists(TEXT, min_size=1, max_size=4), ascii=st.booleans())
def test_every_kind_of_file_gives_the_same_prompts(tmp_path_factory, texts, ascii):
    """Also with the characters that Python, but no editor, takes for the end of a line."""
    folder = tmp_path_factory.mktemp("prompts")
    write = lambda name, text: (folder / name).write_text(text, encoding="utf-8", newline="")
    write("a.txt", "\r\n\r\n".join(texts))
    write("b.jsonl", lines([{"prompt": text} for text in texts], ensure_ascii=ascii))
    write("c.json", json.dumps(texts, ensure_ascii=ascii))
    write("d.json", json.dumps([{"caption": text} for text in texts], ensure_ascii=ascii))
    write("e.json", json.dumps({"all": texts}))
    (folder / "f").mkdir()
    for number, text in enumerate(texts):
        write(f"f/{number:05}.txt", text)
    for name in ("a.txt", "b.jsonl", "c.json", "d.json", "e.json", "f"):
        found = read_prompts(folder / name)
        assert [prompt.text for prompt in found] == [text.strip() for text in texts], name
        assert [prompt.name for prompt in found] == [f"{number:05}" for number in range(len(texts))]


def test_the_captions_of_images_and_the_categories_of_files_are_prompts(tmp_path):
    (tmp_path / "photos/more").mkdir(parents=True)
    for name, caption in (("a", "a cat"), ("more/b", "a dog")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"photos/{name}.png")
        (tmp_path / f"photos/{name}.txt").write_text(f"{caption}\n")
    assert [prompt[:2] for prompt in read_prompts(tmp_path / "photos")] == [("a cat", "a"), ("a dog", "b")]
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps/arts.json").write_text(json.dumps([{"prompt": "a sketch", "image_path": "x/0012.jpg"}]))
    (tmp_path / "hps/animals.json").write_text(json.dumps(["a cow"]))
    assert [prompt[:3] for prompt in read_prompts(tmp_path / "hps")] == [
        ("a cow", "00000", "animals"),
        ("a sketch", "0012", "arts"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "has no prompt in it: expected a .txt file"),
        ("a.csv", "prompt\na cat", "is a .csv file: expected a .txt file"),
        ("A.JSONL", "{", "line 1 is not JSON"),
        ("a.json", '{"a": ["x"], "a": ["y"]}', "the key 'a' comes twice in an object"),
        ("a.json", '{"a": [], "b": ["y"]}', "must be a list of prompts in JSON, or a list for each category"),
        ("a.jsonl", r'{"prompt": "a", "id": "\ud800"}', "is not text in UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": " "}', "line 3: expected a prompt, but it is ' '"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("a.jsonl", r'{"prompt": "\ud800"}', "is not text in UTF-8"),
        ("a.json", "3", "must be a list of prompts in JSON, or a list for each category"),
        ("a.json", '{"prompts": {"a": "b"}}', "must be a list of prompts in JSON"),
        ("a.json", '["a", {"tag": 1}]', "entry 2 of 'all' has no prompt under the key prompt, caption or text"),
    ],
)
def test_what_is_no_prompt_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as raised:
        read_prompts(tmp_path / name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["anime.json", "README.txt"], "1 file beside NAME.txt, such as anime.json"),
        (["1.txt", "more/2.txt"], "1 file beside NAME.txt, such as more/2.txt"),
        (["1.txt", "1.png", "2.TXT"], "1 file beside captions of images, such as 2.TXT"),
        (["a.jsonl"], "1 file beside CATEGORY.json, such as a.jsonl"),
        ([], "has no prompt in it"),
    ],
)
def test_whatever_a_folder_has_is_read_or_told(tmp_path, names, said):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('["a cat"]')
    with pytest.raises(InputError) as raised:
        read_prompts(tmp_path)
    assert said in str(raised.value)


def test_what_is_no_data_is_no_prompt_and_a_category_may_be_a_number(tmp_path):
    for name in (".ipynb_checkpoints/a-checkpoint.json", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('[{"prompt": "a cat", "category": 3}]')
    (found,) = read_prompts(tmp_path)
    assert (found.text, found.category) == ("a cat", "3")


def test_the_key_prompt_comes_before_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello", "prompt": "a sign that says hello"}')
    assert read_prompts(tmp_path / "a.jsonl")[0].text == "a sign that says hello"


LISTS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


@given(LISTS, LISTS)
def test_other_prompts_have_another_checksum(one, other):
    assert (digest(one) == digest(other)) == (one == other)


# ---- Folders of scorers ----------------------------------------------------------------------------------------------
def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_genevals_folder_has_each_prompts_line_and_its_four_images(base, adapter, tmp_path, capsys, monkeypatch):
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text(lines(GENEVAL))
    options = ("--for", "geneval")
    for rank in (1, 0):  # of two processes, the one that is last to finish arranges
        assert not (out / "geneval").exists()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(base, adapter, out, *options, prompts=prompts) == 0
    monkeypatch.undo()
    assert "has the 2 prompts for GenEval, 4 images each" in capsys.readouterr().out
    samples = [f"{number:05}/samples/{place:04}.png" for number in range(2) for place in range(4)]
    assert tree(out / "geneval") == sorted([*samples, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    for number, row in enumerate(GENEVAL):
        assert json.loads((out / f"geneval/{number:05}/metadata.jsonl").read_text()) == row
        for place in range(4):  # image i is of prompt i % 2
            image = out / f"images/{2 * place + number:06}.png"
            assert (out / f"geneval/{number:05}/samples/{place:04}.png").read_bytes() == image.read_bytes()
    assert len({(out / "geneval" / sample).read_bytes() for sample in samples}) == 8

    before = {path: (out / "geneval" / path).read_bytes() for path in tree(out / "geneval")}
    (out / "images/000003.png").unlink()
    assert run(base, adapter, out, *options, prompts=prompts) == 0
    assert before == {path: (out / "geneval" / path).read_bytes() for path in tree(out / "geneval")}
    again = "1 of 1 images are in"  # without --for an image is the same
    assert run(base, adapter, out, "--first", "5", "--num", "1", prompts=prompts) == 0
    assert again in capsys.readouterr().out


def test_dpgs_folder_has_a_grid_of_four_for_each_prompt(base, adapter, tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    for name, text in (("coco12", "a red square"), ("partiprompts97", "a blue disc")):
        (prompts / f"{name}.txt").write_text(text)
    for _ in range(2):
        assert run(base, adapter, out, "--for", "dpg", prompts=prompts) == 0
        assert tree(out / "dpg") == ["coco12.png", "partiprompts97.png"]
        for number, name in enumerate(("coco12", "partiprompts97")):
            four = [pixels(out / f"images/{2 * place + number:06}.png") for place in range(4)]
            expected = np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])
            assert np.array_equal(pixels(out / f"dpg/{name}.png"), expected)
        (out / "images/000002.png").unlink()  # drawn again, and the grid is made again


def test_a_grid_is_made_again_if_its_name_is_now_that_of_another_prompt(base, adapter, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    for names in (("one", "two"), ("two", "one")):
        texts = ("a red square", "a blue disc")
        prompts.write_text(lines([{"item_id": n, "prompt": text} for n, text in zip(names, texts, strict=True)]))
        assert run(base, adapter, out, "--for", "dpg", prompts=prompts) == 0
        for number, name in enumerate(names):
            assert np.array_equal(pixels(out / f"dpg/{name}.png")[:32, :48], pixels(out / f"images/{number:06}.png"))


def test_what_other_prompts_left_in_the_folder_is_told(base, adapter, tmp_path, capsys):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "coco12.txt").write_text("a red square")
    assert run(base, adapter, out, "--for", "dpg", prompts=prompts) == 0
    (prompts / "coco12.txt").rename(prompts / "coco13.txt")  # the same text, so the images stay
    capsys.readouterr()
    assert run(base, adapter, out, "--for", "dpg", prompts=prompts) == 2
    assert "dpg also has 1 file of other prompts, such as coco12.png: remove them" in capsys.readouterr().err


def test_hpsv3s_folder_has_each_image_beside_its_prompt(base, adapter, tmp_path):
    prompts, out = tmp_path / "prompts.json", tmp_path / "out"
    prompts.write_text(json.dumps({"arts": [{"prompt": "a sketch", "image_path": "a/0012.jpg"}], "food": ["bread"]}))
    assert run(base, adapter, out, "--for", "hpsv3", prompts=prompts) == 0
    assert tree(out / "hpsv3") == ["arts/0012.png", "arts/0012.txt", "food/00000.png", "food/00000.txt"]
    assert (out / "hpsv3/food/00000.txt").read_text() == "bread"
    assert np.array_equal(pixels(out / "hpsv3/food/00000.png"), pixels(out / "images/000001.png"))


@pytest.mark.parametrize(
    ("scorer", "rows", "options", "message"),
    [
        ("geneval", [{"prompt": "a"}], (), "these are not the prompts of GenEval, which needs its evaluation_metadata"),
        ("geneval", GENEVAL, ("--num", "3"), "--for geneval draws all images of every prompt: leave out --num"),
        ("dpg", GENEVAL, (), "these are not the prompts of DPG-Bench, which needs its folder of prompts, ID.txt"),
        ("dpg", [{"item_id": "../a", "prompt": "a"}], (), "these are not the prompts of DPG-Bench"),
        ("hpsv3", [{"id": "a", "prompt": "a"}] * 2, (), "these are not the prompts of HPSv3, which needs prompts with"),
        *(
            ("hpsv3", [{"category": name, "prompt": "a"}], (), "these are not the prompts of HPSv3")
            for name in ("a/b", "..", ".", ".a", "a" * 300, "a\0b")
        ),
        ("hpsv3", [{"id": "A", "prompt": "a"}, {"id": "a", "prompt": "b"}], (), "these are not the prompts of HPSv3"),
        ("hpsv3", [{"id": "", "prompt": "a"}], (), "expected a prompt, but it is ''"),
    ],
)
def test_prompts_of_another_benchmark_are_refused_before_anything_is_drawn(
    base, adapter, tmp_path, capsys, scorer, rows, options, message
):
    (tmp_path / "prompts.jsonl").write_text(lines(rows))
    assert run(base, adapter, tmp_path / "out", "--for", scorer, *options, prompts=tmp_path / "prompts.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_keeps_all_that_its_line_says(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(GENEVAL))
    assert read_prompts(tmp_path / "a.jsonl")[1] == Prompt("a red cat", "00001", "all", GENEVAL[1])
