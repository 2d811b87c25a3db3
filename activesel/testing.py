# SPDX-License-Identifier: Apache-2.0
"""Acceptance tests for anybody's sampler, training step or kernel, and the exact values behind."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from activesel.select import Selection

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""What a kernel may lose against eager torch, relative to 1 + |truth|, by dtype of its inputs."""


def draw_probabilities(
    scores: Tensor,  # [B] float
    k: int,
    temperature: float = 1.0,
) -> dict[tuple[int, ...], float]:
    """Exact probability of every ordered draw of k rows without replacement (Plackett-Luce).

    P(i_1, ..., i_k) = prod_j p(i_j) / (1 - p(i_1) - ... - p(i_{j-1})) with p = softmax(scores / T).
    Scores are [B] finite, T > 0; ValueError if k is not in [0, B] or there are over 65,536 draws.

    Source: Plackett 1975; Luce 1959.

    Example:
        >>> import torch
        >>> p = draw_probabilities(torch.tensor([0.0, 0.0, 0.6931472]), 2)
        >>> round(p[2, 0], 6), round(p[0, 2], 6)
        (0.25, 0.166667)
    """
    p = _softmax(scores, k, temperature)
    if math.perm(len(p), k) > 1 << 16:
        raise ValueError(f"scores must give at most 65536 draws of {k}, got {math.perm(len(p), k)}")
    out = {}
    for draw in permutations(range(len(p)), k):
        probability = 1.0
        for i, row in enumerate(draw):
            probability *= p[row] / math.fsum(p[j] for j in range(len(p)) if j not in draw[:i])
        out[draw] = probability
    return out


def inclusion_probabilities(
    scores: Tensor,  # [B] float
    k: int,
    temperature: float = 1.0,
) -> Tensor:  # [B] float64
    """Exact probability of each row to be among the k drawn without replacement; they sum to k.

    Dynamic programming over sets: Q({}) = 1, Q(S + i) += Q(S) p(i) / (1 - p(S)), summed at |S| = k.
    Scores are [B] finite with B <= 16, T > 0; ValueError otherwise, or if k is not in [0, B].

    Example:
        >>> import torch
        >>> inclusion_probabilities(torch.tensor([0.0, 0.0, 0.6931472]), 2)
        tensor([0.5833, 0.5833, 0.8333], dtype=torch.float64)
    """
    p = _softmax(scores, k, temperature)
    if len(p) > 16:
        raise ValueError(f"scores must have at most 16 rows, got {len(p)}")
    sets = {0: 1.0}  # bit mask of the rows drawn so far: its probability
    for _ in range(k):
        grown: dict[int, float] = defaultdict(float)
        for drawn, probability in sets.items():
            others = [i for i in range(len(p)) if not drawn >> i & 1]
            left = math.fsum(p[i] for i in others)
            for i in others:
                grown[drawn | 1 << i] += probability * p[i] / left
        sets = grown
    included = [math.fsum(q for s, q in sets.items() if s >> i & 1) for i in range(len(p))]
    return torch.tensor(included, dtype=torch.float64)


def assert_plackett_luce(
    sampler: Callable[[Tensor, int, int], Selection | Tensor | Sequence[int]],
    scores: Tensor,  # [B] float
    k: int,
    *,
    temperature: float = 1.0,
    draws: int = 4000,
    ordered: bool = True,
    significance: float = 1e-4,
) -> None:
    """Accept a sampler only if it draws k rows without replacement with the exact probabilities.

    Chi-squared over whole draws (rare ones pooled to an expected count of 5), and a z-test of each
    row's inclusion. Fixed draws give a fixed answer: what passes once always passes.

    Args:
        sampler: ``sampler(scores, k, draw)``, called with draw = 0, 1, ... (use it as seed or
            step); returns a `Selection` or the k rows, first drawn first.
        scores: [B] finite, few rows; 6 with k = 3 do well.
        k: rows to draw.
        temperature: the sampler's, > 0.
        draws: how often to call it.
        ordered: False if the order of the rows says nothing; then sets are tested.
        significance: of each of the two tests.

    Raises:
        AssertionError: it is wrong, and where. ValueError: too many outcomes, k out of range.

    Example:
        >>> import torch, activesel
        >>> def good(scores, k, draw):
        ...     return activesel.sample(scores, k, seed=0, step=draw)
        >>> assert_plackett_luce(good, torch.tensor([0.0, 1.0, 2.0]), 2, draws=500)
    """
    from scipy import stats  # type: ignore[import-untyped]  # only this test needs it

    def outcome(rows: tuple[int, ...]) -> tuple[int, ...]:
        return rows if ordered else tuple(sorted(rows))

    expected: dict[tuple[int, ...], float] = defaultdict(float)
    for draw, p in draw_probabilities(scores, k, temperature).items():
        expected[outcome(draw)] += p * draws
    seen = Counter(outcome(_in_order(sampler(scores, k, i))) for i in range(draws))
    for rows in seen.keys() - expected.keys():
        raise AssertionError(f"draws must be {k} different rows of {len(scores)}, got {rows}")
    for row, p in enumerate(inclusion_probabilities(scores, k, temperature).tolist()):
        count = sum(n for rows, n in seen.items() if row in rows)
        z = (count - draws * p) / math.sqrt(max(draws * p * (1 - p), 1e-9))
        if 2 * stats.norm.sf(abs(z)) * len(scores) < significance:
            raise AssertionError(
                f"row {row} must be drawn with probability {p:.4f},"
                f" got {count / draws:.4f} in {draws} draws (z = {z:.1f})"
            )
    bins = [(seen[rows], n) for rows, n in expected.items() if n >= 5]
    if rare := math.fsum(n for n in expected.values() if n < 5):
        bins.append((draws - sum(n for n, _ in bins), rare))
    statistic = math.fsum((n - e) ** 2 / e for n, e in bins)
    if len(bins) > 1 and stats.chi2.sf(statistic, len(bins) - 1) < significance:
        raise AssertionError(
            "draws must follow Plackett-Luce,"
            f" got chi-squared {statistic:.1f} with {len(bins) - 1} degrees of freedom"
        )


