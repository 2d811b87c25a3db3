# SPDX-License-Identifier: Apache-2.0
"""What selection would cost: three columns, from the published convention to everything charged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from activesel.ledger.lines import TRAIN, Cost, check

LINES = (
    "learner_forward", "learner_backward", "scoring_online", "scoring_reference",
    "online_training", "reference_training", "selection", "loading",
)  # fmt: skip
"""The lines of a `Column`."""


class Method(NamedTuple):
    """Who scores, and what its paper leaves uncharged; for `METHODS`.

    `online` is a scorer trained along, the learner, the learner on coarse patches (which half of
    the kept rows are trained on, too) or nobody; the reference is trained before, or beside on
    whole super-batches. `free`: as published, its scores and training cost nothing. `reuse`: as
    published, kept rows are trained on with the forward pass that scored them.

    >>> METHODS["rho"].online
    'learner'
    """

    online: Literal["scorer", "learner", "coarse"] | None = None
    reference: Literal["before", "beside"] | None = None
    free: bool = False
    reuse: bool = False


METHODS: dict[str, Method] = {
    "uniform": Method(),
    "hard": Method("scorer"),
    "selective-backprop": Method("learner"),
    "easy": Method(reference="before"),
    "classact": Method("scorer", "before"),
    "classact-ho": Method("scorer", "before"),
    "classact-online": Method("scorer", "beside"),
    "activeclip": Method("scorer", "before"),
    "rho": Method("learner", "before"),
    "jest": Method("learner", "before", free=True, reuse=True),
    "flexi-jest": Method("coarse", "before", free=True),
}


@dataclass(frozen=True)
class Column:
    """One way to count, in FLOPs (or seconds) per row of uniform's budget.

    With `base` the cost of a uniform row, and by line (see `LINES`) `each` that of a kept row and
    `once` that of the run however long: total = beta sum(each) + sum(once), compute speedup =
    1 - total / base, beta_max = (base - sum(once)) / sum(each).

    >>> each, once = {"learner_forward": 3.0, "selection": 1.0}, {"reference_training": 0.5}
    >>> column = Column("", base=3.0, beta=0.5, each=each, once=once)
    >>> column.lines["selection"], column.total, column.compute_positive
    (0.5, 2.5, True)
    >>> round(column.compute_speedup, 3), column.beta_max, column.without("selection").total
    (0.167, 0.625, 2.0)
    """

    name: str
    base: float
    beta: float
    each: Mapping[str, float]
    once: Mapping[str, float]

    @property
    def lines(self) -> dict[str, float]:
        """Every line, `once` and all updates together."""
        each, once = self.each, self.once
        return {name: self.beta * each.get(name, 0.0) + once.get(name, 0.0) for name in LINES}

    @property
    def total(self) -> float:
        """Sum of all lines."""
        return sum(self.lines.values())

    @property
    def compute_speedup(self) -> float:
        """Share of uniform's cost that is saved; negative where none is."""
        return 1 - self.total / self.base

    @property
    def compute_positive(self) -> bool:
        """Whether less is spent than by training on uniform rows."""
        return self.total < self.base

    @property
    def beta_max(self) -> float:
        """The beta to stay below for a gain; 0 where none would do."""
        return max(0.0, (self.base - sum(self.once.values())) / sum(self.each.values()))

    def without(self, *names: str) -> Column:
        """The same with some lines, keys of `LINES`, not charged; ValueError for other names."""
        if unknown := set(names) - set(LINES):
            raise ValueError(f"names must be of {', '.join(LINES)}, got {min(unknown)!r}")
        each, once = (
            {name: x for name, x in part.items() if name not in names}
            for part in (self.each, self.once)
        )
        return replace(self, each=each, once=once)


