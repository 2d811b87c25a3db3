# SPDX-License-Identifier: Apache-2.0
"""Where the FLOPs go: one line per cost, none left out, and the speedups that follow."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TRAIN = 3
"""Cost of training on a row over that of a forward pass: the backward pass counts twice."""


def forward_flops(
    model: nn.Module,
    input_shape: tuple[int, ...],
) -> float:
    """FLOPs of one forward pass per row: matrix products, convolutions and attention, 2 per MAC.

    Counted on meta tensors, because on CPU tensors torch's counter misses fused attention.

    Args:
        model: any module that runs on meta tensors; it is copied, not touched.
        input_shape: of one row, without the batch dimension.

    Returns:
        FLOPs per row.

    Raises:
        ValueError: nothing countable ran.

    >>> forward_flops(nn.Linear(30, 10), (30,))
    600.0
    """
    shadow = copy.deepcopy(model).to("meta")

    def batch(rows: int) -> int:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            shadow(torch.empty(rows, *input_shape, device="meta"))
        return counter.get_total_flops()

    total = batch(2) - batch(1)  # what is done once a call (resizing weights) is no row's
    if total <= 0:
        raise ValueError(f"model must run at least one countable operation, got {total} FLOPs")
    return float(total)


def selection_flops(
    rows: int,
    classes: int,
    models: int,
) -> float:
    """FLOPs to turn logits into kept rows: 4 per logit for the losses, 40 per row for the key.

    The 40 cover Philox, two polynomial logarithms and one pass of comparisons; they are an
    upper estimate of arithmetic that is not worth counting finely.

    Args:
        rows: size of the super-batch.
        classes: logits per row.
        models: how many models' logits are scored, 0 to 2; 0 means nothing is selected.

    >>> selection_flops(128, 10, 2) / 128
    120.0
    """
    return float(rows * (4 * classes * models + 40)) if models else 0.0


@dataclass(frozen=True)
class Ledger:
    """FLOPs by purpose; `total` is their sum.

    >>> ((Ledger(learner=3) + Ledger(scoring_online=1)) * 2).total
    8.0
    """

    learner: float = 0.0
    scoring_online: float = 0.0
    scoring_reference: float = 0.0
    online_training: float = 0.0
    reference_training: float = 0.0
    selection: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all lines.

        >>> Ledger(learner=3, selection=1).total
        4.0
        """
        return float(sum(asdict(self).values()))

    def __add__(self, other: Ledger) -> Ledger:
        pairs = ((f.name, getattr(self, f.name) + getattr(other, f.name)) for f in fields(self))
        return Ledger(**dict(pairs))

    def __mul__(self, times: float) -> Ledger:
        return Ledger(**{name: times * value for name, value in asdict(self).items()})

    def compute_speedup(self, iid: Ledger) -> float:
        """1 - C / C_IID with every line of both ledgers counted.

        >>> Ledger(learner=75, scoring_online=12.5).compute_speedup(Ledger(learner=100))
        0.125
        """
        if iid.total <= 0:
            raise ValueError(f"iid must have a positive total, got {iid.total}")
        return 1 - self.total / iid.total

    def compute_positive(self, iid: Ledger) -> bool:
        """Whether less was spent than by training on IID rows.

        >>> Ledger(learner=75, scoring_online=15).compute_positive(Ledger(learner=100))
        True
        """
        return self.total < iid.total


def learner_speedup(beta: float) -> float:
    """1 - beta, beta = updates needed / updates IID needs for the same metric.

    >>> learner_speedup(0.75)
    0.25
    """
    if beta < 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    return 1 - beta


def published_cost(
    beta: float,
    learner: float,
    reference: float,
    act: float,
    rho: float = 2.0,
    online_training: float = 0.0,
) -> float:
    """beta * (3 F_learner + rho * F_act + online_training) + 3 F_reference, as printed in papers.

    With `online_training` = 0 it leaves out what the online scorer costs to train, as published.

    Args:
        beta: share of IID's updates.
        learner, reference: forward FLOPs per row of either model.
        act: forward FLOPs to score one row.
        rho: scored rows per kept row.
        online_training: FLOPs to train the online scorer on one kept row.

    Source: Evans et al. 2024 (arXiv 2312.05328).

    >>> round(100 * (1 - published_cost(0.82, 1.0, 0.0713, act=2 * 0.0713) / 3), 1)
    3.1
    """
    return beta * (TRAIN * learner + rho * act + online_training) + TRAIN * reference