def assert_gradient_scale(
    step_fn: Callable[[Any], Sequence[Tensor]],
    row: Any,
    *,
    rows: int = 8,
    keep: int = 2,
    tolerance: float = 1e-5,
) -> None:
    """Accept a training step only if selecting rows leaves the size of its gradient alone.

    Of identical rows any selection keeps the same, so the gradient must be that of a plain batch
    of ``keep`` rows. A loss masked to zero instead of gathered, or divided by B, is off by k / B.

    Args:
        step_fn: ``step_fn(batch)`` selects ``keep`` rows and returns the gradients of its loss; it
            must start afresh at each call.
        row: batch of one row, of any structure: each tensor is [1, ...].
        rows: B of the super-batch, > keep.
        keep: k, > 0.
        tolerance: relative to the largest gradient.

    Raises:
        AssertionError: the gradients differ, or say nothing. ValueError: keep is not in (0, rows).

    Example:
        >>> import torch, activesel
        >>> net = torch.nn.Linear(3, 2)
        >>> def step(batch):
        ...     x, y = activesel.Selector(keep=2, method="uniform")(batch)
        ...     loss = torch.nn.functional.cross_entropy(net(x), y)
        ...     return torch.autograd.grad(loss, list(net.parameters()))
        >>> assert_gradient_scale(step, (torch.randn(1, 3), torch.tensor([1])))
    """
    if not 0 < keep < rows:
        raise ValueError(f"keep must be in (0, {rows}), got {keep}")

    def copies(n: int) -> Any:
        return tree_map(lambda t: t.repeat_interleave(n, 0) if isinstance(t, Tensor) else t, row)

    ours, plain = list(step_fn(copies(rows))), list(step_fn(copies(keep)))
    size = max((g.abs().max().item() for g in plain), default=0.0)
    if len(ours) != len(plain) or size == 0:
        raise AssertionError("step_fn must return the same gradients each time, not all of them 0")
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if not torch.allclose(a, b, rtol=0, atol=tolerance * size):
            raise AssertionError(
                f"gradient {i} must be that of {keep} rows, got one"
                f" {(a.norm() / b.norm()).item():.4g} times as long (k / B = {keep / rows:.4g})"
            )


def assert_as_accurate(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,  # float64
    tolerance: float = TOLERANCE[torch.float32],
) -> None:
    """Accept a result that is as near the truth as eager torch's, within a tolerance.

    |ours - truth| <= |eager - truth| + tolerance (1 + |truth|); NaN and infinities must agree. All
    three have one shape, any; AssertionError names the worst element.

    Source: the rule of apple/ml-cross-entropy's tests.

    Example:
        >>> import torch
        >>> truth = torch.tensor([2.0], dtype=torch.float64).sqrt()
        >>> assert_as_accurate(truth.float(), truth.float(), truth)
    """
    if not ours.shape == eager.shape == truth.shape:
        raise AssertionError(f"shapes must agree, got {ours.shape}, {eager.shape}, {truth.shape}")
    ours, eager, finite = ours.double(), eager.double(), truth.isfinite()
    special, wanted_special = (t.masked_fill(finite, 0.0).nan_to_num(7.0) for t in (ours, truth))
    if not torch.equal(ours.isfinite(), finite) or not torch.equal(special, wanted_special):
        raise AssertionError("NaN and infinities must be where the truth has them")
    slack = (eager - truth).abs().nan_to_num(0.0, 0.0) + tolerance * (1 + truth.abs())
    excess = ((ours - truth).abs() - slack).where(finite, -1.0).flatten()
    if excess.numel() and excess.max() > 0:
        i = int(excess.argmax())
        got, other, wanted = (t.flatten()[i].item() for t in (ours, eager, truth))
        raise AssertionError(
            f"element {i} must be {wanted:.9g}, got {got:.9g} (eager torch {other:.9g})"
        )


def _softmax(scores: Tensor, k: int, temperature: float) -> list[float]:
    if not 0 <= k <= len(scores):
        raise ValueError(f"k must be in [0, {len(scores)}], got {k}")
    p: list[float] = (scores.double() / temperature).softmax(0).tolist()
    return p


def _in_order(drawn: Selection | Tensor | Sequence[int]) -> tuple[int, ...]:
    if isinstance(drawn, Selection):  # the first drawn has the highest key
        drawn = drawn.indices[drawn.keys[drawn.indices].argsort(descending=True, stable=True)]
    return tuple(drawn.tolist() if isinstance(drawn, Tensor) else drawn)
