# SPDX-License-Identifier: Apache-2.0
"""Where the FLOPs go: one line per cost, none left out, and the speedups that follow.

lines (what is spent) <- flops (counting), timing (seconds), plan (what a run would cost), audit.
"""

from activesel.ledger.audit import Verdict, audit
from activesel.ledger.flops import cost, forward_flops, self_check, training_flops
from activesel.ledger.lines import (
    TRAIN,
    Cost,
    Ledger,
    charge,
    learner_speedup,
    selection_flops,
)
from activesel.ledger.plan import LINES, METHODS, Column, Method, Plan, published_cost
from activesel.ledger.timing import seconds

__all__ = [
    "LINES", "METHODS", "TRAIN", "Column", "Cost", "Ledger", "Method", "Plan", "Verdict", "audit",
    "charge", "cost", "forward_flops", "learner_speedup", "published_cost", "seconds",
    "selection_flops", "self_check", "training_flops",
]  # fmt: skip
