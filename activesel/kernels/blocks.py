# SPDX-License-Identifier: Apache-2.0
"""Pixels -> features, a launch per phase: for scorers of which no processor can hold an image.

Two launches a layer, everything between attentions in one of them. The phases are those of the
one-launch scorer; rows are packed, so that no tile is half empty, whatever the number of tokens.

Bytes a row and layer: the residual and the queries, keys and values, each written and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import config, key, scorer, vit
from activesel.packing import Packed

SCRATCH = 3 << 29  # bytes


@triton.jit
def embed_kernel(
    images_ptr, image_stride: tl.int64, x_ptr, patch_ptr, rows_ptr, units_ptr, kept_ptr,
    images,
    T: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    P: tl.constexpr, GRID: tl.constexpr, CLASS: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * BM
    vit.embed(
        images_ptr, image_stride, images, x_ptr + tile.to(tl.int64) * (S * DP), patch_ptr, rows_ptr,
        units_ptr, kept_ptr, tile, T, S, DP, K, KP, P, GRID, CLASS, LAST,
        CHANNELS, CHANNEL_STRIDE, ROW_STRIDE, COLUMN_STRIDE, BM, BE, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["number"])
def layer_kernel(
    x_ptr, qkv_ptr, weights_ptr, vectors_ptr, scales_ptr, number, eps: tl.float32,
    L: tl.constexpr, NW: tl.constexpr, NV: tl.constexpr, XS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, AP: tl.constexpr, HP: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr,
    BH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) * BM
    vit.layer(
        x_ptr + tile * XS, qkv_ptr + tile * (3 * AP), weights_ptr, vectors_ptr, scales_ptr, number,
        eps, L, NW, NV, XS, D, DP, AP, HP, BD, BA, BH, BM,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    qkv_ptr, rows, scale: tl.float32, T: tl.constexpr, AP: tl.constexpr, HEADS: tl.constexpr,
    HD: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    vit.attention(qkv_ptr, tl.program_id(0), rows, scale, T, AP, HEADS, HD, BQ, BT)


@triton.jit
def pool_kernel(
    x_ptr, features_ptr, norm_ptr, eps: tl.float32, T: tl.constexpr, XS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, CLASS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    vit.pool(
        x_ptr + image * (T * XS), features_ptr + image * DP, norm_ptr, eps, T, XS, D, DP, CLASS, BD
    )


def features(
    packed: Packed,
    images: scorer.Pixels,
    tile: config.ScorerTile | None = None,
) -> Tensor:  # [S, B, DP] float32
    """As many images at a time as `SCRATCH` holds."""
    s, device, sides = packed.shape, images.data.device, len(packed.patch)
    tile = tile or config.scorer_tile(packed)
    known, options = scorer.constants(packed, tile) | images.constants, scorer.options(tile)
    known |= {"S": sides, "XS": sides * s.DP}

    def launch(kernel: triton.JITFunction, programs: int, *given: object) -> None:
        own = {name: known[name] for name in kernel.arg_names if name in known}
        kernel[(programs,)](*given, **own, **options)

    count, span = len(images.data), max(scorer.QUERIES // s.tokens, 1)
    units = s.heads * (1 if s.tokens <= scorer.QUERIES else triton.cdiv(s.tokens, scorer.QUERIES))
    scale = key.LOG2E.value * (s.width // s.heads) ** -0.5
    chunk = min(max(SCRATCH // (s.tokens * (4 * sides * s.DP + 6 * s.AP)), 1), count)
    rows = triton.cdiv(chunk * s.tokens, tile.rows) * tile.rows
    x = torch.empty(rows, sides * s.DP, device=device)
    qkv = torch.empty(rows, 3 * s.AP, dtype=torch.float16, device=device)
    out = torch.empty(sides, count, s.DP, device=device)
    for start in range(0, count, chunk):
        part = images.data[start : start + chunk]
        tokens = len(part) * s.tokens
        tiles = triton.cdiv(tokens, tile.rows)
        launch(
            embed_kernel, tiles, part, part.stride(0), x, packed.patch, packed.rows, packed.units,
            packed.kept, len(part),
        )  # fmt: skip
        for side in range(sides):
            mine, scales = x[:, side * s.DP :], packed.scales[side] if packed.fp8 else None
            for number in range(s.depth + 1):
                launch(
                    layer_kernel, tiles, mine, qkv, packed.weights[side], packed.vectors[side],
                    scales, number, s.eps,
                )  # fmt: skip
                if number < s.depth:
                    groups = triton.cdiv(len(part), span) * units
                    launch(attention_kernel, groups, qkv, tokens, scale)
            pooled = out[side, start : start + chunk]
            launch(pool_kernel, len(part), mine, pooled, packed.norm[side], s.eps)
    return out
