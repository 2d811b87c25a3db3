# SPDX-License-Identifier: Apache-2.0
"""Key -> top-k where the compiled module has no CUDA: radix select, deterministic, any k.

Three passes count the keys by their upper 11, middle 11 and lower 10 bits, each among the rows that
agree with the k-th (counted from 0) in the bits before; a fourth counts the rows above and beside
it per block; a fifth writes the chosen rows in ascending order. Five launches and a memset.

Bytes: the keys five times, from the L2 cache up to about ten million rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel import spec

BLOCK = 4096
BINS = tl.constexpr(2048)
TOO_FEW_ROWS = tl.constexpr(spec.TOO_FEW_ROWS)


@triton.jit
def _load(keys_ptr, row, live):
    """Keys, and [R] uint32 in their order: NaN is 0, below -inf; both zeros are the same."""
    key = tl.load(keys_ptr + row, mask=live, other=float("nan"))
    bits = (key + 0.0).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) != 0
    ordered = tl.where(negative, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return key, tl.where(key == key, ordered, 0)


@triton.jit
def _pick(histogram_ptr, rank):
    """The bin that holds the `rank`-th row from above, and its rank within that bin."""
    bins = tl.arange(0, BINS)
    count = tl.load(histogram_ptr + bins)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)
    here = (above <= rank) & (rank < above + count)
    return tl.sum(tl.where(here, bins, 0), 0), rank - tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def _threshold(histogram_ptr, rank):
    """Order of the `rank`-th row, and its rank among the rows of the same order."""
    high, rank = _pick(histogram_ptr, rank)
    middle, rank = _pick(histogram_ptr + BINS, rank)
    low, rank = _pick(histogram_ptr + 2 * BINS, rank)
    return (high.to(tl.uint32) << 21) | (middle.to(tl.uint32) << 10) | low.to(tl.uint32), rank


@triton.jit(do_not_specialize=["rank"])
def histogram_kernel(
    keys_ptr,
    histogram_ptr,  # [3, BINS] int32, zeros before the first pass
    rows: tl.int64,
    rank,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    _, order = _load(keys_ptr, row, live)
    if PASS == 0:
        digit = order >> 21
    else:
        high, rank = _pick(histogram_ptr, rank)
        live = live & ((order >> 21).to(tl.int32) == high)
        digit = (order >> 10) & 0x7FF
        if PASS == 2:
            middle, rank = _pick(histogram_ptr + BINS, rank)
            live = live & (digit.to(tl.int32) == middle)
            digit = order & 0x3FF
    count = tl.histogram(digit.to(tl.int32), BINS, mask=live)
    place = histogram_ptr + PASS * BINS + tl.arange(0, BINS)
    tl.atomic_add(place, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["rank"])
def count_kernel(
    keys_ptr,
    histogram_ptr,
    counts_ptr,  # [2, blocks] int32: rows above the threshold, rows beside it
    rows: tl.int64,
    rank,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    _, order = _load(keys_ptr, row, live)
    threshold, _ = _threshold(histogram_ptr, rank)
    tl.store(counts_ptr + block, tl.sum((live & (order > threshold)).to(tl.int32), 0))
    beside = (live & (order == threshold)).to(tl.int32)
    tl.store(counts_ptr + tl.num_programs(0) + block, tl.sum(beside, 0))


@triton.jit(do_not_specialize=["rank", "k", "partials"])
def write_kernel(
    keys_ptr,
    histogram_ptr,
    counts_ptr,
    partial_ptr,  # [partials] int32
    indices_ptr,  # [k] int64
    threshold_ptr,  # [] float32
    flags_ptr,  # [] int32
    rows: tl.int64,
    rank,
    k,
    partials,
    ALL: tl.constexpr,  # k == rows
    BLOCK: tl.constexpr,
    COUNTS: tl.constexpr,  # blocks, rounded up to a power of two
):
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    key, order = _load(keys_ptr, row, live)
    threshold, needed = _threshold(histogram_ptr, rank)
    if ALL:
        tl.store(indices_ptr + row, row, mask=live)
    else:
        before = tl.arange(0, COUNTS)
        earlier = before < block
        above = tl.sum(tl.load(counts_ptr + before, mask=earlier, other=0), 0)
        beside = counts_ptr + tl.num_programs(0) + before
        beside = tl.sum(tl.load(beside, mask=earlier, other=0), 0)
        equal = live & (order == threshold)
        rank_beside = beside + tl.cumsum(equal.to(tl.int32), 0) - 1
        chosen = (live & (order > threshold)) | (equal & (rank_beside < needed))
        place = above + tl.minimum(beside, needed) + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices_ptr + place, row, mask=chosen)
        left_out = tl.where(key == key, key, -float("inf"))  # with the sign of a zero
        first = equal & (rank_beside == needed)
        tl.store(threshold_ptr + row * 0, left_out, mask=first)
    if block == 0:
        flags = 0
        if partial_ptr is not None:
            for start in range(0, partials, BLOCK):
                at = start + tl.arange(0, BLOCK)
                words = tl.load(partial_ptr + at, mask=at < partials, other=0)
                flags = tl.maximum(flags, tl.max(words, 0))
        nan = tl.load(histogram_ptr)  # the lowest bin of the first pass holds nothing but NaN
        few = tl.where(rows - nan < k, TOO_FEW_ROWS, 0)
        tl.store(flags_ptr, flags | few)
        if ALL:
            tl.store(threshold_ptr, -float("inf"))


@triton.jit(noinline=True)
def small(
    keys_ptr,
    partial_ptr,  # [partials] int32
    partials,
    bad_ptr,  # [] int32: more flags
    indices_ptr,
    threshold_ptr,
    flags_ptr,
    rows,
    k,
    BLOCK: tl.constexpr,
):
    """All of it by one program: the threshold bit by bit, counting; then the rows, in order."""
    rank = tl.minimum(k, rows - 1)
    threshold = tl.zeros((1,), tl.uint32)
    for bit in range(32):
        higher = threshold | (tl.full((1,), 0x80000000, tl.uint32) >> bit)
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            _, order = _load(keys_ptr, row, row < rows)
            count += ((order >= higher) & (row < rows)).to(tl.int32)
        threshold = tl.where(tl.sum(count, 0) > rank, higher, threshold)
    above = tl.zeros((BLOCK,), tl.int32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        _, order = _load(keys_ptr, row, row < rows)
        above += (order > threshold).to(tl.int32)
        nan += ((order == 0) & (row < rows)).to(tl.int32)
    needed = rank - tl.sum(above, 0)
    written = 0
    tied = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        live = row < rows
        key, order = _load(keys_ptr, row, live)
        beside = live & (order == threshold)
        place = tied + tl.cumsum(beside.to(tl.int32), 0) - 1
        chosen = (live & (order > threshold)) | (beside & ((place < needed) | (k == rows)))
        at = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices_ptr + at, row.to(tl.int64), mask=chosen)
        left_out = tl.where((key == key) & (k < rows), key, -float("inf"))  # with a zero's sign
        tl.store(threshold_ptr + row * 0, left_out, mask=beside & (place == needed))
        written += tl.sum(chosen.to(tl.int32), 0)
        tied += tl.sum(beside.to(tl.int32), 0)
    flags = tl.load(bad_ptr)
    for start in range(0, partials, BLOCK):
        at = start + tl.arange(0, BLOCK)
        flags = flags | tl.max(tl.load(partial_ptr + at, mask=at < partials, other=0), 0)
    tl.store(flags_ptr, flags | tl.where(rows - tl.sum(nan, 0) < k, TOO_FEW_ROWS, 0))


def topk(
    keys: Tensor,  # [B] float32
    k: int,
    partial: Tensor | None = None,  # [P] int32, flags of the kernels that made the keys
) -> tuple[Tensor, Tensor, Tensor]:  # indices [k] int64 ascending, threshold [] float32, flags []
    rows, device = keys.shape[0], keys.device
    indices = torch.empty(k, dtype=torch.int64, device=device)
    if rows == 0:
        flags = torch.zeros((), dtype=torch.int32, device=device)
        return indices, torch.full((), -torch.inf, device=device), flags
    threshold = torch.empty((), device=device)
    flags = torch.empty((), dtype=torch.int32, device=device)
    blocks = triton.cdiv(rows, BLOCK)
    histogram = torch.zeros(3 * BINS.value, dtype=torch.int32, device=device)
    counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
    rank = min(k, rows - 1)
    for digit in range(3):
        histogram_kernel[(blocks,)](
            keys, histogram, rows, rank, PASS=digit, BLOCK=BLOCK, num_warps=8
        )
    count_kernel[(blocks,)](keys, histogram, counts, rows, rank, BLOCK=BLOCK)
    write_kernel[(blocks,)](
        keys, histogram, counts, partial, indices, threshold, flags, rows, rank, k,
        0 if partial is None else partial.shape[0],
        ALL=k == rows, BLOCK=BLOCK, COUNTS=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return indices, threshold, flags
