"""Configurations as files: YAML, files based on others, --set, writing, and a thousand broken files."""

import errno
import math
import re
from pathlib import Path

import pytest
from config_words import CONFIGS, TINY, at, complaint, load, words
from hypothesis import given, settings
from hypothesis import strategies as st

from asymflow.errors import InputError
from asymflow.training.config.differences import differences
from asymflow.training.config.reading import Config, dump, load_config, shipped
from asymflow.training.config.sections import known_keys


# ---- YAML ------------------------------------------------------------------------------------------------------------
def test_numbers_and_words_are_those_of_yaml_1_2(write):
    c = load_config(write(TINY + "optimizer: {lr: 1e-4, eps: 1E-9, weight_decay: .5}\ndata: {path: on}\n"))
    assert (c.optimizer.lr, c.optimizer.eps, c.optimizer.weight_decay) == (1e-4, 1e-9, 0.5)
    assert c.data.path == "on"
    c = load_config(
        write(
            TINY
            + "train: {seed: 0x10, steps: 010, compile: TRUE, skip_nonfinite: 0o17}\nsubspace: {file: 2024-01-01}\n"
        )
    )
    assert (c.train.seed, c.train.steps, c.train.compile, c.train.skip_nonfinite) == (16, 10, True, 15)
    assert c.subspace.file == "2024-01-01"
    for word in ("yes", "on", "no", "off", "y", "1"):
        assert "train.compile must be true or false" in complaint(write(TINY + f"train: {{compile: {word}}}\n"))
    for number in ("1:30", "1_000", "1e3", "10.0", '"10"'):
        assert "train.steps must be a whole number" in complaint(write(TINY + f"train: {{steps: {number}}}\n"))
    for number in (".nan", ".inf", "-.inf", "nan", "inf", "1e999", "1" * 5000):
        assert "optimizer.lr" in complaint(write(TINY + f"optimizer: {{lr: {number}}}\n"))


def test_a_whole_number_is_accepted_where_any_number_is(write):
    c = load_config(write(TINY + "optimizer: {lr: 1, betas: [0, 0]}\n"))
    assert isinstance(c.optimizer.lr, float)
    assert c.optimizer.betas == (0.0, 0.0)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "my.yaml must have sections of keys, such as train: {steps: 1000}, but it is empty"),
        ("# nothing\n", "but it is empty"),
        ("- a\n- b\n", "but it is [a, b]"),
        ("train\n", "but it is 'train'"),
        (b"\xff\xfe\x00\xd8", "my.yaml is not UTF-16-LE (byte 2): is it a YAML file?"),
        (b"a: \xfc", "my.yaml is not UTF-8 (byte 3): save it as UTF-8: is it a YAML file?"),
        (b"a\0:\0", "my.yaml has NUL characters: is it UTF-16 without"),
        (b"PK\x03\x04\x00", "my.yaml has NUL characters: is it UTF-16"),
        (TINY + "train:\n\tseed: 3\n", "my.yaml, line 3: "),
        (TINY + "train:\n\tseed: 3\n", "(indent with spaces)"),
        (TINY + "train:\n  seed: 3\n  steps: 2\n  seed: 4\n", "my.yaml, line 5: train.seed is given twice"),
        (TINY + "train:\n  seed: 3\n  steps: 2\n  seed: 4\n", "the first time at line 3"),
        (LAUGHS, "my.yaml, line 1: what begins with & must be in quotes: there are no aliases"),
        (TINY + "train: " + "[" * 5000, "my.yaml, line 2: nested too deeply"),
        (TINY + "train: " + "{a: " * 5000, "my.yaml, line 2: nested too deeply"),
        (TINY + "\n".join(" " * i + "a:" for i in range(300)), "nested too deeply"),
        (TINY + "x: " + "y" * 50_000, "my.yaml has more than 50000 bytes"),
        (TINY + "data: !!python/object/apply:os.getcwd []\n", "my.yaml, line 2: what begins with ! must be in quotes"),
        (TINY + "data: !!set {a, b}\n", "my.yaml, line 2: what begins with ! must be in quotes"),
        (TINY + "data: !mine 3\n", "my.yaml, line 2: what begins with ! must be in quotes: there are no aliases, tags"),
        (TINY + "train: {seed: !!int many}\n", "what begins with ! must be in quotes"),
        ("%YAML 1.1\n---\n" + TINY, "my.yaml, line 1: what begins with % must be in quotes"),
        (TINY + "? [a, b]\n: 3\n", "my.yaml, line 2: a key must be a word"),
        (TINY + "---\ntrain: {seed: 3}\n", "my.yaml, line 2: "),
        (TINY + 'data: {path: "a\\nb"}\n', "my.yaml, line 2: the character '\\n' is not allowed"),
        (TINY + 'data: {path: "\\UFFFFFFFF"}\n', "my.yaml, line 2: this is not YAML"),
        (TINY + 'data: {path: "\\U00110000"}\n', "my.yaml, line 2: this is not YAML"),
        (TINY + 'data: {path: "\\uD800"}\n', "is not allowed"),
        (TINY + "data: {path: a\u2028b}\n", "my.yaml, line 2: the character '\\u2028' is not allowed"),
        (TINY + "data: {path: 'a\x85b'}\n", "my.yaml, line 2: the character '\\x85' is not allowed"),
        (TINY + "train: {seed\u00a0: 3}\n", "'\\xa0' is not allowed"),
        (TINY + "<<: {train: {seed: 3}}\n", "my.yaml, line 2: unknown key <<"),
    ],
)
def test_what_is_no_configuration_is_answered_in_one_line(write, content, expected):
    assert expected in complaint(write(content))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    c = load_config(write(b"\xef\xbb\xbf" + (TINY + "train:\n  seed: 3\n").replace("\n", "\r\n").encode()))
    assert c.train.seed == 3


