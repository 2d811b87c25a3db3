# SPDX-License-Identifier: Apache-2.0
"""A scorer's forward, compiled: the same numbers, nothing left changed, and a way out."""

import copy
import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from activesel import Forward, operands, score
from activesel.models import vit

IMAGES, LABELS = torch.rand(4, 1, 28, 28), torch.arange(4)


def scorer():
    return vit("nano", image_size=28, patch=7, channels=1, classes=10)


@pytest.fixture
def calls(monkeypatch):
    """What the compiled function was called with; it runs uncompiled."""
    seen = []

    def compiled():
        def run(model, images):
            seen.append(model)
            return operands._features(model, images)

        return run

    monkeypatch.setattr(operands, "_compiled", compiled)
    monkeypatch.setattr(operands, "_uncompilable", set())
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_features_are_the_scorers():
    model = scorer().train()
    before = copy.deepcopy(model.state_dict())
    plain = score(online=Forward(model, IMAGES, compile=False), targets=LABELS)
    for _ in range(2):  # the second call replays
        compiled = score(online=Forward(model, IMAGES, compile=True), targets=LABELS)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    assert model not in operands._uncompilable and type(model) not in operands._uncompilable
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model.head.weight.mul_(2)
        next(model.parameters()).mul_(1.1)
    plain = score(online=Forward(model, IMAGES, compile=False), targets=LABELS)
    compiled = score(online=Forward(model, IMAGES, compile=True), targets=LABELS)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)  # not the old weights'


@pytest.mark.parametrize("wanted", [None, False, True])
def test_on_the_cpu_only_what_is_asked_for_is_compiled(calls, wanted):
    score(online=Forward(scorer(), IMAGES, compile=wanted), targets=LABELS)
    assert len(calls) == (wanted is True)


def test_a_scorer_without_features_is_never_compiled(calls):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    score(online=Forward(net, IMAGES, compile=True), targets=LABELS)
    assert calls == []


def test_counting_sees_the_forward(calls):
    """A compiled function hides its operations from dispatch modes."""
    model = scorer()
    with FlopCounterMode(display=False) as counter:
        score(online=Forward(model, IMAGES, compile=True), targets=LABELS)
    assert calls == []
    with FlopCounterMode(display=False) as alone:
        model(IMAGES)
    assert counter.get_total_flops() == alone.get_total_flops() > 0


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_tracing_sees_the_forward(calls):
    model = scorer()
    plain = score(online=Forward(model, IMAGES), targets=LABELS)

    @torch.compile(backend="eager")
    def traced(images):
        return score(online=Forward(model, images, compile=True), targets=LABELS)

    torch.testing.assert_close(traced(IMAGES), plain)
    assert calls == []


def test_what_cannot_be_compiled_runs_as_it_is(calls, monkeypatch, caplog):
    model = scorer()
    tried = []

    def broken():
        def run(model, images):
            tried.append(model)
            raise RuntimeError("no such backend")

        return run

    monkeypatch.setattr(operands, "_compiled", broken)
    plain = score(online=Forward(model, IMAGES), targets=LABELS)
    with caplog.at_level(logging.WARNING, logger="activesel"):
        for _ in range(2):
            got = score(online=Forward(model, IMAGES, compile=True), targets=LABELS)
            assert torch.equal(got, plain)
    assert len(tried) == 1, "it is not tried again"
    assert [r.message for r in caplog.records] == [
        "activesel: ViT cannot be compiled: no such backend"
    ]


def test_a_scorers_own_error_is_raised(calls):
    with pytest.raises(ValueError, match="x must be"):
        score(online=Forward(scorer(), torch.rand(4, 3, 28, 28), compile=True), targets=LABELS)
    assert not operands._uncompilable


def test_colour_images_and_expanded_buffers():
    """Buffers are put back in place, which a view of one number spread over many cannot take."""
    model = vit("nano", image_size=32, classes=5)
    model.register_buffer("spread", torch.ones(1).expand(3))
    got = score(online=Forward(model, torch.rand(4, 3, 32, 32)), targets=LABELS)
    assert got.isfinite().all() and model.spread.stride() == (0,)
