# SPDX-License-Identifier: Apache-2.0
"""The operators as torch sees them: schema, fake shapes, FLOPs, dispatch."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import activesel
from activesel import Head, ops

SEED, STEP, TEMPERATURE = torch.tensor([1]), torch.tensor([2]), torch.tensor([1.0])
B, T, C, D = 6, 3, 5, 4
LABELS = torch.arange(B) % C


def operands():
    """Tensor lists as the operators take them: online, reference, targets."""
    head = [torch.randn(B, D), torch.randn(C, D), torch.randn(C)]
    yield "losses", [torch.randn(B)], [torch.randn(B)], None
    yield "hard", [torch.randn(B)], [], None
    yield "easy", [], [torch.randn(B).bfloat16()], None
    yield "logits", [torch.randn(B, C)], [torch.randn(B, C).bfloat16()], LABELS
    yield "soft", [torch.randn(B, C)], [], torch.rand(B, C)
    yield "tokens", [torch.randn(B, T, C)], [torch.randn(B)], LABELS[:, None].repeat(1, T)
    yield "strided", [torch.randn(C, B).T], [torch.randn(1, C).expand(B, C)], LABELS
    yield "head", head, [torch.randn(B, C)], LABELS
    yield "heads", head[:2], [head[0].half(), head[1].half()], LABELS


@pytest.mark.parametrize("name", [o[0] for o in operands()])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_opcheck(backend, name, loss):
    online, reference, targets = next(o[1:] for o in operands() if o[0] == name)
    common = (loss, 0.1, -100, backend)
    torch.library.opcheck(torch.ops.activesel.score, (online, reference, targets, *common))
    torch.library.opcheck(
        torch.ops.activesel.select,
        (online, reference, targets, 2, SEED, STEP, TEMPERATURE, 7, *common),
    )


@pytest.mark.parametrize("name", [o[0] for o in operands()])
@pytest.mark.parametrize("k", [0, 2, B])
def test_fake_results_have_the_real_shapes(backend, name, k):
    online, reference, targets = next(o[1:] for o in operands() if o[0] == name)
    arguments = (
        online, reference, targets, k, SEED, STEP, TEMPERATURE, 0, "softmax", 0.0, -100, backend,
    )  # fmt: skip
    real = torch.ops.activesel.select(*arguments)
    with FakeTensorMode() as mode:
        fake = torch.ops.activesel.select(
            *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        )
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_direct_calls_and_dispatched_calls_agree(backend, monkeypatch):
    """Plain eager calls go past the dispatcher; it must not be noticed."""
    online, reference = torch.randn(B, C), torch.randn(B, C)

    def run():
        return activesel.select(
            online=online, reference=reference, targets=LABELS, k=2, seed=0, backend=backend
        )

    direct = run()
    monkeypatch.setattr(ops, "opaque", lambda x: True)
    dispatched = run()
    for name in ("indices", "scores", "keys", "threshold", "flags"):
        assert torch.equal(getattr(direct, name), getattr(dispatched, name))


def flops(function):
    counter = FlopCounterMode(display=False)
    with counter:
        out = function()
    return counter.get_total_flops(), out


def test_flops_of_heads_are_those_of_their_products(backend):
    head = Head(torch.randn(B, D), torch.randn(C, D))
    tokens = Head(torch.randn(B, T, 2), torch.randn(C, 2), torch.randn(C))

    def score(**operands):
        return activesel.score(**operands, backend=backend)

    assert flops(lambda: score(online=head, targets=LABELS))[0] == 2 * B * D * C
    total, _ = flops(lambda: score(online=head, reference=torch.randn(B, C), targets=LABELS))
    assert total == 2 * B * D * C
    total, _ = flops(lambda: score(reference=tokens, targets=LABELS[:, None].repeat(1, T)))
    assert total == 2 * B * T * 2 * C
    assert flops(lambda: score(online=torch.randn(B, C), targets=LABELS))[0] == 0


ORDER = """
import torch, {first}
import torch.utils.flop_counter
counter = torch.utils.flop_counter.FlopCounterMode(display=False)
import {second}
head = activesel.Head(torch.ones(8, 4), torch.ones(3, 4))
with counter:
    activesel.select(online=head, targets=torch.zeros(8, dtype=torch.long), k=2)
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("order", [("activesel", "torch"), ("torch", "activesel")])
def test_flops_are_counted_whoever_is_imported_first(order):
    code = ORDER.format(first=order[0], second=order[1])
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == f"{2 * 8 * 4 * 3}\n"


def test_flops_of_a_forward_are_counted_once(backend):
    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(D, D), torch.nn.Linear(D, C)

        def forward_features(self, x):
            return self.body(x)

    scorer = Scorer()
    total, _ = flops(
        lambda: activesel.select(
            online=activesel.Forward(scorer, torch.randn(B, D)), targets=LABELS, k=2, seed=0,
            backend=backend,
        )
    )  # fmt: skip
    assert total == 2 * B * D * D + 2 * B * D * C


def test_counting_flops_changes_no_result(backend):
    head = Head(torch.randn(B, D), torch.randn(C, D))

    def run():
        return activesel.select(online=head, targets=LABELS, k=2, seed=0, backend=backend)

    plain, (_, counted) = run(), flops(run)
    assert torch.equal(plain.keys, counted.keys) and torch.equal(plain.indices, counted.indices)


def test_every_choice_has_a_reason():
    for backend in ("auto", "torch"):
        name, reason = ops.choose(backend, torch.device("cpu"))
        assert name in ("torch", "native") and reason
    assert ops.choose("auto", torch.device("meta"))[0] == "torch"
    with pytest.raises(RuntimeError, match="native kernels run on the CPU, got tensors on meta"):
        ops.choose("native", torch.device("meta"))


def test_meta_tensors_give_shapes():
    picked = activesel.select(
        online=torch.empty(B, C, device="meta"), targets=LABELS.to("meta"), k=2, seed=0
    )
    assert picked.indices.shape == (2,) and picked.indices.device.type == "meta"


def test_allocations_of_the_package_are_poisoned():
    """The fixture that the other tests rely on to notice results that were never written."""
    scope = {"__name__": "activesel.somewhere", "torch": torch}
    exec("a, b = torch.empty(3), torch.zeros(1).new_empty(2, dtype=torch.int64)", scope)
    assert scope["a"].isnan().all() and (scope["b"] == torch.iinfo(torch.int64).min).all()
