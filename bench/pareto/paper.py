# SPDX-License-Identifier: Apache-2.0
"""Points at paper scale: published betas, on FLOPs counted here for vision transformers alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from activesel.ledger import Column, Plan
from bench.common import Row
from bench.pareto.points import gains
from bench.replicate.published import SOURCES, counted


@dataclass(frozen=True)
class Published:
    """One published beta.

    Attributes:
        name, method: as printed, and in the ledger.
        learner, scorer: vision transformers by name, `B@32` at coarse patches.
        beta: value; or, with `bound` ">", the source only says fewer than 1 - beta.
        where: data, and how it came here.
        paper: a key of `SOURCES`.
        trained: examples the reference learnt from, over uniform's; 1 as in the printed formula.
        note: what is doubtful.
    """

    name: str
    method: str
    learner: str
    scorer: str
    beta: float
    where: str
    paper: str = "ClassAct"
    rho: float = 2.0
    bound: str = ""
    trained: float = 1.0
    note: str = ""


JFT = "JFT-300M, from a review"
ABLATION = "JFT-300M, ablation, from a review"
WEBLI = "WebLI, of uniform's 3B examples, from a review"
SIGLIP = "of SigLIP's 40B examples, from a review"
OTHER = "baseline of other data; reference taken as trained on as many examples as the learner"
PAPER = (
    Published("ClassAct", "classact", "L", "B", 0.69, JFT),
    Published("ClassAct", "classact", "L", "S", 0.72, JFT),
    Published("ClassAct", "classact", "L", "Ti", 0.74, JFT),
    Published(
        "ClassAct", "classact", "L", "mu", 0.84, JFT,
        note="whether the paper's ViT-Mu is of this size is not known",
    ),
    Published(
        "easy reference", "easy", "L", "Ti", 0.90, JFT, bound=">",
        note="given as under 10 % and not compute-positive for small scorers; drawn at Ti",
    ),
    Published("easy reference", "easy", "L", "L", 0.67, JFT, note="given as at full size"),
    Published("RHO", "rho", "B", "Ti", 1.00, ABLATION),
    Published("ClassAct-HO", "classact-ho", "B", "Ti", 0.82, ABLATION),
    Published("ClassAct", "classact", "B", "Ti", 0.82, ABLATION),
    Published("ClassAct-Online", "classact-online", "B", "Ti", 0.83, ABLATION),
    Published("JEST", "jest", "B", "B", 2 / 3, WEBLI, "JEST", rho=2),
    Published("JEST", "jest", "B", "B", 1 / 3, WEBLI, "JEST", rho=5),
    Published("JEST", "jest", "B", "B", 0.67 / 3, WEBLI, "JEST", rho=10),
    Published("JEST++", "jest", "B", "B", 0.1, SIGLIP, "JEST", rho=5, trained=0.1, note=OTHER),
    Published(
        "Flexi-JEST++", "flexi-jest", "B", "B@32", 0.1, SIGLIP, "JEST", rho=5, trained=0.1,
        note=OTHER,
    ),
)  # fmt: skip


def plan(row: Published) -> Plan:
    """The ledger's plan, selection's own arithmetic left out.

    >>> ablation = [plan(row) for row in PAPER if row.where == ABLATION]
    >>> [round(100 * p.published().compute_speedup) for p in ablation]
    [-79, 3, 3, 2]
    """
    return Plan(
        counted(row.learner),
        counted(row.scorer),
        method=row.method,
        rho=row.rho,
        beta=row.beta,
        reference_rows=row.trained,
    )


def points() -> list[Row]:
    """A point per published beta, with the columns of those measured."""
    return [point(row) for row in PAPER]


def point(row: Published) -> Row:
    """One published beta, priced by the published convention and with everything charged."""
    usual, text = plan(row), f"{row.bound} {row.beta:.2f}".strip()
    everything = usual.everything()
    ends = dict.fromkeys(("least", "most"), row.beta)
    b = {"value": None if row.bound else row.beta, "low": None, "high": None, "text": text, **ends}

    def cost(column: Callable[[Plan], Column]) -> Callable[[float], float]:
        return lambda beta: 1 - column(replace(usual, beta=beta)).compute_speedup

    forward = {size: counted(size).forward for size in (row.learner, row.scorer)}
    return {
        "source": "published",
        "loop": "paper",
        "method": row.method,
        "label": row.name,
        **{name: getattr(row, name) for name in ("learner", "scorer", "rho")},
        "learner_flops": forward[row.learner],
        "scorer_flops": forward[row.scorer],
        "f_ratio": forward[row.scorer] / forward[row.learner],
        "beta": b,
        "beta_max": everything.beta_max,
        "beta_max_shared": replace(everything, once={}).beta_max,
        **gains(b, cost(Plan.everything), cost(Plan.published)),
        "where": row.where,
        "paper": SOURCES[row.paper],
        "note": row.note,
    }
