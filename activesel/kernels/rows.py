# SPDX-License-Identifier: Apache-2.0
"""Losses -> scores and keys: losses given per row, or the parts of them that kernels left."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import key
from activesel.kernels.operands import Labels, Noise, Rows, noise_arguments, rows_like

BLOCK = 512


@triton.jit
def _loss(
    ptr, stride, splits, labels_ptr, labels_stride, row, live, rows, tokens, ignore,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """Mean over a row's tokens that count of the losses, each made of `splits` parts."""
    if splits is None:
        mean = tl.load(ptr + row * stride, mask=live, other=0.0).to(tl.float32)
    else:
        total = tl.zeros(row.shape, tl.float32)
        count = tl.zeros(row.shape, tl.float32)
        for t in range(tokens):
            token = row * tokens + t
            y = tl.load(labels_ptr + token * labels_stride, mask=live, other=0).to(tl.int64)
            loss = tl.load(ptr + token, mask=live, other=0.0)
            part = ptr + token
            for _ in range(1, splits):
                part += rows * tokens
                other = tl.load(part, mask=live, other=0.0)
                if SIGMOID:
                    loss = loss + other
                else:  # log(e^a + e^b), where either or both may be infinite
                    high = tl.maximum(loss, other, propagate_nan=tl.PropagateNan.ALL)
                    low = tl.minimum(loss, other, propagate_nan=tl.PropagateNan.ALL)
                    loss = high + tl.log(1.0 + tl.exp(tl.where(high == low, 0.0, low - high)))
            loss = tl.where(
                loss == -float("inf"), float("nan"), loss
            )  # there were only -inf logits
            counts = y != ignore
            total += tl.where(counts, loss, 0.0)
            count += tl.where(counts, 1.0, 0.0)
        mean = tl.div_rn(total, count)
    return mean


@triton.jit(do_not_specialize=["ignore", "offset"])
def rows_kernel(
    online_ptr,  # losses [B], or parts [S, B, T] float32
    online_stride,
    online_splits,
    reference_ptr,
    reference_stride,
    reference_splits,
    labels_ptr,  # [B, T] int
    labels_stride,
    scores_ptr,  # [B] float32
    keys_ptr,  # [B] float32
    flags_ptr,  # [programs] int32
    seed_ptr,
    step_ptr,
    temperature_ptr,
    offset: tl.int64,
    ignore: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    classes,
    SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    if reference_ptr is not None:
        reference = _loss(
            reference_ptr, reference_stride, reference_splits, labels_ptr, labels_stride,
            row, live, rows, tokens, ignore, SIGMOID,
        )  # fmt: skip
    if online_ptr is None:
        score = 0.0 - reference
    else:
        score = _loss(
            online_ptr, online_stride, online_splits, labels_ptr, labels_stride,
            row, live, rows, tokens, ignore, SIGMOID,
        )  # fmt: skip
        if reference_ptr is not None:
            score = score - reference
    bad = row < 0
    if labels_ptr is not None:
        for t in range(tokens):
            place = labels_ptr + (row * tokens + t) * labels_stride
            y = tl.load(place, mask=live, other=0).to(tl.int64)
            bad = bad | ((y != ignore) & ((y < 0) | (y >= classes)))
    flags = key.write(
        score, bad, row, live, scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr, offset
    )
    tl.store(flags_ptr + program, flags)


def rows(
    online: Tensor | None,  # losses [B] in any float, or parts [S, B * T] float32
    reference: Tensor | None,
    labels: Labels | None,  # of the parts; None where only losses are given
    noise: Noise | None,
) -> Rows:
    first = online if online is not None else reference
    assert first is not None
    tokens = labels.tokens if labels else 1
    count = first.shape[-1] // (tokens if first.ndim > 1 else 1)
    programs = triton.cdiv(count, BLOCK)
    out = rows_like(first, count, programs, noise)
    rows_kernel[(programs,)](
        *_side(online), *_side(reference),
        *(None, None) if labels is None else (labels.data, labels.data.stride(0)),
        *out, *noise_arguments(noise),
        labels.ignore if labels else 0, count, tokens, labels.classes if labels else 0,
        SIGMOID=labels is not None and labels.sigmoid,
        BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _side(x: Tensor | None) -> tuple[Tensor | None, int | None, int | None]:
    """Pointer, stride of given losses, number of parts a loss is made of."""
    if x is None:
        return None, None, None
    return (x, x.stride(0), None) if x.ndim == 1 else (x, None, x.shape[0])