# ---- Files that are based on others ----------------------------------------------------------------------------------
def test_a_file_holds_only_what_differs_from_its_base(write):
    write(TINY + "optimizer: {lr: 1e-3}\ntrain: {seed: 5}\ndeepspeed: {gradient_clipping: 1.0}\n", "below/base.yaml")
    write("base: ../below/base.yaml\ntrain: {steps: 7}\nema: {decays: [0.5]}\nsample: {every: null}\n", "above/my.yaml")
    c, tiny = load_config("above/my.yaml"), load("shapes_tiny")
    assert (c.train.steps, c.train.seed, c.optimizer.lr, c.ema.decays, c.sample.every) == (7, 5, 1e-3, (0.5,), None)
    assert c.deepspeed == {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}
    assert (c.model, c.data, c.loss, c.optimizer.warmup_steps) == (
        tiny.model,
        tiny.data,
        tiny.loss,
        tiny.optimizer.warmup_steps,
    )


def test_an_error_in_a_base_names_the_base(write):
    write(TINY + "train:\n  stpes: 3\n", "below.yaml")
    write("base: below.yaml\n")
    assert complaint("my.yaml").startswith("below.yaml, line 3: unknown key train.stpes")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("base: my.yaml\n", "my.yaml, line 1: base my.yaml is based on itself"),
        ("base: ../deep/../my.yaml\n", "is neither a file"),
        ("base: ./x/../other.yaml\n", "is based on itself"),
        (
            "\nbase: shape_tiny\n",
            "my.yaml, line 2: base shape_tiny is neither a file nor a shipped configuration: did you",
        ),
        ("base: [shapes_tiny]\n", "base must be a name or a path, but it is [shapes_tiny]"),
        ("base: 3\n", "base must be a name or a path, but it is 3"),
        ("base: .\n", "is neither a file"),
    ],
)
def test_bases_that_cannot_be(write, content, expected):
    write("base: my.yaml\n", "other.yaml")
    write("", "x/empty")
    assert expected in complaint(write(content))


@pytest.mark.parametrize("name", ["shapes-tiny", "shapes_tiny.yaml", "x" * 5000, "a\0b", "a\nb", "/", "", ".", "../x"])
def test_names_that_nothing_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = complaint(name)
    assert "is neither a file nor a shipped configuration" in message
    assert len(message) < 400
    assert ("did you mean shapes_tiny?" in message) == name.startswith("shapes")


