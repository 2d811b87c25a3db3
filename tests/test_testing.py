# SPDX-License-Identifier: Apache-2.0
"""The public acceptance tests reject what they should (test_sampling.py has the wrong samplers)."""

import math

import pytest
import torch

from activesel.testing import (
    TOLERANCE,
    assert_as_accurate,
    assert_gradient_scale,
    assert_plackett_luce,
    draw_probabilities,
    inclusion_probabilities,
)

INF, NAN = math.inf, math.nan


def as_accurate(ours, eager, truth, *tolerance):
    truth = torch.tensor(truth, dtype=torch.float64)
    assert_as_accurate(torch.tensor(ours), torch.tensor(eager), truth, *tolerance)


def test_accuracy_is_relative_to_eager_torch():
    as_accurate([1.0, -2.0], [1.0, -2.0], [1.0, -2.0])
    as_accurate([1.1], [0.9], [1.0])  # no worse than eager
    as_accurate([1.1], [1.0], [1.0], 0.06)  # 0.06 * (1 + |truth|)
    as_accurate([NAN, INF, -INF], [NAN, INF, -INF], [NAN, INF, -INF])
    as_accurate([], [], [])


@pytest.mark.parametrize(
    ("ours", "truth"),
    [([1.0001], [1.0]), ([NAN], [1.0]), ([1.0], [NAN]), ([INF], [-INF]), ([INF], [NAN])],
)
def test_inaccuracy_is_rejected(ours, truth):
    with pytest.raises(AssertionError):
        as_accurate(ours, truth, truth)


def test_accuracy_names_the_worst_element():
    with pytest.raises(AssertionError, match=r"element 1 must be 2, got 3 \(eager torch 2\)"):
        as_accurate([1.1, 3.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(AssertionError, match="shapes"):
        as_accurate([1.0], [1.0, 2.0], [1.0])


def test_tolerances_grow_with_the_dtype():
    assert sorted(TOLERANCE.values()) == [1e-5, 1e-3, 1e-2]


def test_too_much_to_enumerate_is_refused():
    with pytest.raises(ValueError, match="65536 draws"):
        draw_probabilities(torch.zeros(12), 6)
    with pytest.raises(ValueError, match="16 rows, got 17"):
        inclusion_probabilities(torch.zeros(17), 2)
    for function in (draw_probabilities, inclusion_probabilities):
        with pytest.raises(ValueError, match=r"k must be in \[0, 3\], got 4"):
            function(torch.zeros(3), 4)


def test_ends_of_k():
    assert draw_probabilities(torch.zeros(3), 0) == {(): 1.0}
    both = inclusion_probabilities(torch.tensor([5.0, 0.0]), 2)
    assert torch.allclose(both, torch.ones(2, dtype=torch.float64))
    assert inclusion_probabilities(torch.tensor([5.0, 0.0]), 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rows", [[0, 0], [0], [0, 9], [0, 1, 2]])
def test_samplers_must_return_different_rows(rows):
    with pytest.raises(AssertionError, match="2 different rows of 3"):
        assert_plackett_luce(lambda scores, k, draw: rows, torch.zeros(3), 2, draws=10)


def test_a_row_never_drawn_is_noticed():
    with pytest.raises(AssertionError, match="row"):
        assert_plackett_luce(lambda scores, k, draw: [draw % 2], torch.zeros(3), 1, draws=200)


def test_gradients_must_say_something():
    with pytest.raises(AssertionError, match="not all of them 0"):
        assert_gradient_scale(lambda batch: [torch.zeros(2)], torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"keep must be in \(0, 4\), got 4"):
        assert_gradient_scale(lambda batch: [batch], torch.ones(1, 1), rows=4, keep=4)
