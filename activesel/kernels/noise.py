# SPDX-License-Identifier: Apache-2.0
"""Gumbel noise by itself, of any rows and chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from activesel.kernels import key

BLOCK = 1024


@triton.jit(do_not_specialize=["offset", "chunk"])
def noise_kernel(
    out_ptr,  # [R] float32
    seed_ptr,
    step_ptr,
    offset: tl.int64,
    rows: tl.int64,
    chunk: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = key.noise(row + offset, seed_ptr, step_ptr, tl.cast(chunk, tl.uint32))
    tl.store(out_ptr + row, g, mask=row < rows)


def noise(
    rows: int,
    seed: Tensor,  # [1] int64
    step: Tensor,  # [1] int64
    offset: int,
    chunk: int,
) -> Tensor:  # [rows] float32
    out = torch.empty(rows, device=seed.device)
    noise_kernel[(max(triton.cdiv(rows, BLOCK), 1),)](
        out, seed, step, offset, rows, chunk, BLOCK=BLOCK, enable_fp_fusion=False
    )
    return out