def test_a_file_that_may_not_be_read(write, monkeypatch):
    """Root may read all files, so no mode will do."""

    def denied(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    name = write(TINY)
    monkeypatch.setattr(Path, "open", denied)
    assert "my.yaml cannot be read: Permission denied" in complaint(name)


# ---- --set -----------------------------------------------------------------------------------------------------------
def test_overrides_in_all_forms():
    c = load_config(
        "shapes_tiny",
        [
            "train.steps=10",
            "optimizer.lr=1e-4",
            "subspace.rank=full",
            "data.path=/images/a=b",
            "ema.decays=[0.5, 0.9]",
            "sample.every=null",
            "train.compile=true",
            "loss.repa.model=dino",
            "loss.repa.after=2",
            "deepspeed.tensorboard.enabled=true",
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.gradient_clipping=1",
            "train={seed: 4, skip_nonfinite: 2}",
            "train.steps=11",
        ],
    )
    assert (c.train.steps, c.train.seed, c.train.skip_nonfinite, c.train.compile) == (11, 4, 2, True)
    assert (c.optimizer.lr, c.subspace.rank, c.data.path, c.ema.decays) == (1e-4, "full", "/images/a=b", (0.5, 0.9))
    assert c.sample.every is None
    assert (c.loss.repa.model, c.loss.repa.after, c.loss.repa.weight) == ("dino", 2, 0.5)
    assert c.deepspeed == {
        "zero_optimization": {"stage": 3},
        "tensorboard": {"enabled": True},
        "gradient_clipping": 1,
    }
    assert c.train.global_batch_size == load("shapes_tiny").train.global_batch_size


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stpes=1", "--set train.stpes=1: unknown key train.stpes: did you mean train.steps?"),
        ("train.steps=many", "--set train.steps=many: train.steps must be a whole number, but it is 'many'"),
        ("train.steps=", "--set train.steps=: train.steps must be a whole number, but it is null"),
        ("train.steps", "--set train.steps: expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train..steps=3", "expected KEY=VALUE"),
        ("train.st\neps=3", "expected KEY=VALUE"),
        ("train.steps=[", "--set train.steps=[: "),
        ("train.steps=*a", "--set train.steps=*a: what begins with * must be in quotes: there are no aliases"),
        ("train.steps=1\n2", "--set train.steps=1 2: train.steps must be a whole number"),
        ("train.steps.x=1", "train.steps must be a whole number, but it is a section"),
        ("optimizer.betas.0=1", "optimizer.betas must be a list, but it is a section"),
        ("base=emoji64", "unknown key base: "),
        ("train={seed: 1, seed: 2}", "train.seed is given twice, the first time at line 1"),
        ("sample.interval=0,0.88", "sample.interval must be a list, but it is '0,0.88'"),
        ("loss.repa.weight=1", "--set loss.repa.weight=1: loss.repa.model is missing"),
        ("deepspeed.zero_optimization=3", "deepspeed.zero_optimization must be a section with the key stage"),
        ("deepspeed.zero_optimization.stage.x=1", "stage must be 0, 1, 2 or 3, but it is a section"),
        ("x" * 10_000 + "=1", "unknown key xxxx"),
    ],
)
def test_overrides_that_cannot_be(override, expected):
    message = complaint("shapes_tiny", [override])
    assert expected in message
    assert len(message) < 500


