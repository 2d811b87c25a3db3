# SPDX-License-Identifier: Apache-2.0
"""The compiled sums of joint selection, held against float64 and against the specification."""

import contextlib
import ctypes
import gc
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import activesel
from activesel import _native, spec_joint

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
INF, NAN = torch.inf, torch.nan
LOSSES = ["sigmoid", "softmax"]
REGIMES = [(10.0, -10.0), (100.0, -10.0), (10.0, 0.0), (1.0, 3.0)]  # scale, bias


def embed(rows, width, scale=10.0, bias=-10.0, dtype=torch.float32):
    z = F.normalize(torch.randn(2, rows, width), dim=2).to(dtype)
    return [z[0], z[1], torch.tensor([scale]), torch.tensor([bias])]


def state_of(rows, loss):
    if loss == "sigmoid":
        return torch.randn(1, rows)
    return torch.where(torch.rand(4, rows) < 0.3, -INF, torch.randn(4, rows))


def truth(state, online, reference, rows, chunk, loss):
    """The definition, in float64, with the whole matrix."""
    state = state.double()
    rows = torch.arange(state.shape[1]) if rows is None else rows
    apart = (rows[:, None] != chunk) & (chunk >= 0)
    for m, side in enumerate((online, reference)):
        if not side:
            continue
        image, text, scale, bias = (x.double() for x in side)
        for way, (a, b) in enumerate(((image, text), (text, image))):
            x = scale * (a[rows] @ b[chunk.clamp_min(0)].T)
            if loss == "sigmoid":
                state[0] += (1 - 2 * m) * torch.where(apart, F.softplus(x + bias), 0.0).sum(1)
            else:
                lse = torch.where(apart, x, -INF).logsumexp(1)
                state[2 * m + way] = torch.logaddexp(state[2 * m + way], lse)
    return state


def added(state, online, reference, rows, chunk, loss, engine=_native):
    state = state.clone()
    engine.pair_add(state, online, reference, rows, chunk, loss)
    return state


def assert_near(state, online, reference, rows, chunk, loss):
    """At most three times as far from the truth as the specification in float32."""
    arguments = (state, online, reference, rows, chunk, loss)
    exact, eager = truth(*arguments), added(*arguments, spec_joint)
    ours = added(*arguments)
    known = exact.isfinite()
    assert torch.equal(ours[~known], exact[~known].float())
    error, allowed = (ours - exact)[known].abs(), (eager - exact)[known].abs().max()
    size = max(float(side[2]) for side in (online, reference) if side) + exact[known].abs().max()
    assert error.max() <= 3 * allowed + 2e-7 * size, (error.max(), allowed)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("sides", ["both", "online", "reference"])
def test_sums_are_those_of_the_definition(loss, regime, sides):
    online = embed(301, 37, *regime) if sides != "reference" else []
    reference = embed(301, 70, *regime) if sides != "online" else []
    chunk = torch.randperm(301)[:123]
    chunk[[0, 60, 122]] = -1
    assert_near(state_of(301, loss), online, reference, None, chunk, loss)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 130), chosen=st.integers(0, 250),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    loss=st.sampled_from(LOSSES), some=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_at_any_size(rows, chosen, widths, loss, some, seed):
    torch.manual_seed(seed)
    online, reference = embed(260, widths[0]), embed(260, widths[1], 3.0, 1.0)
    at = torch.randperm(260)[:rows] if some else None
    chunk = torch.randperm(260)[:chosen]
    chunk[torch.rand(chosen) < 0.1] = -1
    assert_near(state_of(rows if some else 260, loss), online, reference, at, chunk, loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["columns", "rows", "transposed", "expanded", "misaligned"])
def test_any_layout_and_dtype(loss, dtype, layout):
    online, reference = embed(100, 300, dtype=dtype), embed(100, 21, dtype=dtype)

    def laid_out(x):
        if layout == "columns":
            return torch.zeros(*x.shape, 2, dtype=dtype)[..., 1].copy_(x)
        if layout == "rows":
            return torch.cat([x, torch.full_like(x, NAN)], 1)[:, : x.shape[1]]
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "expanded":
            return x[:1].expand(x.shape)
        return torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)

    other = [[laid_out(x) if x.ndim == 2 else x for x in side] for side in (online, reference)]
    plain = [[x.contiguous().float() for x in side] for side in other]
    state, chunk = state_of(100, loss), torch.arange(3, 90, 2)
    ours = added(state, *other, None, chunk, loss)
    assert torch.equal(ours, added(state, *plain, None, chunk, loss))
    assert_near(state, *plain, None, chunk, loss)


