# SPDX-License-Identifier: Apache-2.0
"""Head -> key: losses of a classifier whose logits are never written.

For each side, tile by tile over the classes, in fp32 from the accumulator of the product:

    softmax  log sum_c exp z_c - (1 - eps) z_y - eps mean z          z_c = x . w_c + b_c
    sigmoid  sum_c log(1 + exp z_c) - (1 - eps) z_y - eps mean z

The mean of the logits is itself a product, with the mean weight, so smoothing costs nothing per
class. One program owns a block of tokens and goes through all classes, or through a share of them
(a split) where tokens are too few to fill the device. Then, and with several tokens to a row, it
leaves one part of each token's loss, and `rows` makes losses and keys of them.

FLOPs 2 N C D a side; bytes: features once, weights once per block of tokens, from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import config, key, rows
from activesel.kernels.operands import Labels, Noise, Rows, left_to_rows, noise_arguments, rows_like

LOG2E = key.LOG2E
LN2_HI, LN2_LO = key.LN2_HI, key.LN2_LO


@triton.jit
def _load(ptr, k, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k, ... of rows that `ptr` [R, 1] points to; zeros beyond D."""
    col = k + tl.arange(0, BLOCK_K)[None, :]
    if D % BLOCK_K == 0:
        return tl.load(ptr + col)
    return tl.load(ptr + col, mask=col < D, other=0.0)


@triton.jit
def _product(x, w, z, UPCAST: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:  # x = high + low, each of w's dtype: twice its bits, for two products
        high = x.to(w.dtype)
        z = tl.dot(high, w.T, z)
        x = (x - high.to(tl.float32)).to(w.dtype)
    elif UPCAST or x.dtype != w.dtype:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, z, input_precision="tf32x3")  # a 16-bit product takes no notice


