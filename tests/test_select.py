# SPDX-License-Identifier: Apache-2.0
"""Losses of every kind of operand against float64, strange memory layouts, and what they cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from activesel import Head, score, select, spec
from activesel.testing import TOLERANCE, assert_as_accurate

DTYPES = list(TOLERANCE)
B, T, C, D = 5, 3, 37, 8


def eager_loss(logits, targets, loss, smoothing=0.0, ignore=-100):
    """Per-row losses by F.cross_entropy and F.binary_cross_entropy_with_logits, in its dtype."""
    rows, classes = logits.shape[0], logits.shape[-1]
    x = logits.reshape(-1, classes)
    soft = targets.is_floating_point()
    y = targets.reshape(-1, classes).to(x) if soft else targets.reshape(-1).long()
    counts = torch.ones(len(x), dtype=torch.bool) if soft else y != ignore
    if loss == "softmax":
        out = F.cross_entropy(
            x, y, reduction="none", label_smoothing=smoothing, ignore_index=-100 if soft else ignore
        )
    else:
        hot = y if soft else F.one_hot(torch.where(counts, y, 0), classes).to(x)
        hot = hot * (1 - smoothing) + smoothing / classes
        out = F.binary_cross_entropy_with_logits(x, hot, reduction="none").sum(-1)
    out, counts = out.view(rows, -1), counts.view(rows, -1)
    return out.where(counts, 0).sum(-1) / counts.sum(-1)


def make_targets(kind, shape, loss, generator):
    if kind == "int":
        y = torch.randint(C, shape, generator=generator)
        y[torch.rand(shape, generator=generator) < 0.2] = -100
        y.view(-1)[0] = 0  # row 0 counts at least once
        return y
    soft = torch.rand(*shape, C, generator=generator)
    return soft / soft.sum(-1, keepdim=True) if loss == "softmax" else (soft > 0.8).float()


def check(operand, logits32, targets, loss, smoothing, backend, tolerance, ignore=-100):
    """A hard score is the loss, an easy one its negative."""
    eager = eager_loss(logits32, targets, loss, smoothing, ignore)
    truth = eager_loss(logits32.double(), targets, loss, smoothing, ignore)
    options = dict(
        targets=targets, loss=loss, label_smoothing=smoothing, ignore_index=ignore, backend=backend
    )
    hard = score(online=operand, **options)
    assert hard.dtype == torch.float32 and not hard.requires_grad
    assert_as_accurate(hard, eager, truth, tolerance)
    assert torch.equal(score(reference=operand, **options).nan_to_num(), -hard.nan_to_num())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["int", "soft"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(backend, dtype, tokens, loss, kind, smoothing):
    g = torch.Generator().manual_seed(0)
    shape = (B, T) if tokens else (B,)
    logits = (4 * torch.randn(*shape, C, generator=g)).to(dtype)
    targets = make_targets(kind, shape, loss, g)
    # The truth starts from the rounded logits, so that half-precision inputs cost nothing.
    check(logits, logits.float(), targets, loss, smoothing, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", ["int", "soft"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head(backend, dtype, tokens, bias, loss, kind):
    g = torch.Generator().manual_seed(1)
    shape = (B, T) if tokens else (B,)
    features = torch.randn(*shape, D, generator=g).to(dtype)
    weight = torch.randn(C, D, generator=g).to(dtype)
    head = Head(features, weight, torch.randn(C, generator=g).to(dtype) if bias else None)
    logits = F.linear(*(t if t is None else t.float() for t in head))
    targets = make_targets(kind, shape, loss, g)
    # fp32 logits whatever the features' dtype: bf16 logits would miss this tolerance by far.
    check(head, logits, targets, loss, 0.1, backend, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_targets_of_any_width(backend, dtype):
    logits, targets = torch.randn(B, C), torch.arange(B)
    expected = score(online=logits, targets=targets, backend=backend)
    assert torch.equal(score(online=logits, targets=targets.to(dtype), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_soft_targets(backend, dtype):
    logits, targets = torch.randn(B, C), torch.rand(B, C).softmax(-1).to(dtype)
    expected = score(online=logits, targets=targets.float(), backend=backend)
    got = score(online=logits, targets=targets, backend=backend)
    assert torch.allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_kinds_and_widths_mix(backend, loss):
    """The online side and the reference may be of different kinds; both see the same targets."""
    targets = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 5, 6], [0, 0, 0], [9, 9, 9]])
    wide = Head(torch.randn(B, T, D), torch.randn(C, D), torch.randn(C))
    narrow = Head(torch.randn(B, T, 2).bfloat16(), torch.randn(C, 2))
    logits, losses = torch.randn(B, T, C), torch.randn(B)
    options = dict(targets=targets, loss=loss, backend=backend)
    alone = {
        id(o): (o if o is losses else score(online=o, **options))
        for o in (wide, narrow, logits, losses)
    }
    for online in (wide, narrow, logits, losses):
        for reference in (wide, narrow, logits, losses):
            if online is reference is losses:
                continue
            got = score(online=online, reference=reference, **options)
            assert torch.equal(got, alone[id(online)] - alone[id(reference)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_losses(backend, dtype):
    online, reference = torch.randn(7).to(dtype), torch.randn(7).to(dtype)
    expected = online.float() - reference.float()
    assert torch.equal(score(online=online, reference=reference, backend=backend), expected)
    assert torch.equal(score(online=online, backend=backend), online.float())
    assert torch.equal(score(reference=reference, backend=backend), -reference.float())


def test_score_does_not_share_memory_with_the_losses(backend):
    losses = torch.randn(7)
    assert score(online=losses, backend=backend).data_ptr() != losses.data_ptr()


@pytest.mark.parametrize(
    ("loss", "logit"),
    [("softmax", 88.0), ("softmax", 1e4), ("softmax", 1.5e38), ("sigmoid", 88.0), ("sigmoid", 1e4)],
)
def test_extreme_logits(backend, loss, logit):
    logits = torch.tensor([[logit, 0.0, -logit], [-logit, logit, 0.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([0, 0, 2])
    truth = eager_loss(logits.double(), targets, loss)
    got = score(online=logits, targets=targets, loss=loss, backend=backend)
    assert_as_accurate(got, eager_loss(logits, targets, loss), truth)


def test_infinite_logits_and_nan(backend):
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, -inf], [-inf, 0.0], [0.0, nan], [inf, 0.0], [-inf, -inf]])
    picked = select(online=logits, targets=torch.zeros(5).long(), k=2, backend=backend, seed=0)
    expected = F.cross_entropy(logits, torch.zeros(5).long(), reduction="none")
    assert torch.equal(picked.scores.nan_to_num(nan=7), expected.nan_to_num(nan=7))
    assert picked.indices.tolist() == [0, 1] and int(picked.flags) == spec.NONFINITE_SCORE


def test_small_losses_keep_their_digits(backend):
    """1e-6 apart in the tail of training is still an order; bf16 or a careless log loses it."""
    margins = torch.linspace(8, 14, 50)
    logits = torch.stack([margins, torch.zeros(50)], 1)
    got = score(online=logits, targets=torch.zeros(50).long(), backend=backend)
    truth = torch.nn.functional.softplus(-margins.double())
    assert (got.double() - truth).abs().max() < 1.3e-7


def test_row_of_ignored_targets_scores_nan_and_is_kept_last(backend):
    targets = torch.tensor([[-1, -1], [0, -1], [1, 1]])
    picked = select(
        online=torch.randn(3, 2, C), targets=targets, k=2, ignore_index=-1, backend=backend, seed=0
    )
    assert picked.scores.isnan().tolist() == [True, False, False]
    assert picked.indices.tolist() == [1, 2]


# ----------------------------------------------------------------------------------------- layout


def layouts(x):
    """The same values as `x` in other memory layouts."""
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    yield "every other", wide[..., ::2]
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.flatten()
    yield "misaligned", flat[1:].view(x.shape)
    padded = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    padded[..., 2:-1] = x
    yield "padded", padded[..., 2:-1]
    yield "first row expanded", x[:1].expand(x.shape)
    yield "last dimension expanded", x[..., :1].expand(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (6, 33), (6, 4, 33)])
def test_layout_changes_nothing(backend, shape, dtype):
    x, other = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y = torch.randint(33, shape[:-1]) if len(shape) > 1 else None
    for name, view in layouts(x):
        same = view.contiguous().clone()
        a = score(online=view, reference=other, targets=y, backend=backend)
        b = score(online=same, reference=other, targets=y, backend=backend)
        assert torch.equal(a, b), name


@pytest.mark.parametrize("soft", [False, True])
def test_layout_of_targets_and_heads_changes_nothing(backend, soft):
    y = torch.rand(6, 4, 33) if soft else torch.randint(33, (6, 4))
    features, weight, bias = torch.randn(6, 4, 8), torch.randn(33, 8), torch.randn(33)
    plain = Head(features, weight, bias)
    for (name, f), (_, w), (_, b), (_, t) in zip(
        layouts(features), layouts(weight), layouts(bias), layouts(y), strict=True
    ):
        copies = [v.contiguous().clone() for v in (f, w, b, t)]
        ours = score(online=Head(f, w, b), reference=plain, targets=t, backend=backend)
        same = score(online=Head(*copies[:3]), reference=plain, targets=copies[3], backend=backend)
        assert torch.allclose(ours, same, atol=1e-6), name


def test_expanded_scalar_losses(backend):
    picked = select(online=torch.tensor(1.0).expand(9), k=3, temperature=0, seed=0, backend=backend)
    assert picked.indices.tolist() == [0, 1, 2]


def test_zero_rows(backend):
    labels = torch.zeros(0, dtype=torch.long)
    for online, targets in [
        (torch.zeros(0), None),
        (torch.zeros(0, C), labels),
        (torch.zeros(0, C), torch.zeros(0, C)),
        (torch.zeros(0, T, C), labels.view(0, 1).expand(0, T)),
        (torch.zeros(0, T, C), torch.zeros(0, T, C)),
        (Head(torch.zeros(0, D), torch.zeros(C, D)), labels),
        (Head(torch.zeros(0, T, D), torch.zeros(C, D)), labels.view(0, 1).expand(0, T)),
    ]:
        picked = select(online=online, targets=targets, k=0, seed=0, backend=backend)
        assert picked.indices.shape == picked.scores.shape == picked.keys.shape == (0,)
        assert picked.threshold == -math.inf and int(picked.flags) == 0
        assert picked.weights().shape == (0,)


def test_zero_tokens_score_nan(backend):
    got = score(
        online=torch.zeros(4, 0, C), targets=torch.zeros(4, 0, dtype=torch.long), backend=backend
    )
    assert got.isnan().all() and got.shape == (4,)


def test_one_row_and_one_class(backend):
    picked = select(
        online=torch.ones(1, 1), targets=torch.zeros(1).long(), k=1, seed=0, backend=backend
    )
    assert picked.indices.tolist() == [0] and picked.scores.tolist() == [0.0]


def test_threads_and_instruction_sets(every_isa, with_threads):
    """Losses are the same bits at any number of threads and within rounding on any machine."""
    logits, targets = torch.randn(200, 1003) * 4, torch.randint(1003, (200,))

    def run():
        return score(online=logits, targets=targets, backend="native")

    truth = eager_loss(logits.double(), targets, "softmax")
    eager = eager_loss(logits, targets, "softmax")
    results = every_isa(lambda: [with_threads(n, run) for n in (1, 2, 3)])
    for one, two, three in results.values():
        assert torch.equal(one, two) and torch.equal(one, three)
        assert_as_accurate(one, eager, truth, 1e-6)


# ----------------------------------------------------------------------------------- what it costs


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes, and whether one waits for the device."""

    def __init__(self):
        super().__init__()
        self.elements, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // 4)
        if func in WAITS:
            self.waits.append(str(func))
        return out


aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


@pytest.mark.parametrize("shape", [(1000, 4), (100, 10, 4)])
def test_head_never_holds_all_logits(host_module, shape):
    classes = 20_000
    features, weight = torch.randn(shape), torch.randn(classes, 4)
    with Largest() as largest:
        host_module.score(
            [features, weight], [], torch.zeros(shape[:-1]).long(), "softmax", 0.0, -100
        )
    assert largest.elements <= spec.HEAD_CHUNK < 1000 * classes / 4


def test_specification_never_waits_for_the_device():
    """On a GPU it must run inside a CUDA graph; reading one value back would break that."""
    features, weight = torch.randn(6, 4), torch.randn(5, 4)
    with Largest() as largest:
        spec.select(
            [features, weight], [torch.randn(6, 5)], torch.zeros(6).long(), 2, torch.tensor([1]),
            torch.tensor([2]), torch.tensor([1.0]), 0, "softmax", 0.1, -100,
        )  # fmt: skip
    assert largest.waits == []


def test_inputs_are_left_alone(backend):
    inputs = [torch.randn(B, C), torch.randn(B, C), torch.randint(C, (B,)), torch.tensor([3])]
    before = [t.clone() for t in inputs]
    online, reference, targets, step = inputs
    select(
        online=online, reference=reference, targets=targets, k=2, seed=0, step=step, backend=backend
    )
    assert all(map(torch.equal, inputs, before))


