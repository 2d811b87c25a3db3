# SPDX-License-Identifier: Apache-2.0
"""The Selector: methods, schedule, batches of any structure, training the scorers, metrics."""

import math
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from activesel import Selector, sample
from activesel.testing import assert_gradient_scale

B, K, D, C = 12, 4, 6, 3
X, Y = torch.randn(B, D, generator=torch.Generator().manual_seed(3)), torch.arange(B) % C


def pair(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(D, C), nn.Linear(D, C)


def losses(model, x=X, y=Y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


def adam(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr)


# ---------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", ["hard", "easy", "learnability", "rho_loss"])
def test_methods_keep_the_rows_they_say(method):
    online, reference = pair()
    temperature = 0.0 if method == "rho_loss" else 0.5
    options = {} if method == "rho_loss" else {"temperature": 0.5}
    sel = Selector(online, reference, keep=K, method=method, seed=3, **options)
    expected = {
        "hard": losses(online),
        "easy": -losses(reference),
        "learnability": losses(online) - losses(reference),
        "rho_loss": losses(online) - losses(reference),
    }[method]
    for step in range(3):
        x, y, index = sel((X, Y, torch.arange(B)))
        assert torch.allclose(sel.last.scores, expected, atol=1e-6)
        picked = sample(sel.last.scores, K, temperature, seed=3, step=step)
        assert torch.equal(index, picked.indices)
        assert torch.equal(x, X[index]) and torch.equal(y, Y[index])


def test_uniform_runs_no_scorer():
    def refuses(x):
        raise AssertionError("the scorer ran")

    sel = Selector(refuses, refuses, keep=K, method="uniform", seed=1)
    for step in range(3):
        _, _, index = sel((X, Y, torch.arange(B)))
        expected = sample(torch.zeros(B), K, math.inf, seed=1, step=step)
        assert torch.equal(index, expected.indices)
    assert sel.examples_scored == 0 and sel.examples_trained == 3 * K


def test_methods_do_without_the_scorer_they_do_not_need():
    online, reference = pair()
    Selector(online, keep=K, method="hard")((X, Y))
    Selector(None, reference, keep=K, method="easy")((X, Y))
    Selector(keep=K, method="uniform")((X, Y))


def test_temperature_may_change_on_the_way():
    online, reference = pair()
    sel = Selector(online, reference, keep=K)
    sel((X, Y))
    sel.temperature = 0.0
    sel((X, Y))
    assert torch.equal(sel.last.keys, sel.last.scores)
    sel.temperature = torch.tensor([2.0])
    sel((X, Y))
    assert torch.equal(sel.last.keys, sample(sel.last.scores, K, 2.0, seed=0, step=2).keys)


def test_sigmoid_and_soft_targets():
    online, reference = pair()
    soft = torch.rand(B, C)
    sel = Selector(online, reference, keep=K, loss="sigmoid", optimizer=adam(online))
    batch = sel((X, soft))

    def bce(model):
        return F.binary_cross_entropy_with_logits(model(X), soft, reduction="none").sum(-1)

    assert torch.allclose(sel.last.scores, bce(online) - bce(reference), atol=1e-5)
    sel.update(batch)


def test_token_targets_with_ignored_places():
    online, reference = pair()
    x, y = torch.randn(B, 5, D), torch.randint(C, (B, 5))
    y[:, 3:] = -100
    for loss in ("softmax", "sigmoid"):
        sel = Selector(online, reference, keep=K, loss=loss, optimizer=adam(online))
        batch = sel((x, y))
        assert sel.last.scores.isfinite().all()
        sel.update(batch)
        assert all(p.isfinite().all() for p in online.parameters())


def test_own_loss_and_inputs():
    online, reference = pair()
    batch = {"image": X, "label": Y, "weight": torch.rand(B)}
    seen = []

    def loss(model, batch):
        seen.append(torch.is_grad_enabled())
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    by_loss = Selector(online, reference, keep=K, loss=loss, optimizer=adam(online))
    kept = by_loss(batch)
    by_inputs = Selector(online, reference, keep=K, inputs=lambda b: (b["image"], b["label"]))
    assert torch.equal(by_inputs(batch)["weight"], kept["weight"])
    assert torch.allclose(by_loss.last.scores, losses(online) - losses(reference), atol=1e-6)
    before = online.weight.clone()
    by_loss.update(kept)
    assert not torch.equal(online.weight, before) and seen == [False, False, True]


# ---------------------------------------------------------------------------- schedule and sizes


def test_schedule():
    online, reference = pair()
    sel = Selector(online, reference, keep=K, temperature=0.5, start=2, end=8, warmup=4, seed=1)
    plain = losses(online) - losses(reference)
    for step in range(10):
        sel((X, Y))
        if 2 <= step < 8:
            ramp = min((step - 1) / 4, 1.0)
            expected = sample(sel.last.scores, K, 0.5 / ramp, seed=1, step=step)
            assert torch.allclose(sel.last.scores, plain, atol=1e-6)
        else:
            expected = sample(torch.zeros(B), K, math.inf, seed=1, step=step)
        assert torch.equal(sel.last.indices, expected.indices)
    assert sel.examples_scored == 6 * B and sel.step == 10


def test_batch_of_keep_rows_comes_back_unchanged():
    sel = Selector(*pair(), keep=B)
    batch = {"x": (X, Y), "names": ["a"] * B}
    assert sel(batch) is batch
    assert sel.last is None and sel.step == 1 and sel.examples_scored == 0
    assert set(sel.metrics()) == {
        "activesel/step", "activesel/examples_scored", "activesel/examples_trained"
    }  # fmt: skip


def test_last_smaller_batch_is_refused():
    with pytest.raises(ValueError, match=r"keep=13 rows, got 12"):
        Selector(*pair(), keep=13)((X, Y))


# ----------------------------------------------------------------------------------- structures

Sample = namedtuple("Sample", "x y")


class Encoding(UserDict):
    """What tokenizers return: a mapping that is not a dict."""


INDEX, NAMES = torch.arange(B), [f"row {i}" for i in range(B)]
BATCHES = {
    "tuple": ((X, Y, INDEX), lambda b: b[2]),
    "list": ([X, Y, INDEX], lambda b: b[2]),
    "named tuple": (Sample((X, INDEX), Y), lambda b: b.x[1]),
    "dict": ({"x": X, "y": Y, "i": INDEX, "epoch": 3}, lambda b: b["i"]),
    "nested": ({"a": {"x": X}, "b": [Y, (INDEX, NAMES)]}, lambda b: b["b"][1][0]),
    "mapping": (Encoding({"x": X, "y": Y, "i": INDEX}), lambda b: b["i"]),
    "strings first": ({"names": NAMES, "x": X, "i": INDEX}, lambda b: b["i"]),
    "numpy": ({"i": np.arange(B), "x": X}, lambda b: torch.from_numpy(b["i"])),
    "numpy only": ({"i": np.arange(B)}, lambda b: torch.from_numpy(b["i"])),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_structure(name):
    batch, index_of = BATCHES[name]
    sel = Selector(*pair(), keep=K, inputs=lambda b: (X, Y), seed=4)
    kept = sel(batch)
    assert type(kept) is type(batch)
    assert torch.equal(index_of(kept), sel.last.indices) and len(sel.last.indices) == K
    assert torch.equal(index_of(batch), torch.arange(B))  # the user's batch is as it was


def test_first_tensor_need_not_hold_rows():
    """A tensor of something else, met first, must not decide how many rows there are."""
    batch = {"class_weights": torch.ones(C), "x": X, "y": Y}
    sel = Selector(*pair(), keep=K, inputs=lambda b: (b["x"], b["y"]))
    kept = sel(batch)
    assert kept["x"].shape == (K, D) and kept["class_weights"].shape == (C,)


def test_ids_are_removed_and_remembered():
    sel = Selector(*pair(), keep=K, inputs=lambda b: (b["x"], b["y"]), id_key="id")
    batch = {"x": X, "y": Y, "id": NAMES}
    kept = sel(batch)
    assert set(kept) == {"x", "y"} and "id" in batch
    assert sel.kept_ids == [NAMES[i] for i in sel.last.indices]
    sel({name: value[:K] for name, value in batch.items()})
    assert sel.kept_ids == NAMES[:K]


# -------------------------------------------------------------------------------------- training


def test_update_is_one_plain_step_on_the_rows_kept():
    (online, reference), (twin, _) = pair(), pair()
    sel = Selector(online, reference, keep=K, optimizer=adam(online))
    batch = sel((X, Y))
    frozen = [p.clone() for p in reference.parameters()]
    with torch.no_grad():  # a caller may be anywhere
        sel.update(batch)
    optimizer = adam(twin)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    optimizer.step()
    for ours, expected in zip(online.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert all(map(torch.equal, frozen, reference.parameters()))


def test_reference_trained_beside_sees_the_whole_super_batch():
    (online, reference), (_, twin) = pair(), pair()
    sel = Selector(
        online, reference, keep=K, optimizer=adam(online), train_reference=True,
        reference_optimizer=adam(reference, 2e-2),
    )  # fmt: skip
    optimizer = adam(twin, 2e-2)
    for _ in range(3):
        sel.update(sel((X, Y)))
        optimizer.zero_grad()
        F.cross_entropy(twin(X), Y).backward()
        optimizer.step()
    for ours, expected in zip(reference.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_update_before_a_call_changes_nothing():
    online, reference = pair()
    sel = Selector(
        online, reference, keep=K, optimizer=adam(online), train_reference=True,
        reference_optimizer=adam(reference),
    )  # fmt: skip
    before = online.weight.clone()
    with pytest.raises(RuntimeError, match="must follow a call"):
        sel.update((X[:K], Y[:K]))
    assert torch.equal(online.weight, before)


def test_rho_loss_never_trains_the_learner():
    learner, reference = pair()
    sel = Selector(learner, reference, keep=K, method="rho_loss")
    with pytest.raises(RuntimeError, match="optimizer"):
        sel.update(sel((X, Y)))


def test_gradient_has_the_size_of_the_rows_kept():
    net = nn.Linear(D, C)

    def gathered(batch):
        x, y = Selector(net, net, keep=2)(batch)
        return torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))

    def masked(batch):
        x, y = batch
        mask = torch.zeros(len(y))
        mask[:2] = 1
        loss = (F.cross_entropy(net(x), y, reduction="none") * mask).mean()
        return torch.autograd.grad(loss, list(net.parameters()))

    row = X[:1], Y[:1]
    assert_gradient_scale(gathered, row)
    with pytest.raises(AssertionError, match=r"0\.25 times as long"):
        assert_gradient_scale(masked, row)


# --------------------------------------------------------------------------------------- metrics

NAMES_OF_METRICS = {
    "step", "examples_scored", "examples_trained", "score_p2.5", "score_p25", "score_p50",
    "score_p75", "score_p97.5", "score_mean", "score_kept_mean", "gain", "nonfinite", "flags",
    "threshold", "ess",
}  # fmt: skip


def test_metrics():
    online, reference = pair()
    sel = Selector(online, reference, keep=K, temperature=0.5)
    assert set(sel.metrics()) < {f"activesel/{name}" for name in NAMES_OF_METRICS}
    x = X.clone()
    x[0] = math.nan
    sel((x, Y))
    got = {name.removeprefix("activesel/"): value for name, value in sel.metrics().items()}
    assert set(got) == NAMES_OF_METRICS
    assert all(isinstance(v, torch.Tensor) and v.shape == () for v in got.values())
    clean, kept = sel.last.scores[1:], sel.last.scores[sel.last.indices]
    assert (got["step"], got["examples_scored"], got["examples_trained"]) == (1, B, K)
    assert torch.allclose(got["score_mean"], clean.mean())
    assert torch.allclose(got["score_p25"], clean.quantile(0.25))
    assert torch.allclose(got["gain"], kept.mean() - clean.mean())
    assert got["nonfinite"] == 1 and got["flags"] == 1 and 0 not in sel.last.indices
    p = (clean / 0.5).softmax(0)
    assert torch.allclose(got["ess"], 1 / (B * p.square().sum()))


@pytest.mark.parametrize(
    ("scores", "temperature", "expected"),
    [
        ([0.0] * 4, 1.0, 1.0),
        ([5.0, 0.0, 1.0, 2.0], math.inf, 1.0),
        ([5.0, 0.0, 1.0, 2.0], 0.0, 0.25),  # all mass on one row
        ([3e38, 0.0, 1.0, 2.0], 1e-3, 0.25),
    ],
)
def test_effective_fraction_of_the_super_batch(scores, temperature, expected):
    def loss(model, batch):
        return torch.tensor(scores)

    sel = Selector(nn.Identity(), keep=1, method="hard", loss=loss, temperature=temperature)
    sel((torch.arange(4),))
    assert sel.metrics()["activesel/ess"].item() == pytest.approx(expected)
