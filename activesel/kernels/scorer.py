# SPDX-License-Identifier: Apache-2.0
"""Pixels -> keys -> rows in one launch: a scorer pair that leaves nothing but its scores behind.

A program owns a share of the images and takes a group of them at a time through all layers, one
side after the other; what it holds of them stays in the L2 cache, where only it looks. Then it
takes its images' features through the head. The last program to be done finds the rows.

Images -> features alone is the same launch without its second half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import config, head, key, topk, vit
from activesel.kernels.operands import Labels, Noise, Rows, noise_arguments, rows_like
from activesel.packing import Packed

QUERIES = 64  # queries, and keys, of an attention's tile
HEAD_M = 32  # images; from 64 on, products would be of a kind that no function can have here
HEAD_N = 32  # classes at a time
KEYS = 1024  # keys at a time that the last program looks at


@triton.jit(noinline=True)
def keys(
    features_ptr, head_ptr, bias_ptr, mean_ptr, labels_ptr, labels_stride, given_ptr, given_stride,
    scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr, offset, ignore, tile, end, images,
    classes, width, smoothing,
    SIDES: tl.constexpr, SIGN: tl.constexpr, SIGMOID: tl.constexpr, DP: tl.constexpr,
    HEAD_M: tl.constexpr, HEAD_N: tl.constexpr, HEAD_K: tl.constexpr,
):  # fmt: skip
    """Features of a tile of images through both heads, to scores and keys; their flags."""
    image = tile + tl.arange(0, HEAD_M)
    live = image < end
    near = tl.minimum(image, end - 1).to(tl.int64)
    y = tl.load(labels_ptr + near * labels_stride).to(tl.int64)
    counts = y != ignore
    bad = counts & ((y < 0) | (y >= classes))
    label = tl.where(counts & (bad == 0), y, 0).to(tl.int32)
    score = tl.zeros((HEAD_M,), tl.float32)
    if given_ptr is not None:
        score = tl.load(given_ptr + near * given_stride).to(tl.float32) * -SIGN
    for side in range(SIDES):
        mean = mean_ptr
        if mean_ptr is not None:
            mean = mean_ptr + side * (DP + 1)
        at = near + tl.cast(images, tl.int64) * side
        loss = head._loss(
            features_ptr + at[:, None] * DP,
            head_ptr + tl.cast(classes, tl.int64) * (side * DP), DP,
            bias_ptr + classes * side, mean, smoothing, label, 0, classes, width,
            DP, False, SIGMOID, False, False, True, HEAD_M, HEAD_N, HEAD_K,
        )  # fmt: skip
        score += loss * (1.0 - 2.0 * side) * SIGN
    score = tl.where(counts & (bad == 0), score, float("nan"))
    return key.write(
        score, bad, near, live, scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr, offset
    )


@triton.jit(do_not_specialize=["offset", "ignore", "k", "images", "share"])
def scorer_kernel(
    images_ptr,  # [B, C, H, W] in either order
    image_stride: tl.int64,
    patch_ptr,  # [S, DP, KP] fp16
    weights_ptr,  # [S, L, NW] fp16 or e4m3
    scales_ptr,  # [S, L, 4] float32 with e4m3
    vectors_ptr,  # [S, L, NV] float32
    rows_ptr,  # [S, T, DP] float32
    units_ptr,  # [S] float32
    norm_ptr,  # [S, 2, DP] float32
    kept_ptr,
    eps: tl.float32,
    x_ptr,  # [programs, ROWS, S * DP] float32
    qkv_ptr,  # [programs, ROWS, 3 * AP] fp16
    features_ptr,  # [S, B, DP] float32
    head_ptr,  # [S, C, DP] fp16; None: stop at the features
    bias_ptr,  # [S, C] float32
    mean_ptr,  # [S, DP + 1] float32, mean weight and bias; None without smoothing
    labels_ptr,  # [B] int
    labels_stride,
    given_ptr,  # [B] losses of the side that has no scorer here
    given_stride,
    scores_ptr,
    keys_ptr,  # None: scores only
    partial_ptr,  # [programs] int32
    seed_ptr,
    step_ptr,
    temperature_ptr,
    offset: tl.int64,
    ignore: tl.int64,
    ticket_ptr,  # [1] int32, zero before and after; None: rows are another launch's
    indices_ptr,
    threshold_ptr,
    flags_ptr,
    bad_ptr,  # [] int32: flags of the weights
    images,  # B
    share,  # images of a program
    k,
    classes,
    width,  # DP, at run time: a loop of known length would be unrolled
    smoothing: tl.float32,
    scale: tl.float32,
    SIDES: tl.constexpr,
    SIGN: tl.constexpr,  # of the first side's loss
    SIGMOID: tl.constexpr,
    GROUP: tl.constexpr,  # images at a time
    ROWS: tl.constexpr,
    T: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,
    HD: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    P: tl.constexpr,
    GRID: tl.constexpr,
    CLASS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    NW: tl.constexpr,
    NV: tl.constexpr,
    HEAD_M: tl.constexpr,
    HEAD_N: tl.constexpr,
    HEAD_K: tl.constexpr,
    KEYS: tl.constexpr,  # of the top-k, at a time
    CALLS: tl.constexpr,  # phases are functions
):
    embed: tl.constexpr = vit.embed_call if CALLS else vit.embed
    layer: tl.constexpr = vit.layer_call if CALLS else vit.layer
    attention: tl.constexpr = vit.attention_call if CALLS else vit.attention
    program = tl.program_id(0)
    begin = program * share
    end = tl.minimum(begin + share, images)
    base = program * ROWS
    SPAN: tl.constexpr = BQ // T if T <= BQ else 1
    UNITS: tl.constexpr = HEADS * (1 if T <= BQ else (T + BQ - 1) // BQ)
    for first in tl.range(begin, end, GROUP, disable_licm=True):
        here = tl.minimum(end - first, GROUP)
        # Pointers are computed where they are used: kept across phases, they would be spilled.
        for tile in tl.range(0, ROWS, BM, disable_licm=True):
            embed(
                images_ptr + tl.cast(first, tl.int64) * image_stride, image_stride, here,
                x_ptr + tl.cast(base + tile, tl.int64) * (SIDES * DP), patch_ptr, rows_ptr,
                units_ptr, kept_ptr, tile,
                T, SIDES, DP, K, KP, P, GRID, CLASS, LAST,
                CHANNELS, CHANNEL_STRIDE, ROW_STRIDE, COLUMN_STRIDE, BM, BE, BK,
            )  # fmt: skip
        tl.debug_barrier()
        for side in tl.range(SIDES, disable_licm=True):
            for number in tl.range(L + 1, disable_licm=True):
                for tile in tl.range(0, ROWS, BM, disable_licm=True):
                    scales = scales_ptr
                    if scales_ptr is not None:
                        scales = scales_ptr + side * (L * 4)
                    layer(
                        x_ptr + tl.cast(base + tile, tl.int64) * (SIDES * DP) + side * DP,
                        qkv_ptr + tl.cast(base + tile, tl.int64) * (3 * AP),
                        weights_ptr + side * (L * NW), vectors_ptr + side * (L * NV), scales,
                        number, eps,
                        L, NW, NV, SIDES * DP, D, DP, AP, HP, BD, BA, BH, BM,
                    )  # fmt: skip
                tl.debug_barrier()
                if number < L:
                    for unit in tl.range((here + SPAN - 1) // SPAN * UNITS, disable_licm=True):
                        attention(
                            qkv_ptr + tl.cast(base, tl.int64) * (3 * AP), unit, here * T, scale,
                            T, AP, HEADS, HD, BQ, BT,
                        )  # fmt: skip
                    tl.debug_barrier()
            for image in tl.range(here, disable_licm=True):
                feature = features_ptr + (tl.cast(images, tl.int64) * side + first + image) * DP
                vit.pool(
                    x_ptr + tl.cast(base + image * T, tl.int64) * (SIDES * DP) + side * DP,
                    feature, norm_ptr + side * (2 * DP), eps, T, SIDES * DP, D, DP, CLASS, BD,
                )  # fmt: skip
        tl.debug_barrier()  # before the next group's pixels overwrite this one's
    if head_ptr is not None:
        wrong = 0
        for tile in tl.range(begin, end, HEAD_M, disable_licm=True):
            found = keys(
                features_ptr, head_ptr, bias_ptr, mean_ptr, labels_ptr, labels_stride, given_ptr,
                given_stride, scores_ptr, keys_ptr, seed_ptr, step_ptr, temperature_ptr, offset,
                ignore, tile, end, images, classes, width, smoothing,
                SIDES, SIGN, SIGMOID, DP, HEAD_M, HEAD_N, HEAD_K,
            )  # fmt: skip
            wrong = tl.maximum(wrong, found)
        tl.store(partial_ptr + program, wrong)
        if ticket_ptr is not None:
            tl.debug_barrier()  # Triton puts none between other warps' stores and the ticket
            done = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
            if done == tl.num_programs(0) - 1:
                tl.store(ticket_ptr, 0)  # for the next launch, or replay
                topk.small(
                    keys_ptr, partial_ptr, tl.num_programs(0), bad_ptr, indices_ptr, threshold_ptr,
                    flags_ptr, images, k, KEYS,
                )  # fmt: skip


class Pixels(NamedTuple):
    """Images as the kernels read them."""

    data: Tensor  # [B, C, H, W], uint8 or float
    last: bool  # channels last in memory

    @property
    def constants(self) -> dict[str, int | bool]:
        _, channel, row, column = self.data.stride()
        return {
            "LAST": self.last, "CHANNELS": self.data.shape[1], "CHANNEL_STRIDE": channel,
            "ROW_STRIDE": row, "COLUMN_STRIDE": column,
        }  # fmt: skip


def channels_last(images: Tensor) -> bool:  # [B, C, H, W] of any strides
    """Whether channels lie side by side, a pixel's beside the next one's."""
    _, channel, _, column = images.stride()
    return channel == 1 and column == images.shape[1] > 1


def pixels(images: Tensor) -> Pixels:  # [B, C, H, W] of any strides
    """Copied only where neither columns nor channels lie side by side."""
    if channels_last(images):
        return Pixels(images, True)
    return Pixels(images if images.stride(3) == 1 else images.contiguous(), False)


def constants(packed: Packed, tile: config.ScorerTile) -> dict[str, int | bool]:
    """What the phases are compiled for."""
    s, columns = packed.shape, len(packed.patch) * packed.shape.DP
    return {
        "T": s.tokens, "L": s.depth, "D": s.width, "DP": s.DP, "HEADS": s.heads, "HD": s.HD,
        "AP": s.AP, "HP": s.HP, "K": s.K, "KP": s.KP, "P": s.patch_size, "GRID": s.grid,
        "CLASS": s.pooled_by_class, "BM": tile.rows, "BD": s.BD, "BA": s.BA, "BH": tile.hidden,
        "BE": min(128, columns & -columns), "BK": s.BK, "BQ": QUERIES, "BT": QUERIES,
        "NW": s.weights, "NV": s.vectors,
    }  # fmt: skip


def options(tile: config.ScorerTile) -> dict[str, int | bool | None]:
    return {
        "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
        "enable_fp_fusion": False,
    }  # fmt: skip


def scorer(
    packed: Packed,
    images: Pixels,
    labels: Labels | None,  # None: features only
    given: Tensor | None,  # [B] losses of the side that is not packed
    sign: int,  # 1, or -1 where the packed side is the reference alone
    noise: Noise | None,
    k: int | None,  # rows to find in the same launch; None: none
    tile: config.ScorerTile | None = None,
) -> tuple[Tensor, Rows | None, tuple[Tensor, Tensor, Tensor] | None]:
    """Features [S, B, DP] float32; scores, keys and flags; indices, threshold and flags."""
    s, device, sides = packed.shape, images.data.device, len(packed.patch)
    tile = tile or config.scorer_tile(packed)
    count = images.data.shape[0]
    programs = tile.programs * config.multiprocessors(device)
    group = config.group(s.tokens, tile.rows, triton.cdiv(count, programs))
    share = triton.cdiv(triton.cdiv(count, group), programs) * group
    programs = triton.cdiv(count, share)
    rows = triton.cdiv(group * s.tokens, tile.rows) * tile.rows
    x = torch.empty(programs, rows, sides * s.DP, device=device)
    qkv = torch.empty(programs, rows, 3 * s.AP, dtype=torch.float16, device=device)
    features = torch.empty(sides, count, s.DP, device=device)
    out = None if labels is None else rows_like(x, count, programs, noise)
    found = None if k is None else (
        torch.empty(k, dtype=torch.int64, device=device), torch.empty((), device=device),
        torch.empty((), dtype=torch.int32, device=device),
    )  # fmt: skip
    mean = None
    if labels is not None and labels.smoothing:
        mean = torch.cat([packed.head.float().mean(1), packed.head_bias.mean(1, True)], 1)
    scorer_kernel[(programs,)](
        images.data, images.data.stride(0), packed.patch, packed.weights,
        packed.scales if packed.fp8 else None, packed.vectors, packed.rows, packed.units,
        packed.norm, packed.kept, s.eps, x, qkv, features,
        *(None, None) if labels is None else (packed.head, packed.head_bias), mean,
        *(None, None) if labels is None else (labels.data, labels.data.stride(0)),
        *(None, None) if given is None else (given, given.stride(0)),
        *(out or (None, None, None)), *noise_arguments(noise), labels.ignore if labels else 0,
        None if found is None else _ticket(device), *(found or (None, None, None)), packed.bad,
        count, share, 0 if k is None else k, s.classes, s.DP, labels.smoothing if labels else 0.0,
        key.LOG2E.value * (s.width // s.heads) ** -0.5,
        SIDES=sides, SIGN=sign, SIGMOID=labels is not None and labels.sigmoid, GROUP=group,
        ROWS=rows, **constants(packed, tile), **images.constants,
        HEAD_M=HEAD_M, HEAD_N=HEAD_N, HEAD_K=min(32, s.BD), KEYS=KEYS,
        CALLS=tile.calls, **options(tile),
    )  # fmt: skip
    return features, out, found


_tickets: dict[tuple[int | None, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:  # [1] int32, zero whenever a launch begins
    """One per stream, since launches of one stream follow each other, and a new one per graph."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = device.index, torch.cuda.current_stream(device).cuda_stream
    if stream not in _tickets:
        _tickets[stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[stream]
