"""Tests over seeds, beside scipy's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpcli.significance import Difference, difference, holm, paired, standard_error

VALUES = st.lists(st.integers(-1000, 1000).map(float), min_size=2, max_size=6)


def by_seed(values):
    return dict(enumerate(values))


def test_pairs_are_tested_as_scipy_does():
    ours, theirs = [0.94, 0.95, 0.97], [0.93, 0.93, 0.96]
    found = difference(by_seed(ours), by_seed(theirs))
    assert (found.test, found.pairs) == ("paired", 3)
    assert found.mean == pytest.approx(0.04 / 3)
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_other_seeds_are_tested_by_welch():
    ours, theirs = [0.94, 0.95, 0.97, 0.91], [0.93, 0.90]
    found = difference(by_seed(ours), {10: theirs[0], 11: theirs[1]})
    assert (found.test, found.pairs) == ("welch", 0)
    assert found.p == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def test_seeds_that_only_one_has_are_left_out_of_pairs():
    assert paired({0: 1.0, 1: 2.0, 7: 99.0}, {0: 0.0, 1: 1.5, 8: -99.0}).mean == 0.75


@pytest.mark.parametrize(
    ("ours", "theirs", "mean"),
    [({0: 2.0}, {0: 1.0}, 1.0), ({0: 2.0}, {1: 1.0, 2: 0.0}, 1.5), ({}, {0: 1.0}, None)],
)
def test_one_seed_says_nothing_about_noise(ours, theirs, mean):
    found = difference(ours, theirs)
    assert (found.mean, found.p, found.standard_error) == (mean, None, None)


def test_pairs_that_do_not_vary_or_are_too_few():
    assert difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).p is None
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == Difference(0.0, 0.0, 1.0, "paired", 2)
    assert difference({0: 1.0, 1: 1.0}, {2: 3.0, 3: 3.0}).p is None
    assert paired({1: 1.0}, {1: 0.5}) == Difference(0.5, pairs=1)


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_the_other_way_round_only_the_sign_changes(a, b):
    ours, theirs = by_seed(a), by_seed(b)
    there, back = difference(ours, theirs), difference(theirs, ours)
    assert there.mean == pytest.approx(-back.mean)
    assert there.p == (None if back.p is None else pytest.approx(back.p))
    assert there.p is None or 0 <= there.p <= 1


def test_standard_error():
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_many_comparisons_raise_each_p_value():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
