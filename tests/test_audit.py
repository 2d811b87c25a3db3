# SPDX-License-Identifier: Apache-2.0
"""The audit of a training step: who gathers, who only masks, and that counting changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import activesel
from activesel import Forward, Head, Pairs
from activesel.ledger import Cost, Verdict, audit, cost, forward_flops
from activesel.models import vit

B, KEEP = 20, 8


@pytest.fixture
def learner():
    return vit("nano", image_size=32, patch=8, channels=1, classes=10)


@pytest.fixture
def batch():
    return torch.rand(B, 1, 32, 32), torch.randint(10, (B,))


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def kept(model, batch, keep=KEEP):
    with torch.no_grad():
        scores = losses(model, batch)
    return activesel.sample(scores, keep, seed=0).take(batch)


def plain(model):
    return lambda batch: losses(model, batch).mean().backward()


def gathering(model, keep=KEEP):
    return lambda batch: losses(model, kept(model, batch, keep)).mean().backward()


def masking(model):
    def step(batch):
        each = losses(model, batch)
        (each * (each >= each.topk(KEEP).values[-1])).mean().backward()

    return step


def gathering_losses(model):
    """Forward over all rows with gradients, then a few of the losses: backward sees all rows."""
    return lambda batch: losses(model, batch).topk(KEEP).values.mean().backward()


def test_self_scored_gathering_costs_its_analytic_ratio(learner, batch):
    verdict = audit(gathering(learner), batch, learner, keep=KEEP)
    row = cost(learner, (1, 32, 32))
    analytic = (row.forward + KEEP / B * row.train) / row.train
    assert 0.7 < analytic < 0.76
    assert verdict.ratio == pytest.approx(analytic, rel=0.01)
    assert verdict.gathers and verdict.text.startswith("gathers and saves: 0.74x")
    assert verdict.forward_rows == B + KEEP and verdict.backward_rows == KEEP


@pytest.mark.parametrize("step", [masking, gathering_losses])
def test_masking_is_flagged(step, learner, batch):
    verdict = audit(step(learner), batch, learner, keep=KEEP)
    assert verdict.ratio >= 1 and not verdict.gathers
    assert str(verdict).startswith("only masks: 1.00x") and verdict.backward_rows == B
    assert not audit(step(learner), batch, learner).gathers, "nor without being told what is kept"


def test_scoring_first_and_masking_then_costs_more_than_nothing(learner, batch):
    def step(batch):
        with torch.no_grad():
            losses(learner, batch)
        masking(learner)(batch)

    assert audit(step, batch, learner).ratio == pytest.approx(4 / 3, rel=0.02)


def test_gathering_most_rows_is_told_from_masking(learner, batch):
    verdict = audit(gathering(learner, 18), batch, learner, keep=18)
    assert verdict.gathers and verdict.ratio > 1
    assert verdict.text.startswith("gathers, but saves nothing: 1.24x")


def test_a_plain_step_or_the_learner_are_one_yardstick(learner, batch):
    assert audit(plain(learner), batch, plain(learner)).ratio == 1
    by_step, by_model = (
        audit(gathering(learner), batch, p) for p in (plain(learner), copy.deepcopy(learner))
    )
    assert by_step == by_model and by_step.plain.forward == B * forward_flops(learner, (1, 32, 32))


def test_a_selector_with_small_scorers(learner, batch):
    scorers = [vit("femto", image_size=32, patch=8, channels=1, classes=10) for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (learner, scorers[0])]
    selector = activesel.Selector(*scorers, keep=KEEP, optimizer=optimizers[1])

    def step(batch):
        kept = selector(batch)
        plain(learner)(kept)
        optimizers[0].step()
        selector.update(kept)

    verdict = audit(step, batch, learner, keep=KEEP)
    big, small = cost(learner, (1, 32, 32)), cost(scorers[0], (1, 32, 32))
    expected = KEEP * (big.train + small.train) + 2 * B * small.forward
    assert verdict.step.train == pytest.approx(expected, rel=1e-6) and verdict.gathers


def test_dictionaries_and_chosen_inputs(batch):
    model = nn.Linear(5, 3)
    rows = {"id": torch.arange(B), "x": torch.randn(B, 5), "name": ["row"] * B}

    def step(batch):
        model(batch["x"][:5]).sum().backward()

    verdict = audit(step, rows, model, inputs=lambda batch: (batch["x"],))
    assert verdict == Verdict(B, None, Cost(150.0, 150.0), Cost(600.0, 600.0))


def test_checkpointed_forward_passes_belong_to_the_backward_pass(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 4), nn.Tanh(), nn.Linear(4, 2))

    def step(batch):
        checkpoint(model, batch[0], use_reentrant=False).sum().backward()

    verdict = audit(step, batch, lambda batch: model(batch[0]).sum().backward())
    assert verdict.step.forward == verdict.plain.forward
    assert verdict.step.backward >= verdict.plain.backward + 2 * B * 1024 * 4


def test_compiled_steps_are_counted_eagerly(learner, batch):
    compiled = torch.compile(learner, backend="eager")
    verdict = audit(lambda b: losses(compiled, kept(compiled, b)).mean().backward(), batch, learner)
    assert verdict == audit(gathering(learner), batch, learner)


def test_what_is_named_is_put_back(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.BatchNorm1d(10), nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain(model)(batch)
    optimizer.step()
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grads, generator = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()

    def step(batch):
        optimizer.zero_grad()
        plain(model)(batch)
        optimizer.step()

    audit(step, batch, step, restore=[model, optimizer])
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    audit(step, batch, step)
    assert not torch.equal(model[1].weight, state["1.weight"]), "what is not named trains"


def test_the_learner_as_yardstick_is_not_touched(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.BatchNorm1d(10))
    before = copy.deepcopy(model.state_dict())
    other = nn.Linear(1024, 10)
    audit(lambda b: other(b[0].flatten(1)).sum().backward(), batch, model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_nonsense_is_refused(learner, batch):
    step = plain(learner)
    with pytest.raises(TypeError, match="step must be callable, got int"):
        audit(3, batch, step)
    with pytest.raises(TypeError, match="plain must be callable, got NoneType"):
        audit(step, batch, None)
    with pytest.raises(TypeError, match="restore must hold things with state, got int"):
        audit(step, batch, step, restore=[3])
    with pytest.raises(ValueError, match="batch must hold a tensor with rows"):
        audit(step, ["row"], step)
    with pytest.raises(ValueError, match=r"keep must be in \[1, 20\], got 21"):
        audit(step, batch, step, keep=21)
    with pytest.raises(RuntimeError, match="step must run countable operations forward and back"):
        audit(lambda batch: None, batch, step)
    with pytest.raises(RuntimeError, match=r"plain must run countable .* got [1-9][0-9]* and 0"):
        audit(step, batch, lambda batch: learner(batch[0]))


def calls(backend):
    """Every operator, by name: a call, and what it must count."""
    features, weight = torch.randn(B, 16), torch.randn(10, 16)
    targets, logits = torch.randint(10, (B,)), torch.randn(2, B, 10)
    z = F.normalize(torch.randn(4, B, 16), dim=-1)
    head = {"online": Head(features, weight), "reference": Head(features, 2 * weight)}
    both = {"online": logits[0], "reference": logits[1], "targets": targets}
    pairs = {
        "online": Pairs(z[0], z[1], scale=10.0, bias=-1.0),
        "reference": Pairs(z[2], z[3], scale=10.0, bias=-1.0),
    }
    how = {"backend": backend}
    drawn = {"k": KEEP, "seed": 3, **how}
    models = [vit("femto", image_size=8, patch=4, channels=1, classes=10) for _ in range(2)]
    images = torch.rand(B, 1, 8, 8)
    forward = {
        name: Forward(model, images)
        for name, model in zip(("online", "reference"), models, strict=True)
    }
    scored = 2 * B * forward_flops(models[0], (1, 8, 8))
    return {
        "score": (lambda: activesel.score(**both, **how), 0),
        "score head": (lambda: activesel.score(**head, targets=targets, **how), 4 * B * 160),
        "select": (lambda: activesel.select(**both, **drawn), 0),
        "select head": (lambda: activesel.select(**head, targets=targets, **drawn), 4 * B * 160),
        "select forward": (lambda: activesel.select(**forward, targets=targets, k=KEEP), scored),
        "sample": (lambda: activesel.sample(logits[0, :, 0], KEEP, seed=3, **how), 0),
        "joint": (
            lambda: activesel.joint_select(**pairs, chunks=4, **drawn),
            2 * 4 * 16 * (6 * B + 2 * KEEP),
        ),
    }


@pytest.mark.parametrize("name", list(calls("torch")))
def test_operators_count_the_same_and_answer_the_same_inside(name, backend):
    run, flops = calls(backend)[name]
    torch.manual_seed(1)
    outside = run()
    torch.manual_seed(1)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        inside = run()
    assert counter.get_total_flops() == flops
    if isinstance(outside, torch.Tensor):
        assert torch.equal(inside, outside)
        return
    for field in ("indices", "keys", "scores", "threshold"):
        a, b = getattr(inside, field), getattr(outside, field)
        if name == "select forward":  # attention as products rounds otherwise
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), field
