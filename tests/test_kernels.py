# SPDX-License-Identifier: Apache-2.0
"""Triton kernels under the interpreter: every tile, every ragged edge, every way to go astray.

What all backends share (losses, layouts, seeds, top-k) is tested with the other backends; here is
what only these kernels have.
"""

import logging

import pytest
import torch

from activesel import _triton, ops, score, select, spec

if why := _triton.reason(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)

from test_select import Largest

from activesel.kernels import config, head, logits, rows, topk
from activesel.kernels.operands import Labels, Noise
from activesel.testing import assert_as_accurate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INF = float("inf")
NOISE = Noise(torch.tensor([5]), torch.tensor([7]), torch.tensor([0.5]), 3)


def side(rows, classes, width, x=BF16, w=BF16, bias=False):
    parts = [torch.randn(*rows, width).to(x), (torch.randn(classes, width) / width**0.5).to(w)]
    return [*parts, torch.randn(classes).to(w)] if bias else parts


def labels_of(y, classes, sigmoid=False, smoothing=0.0):
    tokens = y.shape[1] if y.ndim > 1 else 1
    return Labels(y.reshape(-1), tokens, classes, -100, sigmoid, smoothing)


def check(out, online, reference, y, sigmoid=False, smoothing=0.0):
    """Scores no worse than the specification's; flags, and keys given the scores, equal to it."""
    options = y, "sigmoid" if sigmoid else "softmax", smoothing, -100
    ours, flags = spec.score(online, reference, *options)
    exact = [[t.double() for t in operand] for operand in (online, reference)]
    losses = [double_loss(operand, *options) if operand else 0 for operand in exact]
    classes = online[-1].shape[0] if sigmoid else 0  # as many terms, each of about 1
    assert_as_accurate(out.scores, ours, losses[0] - losses[1], 3e-6 + 1e-7 * classes)
    noise = spec.noise(len(ours), NOISE.seed, NOISE.step, NOISE.offset)
    keys, _ = spec.key(out.scores, noise, NOISE.temperature)
    assert torch.equal(out.keys.view(torch.int32), keys.view(torch.int32))
    assert out.flags.max() == flags


def double_loss(operand, y, loss, smoothing, ignore):
    x = operand[0]
    if x.ndim == 1:
        return x
    if len(operand) > 1:
        x = x @ operand[1].T + (operand[2] if len(operand) > 2 else 0)
    classes, shape = x.shape[-1], y.shape
    known = (y != ignore) & (y >= 0) & (y < classes)
    hot = torch.nn.functional.one_hot(y.where(known, 0), classes).double()
    hot = hot * (1 - smoothing) + smoothing / classes
    if loss == "softmax":
        out = -(torch.log_softmax(x, -1) * hot).sum(-1)
    else:
        out = torch.nn.functional.binary_cross_entropy_with_logits(x, hot, reduction="none").sum(-1)
    counts = (y != ignore).view(shape[0], -1)
    out = out.where(known | (y == ignore), torch.nan).view(shape[0], -1)
    return out.where(counts, 0).sum(-1) / counts.sum(-1)


# -------------------------------------------------------------------------------------------- head

TILES = sorted(
    {(kind, tile) for (_, kind), tiles in config.TILES.items() for tile in tiles}, key=str
)


@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_every_tile(kind, tile, sigmoid):
    width = {"narrow": 72, "wide": 200, "float32": 40}[kind]
    x, w = (BF16, FP32) if kind == "float32" else (BF16, BF16)
    online, reference = side([70], 150, width, x, w, bias=True), side([70], 150, 32, x, w)
    y = torch.arange(70) % 150
    out = head.head(online, reference, labels_of(y, 150, sigmoid, 0.1), NOISE, tile)
    check(out, online, reference, y, sigmoid, 0.1)


