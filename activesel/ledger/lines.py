# SPDX-License-Identifier: Apache-2.0
"""What is spent, line by line, and the speedups that follow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

TRAIN = 3
"""Cost of training on a row over that of a forward pass: the backward pass counts twice."""


def check(least: float, infinite: bool = False, **numbers: float | None) -> None:
    """Refuse numbers that are below `least`, or infinite; None passes."""
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not value >= least:
            raise ValueError(f"{name} must be at least {least:g}, got {value}")
        if math.isinf(value) and not infinite:
            raise ValueError(f"{name} must be finite, got {value}")


@dataclass(frozen=True)
class Cost:
    """What one row costs in one model: FLOPs, or seconds; the arithmetic is the same.

    Args:
        forward: of a forward pass, >= 0.
        backward: of the backward pass, >= 0; None is twice `forward`, by convention.

    >>> Cost(100.0).train, Cost(100.0, 193.0).train
    (300.0, 293.0)
    """

    forward: float
    backward: float | None = None

    def __post_init__(self) -> None:
        check(0, forward=self.forward, backward=self.backward)

    @property
    def train(self) -> float:
        """Of training on the row: forward and backward."""
        return self.forward + (2 * self.forward if self.backward is None else self.backward)


def selection_flops(rows: int, classes: int, models: int) -> float:
    """FLOPs to turn logits into kept rows: 4 per logit for the losses, 40 per row for the key.

    The 40 are an upper estimate: Philox, two polynomial logarithms, a pass of comparisons. `models`
    is how many models' logits [rows, classes] are scored, 0 to 2; 0 means nothing is selected.

    >>> selection_flops(128, 10, 2) / 128
    120.0
    """
    return float(rows * (4 * classes * models + 40)) if models else 0.0


@dataclass(frozen=True)
class Ledger:
    """FLOPs (or seconds, or rows) by purpose; `total` is their sum.

    >>> ours, iid = (Ledger(learner=3) + Ledger(scoring_online=0.5)) * 2, Ledger(learner=8)
    >>> ours.total, ours.compute_speedup(iid), ours.compute_positive(iid)
    (7.0, 0.125, True)
    """

    learner: float = 0.0
    scoring_online: float = 0.0
    scoring_reference: float = 0.0
    online_training: float = 0.0
    reference_training: float = 0.0
    selection: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all lines."""
        return float(sum(asdict(self).values()))

    def __add__(self, other: Ledger) -> Ledger:
        pairs = ((f.name, getattr(self, f.name) + getattr(other, f.name)) for f in fields(self))
        return Ledger(**dict(pairs))

    def __mul__(self, times: float) -> Ledger:
        return Ledger(**{name: times * value for name, value in asdict(self).items()})

    def compute_speedup(self, iid: Ledger) -> float:
        """1 - C / C_IID with every line of both ledgers counted."""
        if iid.total <= 0:
            raise ValueError(f"iid must have a positive total, got {iid.total}")
        return 1 - self.total / iid.total

    def compute_positive(self, iid: Ledger) -> bool:
        """Whether less was spent than by training on IID rows."""
        return self.total < iid.total


def charge(
    rows: Ledger,
    learner: Cost,
    online: Cost | None = None,
    reference: Cost | None = None,
    selection: float = 0.0,
) -> Ledger:
    """Rows that went through each line, times what one costs in each model (or none, or selecting).

    With costs in seconds, recorded once on one machine, this is the reference-system time of a run
    made on any. ValueError for negative numbers.

    Source: Kaddour et al. 2023 (arXiv:2307.06440).

    >>> learner = Cost(forward=0.0929 / 128, backward=0.1324 / 128)  # seconds, of 128 rows
    >>> charge(Ledger(learner=1280, scoring_online=2560), learner, Cost(0.0001)).learner
    2.253
    """
    check(0, **asdict(rows))
    check(0, selection=selection)
    online, reference = online or Cost(0.0), reference or Cost(0.0)
    return Ledger(
        rows.learner * learner.train,
        rows.scoring_online * online.forward,
        rows.scoring_reference * reference.forward,
        rows.online_training * online.train,
        rows.reference_training * reference.train,
        rows.selection * selection,
    )


def learner_speedup(beta: float) -> float:
    """1 - beta, beta = updates needed / updates IID needs for the same metric.

    >>> learner_speedup(0.75)
    0.25
    """
    check(0, beta=beta)
    return 1 - beta
