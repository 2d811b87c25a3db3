# SPDX-License-Identifier: Apache-2.0
"""Pairs of embeddings -> joint selection: what rows just chosen add to every row's score.

With x_ij = scale z_i . t_j + bias, tile by tile over the chunk's columns j, in fp32 from the
accumulator of the product:

    sigmoid  sum_j log(1 + exp x_ij)        softmax  log sum_j exp x_ij

One program owns a block of rows in one direction (image against text, or the reverse) and goes
through the whole chunk. Nothing is accumulated across programs, so the sums are deterministic.

FLOPs 4 R c D a side; bytes: embeddings once per tile of columns, the chunk's once per block of
rows, from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel import spec_joint
from activesel.kernels import config, head, key

LOG2E = key.LOG2E
LN2_HI, LN2_LO = key.LN2_HI, key.LN2_LO
FLOAT_MAX = key.FLOAT_MAX
BAD_NORM, BAD_SCALE = tl.constexpr(spec_joint.BAD_NORM), tl.constexpr(spec_joint.BAD_SCALE)
TOLERANCE = tl.constexpr(spec_joint.NORM_TOLERANCE)


@triton.jit
def _softplus_sum(y, BLOCK_N: tl.constexpr):  # [M, N] logits * log2 e -> [M]
    """Sum of log(1 + exp x), with one logarithm for up to 32 terms.

    Of (1 + e_1) (1 + e_2) ... only what exceeds 1 is kept: e is tiny where a bias is far below 0.
    """
    e = tl.exp2(tl.abs(y) * -1.0)  # a sign costs nothing, 0 - y an addition
    halvings: tl.constexpr = 5 if BLOCK_N >= 256 else (BLOCK_N.bit_length() - 4)
    for _ in tl.static_range(halvings):  # the 8 columns left lie in different threads
        pair = tl.reshape(e, (e.shape[0], 2, e.shape[1] // 2))
        a, b = tl.split(tl.permute(pair, (0, 2, 1)))
        e = tl.fma(a, b, a + b)
    u = 1.0 + e
    linear = tl.sum(tl.maximum(y, 0.0), 1)
    return linear * (LN2_HI + LN2_LO) + tl.sum(tl.log(u) + (e - (u - 1.0)) / u, 1)


@triton.jit(do_not_specialize=["rows", "chunk"])
def pair_kernel(
    image_ptr,  # [B, D]
    image_stride,
    text_ptr,
    text_stride,
    scale_ptr,  # [1] float32
    bias_ptr,
    rows_ptr,  # [R] int64; None for all rows
    chunk_ptr,  # [c] int64, -1 counts nothing
    out_ptr,  # [2, R] float32: image to text, text to image
    rows: tl.int64,  # R
    chunk: tl.int32,  # c
    width,  # D, at run time: a loop of known length would be unrolled
    sign: tl.float32,
    D: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    way = tl.program_id(1)
    if way == 0:
        x_ptr, x_stride, w_ptr, w_stride = image_ptr, image_stride, text_ptr, text_stride
    else:
        x_ptr, x_stride, w_ptr, w_stride = text_ptr, text_stride, image_ptr, image_stride
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(place, rows - 1)  # rows past the end are the last one again
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row)
    x_rows = x_ptr + row[:, None] * x_stride
    row = row.to(tl.int32)
    lowest, highest = tl.min(row, 0), tl.max(row, 0)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    if SIGMOID:
        scale, bias = scale * LOG2E, bias * LOG2E

    lane = tl.arange(0, BLOCK_N)
    high = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, chunk, BLOCK_N):
        j = tl.load(chunk_ptr + n + lane, mask=n + lane < chunk, other=-1)
        w_rows = w_ptr + tl.maximum(j, 0)[:, None] * w_stride
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            x, w = head._load(x_rows, k, D, BLOCK_K), head._load(w_rows, k, D, BLOCK_K)
            z = head._product(x, w, z, UPCAST, False)
        y = z * scale
        if SIGMOID:
            y = tl.fma(z, scale, bias)
        j = j.to(tl.int32)
        if tl.min(j, 0) < 0:
            y = tl.where((j >= 0)[None, :], y, -float("inf"))
        if tl.max(((j >= lowest) & (j <= highest)).to(tl.int32), 0) != 0:  # rarely
            y = tl.where(row[:, None] == j[None, :], -float("inf"), y)
        if SIGMOID:
            total += _softplus_sum(y, BLOCK_N)
        else:
            high, total = head._fold(high, total, y, 0, 0, 0, False, False)
    if not SIGMOID:
        total = tl.where(
            high == -float("inf"), high, high * LN2_HI + (high * LN2_LO + tl.log(total))
        )
    out = out_ptr + way.to(tl.int64) * rows + place
    tl.store(out, sign * total, mask=place < rows)


@triton.jit
def pair_logits_kernel(
    image_ptr,  # [B, D]
    image_stride,
    text_ptr,
    text_stride,
    scale_ptr,  # [1] float32
    bias_ptr,
    out_ptr,  # [B] float32
    flags_ptr,  # [programs] int32; the largest is all of them or-ed
    rows: tl.int64,
    width,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(place, rows - 1)[:, None]
    dot = tl.zeros((BLOCK_R,), tl.float32)
    of_image = tl.zeros((BLOCK_R,), tl.float32)
    of_text = tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, width, BLOCK_K):
        a = head._load(image_ptr + row * image_stride, k, D, BLOCK_K).to(tl.float32)
        b = head._load(text_ptr + row * text_stride, k, D, BLOCK_K).to(tl.float32)
        dot += tl.sum(a * b, 1)
        of_image += tl.sum(a * a, 1)
        of_text += tl.sum(b * b, 1)
    # Vectors, since the interpreter mixes up booleans of scalars and vectors.
    scale = tl.zeros((BLOCK_R,), tl.float32) + tl.load(scale_ptr)
    bias = tl.zeros((BLOCK_R,), tl.float32) + tl.load(bias_ptr)
    finite = (of_image <= FLOAT_MAX) & (of_text <= FLOAT_MAX)
    off = (tl.abs(of_image - 1.0) > TOLERANCE) | (tl.abs(of_text - 1.0) > TOLERANCE)
    unusable = (tl.abs(scale) <= FLOAT_MAX) & (tl.abs(bias) <= FLOAT_MAX)
    flags = tl.where(off & finite, BAD_NORM, 0) | tl.where(unusable, 0, BAD_SCALE)
    tl.store(flags_ptr + tl.program_id(0), tl.max(flags, 0))
    x = tl.where(finite, scale * dot + bias, float("nan"))
    tl.store(out_ptr + place, x, mask=place < rows)


def pair_logits(
    side: Sequence[Tensor],  # [image [B, D], text [B, D], scale [1] float32, bias [1] float32]
) -> tuple[Tensor, Tensor]:  # [B] float32, [] int32 flags
    count, width = side[0].shape
    programs = triton.cdiv(count, 16)
    out = torch.empty(count, device=side[0].device)
    flags = torch.empty(programs, dtype=torch.int32, device=side[0].device)
    pair_logits_kernel[(programs,)](
        *_factors(side), out, flags, count, width, D=width,
        BLOCK_R=16, BLOCK_K=128, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out, flags.amax()


def pair_add(
    state: Tensor,  # [1, R] | [4, R] float32, changed in place
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    rows: Tensor | None,  # [R] int64
    chunk: Tensor,  # [c] int64
    loss: str,
    tile: config.Tile | None = None,
) -> None:
    count, sigmoid = state.shape[1], loss == "sigmoid"
    sides = [(side, sign) for side, sign in ((online, 1.0), (reference, -1.0)) if side]
    sums = torch.empty(len(sides), 2, count, device=state.device)
    for (side, sign), out in zip(sides, sums, strict=True):
        width = side[0].shape[1]
        use = tile or config.pair_tile(side[0], chunk.shape[0])
        pair_kernel[(triton.cdiv(count, use.block_m), 2)](
            *_factors(side), rows, chunk, out, count, chunk.shape[0], width,
            sign if sigmoid else 1.0,
            D=width, SIGMOID=sigmoid, UPCAST=config.INTERPRETED,
            BLOCK_M=use.block_m, BLOCK_N=use.block_n, BLOCK_K=use.block_k,
            num_warps=use.warps, num_stages=use.stages, maxnreg=use.registers,
            enable_fp_fusion=False,
        )  # fmt: skip
    if sigmoid:
        state += sums.sum((0, 1))
    else:
        lanes = state if online and reference else state[:2] if online else state[2:]
        torch.logaddexp(lanes, sums.view(-1, count), out=lanes)


def _factors(side: Sequence[Tensor]) -> tuple[Tensor | int, ...]:
    """Embeddings of one dtype, each with its stride; scale and bias."""
    image, text, scale, bias = side
    if image.dtype != text.dtype:
        image, text = image.float(), text.float()
    image, text = head._aligned(image), head._aligned(text)
    return image, image.stride(0), text, text.stride(0), scale, bias
