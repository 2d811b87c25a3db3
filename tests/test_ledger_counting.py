# SPDX-License-Identifier: Apache-2.0
"""Counting: any callable, any inputs, both passes, and a counter that has to prove itself."""

import functools

import pytest
import torch
from test_ledger import analytic
from torch import nn
from torch.utils import flop_counter

from activesel.ledger import cost, forward_flops, self_check, training_flops
from activesel.loop.icons import LENGTH
from activesel.loop.pairs_cost import pair_flops
from activesel.models import dual, vit

SMALL = {"image_size": 32, "patch": 8, "channels": 1, "classes": 10}


@pytest.mark.parametrize("size, pool", [("nano", "mean"), ("micro", "class"), ("Ti", "mean")])
def test_training_is_three_forward_passes_but_for_the_pixels_gradient(size, pool):
    with torch.device("meta"):
        model = vit(size, pool=pool, **SMALL)
    forward = analytic(size, 32, 8, 1, 10, extra_tokens=pool == "class")
    pixels = 2 * 16 * 64 * model.config.width
    assert forward_flops(model, (1, 32, 32)) == forward
    assert training_flops(model, (1, 32, 32)) == 3 * forward - pixels
    assert training_flops(model, (1, 32, 32), convention=True) == 3 * forward


def test_methods_partials_and_closures_count_as_the_module_does():
    model = vit("nano", **SMALL)
    whole = cost(model, (1, 32, 32))
    assert cost(lambda x: model(x), (1, 32, 32)) == whole
    assert cost(functools.partial(model), (1, 32, 32)) == whole
    head = 2 * 32 * 10
    assert cost(model.forward_features, (1, 32, 32)).forward == whole.forward - head
    assert all(p.grad is None for p in model.parameters())


def test_tokens_keywords_and_two_towers():
    shapes = {"image_size": 32, "patch": 8, "channels": 1, "vocabulary": 50, "length": LENGTH}
    model = dual("micro", **shapes)
    pair = cost(model, (1, 32, 32), ((LENGTH,), torch.int64))
    assert pair.forward == pair_flops("micro", 8)
    assert 1.9 < pair.backward / pair.forward < 2
    named = {"images": (1, 32, 32), "tokens": ((LENGTH,), torch.int64)}
    assert cost(model, named) == pair


def test_a_model_is_neither_moved_nor_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, (3, 8, 8))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    cost(lambda x: model(x), (3, 8, 8))
    del before["1.num_batches_tracked"]  # torch lets fake batches count
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in before.items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


def test_frozen_parts_get_no_gradient_and_a_frozen_model_was_trained_before():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    all_of_it = cost(model, (8,))
    model[0].requires_grad_(False)
    assert cost(model, (8,)).backward == 2 * 8 * 2, "the head's weights, nothing further down"
    assert cost(model.requires_grad_(False), (8,)) == all_of_it


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert cost(model, (8,)).backward == 2 * 8 * 8 * 3


@pytest.mark.parametrize(
    "inputs, got", [((3.5,), "3.5"), (((0, 2),), "(0, 2)"), (((True,),), "(True,)")]
)
def test_shapes_are_refused_by_name(inputs, got):
    with pytest.raises(TypeError, match=r"inputs must be shapes of one row") as error:
        forward_flops(nn.Linear(2, 2), *inputs)
    assert got in str(error.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a module or a callable, got str"):
        forward_flops("ViT", (3,))
    with pytest.raises(ValueError, match="must return something that its parameters"):
        cost(lambda x: x @ x.T, (4,))


@pytest.mark.parametrize(
    "operation, factor, cause",
    [
        (torch.ops.aten.bmm, 2, r"attention \(twice\)"),
        (torch.ops.aten.bmm, 0, r"attention \(not at all\)"),
        (torch.ops.aten.mm, 2, "the backward pass"),
        (torch.ops.aten.addmm, 2, "forward passes"),
    ],
)
def test_a_counter_that_is_off_is_not_used(operation, factor, cause, monkeypatch):
    right = flop_counter.flop_registry[operation]
    wrong = functools.wraps(right)(lambda *args, **kwargs: factor * right(*args, **kwargs))
    self_check.cache_clear()
    monkeypatch.setitem(flop_counter.flop_registry, operation, wrong)
    with pytest.raises(RuntimeError, match=f"FLOP counter must count .*: {cause} counted wrongly"):
        forward_flops(nn.Linear(2, 2), (2,))
    monkeypatch.undo()
    assert forward_flops(nn.Linear(2, 2), (2,)) == 8


def test_it_proves_itself_once():
    self_check.cache_clear()
    forward_flops(nn.Linear(2, 2), (2,))
    forward_flops(nn.Linear(2, 2), (2,))
    assert self_check.cache_info().misses == 1
