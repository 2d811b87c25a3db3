# SPDX-License-Identifier: Apache-2.0
"""Beta by equivalence against arithmetic, and at the edges of what uniform's budgets reach."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.equivalence import beta

UNIFORM = {50: [0.83, 0.85], 100: [0.86, 0.86], 200: [0.87, 0.89]}  # means .84, .86, .88


def test_half_way_up_is_half_way_in_log_updates():
    found = beta(60, [0.85], UNIFORM)
    assert found.value == pytest.approx(60 / math.sqrt(50 * 100))
    assert (found.low, found.high, found.text) == (None, None, "0.85")


def test_interval_is_that_of_the_metric():
    metrics = [0.858, 0.86, 0.862]
    found = beta(67, metrics, UNIFORM)
    half = stats.t.ppf(0.975, 2) * 0.002 / math.sqrt(3)  # 0.0050; 0.02 is one doubling
    assert found.value == pytest.approx(0.67)
    assert found.low == pytest.approx(0.67 * 2 ** (-half / 0.02))
    assert found.high == pytest.approx(0.67 * 2 ** (half / 0.02))
    assert found.text == f"0.67 ({found.low:.2f} to {found.high:.2f})"


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ([0.9], "< 0.50"),
        ([0.8], "> 2.00"),
        ([0.8, 0.8], "> 2.00"),
        ([0.86, 0.86], "1.00 (1.00 to 1.00)"),
        ([0.81, 0.86, 0.91], "1.00 (< 0.50 to > 2.00)"),
        ([0.85, 0.87, 0.93], "< 0.50 (< 0.50 to > 2.00)"),
        ([0.88, 0.88], "0.50 (0.50 to 0.50)"),
    ],
)
def test_nothing_is_extrapolated(metrics, text):
    found = beta(100, metrics, {50: [0.84], 100: [0.86], 200: [0.88]})
    assert found.text == text
    assert (found.value is None) == (text[0] in "<>")


def test_a_larger_budget_that_came_out_worse_is_pooled():
    found = beta(100, [0.85], {50: [0.84], 100: [0.86], 200: [0.84]})
    # isotonic: .84, .85, .85; .85 is reached with 100
    assert found.value == pytest.approx(1.0)
    assert beta(100, [0.8501], {50: [0.84], 100: [0.86], 200: [0.84]}).text == "< 1.00"


def test_one_budget_of_uniform_says_only_the_side():
    assert beta(67, [0.9], {100: [0.86]}).text == "< 0.67"
    assert beta(67, [0.8], {100: [0.86]}).text == "> 0.67"
    assert beta(67, [0.86], {100: [0.86]}).value == pytest.approx(0.67)


curve = st.dictionaries(
    st.integers(1, 10**6), st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6
)


@given(st.integers(1, 10**6), st.lists(st.floats(0, 1), min_size=1, max_size=5), curve)
def test_beta_is_ordered_and_stays_on_the_grid(updates, metrics, uniform):
    found = beta(updates, metrics, uniform)
    ends = [v for v in (found.low, found.value, found.high) if v is not None]
    assert ends == sorted(ends)
    for end in ends:
        assert updates / max(uniform) * (1 - 1e-9) <= end <= updates / min(uniform) * (1 + 1e-9)
    assert (found.value is None) == (found.text[0] in "<>")


@given(st.floats(0, 1), st.floats(0, 1), curve)
def test_a_better_metric_never_has_a_larger_beta(one, other, uniform):
    worse, better = sorted((one, other))
    a, b = (beta(100, [metric], uniform).value for metric in (worse, better))
    if a is not None and b is not None:
        assert b <= a * (1 + 1e-12)


@pytest.mark.parametrize(
    ("updates", "metrics", "uniform", "match"),
    [
        (100, [], UNIFORM, "at least one run"),
        (100, [0.8], {}, "at least one run"),
        (100, [0.8], {100: []}, "at least one run"),
        (0, [0.8], UNIFORM, "updates must be at least 1"),
        (100, [0.8], {0: [0.8]}, "updates must be at least 1"),
        (100, [math.nan], UNIFORM, "finite"),
        (100, [0.8], {100: [math.inf]}, "finite"),
    ],
)
def test_bad_input_is_named(updates, metrics, uniform, match):
    with pytest.raises(ValueError, match=match):
        beta(updates, metrics, uniform)
