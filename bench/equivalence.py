# SPDX-License-Identifier: Apache-2.0
"""Beta by equivalence: how many updates uniform sampling needs for what a method reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

from bench.aggregate import spread

ROUNDING = 1e-12


@dataclass(frozen=True)
class Beta:
    """Updates of a method over those uniform needs to reach the same metric.

    Attributes:
        value: None where the metric lies beyond what uniform's budgets reach.
        low, high: 95 % interval, from the t-interval of the method's metric over its seeds; the
            uncertainty of uniform's curve is not in it. None beyond uniform's budgets, or with a
            single seed.
        text: "0.67 (0.61 to 0.74)", "< 0.50", "0.67 (< 0.50 to 0.74)".
    """

    value: float | None
    low: float | None
    high: float | None
    text: str


def beta(
    updates: int,
    metrics: Sequence[float],
    uniform: Mapping[int, Sequence[float]],
) -> Beta:
    """updates / U(mean of metrics), U(a) = the fewest updates with which uniform reaches a.

    U is linear in log updates between uniform's budgets, after an isotonic regression of their
    means (a larger budget is no worse), and is never extrapolated.

    Args:
        updates: of each of the method's runs, all decayed over them, >= 1.
        metrics: what they reached, one per seed; higher is better.
        uniform: by updates >= 1, what uniform's runs of that budget reached, one per seed.

    Raises:
        ValueError: no runs, fewer than one update, or a metric that is not finite.

    >>> beta(67, [0.86, 0.86], {50: [0.84], 100: [0.86], 200: [0.87]}).text
    '0.67 (0.67 to 0.67)'
    >>> beta(67, [0.88], {50: [0.84], 100: [0.86]}).text
    '< 0.67'
    """
    if not metrics or not uniform or not all(uniform.values()):
        raise ValueError(
            "metrics and every budget of uniform must hold at least one run, got "
            f"{len(metrics)} and { {u: len(found) for u, found in uniform.items()} }"
        )
    if min(updates, *uniform) < 1:
        raise ValueError(f"updates must be at least 1, got {updates} and {sorted(uniform)}")
    if not all(map(math.isfinite, (*metrics, *(m for found in uniform.values() for m in found)))):
        raise ValueError(f"metrics must be finite, got {list(metrics)} and {dict(uniform)}")
    budgets = sorted(uniform)
    means = [float(np.mean(uniform[u])) for u in budgets]
    fitted = isotonic_regression(means, weights=[len(uniform[u]) for u in budgets]).x
    levels, first = np.unique(fitted, return_index=True)  # equal levels: reached by the smallest
    logs = np.log(budgets)[first]

    def at(metric: float) -> tuple[float | None, str]:
        if metric > levels[-1] + ROUNDING:
            return None, f"< {updates / math.exp(logs[-1]):.2f}"
        if metric < levels[0] - ROUNDING:
            return None, f"> {updates / math.exp(logs[0]):.2f}"
        value = updates / math.exp(np.interp(metric, levels, logs))
        return value, f"{value:.2f}"

    entry = spread(metrics)
    value, text = at(entry["mean"])
    if entry["low"] is None:
        return Beta(value, None, None, text)
    (low, least), (high, most) = at(entry["high"]), at(entry["low"])
    beyond = value is None and least == most  # nothing to add
    return Beta(value, low, high, text if beyond else f"{text} ({least} to {most})")
