# SPDX-License-Identifier: Apache-2.0
"""What a Selector leaves behind: exact resume, refused checkpoints, and an untouched world."""

import copy
import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import activesel
from activesel import Forward, Selector

B, K, D, C = 12, 4, 6, 3
SUPER_BATCHES = [
    (torch.randn(B, D, generator=torch.Generator().manual_seed(i)), (torch.arange(B) + i) % C)
    for i in range(12)
]
X, Y = SUPER_BATCHES[0]


def build(seed=0, beside=True, width=5, **options):
    torch.manual_seed(seed)

    def scorer():
        return nn.Sequential(nn.Linear(D, width), nn.BatchNorm1d(width), nn.Linear(width, C))

    online, reference = scorer(), scorer()
    if beside:
        optimizer = torch.optim.AdamW(reference.parameters(), lr=2e-2)
        options |= {"train_reference": True, "reference_optimizer": optimizer}
    optimizer = torch.optim.AdamW(online.parameters(), lr=1e-2)
    return Selector(online, reference, keep=K, optimizer=optimizer, seed=9, **options)


def train(sel, batches):
    kept = []
    for batch in batches:
        rows = sel(batch)
        kept.append((sel.last.indices, sel.last.keys))
        sel.update(rows)
    return kept


def flat(state):
    """Every leaf of a state as something that compares exactly."""
    leaves, structure = torch.utils._pytree.tree_flatten(state)
    return [v.tolist() if isinstance(v, torch.Tensor) else v for v in leaves], str(structure)


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_resumed_run_is_the_straight_run_bit_for_bit(cut, beside):
    straight = build(beside=beside)
    expected = train(straight, SUPER_BATCHES)
    first = build(beside=beside)
    train(first, SUPER_BATCHES[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = build(seed=77, beside=beside)
    if not beside:  # a reference that is not trained is not the Selector's to save
        resumed.reference.load_state_dict(first.reference.state_dict())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for (a, b), (c, d) in zip(train(resumed, SUPER_BATCHES[cut:]), expected[cut:], strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert flat(resumed.state_dict()) == flat(straight.state_dict())


def test_taking_a_state_changes_nothing():
    sel, twin = build(), build()
    assert flat(sel.state_dict()) == flat(twin.state_dict())  # valid before the first step
    for batch in SUPER_BATCHES[:3]:
        assert flat(sel.state_dict()) == flat(sel.state_dict())
        assert torch.equal(train(sel, [batch])[0][1], train(twin, [batch])[0][1])
    rng = torch.get_rng_state()
    sel.state_dict()
    sel.metrics()
    assert torch.equal(torch.get_rng_state(), rng)


def test_loading_into_a_running_selector():
    """Going back to an earlier state is a resume too: the clock on the device must follow."""
    sel = build()
    train(sel, SUPER_BATCHES[:2])
    state = copy.deepcopy(sel.state_dict())
    first = train(sel, SUPER_BATCHES[2:5])
    sel.load_state_dict(state)
    assert sel.step == 2 and sel.last is None
    for (a, b), (c, d) in zip(train(sel, SUPER_BATCHES[2:5]), first, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_the_learner_is_never_saved():
    learner, reference = nn.Linear(D, C), nn.Linear(D, C)
    sel = Selector(learner, reference, keep=K, method="rho_loss")
    sel((X, Y))
    assert sel.state_dict() == {
        "version": 1, "seed": 0, "step": 1, "examples_scored": B, "examples_trained": K,
    }  # fmt: skip


def test_large_seed_survives():
    sel = Selector(keep=K, method="uniform", seed=2**64 - 3)
    sel((X, Y))
    other = Selector(keep=K, method="uniform")
    other.load_state_dict(sel.state_dict())
    sel((X, Y)), other((X, Y))
    assert torch.equal(sel.last.keys, other.last.keys)


def spoil(*path, value=None, drop=False):
    def function(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        if drop:
            del state[last]
        else:
            state[last] = value

    return function


SPOILT = {
    "no version": spoil("version", drop=True),
    "later version": spoil("version", value=2),
    "missing part": spoil("reference", drop=True),
    "extra part": spoil("learner", value={}),
    "seed of another kind": spoil("seed", value="nine"),
    "seed too large": spoil("seed", value=2**64),
    "negative step": spoil("step", value=-1),
    "step too large": spoil("step", value=2**32),
    "fractional step": spoil("step", value=1.5),
    "counter of another kind": spoil("examples_scored", value=None),
    "online missing a weight": spoil("online", "0.weight", drop=True),
    "online of another shape": spoil("online", "0.weight", value=torch.zeros(2, 2)),
    "online not a tensor": spoil("online", "0.weight", value=3.0),
    "online not a state": spoil("online", value=None),
    "reference of another shape": spoil("reference", "2.bias", value=torch.zeros(9)),
    "optimizer not a state": spoil("optimizer", value=5),
    "optimizer without groups": spoil("optimizer", value={"state": {}, "param_groups": []}),
    "second optimizer missing a group": spoil("reference_optimizer", "param_groups", value=[]),
    "optimizer of another size": spoil("optimizer", "param_groups", 0, "params", value=[0]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_state_is_refused_and_changes_nothing(name):
    source, sel = build(), build(seed=5)
    train(source, SUPER_BATCHES[:3])
    train(sel, SUPER_BATCHES[5:7])
    state = copy.deepcopy(source.state_dict())
    SPOILT[name](state)
    before = flat(sel.state_dict())
    with pytest.raises(ValueError, match=r"state|seed|step|counter|examples|group"):
        sel.load_state_dict(state)
    assert flat(sel.state_dict()) == before


@pytest.mark.parametrize("state", [None, [1, 2], "state"])
def test_state_of_another_kind_is_refused(state):
    with pytest.raises((ValueError, TypeError), match="state"):
        build().load_state_dict(state)


# ------------------------------------------------------------------------------ an untouched world


class Restless(nn.Module):
    """Does in evaluation mode everything that a forward pass should not do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, C)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("averaged", torch.ones(1))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.averaged.data.mul_(2)  # as moving averages do; autograd's version counter misses it
        self.absent = torch.ones(1)
        torch.set_grad_enabled(True)
        return self.head(self.body(x)) + torch.rand(())


def fingerprint(model):
    return {
        "flags": [(name, m.training) for name, m in model.named_modules()],
        "buffers": [(name, b.tolist()) for name, b in model.named_buffers()],
        "parameters": [(n, p.tolist(), p.requires_grad) for n, p in model.named_parameters()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "inference": torch.is_inference_mode_enabled(),
    }


def partly_frozen():
    model = Restless().train()
    model.body[1].eval()  # as people freeze BatchNorm
    model.body[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [Restless, lambda: Restless().eval(), partly_frozen])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_scoring_leaves_the_world_as_found(make, grad, autocast):
    model, other = make(), make()
    sel = Selector(model, other, keep=K)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        before = fingerprint(model), fingerprint(other)
        sel((X, Y))
        assert (fingerprint(model), fingerprint(other)) == before
        assert sel.last.scores.dtype == torch.float32


def test_own_loss_leaves_the_world_as_found():
    model = Restless()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    before = fingerprint(model)
    Selector(model, keep=K, method="hard", loss=loss)((X, Y))
    assert fingerprint(model) == before


def test_world_is_as_found_after_an_error():
    class Fails(Restless):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("out of luck")

    model = Fails()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        Selector(model, keep=K, method="hard")((X, Y))
    assert fingerprint(model) == before


def test_dropout_draws_nothing_and_decides_nothing():
    model = nn.Sequential(nn.Linear(D, 64), nn.Dropout(0.9), nn.Linear(64, C)).train()
    first, second = (activesel.score(online=Forward(model, X), targets=Y) for _ in range(2))
    assert torch.equal(first, second)


def test_scorers_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C))
        inside = activesel.score(online=Forward(model, X), targets=Y)
    assert torch.equal(activesel.score(online=Forward(model, X), targets=Y), inside)


def test_scorer_with_features_and_head_is_scored_in_full_precision():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(D, 8), nn.Linear(8, C)

        def forward_features(self, x):
            return self.body(x)

        def forward(self, x):
            return self.head(self.forward_features(x))

    model = Scorer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = activesel.score(online=Forward(model, X), targets=Y)
        features = model.forward_features(X)
        assert model(X).dtype == features.dtype == torch.bfloat16
    truth = F.cross_entropy(model.head(features.float()), Y, reduction="none")
    assert torch.allclose(got, truth, atol=1e-6)


def test_head_that_does_more_than_its_weight_is_called():
    """A low-rank adapter is an nn.Linear whose forward adds to it; its weight is not the whole."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 5 * x[:, : self.out_features].flip(1)

    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Adapted(D, C)

        def forward_features(self, x):
            return x

        def forward(self, x):
            return self.head(x)

    model = Scorer()
    truth = F.cross_entropy(model(X), Y, reduction="none")
    assert torch.allclose(activesel.score(online=Forward(model, X), targets=Y), truth, atol=1e-5)
