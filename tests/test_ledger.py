# SPDX-License-Identifier: Apache-2.0
"""The ledger: counted FLOPs against arithmetic, and the published speedups."""

import pytest
import torch
from torch import nn

from activesel.ledger import (
    Ledger,
    forward_flops,
    learner_speedup,
    published_cost,
    selection_flops,
)
from activesel.models import SIZES, vit

# torch lists its constructors at the first use of a device context; poisoned ones must not be it.
with torch.device("meta"):
    torch.empty(0)


def analytic(size, image_size, patch, channels, classes, extra_tokens=0):
    """Two FLOPs per multiply-add: patches, then per block projections, attention, MLP; head."""
    width, depth, _ = SIZES[size]
    patches = (image_size // patch) ** 2
    tokens = patches + extra_tokens
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    macs = patches * channels * patch**2 * width + depth * block + width * classes
    return 2 * macs


@pytest.mark.parametrize("size", SIZES)
def test_counted_flops_are_the_analytic_ones(size):
    with torch.device("meta"):
        model = vit(size, classes=21_843)
    assert forward_flops(model, (3, 224, 224)) == analytic(size, 224, 16, 3, 21_843)


def test_class_token_and_small_images_too():
    model = vit("mini", image_size=28, patch=7, channels=1, classes=10, pool="class")
    assert forward_flops(model, (1, 28, 28)) == analytic("mini", 28, 7, 1, 10, extra_tokens=1)


@pytest.mark.parametrize("size, gmac", [("Ti", 1.25), ("S", 4.57), ("B", 17.5), ("L", 61.2)])
def test_published_forward_costs(size, gmac):
    with torch.device("meta"):
        model = vit(size, classes=1)
    assert forward_flops(model, (3, 224, 224)) / 2e9 == pytest.approx(gmac, rel=0.01)


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward_flops(model, (4,))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert next(model.parameters()).device.type == "cpu" and not model.training


def test_nothing_countable_is_refused():
    with pytest.raises(ValueError, match="at least one countable operation, got 0"):
        forward_flops(nn.ReLU(), (4,))


RATIO = 0.0713  # forward cost of ViT-Ti over ViT-B


@pytest.mark.parametrize(
    "beta, act, online_training, percent",
    [
        (1.00, RATIO + 1, 0.0, -79),  # RHO: the learner scores
        (0.82, 2 * RATIO, 0.0, 3),  # ClassAct
        (0.83, 2 * RATIO, 0.0, 2),  # ClassAct-Online
        (0.82, 2 * RATIO, 3 * RATIO, -2.8),  # ClassAct, its online scorer's training paid for
    ],
)
def test_published_compute_speedups(beta, act, online_training, percent):
    cost = published_cost(beta, 1.0, RATIO, act=act, rho=2, online_training=online_training)
    digits = 1 if isinstance(percent, float) else 0
    assert round(100 * (1 - cost / 3), digits) == percent


def test_ledger_lines_give_the_published_formula():
    """Per kept row of 1,000 IID updates' worth, ClassAct with rho = 2."""
    once = Ledger(reference_training=3 * RATIO)
    each = Ledger(1 * 3, 2 * RATIO, 2 * RATIO, online_training=3 * RATIO)
    ours = once + each * 0.82
    assert ours.total == pytest.approx(published_cost(0.82, 1, RATIO, 2 * RATIO, 2, 3 * RATIO))
    assert ours.compute_speedup(Ledger(learner=3)) == pytest.approx(-0.028, abs=5e-4)
    assert not ours.compute_positive(Ledger(learner=3))
    assert (once + Ledger(3, 4 * RATIO) * 0.82).compute_positive(Ledger(learner=3))


def test_sums_and_multiples_keep_lines_apart():
    total = Ledger(1, 2, 3, 4, 5, 6) + Ledger(10, 20, 30, 40, 50, 60) * 0.5
    assert total == Ledger(6, 12, 18, 24, 30, 36)
    assert total.total == 126


def test_speedups_refuse_nonsense():
    assert learner_speedup(0.75) == 0.25
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        learner_speedup(-1)
    with pytest.raises(ValueError, match="iid must have a positive total, got 0"):
        Ledger(1).compute_speedup(Ledger())


def test_uniform_selects_for_free():
    assert selection_flops(128, 10, models=0) == 0
    assert selection_flops(128, 10, models=2) == 128 * (4 * 10 * 2 + 40)
