# SPDX-License-Identifier: Apache-2.0
"""Every GPU backend against the specification, on a GPU.

Scores may differ by rounding: they have to be as near to float64 as eager fp32 is. From the scores
on, keys, rows, threshold and flags have to be the specification's, computed on the CPU, to the bit.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from on_gpu import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    NEEDS_GPU,
    B,
    C,
    D,
    T,
    every_backend,
    every_backend_for_losses,
    exact,
    gpu,
    head,
    labels,
    randn,
)
from test_select import eager_loss, layouts, make_targets

from activesel import Head, sample, select, spec
from activesel.testing import assert_as_accurate

pytestmark = [pytest.mark.gpu, NEEDS_GPU]

SEED, STEP, OFFSET = -(3**39), 2**32 - 2, 2**33 + 3
INF, NAN = math.inf, math.nan


def loss_of(operand, targets, loss, smoothing, dtype):
    if operand is None:
        return 0.0
    if isinstance(operand, Head):
        operand = F.linear(*(t if t is None else t.to(dtype) for t in operand))
    return operand.to(dtype) if operand.ndim == 1 else eager_loss(
        operand.to(dtype), targets, loss, smoothing
    )  # fmt: skip


def run(backend, k, given, **options):
    """Select on the GPU what is given on the CPU; check everything; return the selection."""
    noise = {"seed": SEED, "step": STEP, "offset": OFFSET, "temperature": 0.7}
    noise |= {name: options.pop(name) for name in list(options) if name in noise}
    picked = select(**gpu(given), **options, k=k, backend=backend, **noise)
    loss, smoothing = options.get("loss", "softmax"), options.get("label_smoothing", 0.0)
    eager, truth = (
        loss_of(given.get("online"), given.get("targets"), loss, smoothing, dtype)
        - loss_of(given.get("reference"), given.get("targets"), loss, smoothing, dtype)
        for dtype in (FP32, torch.float64)
    )
    assert_as_accurate(picked.scores.cpu(), eager, truth)
    exact(picked, k, **noise)
    return picked


def on_device(x):
    """The layouts of `x`, made on the GPU."""
    with torch.device(DEVICE):
        return list(layouts(x.to(DEVICE)))


# ------------------------------------------------------------------------------------------- heads

HEADS = {
    "bf16": dict(dtype=BF16),
    "fp16, bias": dict(dtype=FP16, bias=True),
    "fp32, bias": dict(dtype=FP32, bias=True),
    "bf16 features, fp32 weight": dict(dtype=BF16, weight_dtype=FP32),
}


@every_backend
@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_every_dtype(backend, kind):
    online, reference = (head(B, D, **HEADS[kind]) for _ in range(2))
    run(backend, 17, dict(online=online, reference=reference, targets=labels(B, ignored=False)))


@every_backend
@pytest.mark.parametrize("loss, smoothing", [("softmax", 0.1), ("sigmoid", 0.0), ("sigmoid", 0.2)])
@pytest.mark.parametrize("tokens", [False, True])
def test_heads_of_every_loss(backend, tokens, loss, smoothing):
    shape = (B, T) if tokens else (B,)
    sides = {name: head(*shape, D, bias=True) for name in ("online", "reference")}
    run(backend, 9, dict(**sides, targets=labels(*shape)), loss=loss, label_smoothing=smoothing)


@every_backend
@pytest.mark.parametrize("widths", [(32, 192), (50, 50), (384, 64), (1024, 17)])
def test_widths(backend, widths):
    online, reference = (head(B, width) for width in widths)
    run(backend, 17, dict(online=online, reference=reference, targets=labels(B)))


@every_backend
@pytest.mark.parametrize("rows, classes", [(1, 29_593), (300, 1000), (257, 2), (3, 1)])
def test_few_rows_many_classes_and_the_reverse(backend, rows, classes):
    sides = {name: head(rows, 64, classes=classes) for name in ("online", "reference")}
    run(backend, 1, dict(**sides, targets=torch.randint(classes, (rows,))))


@every_backend
def test_kinds_mix(backend):
    """A cached reference, logits, a narrower head, or nothing beside a head."""
    y = labels(B, T)
    kinds = [None, randn(B), randn(B, T, C, dtype=BF16), head(B, T, D), head(B, T, 16, dtype=FP16)]
    for online, reference in itertools.permutations(kinds, 2):
        given = dict(online=online, reference=reference)
        if any(x is not None and not (torch.is_tensor(x) and x.ndim == 1) for x in given.values()):
            given["targets"] = y
        run(backend, 8, given)


@every_backend
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_soft_targets(backend, loss):
    y = make_targets("soft", (B,), loss, None)
    run(backend, 8, dict(online=head(B, D), reference=randn(B, C), targets=y), loss=loss)


@every_backend
def test_layouts_of_heads(backend):
    """Misaligned, strided and expanded memory gives what contiguous memory gives."""
    plain, y = head(B, T, D, bias=True), labels(B, T)
    for (_, f), (_, w), (_, b), (_, t) in zip(*map(on_device, [*plain, y]), strict=True):
        copies = [v.contiguous().clone() for v in (f, w, b, t)]
        options = dict(reference=gpu(plain), k=9, seed=0, backend=backend)
        got = select(online=Head(f, w, b), targets=t, **options)
        want = select(online=Head(*copies[:3]), targets=copies[3], **options)
        torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-5, equal_nan=True)
        exact(got, 9)


# ------------------------------------------------------------------------------- logits and losses


@every_backend
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (FP16, FP32)])
@pytest.mark.parametrize("loss, smoothing", [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.1)])
@pytest.mark.parametrize("tokens", [False, True])
def test_logits(backend, tokens, loss, smoothing, dtypes):
    shape = (B, T) if tokens else (B,)
    online, reference = (randn(*shape, C, dtype=dtype) for dtype in dtypes)
    given = dict(online=online, reference=reference, targets=labels(*shape))
    run(backend, 9, given, loss=loss, label_smoothing=smoothing)


@every_backend
@pytest.mark.parametrize("classes", [1, 1000, 29_593])
def test_numbers_of_classes(backend, classes):
    y = torch.randint(classes, (B,))
    run(backend, 9, dict(online=randn(B, classes), reference=randn(B, classes), targets=y))


@every_backend
def test_layouts_of_logits(backend):
    other, y = gpu([randn(B), labels(B)])
    for _, view in on_device(randn(B, C, dtype=BF16)):
        got, want = (
            select(online=v, reference=other, targets=y, k=9, seed=0, backend=backend)
            for v in (view, view.contiguous().clone())
        )
        torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-5, equal_nan=True)


@every_backend_for_losses
@pytest.mark.parametrize("rows", [1, 2, 33, 1000, 8193, 163_840, 262_145, 2_000_000])
def test_losses(backend, rows):
    given = dict(online=randn(rows), reference=randn(rows, dtype=BF16))
    for k in {0, 1, rows // 5, rows - 1, rows} if rows < 10_000 else {rows // 5}:
        run(backend, k, given)


@every_backend_for_losses
@pytest.mark.parametrize("temperature", [0.0, 1e-3, INF])
def test_temperatures(backend, temperature):
    run(backend, 300, dict(online=randn(1000)), temperature=temperature)
    run(backend, 300, dict(reference=randn(1000, dtype=FP16)), temperature=temperature)


@every_backend_for_losses
def test_layouts_of_losses(backend):
    for _, view in on_device(randn(1000, dtype=BF16)):
        picked = select(online=view, k=300, seed=0, backend=backend)
        assert torch.equal(picked.scores, view.float())
        exact(picked, 300)
    many = gpu(randn(7, 1000, dtype=FP16)).T[:, 3]
    exact(select(online=many, k=9, seed=0, backend=backend), 9)


@every_backend_for_losses
def test_ties_infinities_and_nan(backend):
    """The order of the specification, where values say little or nothing."""
    special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    for rows in (300, 50_000, 300_000):
        equal, mixed = torch.zeros(rows), special[torch.randint(len(special), (rows,))]
        rare = torch.full((rows,), NAN)
        rare[:: rows // 7] = 1.0
        for losses in (equal, mixed, rare):
            for k, temperature in itertools.product((1, rows // 3, rows), (0.0, 1.0)):
                options = dict(seed=0, temperature=temperature, backend=backend)
                picked = select(online=losses.to(DEVICE), k=k, **options)
                exact(picked, k, temperature=temperature)


# --------------------------------------------------------------------------------------- bad input


@every_backend
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_bad_data_is_flagged_without_waiting(backend, kind):
    """Looking would stall the device, so a wrong target makes its row NaN and sets a bit."""
    online = head(B, D) if kind == "head" else randn(B, C)
    y = labels(B, ignored=False)
    y[3], y[4], y[5] = C, -1, -100
    temperature = torch.tensor([-1.0], device=DEVICE)
    picked = select(
        online=gpu(online), targets=gpu(y), k=9, seed=0, temperature=temperature, backend=backend
    )
    assert picked.scores.isnan().nonzero().flatten().tolist() == [3, 4, 5]
    wanted = spec.BAD_TARGET | spec.NONFINITE_SCORE | spec.BAD_TEMPERATURE
    assert int(picked.flags) == wanted


@every_backend
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_infinite_and_nan_logits(backend, kind):
    if kind == "head":  # one column, since 0 * inf would be NaN
        online = Head(
            torch.tensor([[0.0, -INF, INF, NAN, 2.0]]).T.bfloat16(),
            torch.tensor([[1.0], [-1.0]]).bfloat16(),
        )
        logits = F.linear(*online[:2]).float()
    else:
        online = logits = torch.tensor(
            [[0.0, -INF], [-INF, 0.0], [0.0, NAN], [INF, 0.0], [-INF, -INF], [1.0, 2.0]]
        )
    y = torch.zeros(len(logits), dtype=torch.long)
    picked = select(online=gpu(online), targets=gpu(y), k=2, seed=0, backend=backend)
    expected = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(picked.scores.cpu(), expected, equal_nan=True)
    exact(picked, 2)


@every_backend
def test_what_cannot_run_says_why(backend):
    with pytest.raises(RuntimeError, match="reference must be on cuda"):
        select(online=gpu(randn(4)), reference=randn(4), k=1, seed=0, backend=backend)
    with pytest.raises(RuntimeError, match="cuda"):
        select(online=gpu(randn(4, 3)), targets=gpu(labels(4) % 3), k=1, seed=0, backend="cuda")
    with pytest.raises(RuntimeError, match="native"):
        sample(gpu(randn(4)), 1, seed=0, backend="native")