@triton.jit
def _logits(
    xs, x_ptr, w_ptr, b_ptr, width, D: tl.constexpr, RESIDENT: tl.constexpr, UPCAST: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if RESIDENT:
        for i in tl.static_range((D + BLOCK_K - 1) // BLOCK_K):
            z = _product(xs[i], _load(w_ptr, i * BLOCK_K, D, BLOCK_K), z, UPCAST, SPLIT)
    else:
        for k in range(0, width, BLOCK_K):
            x = _load(x_ptr, k, D, BLOCK_K)
            z = _product(x, _load(w_ptr, k, D, BLOCK_K), z, UPCAST, SPLIT)
    if b_ptr is not None:
        z = z + tl.load(b_ptr).to(tl.float32)[None, :]
    return z


@triton.jit
def _fold(high, total, z, col, last, label, EDGE: tl.constexpr, SIGMOID: tl.constexpr):
    """Take a tile of logits into each token's sum of exponentials, which is total * 2^high.

    `high` is a whole number, so that rescaling is exact and one fused operation makes an exponent.
    """
    if SIGMOID:  # but for the token's own class, of which `_loss` takes care
        soft = tl.maximum(z, 0.0) + key.log1p(tl.exp2(tl.abs(z) * -LOG2E))
        soft = tl.where(col[None, :] == label[:, None], 0.0, soft)
        if EDGE:
            soft = tl.where((col < last)[None, :], soft, 0.0)
        return high, total + tl.sum(soft, 1)
    if EDGE:
        z = tl.where((col < last)[None, :], z, -float("inf"))
    new = tl.maximum(high, tl.ceil(tl.max(z, 1) * LOG2E))
    base = tl.where(new == -float("inf"), 0.0, new)  # -inf minus -inf would be NaN
    total = total * tl.exp2(high - base)
    return new, total + tl.sum(tl.exp2(tl.fma(z, LOG2E, -base[:, None])), 1)


@triton.jit
def _loss(
    x_ptr,  # [M, 1] pointers to the tokens' features
    w_ptr,  # [C, D]
    w_stride,
    b_ptr,  # [C]
    mean_ptr,  # [D + 1] float32, mean weight and mean bias; None without smoothing
    smoothing,
    label,  # [M] int32
    first,  # classes [first, last)
    last,
    width,  # D, at run time: a loop of known length would be unrolled
    D: tl.constexpr,
    PARTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RESIDENT: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # [M] float32; sums (sigmoid) or sums of exponentials (softmax) over splits make the loss
    xs = ()
    if RESIDENT:
        for i in tl.static_range((D + BLOCK_K - 1) // BLOCK_K):
            xs = xs + (_load(x_ptr, i * BLOCK_K, D, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005
    high = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    lane = tl.arange(0, BLOCK_N)
    full = first + (last - first) // BLOCK_N * BLOCK_N
    for n in range(first, full, BLOCK_N):
        place = w_ptr + tl.cast(n, tl.int64) * w_stride + lane[:, None] * w_stride
        b = b_ptr
        if b_ptr is not None:
            b = b_ptr + n + lane
        z = _logits(
            xs, x_ptr, place, b, width, D, RESIDENT, UPCAST, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
        )
        high, total = _fold(high, total, z, n + lane, last, label, False, SIGMOID)
    if full < last:  # the last tile reads its last class again and again, and masks the copies
        near = tl.minimum(full + lane, last - 1)
        place = w_ptr + near.to(tl.int64)[:, None] * w_stride
        b = b_ptr
        if b_ptr is not None:
            b = b_ptr + near
        z = _logits(
            xs, x_ptr, place, b, width, D, RESIDENT, UPCAST, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
        )
        high, total = _fold(high, total, z, full + lane, last, label, True, SIGMOID)

    own = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    own_ptr = w_ptr + label.to(tl.int64)[:, None] * w_stride
    for k in range(0, width, 32):  # few features at a time, to save registers
        x = _load(x_ptr, k, D, 32).to(tl.float32)
        own += tl.sum(x * _load(own_ptr, k, D, 32).to(tl.float32), 1)
        if mean_ptr is not None:
            mean += tl.sum(x * _load(mean_ptr, k, D, 32), 1)
    if b_ptr is not None:
        own += tl.load(b_ptr + label).to(tl.float32)
    if mean_ptr is not None:
        mean += tl.load(mean_ptr + D)
    linear = (1.0 - smoothing) * own + smoothing * mean
    if SIGMOID:
        its = tl.maximum(own, 0.0) - linear + key.log1p(tl.exp2(tl.abs(own) * -LOG2E))
        return total + tl.where((label >= first) & (label < last), its, 0.0)
    loss = (high * LN2_HI - linear) + (high * LN2_LO + tl.log(total))
    nothing = -float("inf") if PARTS else float("nan")  # only -inf logits: other splits decide
    return tl.where(high == -float("inf"), nothing, loss)


@triton.jit(do_not_specialize=["offset", "ignore"])
def head_kernel(
    online_ptr,  # features [N, D], or losses [N] where online_weight is None
    online_stride,
    online_weight,  # [C, D]
    online_weight_stride,
    online_bias,
    online_mean,
    reference_ptr,
    reference_stride,
    reference_weight,
    reference_weight_stride,
    reference_bias,
    reference_mean,
    online_parts,  # [splits, N] float32, where the kernel stops at parts
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
    classes,
    share,  # classes of a split
    smoothing: tl.float32,
    online_width,
    reference_width,
    D_ONLINE: tl.constexpr,
    D_REFERENCE: tl.constexpr,
    PARTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RESIDENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    token = program.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < tokens
    near = tl.minimum(token, tokens - 1)  # rows past the end read the last one again
    y = tl.load(labels_ptr + near * labels_stride).to(tl.int64)
    counts = y != ignore
    bad = counts & ((y < 0) | (y >= classes))
    label = tl.where(counts & (bad == 0), y, 0).to(tl.int32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, classes)
    place = tl.program_id(1).to(tl.int64) * tokens + token

    score = tl.zeros((BLOCK_M,), tl.float32)
    if online_weight is not None:
        score = _loss(
            online_ptr + near[:, None] * online_stride, online_weight, online_weight_stride,
            online_bias, online_mean, smoothing, label, first, last,
            online_width, D_ONLINE, PARTS, SIGMOID, RESIDENT, UPCAST, False,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if PARTS:
            tl.store(online_parts + place, tl.where(bad, float("nan"), score), mask=live)
    elif online_ptr is not None and not PARTS:
        score = tl.load(online_ptr + near * online_stride).to(tl.float32)
    if reference_weight is not None:
        reference = _loss(
            reference_ptr + near[:, None] * reference_stride, reference_weight,
            reference_weight_stride, reference_bias, reference_mean, smoothing, label, first, last,
            reference_width, D_REFERENCE, PARTS, SIGMOID, RESIDENT, UPCAST, False,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if PARTS:
            tl.store(reference_parts + place, tl.where(bad, float("nan"), reference), mask=live)
        score = score - reference
    elif reference_ptr is not None and not PARTS:
        score = score - tl.load(reference_ptr + near * reference_stride).to(tl.float32)
    if not PARTS:
        known = counts & (bad == 0)
        score = tl.where(known, score, float("nan"))
        flags = key.write(
            score, bad, token, live, scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr,
            offset,
        )  # fmt: skip
        tl.store(flags_ptr + program, flags)


def head(
    online: Sequence[Tensor],  # [features [B, (T,) D], weight [C, D], (bias [C])], [losses [B]], []
    reference: Sequence[Tensor],
    labels: Labels,
    noise: Noise | None,
    tile: config.Tile | None = None,
) -> Rows:
    first = (online or reference)[0]
    tokens = labels.data.shape[0]
    widths = [side[0].shape[-1] if len(side) > 1 else 0 for side in (online, reference)]
    kind = config.kind([side for side in (online, reference) if len(side) > 1])
    tile = tile or config.tile(first.device, kind, labels.sigmoid)
    blocks = triton.cdiv(tokens, tile.block_m)
    share, splits = config.split(first.device, blocks, labels.classes, tile.block_n)
    parts = splits > 1 or labels.tokens > 1
    left = [left_to_rows(side, tokens, splits) if parts else None for side in (online, reference)]
    out = None if parts else rows_like(first, tokens, blocks, noise)
    head_kernel[(blocks, splits)](
        *_factors(online, labels), *_factors(reference, labels), *left,
        labels.data, labels.data.stride(0),
        *(out or (None, None, None)), *noise_arguments(None if parts else noise),
        labels.ignore, tokens, labels.classes, share, labels.smoothing, *widths,
        D_ONLINE=widths[0], D_REFERENCE=widths[1], PARTS=parts, SIGMOID=labels.sigmoid,
        RESIDENT=kind == "narrow", UPCAST=config.INTERPRETED,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out or rows.rows(left[0], left[1], labels, noise)


def _aligned(x: Tensor) -> Tensor:
    """Rows that Triton knows to be aligned: it would read others one feature at a time, and spill.

    32 bits hold the offsets within a tile.
    """
    plain = x.stride(-1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) < 1 << 22
    if plain and x.data_ptr() % 16 == 0:
        return x
    if pad := -x.shape[-1] % 16:
        return F.pad(x, (0, pad))  # the width stays what it was, so nobody reads the rest
    return x.clone(memory_format=torch.contiguous_format)


def _factors(operand: Sequence[Tensor], labels: Labels) -> tuple[Tensor | int | None, ...]:
    """Features or losses, weights (each with a stride), bias, mean weight and bias."""
    if len(operand) < 2:
        return (operand[0], operand[0].stride(0), *[None] * 4) if operand else (None,) * 6
    x, weight, *bias = operand
    b = bias[0].contiguous() if bias else None
    mean = None
    if labels.smoothing:
        of_bias = weight.new_zeros(1, dtype=torch.float32) if b is None else b.float().mean(0, True)
        mean = torch.cat([weight.float().mean(0), of_bias])
    x, weight = _aligned(x.reshape(-1, x.shape[-1])), _aligned(weight)
    return x, x.stride(0), weight, weight.stride(0), b, mean
