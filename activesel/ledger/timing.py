# SPDX-License-Identifier: Apache-2.0
"""Seconds, of models as they run here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from activesel.ledger.flops import backward, tensors
from activesel.ledger.lines import Cost, check


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not timed; GPUs are waited for."""
    check(1, repeats=repeats)
    times = []
    for _ in range(repeats + 1):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def seconds(model: Callable[..., Any], *args: Any, repeats: int = 5) -> Cost:
    """Seconds of a row in a model, forward (as a scorer, without gradients) and backward: medians.

    The model runs as it stands on `args`, real tensors, of which the first's rows count; no
    optimizer steps. What running changes (a batch norm's averages, random states) stays changed.
    ValueError if there are no rows, or nothing to have a gradient of.

    >>> import torch
    >>> seconds(torch.nn.Linear(16, 16), torch.randn(4, 16), repeats=1).forward > 0
    True
    """
    rows = next((len(t) for t in tensors(args) if t.ndim and len(t)), 0)
    if not rows:
        raise ValueError("args must hold a tensor with rows, got none")
    with torch.no_grad():
        forward = median(lambda: model(*args), repeats)
    step = median(lambda: backward(model(*args)), repeats)
    return Cost(forward / rows, max(step - forward, 0.0) / rows)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
