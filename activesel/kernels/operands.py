# SPDX-License-Identifier: Apache-2.0
"""What the launchers pass each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Labels(NamedTuple):
    """Integer targets of rows * tokens predictions, flattened."""

    data: Tensor  # [rows * tokens] int
    tokens: int
    classes: int
    ignore: int
    sigmoid: bool
    smoothing: float


class Noise(NamedTuple):
    """What turns scores into keys, all on the device."""

    seed: Tensor  # [1] int64
    step: Tensor  # [1] int64
    temperature: Tensor  # [1] float32
    offset: int


class Rows(NamedTuple):
    """What every kernel up to the keys writes."""

    scores: Tensor  # [B] float32
    keys: Tensor | None  # [B] float32; None: scores only
    flags: Tensor  # [programs] int32; the largest is all of them or-ed


def rows_like(x: Tensor, rows: int, programs: int, noise: Noise | None) -> Rows:
    scores = torch.empty(rows, device=x.device)
    keys = None if noise is None else torch.empty(rows, device=x.device)
    return Rows(scores, keys, torch.empty(programs, dtype=torch.int32, device=x.device))


def left_to_rows(
    operand: Sequence[Tensor],
    tokens: int,
    splits: int,
) -> Tensor | None:
    """Of a kernel that makes no keys: room for parts of the losses [S, N], or losses given [B]."""
    if operand and operand[0].ndim > 1:
        return torch.empty(splits, tokens, device=operand[0].device)
    return operand[0] if operand else None


def noise_arguments(noise: Noise | None) -> tuple[Tensor | int | None, ...]:
    return (None, None, None, 0) if noise is None else (*noise,)
