# SPDX-License-Identifier: Apache-2.0
"""Logits -> key: one pass over both tensors.

    softmax  log sum_c exp z_c - (1 - eps) z_y - eps mean z
    sigmoid  sum_c log(1 + exp z_c) - (1 - eps) z_y - eps mean z

A program takes some tokens at a time, all their classes, both sides in turn, and goes on to the
next ones (`turns`), which bounds the number of programs and of flag words.

Bytes: every logit once, a label per token; 8 written per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import key, rows
from activesel.kernels.operands import Labels, Noise, Rows, left_to_rows, noise_arguments, rows_like

LOG2E = key.LOG2E
TILE = 2048  # logits in flight per program and side
PROGRAMS = 4096  # at most, about


@triton.jit
def _loss(
    x_ptr,  # [R, 1] pointers to the tokens' logits
    stride,
    label,  # [R] int64
    classes,
    smoothing,
    SIGMOID: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # [R] float32
    high = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(0, classes, BLOCK_C):
        col = c + tl.arange(0, BLOCK_C)[None, :]
        place = x_ptr + col.to(tl.int64) * stride
        z = tl.load(place, mask=col < classes, other=-float("inf")).to(tl.float32)
        if SMOOTH:
            mean += tl.sum(tl.where(col < classes, z, 0.0), 1)
        if SIGMOID:
            soft = tl.maximum(z, 0.0) + key.log1p(tl.exp2(tl.abs(z) * -LOG2E))
            total += tl.sum(tl.where((col == label[:, None]) | (col >= classes), 0.0, soft), 1)
        else:
            new = tl.maximum(high, tl.max(z, 1))
            base = tl.where(new == -float("inf"), 0.0, new)  # -inf minus -inf would be NaN
            total = total * tl.exp2((high - base) * LOG2E)
            total += tl.sum(tl.exp2((z - base[:, None]) * LOG2E), 1)
            high = new
    own = tl.sum(tl.load(x_ptr + label[:, None] * stride).to(tl.float32), 1)
    linear = own
    if SMOOTH:
        linear = (1.0 - smoothing) * own + smoothing * (mean / classes)
    if SIGMOID:
        return total + (tl.maximum(own, 0.0) - linear + key.log1p(tl.exp2(tl.abs(own) * -LOG2E)))
    loss = (high - linear) + tl.log(total)
    return tl.where(high == -float("inf"), float("nan"), loss)


@triton.jit(do_not_specialize=["offset", "ignore"])
def logits_kernel(
    online_ptr,  # [N, C], or losses [N]
    online_row,  # strides of rows of logits in units of VECTOR, of losses in units of one
    online_class,  # None: losses
    reference_ptr,
    reference_row,
    reference_class,
    online_parts,  # [N] float32, where a row has several tokens
    reference_parts,
    labels_ptr,  # [N] int
    labels_stride,
    scores_ptr,
    keys_ptr,
    flags_ptr,
    seed_ptr,
    step_ptr,
    temperature_ptr,
    offset: tl.int64,
    ignore: tl.int64,
    tokens: tl.int64,  # N
    vectors,  # C in units of VECTOR
    smoothing: tl.float32,
    turns,
    VECTOR: tl.constexpr,  # divides what it measures, so that loads are known to be aligned
    PARTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    classes = vectors * VECTOR
    flags = 0
    for turn in range(turns):
        block = program.to(tl.int64) * turns + turn
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)
        live = token < tokens
        near = tl.minimum(token, tokens - 1)  # tokens past the end read the last one again
        y = tl.load(labels_ptr + near * labels_stride).to(tl.int64)
        counts = y != ignore
        bad = counts & ((y < 0) | (y >= classes))
        known = counts & (bad == 0)
        label = tl.where(known, y, 0)
        score = tl.zeros((BLOCK_R,), tl.float32)
        if online_class is not None:
            score = _loss(
                online_ptr + near[:, None] * online_row * VECTOR, online_class, label, classes,
                smoothing, SIGMOID, SMOOTH, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            if PARTS:
                tl.store(online_parts + token, tl.where(bad, float("nan"), score), mask=live)
        elif online_ptr is not None and not PARTS:
            score = tl.load(online_ptr + near * online_row).to(tl.float32)
        if reference_class is not None:
            reference = _loss(
                reference_ptr + near[:, None] * reference_row * VECTOR, reference_class, label,
                classes, smoothing, SIGMOID, SMOOTH, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            if PARTS:
                tl.store(reference_parts + token, tl.where(bad, float("nan"), reference), mask=live)
            score = score - reference
        elif reference_ptr is not None and not PARTS:
            score = score - tl.load(reference_ptr + near * reference_row).to(tl.float32)
        if not PARTS:
            score = tl.where(known, score, float("nan"))
            flags = flags | key.write(
                score, bad, token, live, scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr,
                offset,
            )  # fmt: skip
    if not PARTS:
        tl.store(flags_ptr + program, flags)


def logits(
    online: Sequence[Tensor],  # [logits [B, (T,) C]], [losses [B]], []
    reference: Sequence[Tensor],
    labels: Labels,
    noise: Noise | None,
) -> Rows:
    first = (online or reference)[0]
    tokens, parts = labels.data.shape[0], labels.tokens > 1
    block_c = min(triton.next_power_of_2(labels.classes), TILE)
    block_r = TILE // block_c
    blocks = triton.cdiv(tokens, block_r)
    turns = triton.cdiv(blocks, PROGRAMS)
    programs = triton.cdiv(blocks, turns)
    flat = [_flat(side) for side in (online, reference)]
    wide = [x.stride(0) for x in flat if x is not None and x.ndim > 1]
    vector = math.gcd(8, labels.classes, *wide)  # neighbours that may be read at once
    left = [left_to_rows(side, tokens, 1) if parts else None for side in (online, reference)]
    out = None if parts else rows_like(first, tokens, programs, noise)
    logits_kernel[(programs,)](
        *_strided(flat[0], vector), *_strided(flat[1], vector), *left,
        labels.data, labels.data.stride(0),
        *(out or (None, None, None)), *noise_arguments(None if parts else noise),
        labels.ignore, tokens, labels.classes // vector, labels.smoothing, turns,
        VECTOR=vector, PARTS=parts, SIGMOID=labels.sigmoid, SMOOTH=labels.smoothing != 0,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8, maxnreg=255, enable_fp_fusion=False,
    )  # fmt: skip
    return out or rows.rows(left[0], left[1], labels, noise)


def _flat(operand: Sequence[Tensor]) -> Tensor | None:  # [N, C], or losses [N]
    if not operand:
        return None
    x = operand[0]
    return x if x.ndim == 1 else x.reshape(-1, x.shape[-1])


def _strided(x: Tensor | None, vector: int) -> tuple[Tensor | int | None, ...]:
    if x is None:
        return None, None, None
    return (x, x.stride(0), None) if x.ndim == 1 else (x, x.stride(0) // vector, x.stride(1))