# ---- Writing, and reading again --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", shipped())
def test_dumped_configurations_have_all_keys_and_load_as_the_same(name, write):
    c = load(name)
    text = dump(c)
    assert load_config(write(text)) == c
    assert dump(load_config("my.yaml")) == text
    sections = [line.partition(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert sections == list(Config.model_fields)
    absent = [key for key in known_keys(Config) if at(c, key) is None]
    for key in known_keys(Config):
        if not any(key.startswith(f"{section}.") for section in absent):
            assert f"{key.rpartition('.')[2]}:" in text


@pytest.mark.parametrize("path", ["1e-4", "0o7", "on", "null", "1_000", "2024-01-01", "x " * 100 + "x", "größe/🙂"])
def test_words_stay_words_and_long_ones_one_line(path, write):
    content = load("shapes_tiny").model_dump()
    content["data"]["path"] = content["subspace"]["file"] = path
    c = Config(**content)
    write(dump(c).encode("ascii"))
    assert load_config("my.yaml") == c
    assert [len(line.splitlines()) for line in differences(load("shapes_tiny"), c)] == [1]


numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(-1e18, 1e18) | st.sampled_from([1e-5, 5e-324, 1e17, 0.1])
anything = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=100)
@given(
    anything,
    words.filter(bool),
    st.lists(st.floats(0, 1, exclude_max=True), max_size=4, unique_by=lambda d: f"{d:.10g}"),
    st.floats(0, 1e15),
    st.integers(0, 2**63 - 1),
)
def test_whatever_is_valid_survives_writing_and_reading(folder, extra, path, decays, lr, seed):
    content = load("shapes_tiny").model_dump()
    content["deepspeed"] |= {"something_new": extra}
    content["data"]["path"] = path
    content["ema"]["decays"] = [d for d in decays if f"{d:.10g}" != "1"]
    content["optimizer"]["lr"], content["train"]["seed"] = lr, seed
    c = Config(**content)
    again = load_text(folder, dump(c))
    assert again == c
    assert differences(c, again) == []
    assert repr(again) == repr(c)  # 1, 1.0 and true are equal to Python


def load_text(folder: Path, text: str) -> Config:
    (folder / "dumped.yaml").write_text(text, encoding="ascii")
    return load_config(folder / "dumped.yaml")


# ---- A thousand broken files -----------------------------------------------------------------------------------------
SOURCES = [
    (CONFIGS / "shapes_tiny.yaml").read_text(),
    (CONFIGS / "imagenet.yaml").read_text().replace("path: null", "path: x"),
    "base: imagenet256_h16_repa\nloss:\n  repa:\n    model: dino\ndata:\n  path: x\ntrain:\n  seed: 1\n",
]
ODD = """
0 1 -1 3 0.5 1e-4 -0.0 1e999 .nan .inf nan 9223372036854775808 1e400 0x1 0o7 true false null ~ yes on '' full auto heun
fp32 bf16 B/16 tiny/4 S/8 H/0 [] [0.5] [0,1] [1,2,3] {} {a:1} {"a":1} {"enabled":true} [[]] 2024-01-01 12:30 1_000 naïve
日本語 🙂 '\\u2028' "\\n" "\\0" "\\ud800" "\\UFFFFFFFF" !!python/name:os.system *a | > % @ ` - shapes webdataset
image_folder imagenet broken.yaml ../x"""
ODDER = ["!!int 3", "!!int x", "!!str 3", "!!binary eA==", "&a 1", "- 1", "a: b", "[0.5, *a]", "9" * 400, "1" * 5000]
VALUES = st.sampled_from([*ODD.split(), *ODDER, "[" * 200, "x" * 1000, "1e" + "9" * 50])
KEYS = st.sampled_from(
    [key.rpartition(".")[2] for key in known_keys(Config)]
    + ["base", "<<", "", "?", "1", "null", "fp16", "bf16", "ключ", "a.b", "-"]
) | st.text(max_size=6)
JUNK = st.binary(max_size=4) | st.sampled_from(
    [b"\t", b"\0", b"\xff", b"{", b"]", b'"', b"---\n", b"...\n", b"\r", b"%YAML 9"]
)


@st.composite
def broken_files(draw) -> bytes:
    lines = draw(st.sampled_from(SOURCES)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(len(lines) - 1, 0)))
        line = lines[i] if lines else ""
        indent, (key, colon, value) = " " * (len(line) - len(line.lstrip())), line.strip().partition(":")
        kind = draw(st.sampled_from(["value", "value", "value", "key", "delete", "duplicate", "nest", "move", "swap"]))
        if kind == "value" and colon:
            lines[i] = f"{indent}{key}: {draw(VALUES)}"
        elif kind == "key" and colon:
            lines[i] = f"{indent}{draw(KEYS)}:{value}"
        elif kind == "delete":
            lines[i : i + 1] = []
        elif kind == "duplicate":
            lines[i:i] = [line]
        elif kind == "nest" and colon:
            lines[i : i + 1] = [f"{indent}{key}:", f"{indent}  {draw(KEYS)}: {draw(VALUES)}"]
        elif kind == "move":
            lines[i : i + 1] = [" " * draw(st.integers(0, 5)) + line.lstrip()]
        else:
            lines[i : i + 1] = [*lines[:i][-1:], line]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(JUNK) + content[at:]
    return content


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_broken_files_are_valid_or_answered_in_one_line(folder, count):
    outcomes = {True: 0, False: 0}

    @settings(max_examples=count)
    @given(broken_files())
    def check(content):
        path = folder / "broken.yaml"
        path.write_bytes(content)
        try:
            c, message = load_config(path), None
        except InputError as e:
            c, message = None, str(e)
        outcomes[c is not None] += 1
        if c is None:
            assert len(message.splitlines()) == 1
            assert len(message.encode()) < 600  # and it can be printed
            assert "broken.yaml" in message or re.match(
                r"asymflow/configs/\w+\.yaml, line \d+: .* is missing: give it", message
            )
        else:
            assert all(math.isfinite(x) for x in (c.optimizer.lr, *c.ema.decays, c.loss.sigma_mean))
            assert load_text(folder, dump(c)) == c

    check()
    assert min(outcomes.values()) >= count // 10, outcomes
