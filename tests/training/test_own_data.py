"""docs/examples/own_data.md: its commands, word for word, with fewer images and steps, one after the other."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from processes import ROOT

PAGE = (ROOT / "docs/examples/own_data.md").read_text()
FEWER = [  # what stands on the page, and what is run instead
    ("count=400", "count=100"),
    ("range(400)", "range(100)"),
    ("asymflow compare --data photos", "asymflow compare --data photos --steps 2 --set sample.steps=1"),
    ("--config photos.yaml", "--config photos.yaml --set train.steps=2 --set sample.steps=1 --set data.workers=0"),
    ("asymflow sample --model", "asymflow sample --steps 1 --device cpu --model"),
]


@pytest.mark.slow
def test_the_commands_of_the_page_go_from_a_folder_to_samples(tmp_path):
    (tmp_path / "train_ddp.py").symlink_to(ROOT / "train_ddp.py")
    (tmp_path / "photos.yaml").write_text(*re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    script = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    for shown, run in FEWER:
        assert script.count(shown) == 1
        script = script.replace(shown, run)
    commands = f'set -e\npython() {{ "{sys.executable}" "$@"; }}\nasymflow() {{ python -m asymflow "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = ["photos/compare.png", "photos-r8.png", "shapes64/samples/00000002.png", "shapes64_samples/grid.png"]
    for name in pictures:
        with Image.open(tmp_path / "runs" / name) as picture:
            assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 20
    assert len(list((tmp_path / "runs/shapes64_samples/images").iterdir())) == 8
    assert all(
        f"`{name}" in PAGE for name in ("runs/photos/compare.png", "runs/photos-r8.png", "runs/shapes64/samples")
    )


def test_every_line_of_its_configuration_is_explained_or_a_section():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    plain = {line for line in text.splitlines() if "#" not in line and not line.endswith(":")}
    assert plain == {"  path: photos", "  steps: 5000"}
