# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels: near the truth, the same on any instruction set and thread count."""

import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import activesel
from activesel import _native, spec

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
INF, NAN = math.inf, math.nan
CLASSES = [1, 2, 15, 16, 17, 1000, 4096, 4097, 9001]


def truth(x, targets, loss, smoothing):
    """Losses of [N, C] logits in float64, and the size of the terms that cancel in them."""
    x, classes = x.double(), x.shape[-1]
    y = targets.double() if targets.is_floating_point() else F.one_hot(targets, classes).double()
    y = y * (1 - smoothing) + smoothing / classes
    if loss == "sigmoid":
        terms = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
        return (terms - x * y).sum(-1), (terms + (x * y).abs()).sum(-1)
    out = -(F.log_softmax(x, -1) * y).sum(-1)
    return out, out + 1


def make_targets(kind, shape):
    if kind == "classes":
        return torch.randint(0, shape[-1], shape[:-1])
    soft = torch.rand(shape)
    return soft if kind == "multi-hot" else soft / soft.sum(-1, keepdim=True)


def layouts(x):
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1] + 1).to(x.dtype)
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    yield "contiguous", x
    yield "strided", wide[..., 1::2]
    yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "misaligned", odd
    yield "expanded", x[:1].expand(x.shape)


@pytest.mark.parametrize("loss, kind", [
    ("softmax", "classes"), ("softmax", "distribution"),
    ("sigmoid", "classes"), ("sigmoid", "multi-hot"),
])  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("classes", CLASSES)
def test_loss_is_as_near_the_truth_as_torch(loss, kind, smoothing, dtype, classes):
    x = (torch.randn(5, classes) * 4).to(dtype)
    targets = make_targets(kind, x.shape)
    for name, logits in layouts(x):
        exact, size = truth(logits, targets, loss, smoothing)
        ours, _ = _native.row_loss([logits], targets, loss, smoothing, -100)
        eager, _ = spec.row_loss([logits], targets, loss, smoothing, -100)
        bound = (eager - exact).abs() + 1e-6 * size
        assert ((ours - exact).abs() <= bound).all(), (name, ours, exact)


@pytest.mark.parametrize("kind", ["classes", "distribution"])
def test_tokens_are_averaged_over_those_that_count(kind):
    x = torch.randn(4, 6, 33)
    targets = make_targets(kind, x.shape)
    if kind == "classes":
        targets[0, ::2] = -100
        targets[1] = -100
    for dtype in (targets.dtype, torch.int32 if kind == "classes" else torch.bfloat16):
        ours, _ = _native.row_loss([x], targets.to(dtype), "softmax", 0.1, -100)
        expected, _ = spec.row_loss([x], targets.to(dtype), "softmax", 0.1, -100)
        torch.testing.assert_close(ours, expected, equal_nan=True)
        assert ours.isnan().tolist() == [False, kind == "classes", False, False]


@pytest.mark.parametrize("classes", [3, 40, 9000])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_infinities_and_nan_are_those_of_torch(classes, loss, smoothing):
    x = torch.randn(9, classes)
    x[0, 1], x[1, 1], x[2], x[3, 1], x[4], x[5], x[6, :-1] = INF, -INF, -INF, NAN, INF, NAN, -INF
    x[7, 1:], x[8, -1] = -INF, 100
    soft = F.one_hot(torch.ones(9, dtype=torch.long), classes).float()
    for targets in (*(torch.full((9,), c) for c in (0, 1, classes - 1, classes, -1)), soft):
        ours, bad = _native.row_loss([x], targets, loss, smoothing, -100)
        expected, flagged = spec.row_loss([x], targets, loss, smoothing, -100)
        assert bad == flagged
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_small_losses_are_not_negative_and_as_good_as_eager():
    x = torch.zeros(40, 1000)
    x[:, 7] = torch.linspace(20, 80, 40)
    ours, _ = _native.row_loss([x], torch.full((40,), 7), "softmax", 0.0, -100)
    exact = 999 * torch.exp(-x[:, 7].double())
    eager = F.cross_entropy(x, torch.full((40,), 7), reduction="none")
    assert (ours >= 0).all()
    assert (ours - exact).abs().max() <= (eager - exact).abs().max() + 6e-8


def everything(rows=600, classes=3000):
    """Runs every kernel once on data large enough for several threads."""
    torch.manual_seed(1)
    x, y = torch.randn(rows, classes) * 3, torch.randn(rows, classes + 1)
    targets, soft = torch.randint(0, classes, (rows,)), torch.rand(rows, classes)
    common = 50, torch.tensor([5]), torch.tensor([6]), torch.tensor([0.7]), 3
    out = []
    for loss in ("softmax", "sigmoid"):
        for smoothing in (0.0, 0.1):
            out += _native.select([x], [y.half()], targets, *common, loss, smoothing, -100)
            out += _native.select([x], [], soft, *common, loss, smoothing, -100)
    keys = _native.noise(400_000, torch.tensor([1]), torch.tensor([2]), 7, 3)
    return [*out, keys, *_native.topk(keys.round(), 70_000)]


