# SPDX-License-Identifier: Apache-2.0
"""Plans: lines add up, columns grow, break-even breaks even, nonsense is refused by name."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activesel.ledger import (
    LINES,
    METHODS,
    Cost,
    Ledger,
    Plan,
    charge,
    cost,
    published_cost,
    seconds,
)
from activesel.models import vit

R = 0.0713
positive = st.floats(1e-3, 1e3)


@st.composite
def plans(draw, convention=False):
    def price():
        forward = draw(positive)
        return Cost(forward, None if convention else forward * draw(st.floats(1.5, 2.5)))

    method = draw(st.sampled_from(sorted(METHODS)))
    before = METHODS[method].reference == "before"
    return Plan(
        *(price() for _ in range(3)),
        method=method,
        rho=draw(st.floats(1, 10)),
        beta=draw(st.floats(0, 3)),
        runs=draw(st.floats(1, 100)),
        reference_rows=draw(st.floats(0, 3)),
        cached=draw(st.none() | st.floats(0, 3)) if before else None,
        selection=draw(st.floats(0, 10)),
        decode=draw(st.floats(0, 10)),
        reuse=draw(st.booleans()) if METHODS[method].online == "learner" else False,
    )


@given(plans())
def test_lines_add_up_and_break_even_breaks_even(plan):
    for column in plan.columns():
        assert list(column.lines) == list(LINES) and min(column.lines.values()) >= 0
        assert column.total == pytest.approx(sum(column.lines.values()))
        assert column.compute_positive == (column.compute_speedup > 0) or math.isclose(
            column.total, column.base
        )
        if column.beta_max > 0:
            even = replace(column, beta=column.beta_max)
            assert even.compute_speedup == pytest.approx(0, abs=1e-9)
        else:
            assert replace(column, beta=0.0).compute_speedup <= 0


@given(plans(convention=True))
def test_charging_more_never_makes_it_cheaper(plan):
    published, computed, _ = plan.columns()
    everything = replace(plan, cached=None, reuse=METHODS[plan.method].reuse, decode=0.0)
    beside = METHODS[plan.method].reference == "beside"
    assert computed == replace(published, name="computed"), "nothing is counted but by convention"
    if not beside:  # published as if trained before, which can cost more or less
        assert everything.everything().total >= published.total * (1 - 1e-12)


@given(plans())
def test_a_line_not_charged_is_gone_and_no_other(plan):
    column = plan.everything()
    for name in LINES:
        less = column.without(name)
        assert less.lines == {**column.lines, name: 0.0}


@pytest.mark.parametrize("beta, online", [(0.82, 0.0), (0.82, 3 * R), (1.0, 0.0)])
def test_published_formula(beta, online):
    column = Plan(Cost(1.0), Cost(R), beta=beta)
    column = column.everything() if online else column.published()
    assert column.total == pytest.approx(published_cost(beta, 1.0, R, 2 * R, 2, online))


@pytest.mark.parametrize(
    "settings, without, expected",
    [
        ({}, ["reference_training"], 3 / (3 + 7 * R)),
        ({"cached": 0.0}, ["reference_training"], 3 / (3 + 5 * R)),
        ({}, [], (3 - 3 * R) / (3 + 7 * R)),
        ({}, ["online_training"], (3 - 3 * R) / (3 + 4 * R)),
        ({"runs": math.inf}, [], 3 / (3 + 7 * R)),
        ({"runs": 4}, [], (3 - 3 * R / 4) / (3 + 7 * R)),
    ],
)
def test_break_even_of_the_literature(settings, without, expected):
    column = Plan(Cost(1.0), Cost(R), **settings).everything().without(*without)
    assert column.beta_max == pytest.approx(expected)


@pytest.mark.parametrize(
    "method, percent",
    [
        ("rho", -78.55),
        ("jest", 100 * (1 - 7 / 3)),
        ("uniform", 0),
        ("selective-backprop", -200 / 3),
    ],
)
def test_by_convention(method, percent):
    plan = Plan(Cost(1.0), Cost(R), method=method, rho=5 if method == "jest" else 2)
    assert 100 * plan.published().compute_speedup == pytest.approx(percent)


def test_jest_with_everything_charged():
    plan = Plan(Cost(1.0), Cost(1.0), method="jest", rho=5, cached=0.1, runs=2)
    lines = plan.everything().lines
    assert lines["scoring_online"] == 5 and lines["scoring_reference"] == 0.05
    assert lines["reference_training"] == 1.5
    assert replace(plan, reuse=True).everything().lines["scoring_online"] == 4


def test_flexi_jest_trains_half_of_its_rows_on_coarse_patches():
    lines = Plan(Cost(1.0), Cost(0.28), method="flexi-jest", rho=5).published().lines
    assert lines["learner_forward"] == pytest.approx(0.64)
    assert lines["learner_backward"] == pytest.approx(1.28)
    assert lines["scoring_online"] == pytest.approx(1.4)
    assert lines["scoring_reference"] == lines["reference_training"] == 0


def test_a_reference_beside_is_charged_as_it_is_trained():
    plan = Plan(Cost(1.0), Cost(R), method="classact-online", beta=0.83)
    assert plan.published().lines["reference_training"] == 3 * R
    assert plan.everything().lines["reference_training"] == pytest.approx(0.83 * 2 * 3 * R)


def test_loading_is_rows_until_it_has_a_price():
    plan = Plan(Cost(1.0), Cost(R), beta=0.5, rho=4)
    assert plan.rows_read == 2 and plan.everything().lines["loading"] == 0
    column = replace(plan, decode=0.5).everything()
    assert column.lines["loading"] == 1 and column.base == 3.5
    assert replace(plan, decode=0.5).published() == plan.published()
    assert replace(plan, method="uniform").rows_read == 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"beta": math.nan}, "beta must be at least 0, got nan"),
        ({"beta": math.inf}, "beta must be finite, got inf"),
        ({"rho": 0.5}, "rho must be at least 1, got 0.5"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"reference_rows": -1}, "reference_rows must be at least 0, got -1"),
        ({"cached": -1}, "cached must be at least 0, got -1"),
        ({"selection": -1}, "selection must be at least 0, got -1"),
        ({"decode": -1}, "decode must be at least 0, got -1"),
        ({"ratio": -1}, "ratio must be at least 0, got -1"),
        ({"method": "clasact"}, r"method must be one of uniform, .*classact.*, got 'clasact'"),
        ({"method": "hard", "cached": 0.0}, "cached must be None for hard"),
        ({"method": "classact-online", "cached": 0.0}, "cached must be None for classact-online"),
        ({"reuse": True}, "reuse must be False for classact"),
        ({"online": None}, "online or reference must be given for classact"),
        ({"learner": Cost(0.0)}, "learner must cost more than 0"),
    ],
)
def test_nonsense_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"learner": Cost(1.0), "online": Cost(R), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learner": 1.0}, "learner must be a Cost, got float"),
        ({"reference": 1.0}, "reference must be a Cost, got float"),
        ({"rho": "2"}, "rho must be a number, got str"),
        ({"beta": True}, "beta must be a number, got bool"),
    ],
)
def test_kinds_are_refused_by_name(change, message):
    with pytest.raises(TypeError, match=message):
        Plan(**{"learner": Cost(1.0), "online": Cost(R), **change})


def test_costs_lines_and_charges_refuse_nonsense():
    with pytest.raises(ValueError, match="backward must be at least 0, got -1"):
        Cost(1.0, -1)
    with pytest.raises(ValueError, match=r"names must be of learner_forward, .*, got 'learner'"):
        Plan(Cost(1.0), Cost(R)).everything().without("learner")
    with pytest.raises(ValueError, match="scoring_online must be at least 0, got -1"):
        charge(Ledger(scoring_online=-1), Cost(1.0))


def test_one_machine_s_seconds_are_charged_for_any_run():
    """A third of a step is not what a forward pass takes there."""
    learner = Cost(0.0929 / 128, (0.2253 - 0.0929) / 128)
    scorer = Cost(0.001 / 128, 0.002 / 128)
    rows = Ledger(1280, 2560, 2560, 1280, 640, 2560)
    spent = charge(rows, learner, scorer, scorer, selection=1e-6)
    expected = Ledger(2.253, 0.02, 0.02, 0.03, 0.015, 2560e-6)
    assert vars(spent) == pytest.approx(vars(expected))
    assert learner.forward / learner.train == pytest.approx(0.41, abs=0.005)


def test_seconds_are_those_of_a_forward_pass_and_a_step():
    model = vit("micro", image_size=32, patch=8, channels=1)
    images = torch.rand(16, 1, 32, 32)
    spent = seconds(model, images, repeats=3)
    assert 0 < spent.forward < spent.train < 1
    assert all(p.grad is None for p in model.parameters())
    assert Plan(spent, cost(vit("nano"), (3, 224, 224))).everything().base == spent.train
    with pytest.raises(ValueError, match="args must hold a tensor with rows"):
        seconds(model, 3)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        seconds(model, images, repeats=0)
