"""Protocols: which classes are drawn, and that what is measured can be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymflow.errors import InputError
from asymflow.evaluation import result
from asymflow.evaluation.features import EXTRACTORS
from asymflow.evaluation.measures import MEASURES, ORACLE, Reference, Samples
from asymflow.evaluation.protocol import Protocol, load_protocol, shipped
from asymflow.evaluation.rows import Rows


def test_every_shipped_protocol_is_whole_and_says_what_it_is():
    assert shipped() == ["adm", "captions", "edm2-dino", "jit", "quick", "shapes"]
    for name in shipped():
        protocol = load_protocol(name)
        assert protocol.name == name
        assert protocol.about
        assert load_protocol(name, {"num": 10}).name == f"{name}, num 10"
    adm = load_protocol("adm")
    labels = [adm.label(i, 1000) for i in range(adm.num)]
    assert np.bincount(labels).tolist() == [50] * 1000
    jit = load_protocol("jit")
    assert [jit.label(i, 1000) for i in range(50_000)] == sorted(labels)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(0, 2**61), st.integers(0, 2**50), st.sampled_from(["in turn", "shuffled"]))
def test_each_class_comes_once_before_any_comes_again(classes, seed, turn, order):
    protocol = Protocol(name="mine", num=2, seed=seed, order=order)
    found = [protocol.label(number, classes) for number in range(turn * classes, (turn + 1) * classes)]
    assert sorted(found) == list(range(classes))


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_fits_the_extractor_or_is_refused(extractor, name):
    """Whatever is not refused gives a number, or says why not."""
    changes = {"extractor": extractor, "measures": [name]}
    if (extractor == "oracle") != (name in ORACLE):
        with pytest.raises(InputError, match=f"the extractor {extractor} is not for {name}"):
            load_protocol("quick", changes)
        return
    protocol = load_protocol("quick", changes)
    columns = tuple(ORACLE) if extractor == "oracle" else ()
    features = Rows([torch.rand(20, 6)])
    sample = Samples(features, columns=columns)
    reference = None if columns else Reference(sample.statistics(), features)
    (found,) = result.measure(protocol.measures, sample, reference).values()
    assert found.value is not None or found.remarks[0].startswith("not measured: ")