@dataclass(frozen=True)
class Plan:
    """A run with selection, priced before it is run; every cost is that of a row.

    `published()` is the papers' beta (3 F_learner + rho F_act) + 3 F_reference: no training of the
    online scorer, no selection. `computed()` is the same with forward and backward passes as they
    are counted, `everything()` charges every line; `columns()` are the three.

    Args:
        learner: cost of a row in the learner.
        online, reference: in the scorers; one not given costs what the other does. `online` is the
            learner at its coarse patch size for flexi-jest, unused where the learner scores.
        method: a key of `METHODS`.
        rho: rows drawn per row kept, >= 1; uniform draws what it keeps.
        beta: updates needed over uniform's, for the same metric, >= 0.
        runs: that share one reference and its cached scores, >= 1; infinity leaves them free.
        reference_rows: that the reference was trained on, per row of uniform's budget, >= 0.
        cached: rows whose reference scores are computed once and kept, per row of uniform's budget
            (0: they are somebody else's); None scores every row drawn. Third column only.
        selection: FLOPs to select, per row drawn, see `selection_flops`.
        decode: FLOPs to load a row; 0 leaves loading to be counted in rows (`rows_read`, beta rho).
        reuse: the learner trains on the forward pass that it scored with, not paid twice.
        ratio: forward cost of either scorer over the learner's, as printed, for the first column.

    Raises:
        ValueError: an unknown method (the known are listed), a number out of range, no scorer.
        TypeError: no number, no `Cost`.

    >>> plan = Plan(Cost(1.0), Cost(0.0713), beta=0.82)
    >>> [round(100 * column.compute_speedup, 1) for column in plan.columns()]
    [3.1, 3.1, -2.8]
    >>> plan.columns() == (plan.published(), plan.computed(), plan.everything())
    True
    >>> round(plan.everything().without("reference_training").beta_max, 3), plan.rows_read
    (0.857, 1.64)
    """

    learner: Cost
    online: Cost | None = None
    reference: Cost | None = None
    method: str = "classact"
    rho: float = 2.0
    beta: float = 1.0
    runs: float = 1.0
    reference_rows: float = 1.0
    cached: float | None = None
    selection: float = 0.0
    decode: float = 0.0
    reuse: bool = False
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check(1, rho=self.rho)
        check(1, infinite=True, runs=self.runs)
        names = ("beta", "reference_rows", "cached", "selection", "decode", "ratio")
        check(0, **{name: getattr(self, name) for name in names})
        for name in ("learner", "online", "reference"):
            given = getattr(self, name)
            if not isinstance(given, Cost) and (given is not None or name == "learner"):
                raise TypeError(f"{name} must be a Cost, got {type(given).__name__}")
        if self.learner.train <= 0:
            raise ValueError(f"learner must cost more than 0, got {self.learner}")
        how = METHODS[self.method]
        if (how.reference or how.online in ("scorer", "coarse")) and self._costs[1] is None:
            raise ValueError(f"online or reference must be given for {self.method}, got neither")
        if self.cached is not None and how.reference != "before":
            raise ValueError(f"cached must be None for {self.method}: no reference scores to keep")
        if self.reuse and how.online != "learner":
            raise ValueError(f"reuse must be False for {self.method}: the learner scores nothing")

    @property
    def rows_read(self) -> float:
        """Rows loaded per row of uniform's budget."""
        return self.beta * self._drawn

    def published(self) -> Column:
        """By convention: a backward pass is two forward passes."""
        models = [c and Cost(c.forward) for c in self._costs]
        if self.ratio is not None:
            models[1:] = [Cost(self.ratio * self.learner.forward)] * 2
        return self._column("as published", models, everything=False)

    def computed(self) -> Column:
        """The same lines as counted."""
        return self._column("computed", self._costs, everything=False)

    def everything(self) -> Column:
        """Every line as counted."""
        return self._column("everything charged", self._costs, everything=True)

    def columns(self) -> tuple[Column, Column, Column]:
        """All three."""
        return self.published(), self.computed(), self.everything()

    @property
    def _drawn(self) -> float:
        return 1.0 if self.method == "uniform" else self.rho

    @property
    def _costs(self) -> list[Cost | None]:
        return [self.learner, self.online or self.reference, self.reference or self.online]

    def _column(self, name: str, costs: list[Cost | None], everything: bool) -> Column:
        how, drawn = METHODS[self.method], self._drawn
        free, reuse = (False, self.reuse) if everything else (how.free, how.reuse)
        learner, online, reference = (c or Cost(0.0) for c in costs)
        who = {"learner": learner, None: Cost(0.0)}.get(how.online, online)
        trained = [learner, online] if how.online == "coarse" else [learner]
        each = {
            "learner_forward": sum(c.forward for c in trained) / len(trained),
            "learner_backward": sum(c.train - c.forward for c in trained) / len(trained),
            "scoring_online": (drawn - reuse) * who.forward,
        }
        once = {}
        if how.reference and everything and self.cached is not None:
            once["scoring_reference"] = self.cached * reference.forward / self.runs
        elif how.reference and not free:
            each["scoring_reference"] = drawn * reference.forward
        if how.reference == "beside" and everything:
            each["reference_training"] = drawn * reference.train
        elif how.reference and not free:
            once["reference_training"] = self.reference_rows * reference.train / self.runs
        if everything and how.online == "scorer":
            each["online_training"] = online.train
        if everything:
            each["selection"] = drawn * self.selection if how != Method() else 0.0
            each["loading"] = drawn * self.decode
        base = learner.train + (self.decode if everything else 0.0)
        return Column(name, base, self.beta, each, once)


def published_cost(
    beta: float, learner: float, reference: float, act: float, rho: float = 2.0,
    online_training: float = 0.0,
) -> float:  # fmt: skip
    """beta (3 F_learner + rho F_act + online_training) + 3 F_reference; 0 online as published.

    Source: Evans et al. 2024 (arXiv 2312.05328).

    >>> round(100 * (1 - published_cost(0.82, 1.0, 0.0713, act=2 * 0.0713) / 3), 1)
    3.1
    """
    return beta * (TRAIN * learner + rho * act + online_training) + TRAIN * reference