def everything(loss):
    torch.manual_seed(1)
    online, reference = embed(1500, 90), embed(1500, 130, 100.0)
    state, rows = state_of(1500, loss), torch.randperm(1500)[:1001]
    whole = added(state, online, reference, None, torch.randperm(1500)[:400], loss)
    return whole, added(state[:, :1001], online, reference, rows, rows[::3], loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_instruction_sets_agree(every_isa, loss):
    """To the bit where multiply and add are one operation."""
    results = every_isa(lambda: everything(loss))
    baseline = results.pop("baseline")
    for other in results.values():
        assert all(map(torch.equal, next(iter(results.values())), other))
        for a, b in zip(baseline, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sides", ["both", "online", "reference"])
def test_every_instruction_set_sums_right(every_isa, sides):
    online = embed(97, 33) if sides != "reference" else []
    reference = embed(97, 20) if sides != "online" else []
    for loss in LOSSES:
        state, chunk = state_of(97, loss), torch.randperm(97)[:50]
        every_isa(lambda s=state, c=chunk, n=loss: assert_near(s, online, reference, None, c, n))


@pytest.mark.parametrize("loss", LOSSES)
def test_any_number_of_threads_gives_the_same_bits(with_threads, loss):
    first = with_threads(1, lambda: everything(loss))
    for threads in (2, 3, 7):
        assert all(map(torch.equal, first, with_threads(threads, lambda: everything(loss))))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_bad_candidates_keep_to_themselves(loss, value):
    online, reference = embed(150, 40), embed(150, 40)
    state, chunk = state_of(150, loss), torch.arange(0, 150, 7)
    before = added(state, online, reference, None, chunk, loss)
    bad = torch.tensor([1, 47, 48, 99, 149])
    online[0][bad, 3], reference[1][bad] = value, value
    after = added(state, online, reference, None, chunk, loss)
    good = torch.ones(150, dtype=torch.bool)
    good[bad] = False
    assert torch.equal(before[:, good], after[:, good])


@pytest.mark.parametrize("loss", LOSSES)
def test_similarities_that_overflow_are_those_of_torch(loss):
    """Far beyond unit length: thousands of nats each, and not one infinity."""
    online = [x * 30 if x.ndim == 2 else x for x in embed(64, 16, 100.0)]
    assert_near(state_of(64, loss), online, [], None, torch.arange(40), loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_the_same_rows_as_the_specification(loss, chunks):
    def side(width):
        image, text, scale, bias = embed(500, width)
        return activesel.Pairs(image, text, scale, bias)

    online, reference = side(48), side(31)
    for temperature in (0.0, 1.0):
        ours, theirs = (
            activesel.joint_select(
                online=online, reference=reference, k=40, chunks=chunks, loss=loss,
                temperature=temperature, seed=3, backend=backend,
            )
            for backend in ("native", "torch")
        )  # fmt: skip
        assert torch.equal(ours.indices, theirs.indices)
        for name in ("scores", "keys", "threshold", "batch_score"):
            a, b = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def resident():  # bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_is_linear_in_the_rows():
    """At B = 8,192, D = 256 less than 64 MB beyond the inputs; a B x B matrix alone is 268 MB."""
    online, reference = embed(8192, 256), embed(8192, 256)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # give free memory back, glibc only
        ctypes.CDLL(None).malloc_trim(0)
    most, stop, start = [0], threading.Event(), resident()

    def watch():
        while not stop.is_set():
            most[0] = max(most[0], resident())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    activesel.joint_select(
        online=activesel.Pairs(*online), reference=activesel.Pairs(*reference),
        k=1640, chunks=4, seed=0, backend="native",
    )  # fmt: skip
    stop.set()
    watcher.join()
    assert most[0] - start < 64e6, f"{(most[0] - start) / 1e6:.0f} MB"