@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("multiprocessors", [1, 7])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_classes_and_splits(monkeypatch, classes, multiprocessors, sigmoid):
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    online, reference = side([9], classes, 32), side([9], classes, 16)
    y = torch.arange(9) % classes
    y[3], y[4] = -100, classes - 1
    out = head.head(online, reference, labels_of(y, classes, sigmoid), NOISE)
    check(out, online, reference, y, sigmoid)


@pytest.mark.parametrize("widths", [(1, 7), (8, 32), (17, 64), (192, 64), (193, 64), (1024, 384)])
def test_widths(widths):
    online, reference = (side([5], 70, width) for width in widths)
    y = torch.arange(5)
    check(head.head(online, reference, labels_of(y, 70), NOISE), online, reference, y)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
def test_dtypes(dtypes):
    online, reference = side([40], 70, 48, *dtypes, bias=True), side([40], 70, 48)
    y = torch.arange(40)
    check(head.head(online, reference, labels_of(y, 70), NOISE), online, reference, y)


@pytest.mark.parametrize("given", [FP32, BF16, None])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_head_against_given_losses(given, swapped, tokens):
    """A cached reference is the commonest case; it may also come with several tokens per row."""
    shape = [20] if tokens == 1 else [20, tokens]
    sides = [side(shape, 30, 16), [] if given is None else [torch.randn(40)[::2].to(given)]]
    online, reference = reversed(sides) if swapped else sides
    y = torch.randint(30, shape)
    check(head.head(online, reference, labels_of(y, 30), NOISE), online, reference, y)


