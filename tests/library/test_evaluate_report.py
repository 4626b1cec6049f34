"""`asymflow evaluate report`: what is in one table, and what the table says of it."""

import pytest

from asymflow.cli.evaluate_report import table


def result_of(name="adm", images=50_000, size=256, reference="adm-imagenet", extractor="inception-v3-compat", **scored):
    return {
        "of": "mine",
        "images": images,
        "size": [size, size],
        "scored": scored,
        "protocol": {"name": name},
        "extractor": {"name": extractor, "weights_sha256": "0"},
        "reference": {"name": reference, "file_sha256": "1"},
        "measures": {"frechet_distance": {"value": 2.0, "uncertainty": 0.1, "remarks": []}},
    }


@pytest.mark.parametrize(
    "other",
    [
        {"name": "quick"},
        {"name": "adm, steps 10"},
        {"images": 10_000},
        {"size": 512},
        {"reference": "/home/me/photos"},
        {"reference": "jit-imagenet"},
        {"extractor": "dinov2"},
    ],
)
def test_the_papers_figures_are_beside_what_goes_with_them_alone(other):
    assert "(published)" in table([result_of()])
    assert "(published)" not in table([result_of(**other)])


@pytest.mark.parametrize(("reference", "said"), [("adm-imagenet", "adm-imagenet"), ("/home/me/photos", "photos")])
def test_the_title_tells_the_reference_and_no_path(reference, said):
    assert table([result_of(reference=reference)]).splitlines()[0].endswith(f"256 x 256 pixels, against {said}")