def test_instruction_sets_agree(every_isa):
    """Noise and top-k to the bit; losses too where multiply and add are one operation."""
    results = every_isa(everything)
    baseline = results.pop("baseline")
    for other in results.values():
        assert all(map(torch.equal, next(iter(results.values())), other))
        assert all(map(torch.equal, baseline[-4:], other[-4:]))
        for i in range(1, len(other) - 4, 5):  # of indices, scores, keys, threshold, flags
            torch.testing.assert_close(baseline[i], other[i], rtol=1e-5, atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits(with_threads):
    first = with_threads(1, everything)
    for threads in (2, 3, 7):
        assert all(map(torch.equal, first, with_threads(threads, everything)))


@pytest.mark.parametrize("offset", [0, 1, 1023, 2**34 + 3, 2**40 + 2])
@pytest.mark.parametrize("seed, step, chunk", [(0, 0, 0), (-1, 2**32 - 1, 15), (2**63 - 1, 7, 1)])
@pytest.mark.parametrize("rows", [0, 1, 5, 4099])
def test_noise_is_the_specification_s(rows, offset, seed, step, chunk):
    arguments = rows, torch.tensor([seed]), torch.tensor([step]), offset, chunk
    assert torch.equal(_native.noise(*arguments), spec.noise(*arguments))


@pytest.mark.parametrize("keys", [
    torch.zeros(1 << 20), torch.arange(1 << 20).float(), -torch.arange(1 << 20).float(),
    torch.full((1 << 20,), NAN), torch.arange(1 << 20) % 2 - 0.5, torch.full((1 << 20,), -INF),
    torch.arange(1 << 20).int().view(torch.float32),
], ids=["equal", "rising", "falling", "nan", "two", "-inf", "one digit apart"])  # fmt: skip
def test_no_order_of_keys_is_slow(keys, with_threads):
    start = time.perf_counter()
    _native.topk(torch.randn(1 << 20), 300_000)
    usual = time.perf_counter() - start
    start = time.perf_counter()
    ours = _native.topk(keys, 300_000)
    assert time.perf_counter() - start < 50 * usual  # a quadratic pass would be 10,000 times
    for threads in (1, 3):
        ours = with_threads(threads, lambda: _native.topk(keys, 300_000))
        assert all(map(torch.equal, ours, spec.topk(keys, 300_000)))


@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_head_holds_few_logits_at_once(monkeypatch, shape):
    held = []

    def linear(*arguments):
        out = plain(*arguments)
        held.append(out.numel())
        return out

    plain = F.linear
    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(spec, "HEAD_CHUNK", 5_000)
    features, weight, bias = torch.randn(*shape, 16), torch.randn(300, 16), torch.randn(300)
    targets = torch.randint(0, 300, shape)
    targets[0] = -100
    ours, _ = _native.row_loss([features, weight, bias], targets, "softmax", 0.0, -100)
    assert max(held) <= 5_000 and sum(held) == features[..., 0].numel() * 300
    expected, _ = spec.row_loss([features @ weight.T + bias], targets, "softmax", 0.0, -100)
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_only_plain_cpu_tensors_are_read():
    with pytest.raises(RuntimeError, match="need CPU tensors, got one on meta"):
        _native.topk(torch.zeros(3, device="meta"), 1)
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        _native.score([torch.zeros(3, dtype=torch.int32)], [], None, "softmax", 0.0, -100)
    with pytest.raises(ValueError, match="got sse9"):
        _native._module().set_isa("sse9")
    lazy = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag  # a view with its sign pending
    assert _native.score([lazy], [], None, "softmax", 0.0, -100)[0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("change, said", [
    (lambda patch: patch.setitem(sys.modules, "activesel._C", None), "cannot be loaded"),
    (lambda patch: patch.setattr(activesel, "__version__", "9.9"), "not 9.9: reinstall"),
], ids=["missing", "stale"])  # fmt: skip
def test_a_missing_or_stale_module_is_told(monkeypatch, change, said):
    with monkeypatch.context() as patch:
        change(patch)
        _native._load.cache_clear()
        try:
            assert not _native.available()
            assert said in _native.reason() and said in _native.cuda_reason()
            with pytest.raises(RuntimeError, match=said):
                _native.topk(torch.zeros(3), 1)
        finally:
            _native._load.cache_clear()


def test_cuda_is_explained():
    assert (_native.cuda_reason() == "") == (_native._module().cuda and torch.cuda.is_available())


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_needs_no_library_beyond_the_system_s():
    listing = subprocess.check_output(["objdump", "-p", _native._module().__file__], text=True)
    needed = {line.split()[1] for line in listing.splitlines() if "NEEDED" in line}
    usual = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "librt"}
    assert {n.split(".so")[0] for n in needed if not n.startswith("ld-")} <= usual
