# SPDX-License-Identifier: Apache-2.0
"""Joint selection: from running sums to conditional scores and keys, one launch a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import key

BLOCK = 512


@triton.jit(do_not_specialize=["offset", "chunk"])
def pair_keys_kernel(
    own_ptr,  # [B] float32
    state_ptr,  # [1, B] | [4, B] float32; None before the first chunk
    chosen_ptr,  # [B] uint8
    scores_ptr,  # [B] float32, written where a row is not chosen, as keys are
    keys_ptr,
    open_ptr,  # [B] float32
    terms_ptr,  # [1] float32, or None
    seed_ptr,
    step_ptr,
    temperature_ptr,
    offset: tl.int64,
    chunk: tl.int64,
    rows: tl.int64,
    SOFTMAX: tl.constexpr,
    ONLINE: tl.constexpr,
    REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    score = tl.load(own_ptr + row, mask=live, other=0.0)
    if state_ptr is not None:
        at = state_ptr + row
        if not SOFTMAX:
            score = score + tl.load(at, mask=live, other=0.0)
        if SOFTMAX and ONLINE:
            there = tl.load(at, mask=live, other=0.0)
            score = score + 0.5 * (there + tl.load(at + rows, mask=live, other=0.0))
        if SOFTMAX and REFERENCE:
            there = tl.load(at + 2 * rows, mask=live, other=0.0)
            score = score - 0.5 * (there + tl.load(at + 3 * rows, mask=live, other=0.0))
    if terms_ptr is not None:
        score = tl.div_rn(score, tl.zeros(score.shape, tl.float32) + tl.load(terms_ptr))
    key_, _ = key.of_score(
        score, row + offset, seed_ptr, step_ptr, temperature_ptr, tl.cast(chunk, tl.uint32)
    )
    chosen = tl.load(chosen_ptr + row, mask=live, other=0) != 0
    tl.store(scores_ptr + row, score, mask=live & (chosen == 0))
    tl.store(keys_ptr + row, key_, mask=live & (chosen == 0))
    tl.store(open_ptr + row, tl.where(chosen, float("nan"), key_), mask=live)


def pair_keys(
    own: Tensor,  # as `spec_joint.pair_keys`
    state: Tensor | None,
    chosen: Tensor,
    scores: Tensor,
    keys: Tensor,
    terms: Tensor | None,
    sides: tuple[bool, bool],
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    chunk: int,
) -> Tensor:  # [B] float32
    out = torch.empty_like(own)
    pair_keys_kernel[(triton.cdiv(own.shape[0], BLOCK),)](
        own, state, chosen.view(torch.uint8), scores, keys, out, terms,
        seed, step, temperature, offset, chunk, own.shape[0],
        SOFTMAX=state is not None and state.shape[0] == 4, ONLINE=sides[0], REFERENCE=sides[1],
        BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