@pytest.mark.parametrize("multiprocessors", [1, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_tokens_ignored_and_out_of_range(monkeypatch, multiprocessors, smoothing, sigmoid):
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    online, reference = side([6, 4], 600, 24, bias=True), side([6, 4], 600, 24)
    y = torch.randint(600, (6, 4))
    y[0, 1:], y[1], y[2, 3], y[3, 0] = -100, -100, 600, -1
    out = head.head(online, reference, labels_of(y, 600, sigmoid, smoothing), NOISE)
    check(out, online, reference, y, sigmoid, smoothing)
    assert out.scores.isnan().tolist() == [False, True, True, True, False, False]
    assert out.flags.max() == spec.BAD_TARGET | spec.NONFINITE_SCORE


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_classes_switched_off_by_their_bias(monkeypatch, multiprocessors):
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    online = side([5], 600, 16, FP32, FP32, bias=True)
    online[2][:400] = -INF  # more than a tile, more than a split
    y = torch.tensor([450, 599, 0, 399, 400])
    got = head.head(online, [], labels_of(y, 600), NOISE).scores
    expected, _ = spec.score(online, [], y, "softmax", 0.0, -100)
    assert (got == INF).tolist() == [False, False, True, True, False]
    torch.testing.assert_close(got, expected)
    online[2][:] = -INF
    assert head.head(online, [], labels_of(y, 600), NOISE).scores.isnan().all()


def test_infinite_and_nan_features_stay_in_their_row():
    online = side([6], 70, 16, FP32, FP32)
    online[0][1, 3], online[0][4, 0] = INF, torch.nan
    y = torch.arange(6)
    out = head.head(online, [], labels_of(y, 70), NOISE)
    assert out.scores.isfinite().tolist() == [True, False, True, True, False, True]
    expected, _ = spec.score(online, [], y, "softmax", 0.0, -100)
    torch.testing.assert_close(out.scores[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_large_logits_keep_their_precision():
    """Exponents are taken relative to a whole number: no cancellation at 2^13."""
    online = side([30], 100, 64, FP32, FP32)
    online[0] *= 3000
    y = torch.randint(100, (30,))
    check(head.head(online, [], labels_of(y, 100), NOISE), online, [], y)


def test_nothing_of_all_rows_by_all_classes_is_allocated():
    online, reference = side([256], 4000, 32), side([256], 4000, 32)
    with Largest() as largest:
        _triton.select(online, reference, torch.zeros(256).long(), 50, *NOISE, "softmax", 0.1, -100)
    assert largest.elements <= 3 * 2048 + 4000 * 32, "a histogram, and the weights in fp32"
    assert largest.waits == []


# ----------------------------------------------------------------------------------------- layouts


def far(rows, width, dtype):
    """[rows, width] whose rows are so far apart that offsets pass 2^31; few pages are touched."""
    stride = (1 << 31) // (rows - 2)
    view = torch.zeros(1, dtype=dtype).new_empty(0)
    memory = torch.UntypedStorage((rows - 1) * stride * dtype.itemsize + 4096)
    view.set_(memory, 0, (rows, width), (stride, 1))
    return view.copy_(torch.randn(rows, width))


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("what", ["features", "weight", "logits", "losses"])
def test_offsets_beyond_32_bits(what):
    y = torch.arange(34) % 34
    if what == "logits":
        x = far(34, 40, BF16)
        got, expected = (logits.logits([x], [], labels_of(y, 40), NOISE), [x.clone()])
    elif what == "losses":
        x = far(34, 1, BF16)[:, 0]
        got, expected = rows.rows(x, None, None, NOISE), [x.clone()]
        y = None
    else:
        near = torch.randn(34, 16).bfloat16()
        x = far(34, 16, BF16)
        online = [x, near] if what == "features" else [near, x]
        got = head.head(online, [], labels_of(y, 34), NOISE)
        expected = [t.clone() for t in online]
    check(got, expected, [], y)


def test_misaligned_strided_and_expanded():
    y = torch.arange(20)
    memory = torch.randn(8000).bfloat16()
    plain = torch.randn(20, 16).bfloat16()
    weight = torch.randn(30, 16).bfloat16()
    layouts = [
        memory[1 : 1 + 20 * 16].view(20, 16),
        memory[: 20 * 40].view(20, 40)[:, 3:19],
        plain.T.contiguous().T,
        plain[:1].expand(20, 16),
    ]
    for x in layouts:
        for w in (weight, weight.T.contiguous().T, memory[7 : 7 + 480].view(30, 16)):
            got = head.head([x, w], [], labels_of(y, 30), NOISE)
            again = head.head([x.clone(), w.clone()], [], labels_of(y, 30), NOISE)
            assert torch.equal(got.scores, again.scores)
            check(got, [x, w], [], y)


@pytest.mark.parametrize("classes", [1, 3, 10, 12, 1000, 4096, 4097, 9000])
@pytest.mark.parametrize("padding", [0, 4, 6])
def test_logits_of_any_number_of_classes(classes, padding):
    """Whatever number of neighbours may be read at once."""
    online = torch.randn(7, classes + padding)[:, :classes]
    reference = torch.randn(7, classes).bfloat16()
    y = torch.arange(7) % classes
    out = logits.logits([online], [reference], labels_of(y, classes), NOISE)
    check(out, [online], [reference], y)


def test_programs_go_on_to_further_rows(monkeypatch):
    monkeypatch.setattr(logits, "PROGRAMS", 3)
    online, reference = torch.randn(50, 1500), torch.randn(50)
    y = torch.randint(1500, (50,))
    y[49] = 1500
    out = logits.logits([online], [reference], labels_of(y, 1500), NOISE)
    assert len(out.flags) <= 3
    check(out, [online], [reference], y)


# ------------------------------------------------------------------------------------------- top-k


@pytest.mark.parametrize("block", [64, 256])
def test_topk_across_blocks(monkeypatch, block):
    monkeypatch.setattr(topk, "BLOCK", block)
    keys = torch.randint(-3, 3, (300,)).float()
    keys[::7], keys[1::9], keys[2::11], keys[3::5] = torch.nan, INF, -INF, -0.0
    partial = torch.tensor([0, 1, 5], dtype=torch.int32)
    for k in (0, 1, *range(90, 220, 7), 258, 299, 300):  # among them, zeros of either sign
        indices, threshold, flags = topk.topk(keys, k, partial)
        expected = spec.topk(keys, k)
        assert torch.equal(indices, expected[0]) and flags == expected[2] | 5
        assert torch.equal(threshold.view(torch.int32), expected[1].view(torch.int32))


def test_topk_takes_a_fixed_number_of_launches(monkeypatch):
    launched = []
    for name in ("histogram_kernel", "count_kernel", "write_kernel"):
        kernel = getattr(topk, name)

        class Counted:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                launched.append(self.kernel)
                return self.kernel[grid]

        monkeypatch.setattr(topk, name, Counted(kernel))
    for size in (10, 20_000):
        launched.clear()
        topk.topk(torch.randn(size), 5)
        assert len(launched) + 1 <= 6, "and a memset"


# ---------------------------------------------------------------------------------------- dispatch


def test_soft_targets_are_left_to_torch_and_said_once(caplog):
    _triton.say_once.cache_clear()
    soft = torch.rand(20, 30)
    online, reference = torch.randn(20, 30), torch.randn(20)
    with caplog.at_level(logging.WARNING, logger="activesel"):
        for _ in range(2):
            given = dict(online=online, reference=reference, targets=soft)
            got = select(**given, k=5, seed=0, backend="triton")
            expected = select(**given, k=5, seed=0, backend="torch")
            assert torch.equal(got.indices, expected.indices)
    assert [record.message for record in caplog.records] == [
        "activesel: no kernel takes soft targets, so torch makes their losses"
    ]


@pytest.mark.parametrize("rows", [0, 3])
def test_empty_operands(rows):
    features, weight = torch.randn(rows, 0), torch.randn(5, 0)
    y = torch.zeros(rows).long()
    given = dict(online=[features, weight], reference=[], targets=y)
    got = _triton.score(*given.values(), "softmax", 0.0, -100)[0]
    torch.testing.assert_close(got, torch.full((rows,), 5.0).log())


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ((), {"head": "triton", "logits": "triton", "losses": "cuda", "topk": "cuda"}),
        (("cuda",), {"head": "triton", "logits": "triton", "losses": "triton", "topk": "triton"}),
        (("triton",), {"head": "torch", "logits": "torch", "losses": "cuda", "topk": "cuda"}),
        (("triton", "cuda"), {"head": "torch", "losses": "torch", "topk": "torch"}),
    ],
)
def test_what_auto_takes_on_a_gpu(monkeypatch, caplog, broken, expected):
    monkeypatch.delenv("ACTIVESEL_BACKEND", raising=False)
    monkeypatch.setattr(_triton, "reason", lambda d: "no Triton" if "triton" in broken else "")
    monkeypatch.setattr(ops._native, "cuda_reason", lambda i: "no nvcc" if "cuda" in broken else "")
    _triton.say_once.cache_clear()
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, logger="activesel"):
        for stage, name in expected.items():
            chosen, reason = ops.choose("auto", device, stage)
            assert chosen == name
            for other in broken:
                if other != "cuda" or stage in ("losses", "topk"):
                    assert {"triton": "no Triton", "cuda": "no nvcc"}[other] in reason or (
                        name == "cuda"
                    )
        left = [stage for stage, name in expected.items() if name == "torch"]
        assert len(caplog.records) == len(left), "one line for each that is left to torch"
        for other in broken:
            with pytest.raises(RuntimeError, match=f'backend="{other}" cannot run: no '):
                ops.choose(other, device, "topk")
        with pytest.raises(RuntimeError, match=r"no CUDA C\+\+ kernel takes head"):
            ops.choose("cuda", device, "head")


def test_without_a_gpu_and_without_the_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    _triton.reason.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: .*CUDA device'):
            select(online=torch.randn(4), k=1, backend="triton")
    finally:
        _triton.reason.cache_clear()


def test_scores_alone():
    online, reference = torch.randn(40, 9), torch.randn(40)
    y = torch.arange(40) % 9
    given = dict(online=online, reference=reference, targets=y)
    torch.testing.assert_close(score(**given, backend="triton"), score(**given, backend="torch"))
    with pytest.raises(ValueError, match="targets must be classes"):
        score(online=online, targets=y + 1, backend="triton")
