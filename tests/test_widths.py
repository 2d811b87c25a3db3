# SPDX-License-Identifier: Apache-2.0
"""Rows of any width, special values anywhere, many callers: what vector code gets wrong."""

import math
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS

from activesel import score, select
from activesel.testing import TOLERANCE, assert_as_accurate

WIDTHS = [1, 2, 7, 15, 16, 17, 31, 33, 255, 1003, 4097, 21_843, 150_001]


def eager(logits, targets, loss):
    if loss == "softmax":
        return F.cross_entropy(logits, targets, reduction="none")
    hot = F.one_hot(targets, logits.shape[-1]).to(logits)
    return F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(-1)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width_on_any_instruction_set(width, loss, every_isa):
    g = torch.Generator().manual_seed(width)
    rising = torch.linspace(-30, 30, width)  # the maximum comes last: running sums are rescaled
    base = torch.stack(
        [torch.randn(width, generator=g), 20 * torch.randn(width, generator=g), rising, -rising]
    )
    targets = torch.tensor([0, width - 1, width // 2, width - 1])
    for dtype in TOLERANCE:
        logits = base.to(dtype)
        reference = eager(logits.float(), targets, loss)
        truth = eager(logits.double(), targets, loss)
        for got in every_isa(lambda x=logits: score(online=x, targets=targets, loss=loss)).values():
            assert_as_accurate(got, reference, truth, 1e-6)


def exact(logits, targets, loss):
    """As `eager` in float64, and right at infinities: there 0 * inf is 0, not NaN."""
    x = logits.double()
    if loss == "softmax":
        return eager(x, targets, loss)
    hot = F.one_hot(targets, x.shape[-1]).bool()
    return F.softplus(torch.where(hot, -x, x)).sum(-1)


@pytest.mark.parametrize("width", [1, 5, 16, 37, 64])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_in_any_place(backend, width, loss, value):
    """One bad logit per row, at each place in turn; it is the target's, then its neighbour's."""
    logits = torch.randn(width, width)
    logits.fill_diagonal_(value)
    for targets in (torch.arange(width), torch.arange(width).roll(1)):
        if value == math.inf and loss == "sigmoid" and targets[0] == 0:
            continue  # inf - inf: eager torch says NaN, mathematics 0, and either will do
        got = score(online=logits, targets=targets, loss=loss, backend=backend)
        truth = exact(logits, targets, loss)
        assert_as_accurate(got, truth, truth)


def test_neighbouring_memory_is_not_read(backend):
    """Rows that end inside a vector register have NaN for neighbours."""
    for width in (1, 3, 15, 17, 33):
        padded = torch.full((6, width + 40), math.nan)
        logits = padded[1:-1, 20:-20]
        logits.copy_(torch.randn(4, width))
        targets = torch.arange(4) % width
        got = score(online=logits, targets=targets, backend=backend)
        same = score(online=logits.clone(), targets=targets, backend=backend)
        assert got.isfinite().all() and torch.equal(got, same)


def work(backend):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 333, generator=g)
    picked = select(
        online=logits, targets=torch.arange(500) % 333, k=100, seed=1, step=2, backend=backend
    )
    return picked.indices, picked.keys


def test_many_callers_at_once(host_backend, with_threads):
    expected = work(host_backend)

    def all_at_once():
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: work(host_backend), range(16)))

    for threads in (1, 2):
        for indices, keys in with_threads(threads, all_at_once):
            assert torch.equal(indices, expected[0]) and torch.equal(keys, expected[1])


def child(backend, queue):
    torch.set_num_threads(1)  # as data loader workers do
    queue.put(work(backend)[0].tolist())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "native"])
def test_forked_workers_select(backend, with_threads):
    """A parent that has used threads must not leave a forked data loader worker hanging."""
    expected = with_threads(2, lambda: work(backend))[0].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(backend, queue))
    process.start()
    process.join(30)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive and process.exitcode == 0
    assert queue.get() == expected
