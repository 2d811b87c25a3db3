# SPDX-License-Identifier: Apache-2.0
"""Not how fast but how right: who keeps the rows that exact scores would keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import Head
from bench.gpu import baselines
from bench.gpu.baselines import Inputs
from bench.gpu.device import BF16, FP32, Bench
from bench.gpu.timing import Row


def agreement(rows: int, classes: int, width: int, bench: Bench) -> Row:
    """How much of the true top fifth by learnability each way of scoring keeps, at T = 0.

    The reference's weight is the online one, slightly moved. Both are rounded to bf16 before the
    truth is computed, so that all start from the same numbers.
    """
    rows, classes = bench.size(rows, 60), bench.size(classes, 70)
    keep, at_once = rows // 5, max(1, (1 << 28) // classes)
    x = bench.randn(rows, width, dtype=BF16)
    weight, change = (bench.randn(classes, width) * width**-0.5 for _ in range(2))
    moved = weight + 0.01 * change
    targets = bench.labels(rows, classes)
    inputs = Inputs([x, weight.to(BF16)], [x, moved.to(BF16)], targets)

    def by_parts(function: Callable[[Inputs], Tensor]) -> Tensor:
        parts = (inputs.part(slice(i, i + at_once)) for i in range(0, rows, at_once))
        return torch.cat([function(part) for part in parts])

    def bf16_losses(part: Inputs) -> Tensor:
        assert part.targets is not None
        on, ref = (
            F.cross_entropy(features @ w.T, part.targets, reduction="none")
            for features, w in (part.online, part.reference)
        )
        return (on - ref).float()

    truth = by_parts(partial(baselines.scores, product=torch.float64))
    best = truth.topk(keep).indices
    picked = activesel.select(
        online=Head(*inputs.online), reference=Head(*inputs.reference), targets=targets, k=keep,
        temperature=0.0, seed=0, backend=bench.backend,
    )  # fmt: skip
    scores = {
        "ours": picked.scores,
        "eager, fp32 logits": by_parts(partial(baselines.scores, product=FP32)),
        "eager, bf16 logits, fp32 loss": by_parts(partial(baselines.scores, product=BF16)),
        "eager, bf16 throughout": by_parts(bf16_losses),
    }
    kept = {name: s.topk(keep).indices for name, s in scores.items()} | {"ours": picked.indices}
    return {
        "learnability_rms": truth.square().mean().sqrt().item(),
        "kept": keep,
        "agreement": {
            name: {
                "overlap": torch.isin(kept[name], best).float().mean().item(),
                "error_rms": (s.double() - truth).square().mean().sqrt().item(),
            }
            for name, s in scores.items()
        },
    }