def test_no_gradients_flow(backend):
    logits = torch.randn(B, C, requires_grad=True)
    picked = select(online=logits, targets=torch.arange(B), k=2, seed=0, backend=backend)
    assert not picked.scores.requires_grad and not picked.keys.requires_grad
    learnt = torch.ones(1, requires_grad=True)
    picked = select(online=torch.randn(B), k=2, temperature=learnt, seed=0, backend=backend)
    assert not picked.keys.requires_grad and not picked.threshold.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_a_head(backend, dtype):
    head = Head(torch.randn(B, 64), torch.randn(C, 64))
    plain = score(online=head, targets=torch.arange(B), backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(score(online=head, targets=torch.arange(B), backend=backend), plain)
        assert torch.is_autocast_enabled("cpu")


def test_inside_function_transforms(backend):
    """Scoring is detached, so a differentiated function may contain it."""
    logits, y = torch.randn(B, C), torch.arange(B)

    def loss(w):
        picked = select(online=logits * w, targets=y, k=2, temperature=0, seed=0, backend=backend)
        return (w * logits)[picked.indices].sum()

    w = torch.tensor(2.0)
    kept = select(online=logits * w, targets=y, k=2, temperature=0, seed=0).indices
    assert torch.allclose(torch.func.grad(loss)(w), logits[kept].sum(), rtol=1e-4)
