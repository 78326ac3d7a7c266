"""The statistics against values that are known without them: Student's own data, Holm's procedure by hand."""

import math

import pytest

from study.report import rounded
from study.statistics import compare, holm

# Student (1908): hours of sleep gained under two drugs, ten patients. t = 4.0621, p = 0.002833, 95 % from 0.70 to 2.46.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_students_sleep():
    found = compare(dict(enumerate(SECOND)), dict(enumerate(FIRST)))
    assert found.n == 10 and found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.p == pytest.approx(0.00283289, abs=1e-7)


def test_only_seeds_that_both_have_are_paired():
    found = compare({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.5, 0: 1.0, 3: -5.0})
    assert (found.n, found.mean) == (2, 0.25)


def test_nothing_is_claimed_from_one_pair_or_none_and_equal_runs_differ_by_nothing():
    assert compare({}, {0: 1.0}).n == 0
    one = compare({0: 2.0}, {0: 1.0})
    assert one.mean == 1.0 and math.isnan(one.p) and math.isnan(one.low)
    same = compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[0] == pytest.approx(0.06) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.06)


def test_a_rounded_p_says_on_which_side_of_the_limit_it_lies():
    assert [rounded(p) for p in (0.0499999, 0.0500001, 0.0012345, math.nan)] == ["<0.05", "0.05", "0.0012", ""]
