"""toy.paper: which differences count, and the verdict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy.paper.differences import NOT, OPPOSITE, SHOWN, SO_FAR, TOO_FEW, Difference, verdict

values = st.dictionaries(st.integers(0, 5), st.floats(-10, 10), min_size=1, max_size=5)


@given(first=values, other=values, moved=st.floats(-5, 5))
def test_differences_are_of_the_seeds_that_both_have(first, other, moved):
    """What all runs of a seed have in common, such as an easy draw of data, is in no difference."""
    found = Difference.between(first, other)
    assert found.seeds == len(first.keys() & other.keys())
    swapped = Difference.between(other, first)
    assert swapped.counts == found.counts
    assert swapped.mean == pytest.approx(-found.mean, nan_ok=True)
    easier = [{seed: value + moved * seed for seed, value in values.items()} for values in (first, other)]
    again = Difference.between(*easier)
    assert again.mean == pytest.approx(found.mean, abs=1e-9, nan_ok=True)
    assert again.spread == pytest.approx(found.spread, abs=1e-6)


def test_one_seed_is_not_enough_and_noise_does_not_count():
    one = Difference.between({0: 5.0}, {0: 1.0})
    assert not one.counts
    assert verdict([Difference(-1.0, 0.1, 3), one]) == TOO_FEW
    assert verdict([Difference(-1.0, 0.1, 2)]) == TOO_FEW
    assert Difference.between({0: 5.0, 1: 5.1}, {0: 1.0, 1: 1.0}).counts
    assert not Difference.between({0: 5.0, 1: 3.0}, {0: 1.0, 1: 3.5}).counts
    assert Difference.between({0: None, 1: 2.0}, {0: 1.0, 1: 1.0}).seeds == 1


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=3))
def test_the_verdict_is_the_rule_of_the_page(signs):
    found = verdict([Difference(float(sign), 0.1, 3) for sign in signs])
    lower, higher = signs.count(-1), signs.count(1)
    assert (found == SHOWN) == (lower == len(signs))
    assert (found == SO_FAR) == (0 < lower < len(signs) and not higher)
    assert (found == OPPOSITE) == (higher == len(signs))
    assert found in (SHOWN, SO_FAR, OPPOSITE, NOT)
