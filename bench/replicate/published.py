# SPDX-License-Identifier: Apache-2.0
"""The published ledger: what the papers print, by their convention, counted, and with all charged.

Published betas and figures are second-hand (reviews, abstracts). Forward costs are counted on our
vision transformers of the same names, 224 pixels, patch 16, 1,000 classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from activesel.ledger import Column, Cost, Plan, cost, selection_flops
from activesel.models import dual, vit
from bench.common import Row, Scale

NAME = "published"
TITLE = "The published ledger"

RATIO = 0.0713
"""ViT-Ti's forward cost over ViT-B's, from which the papers' figures follow."""
COARSE = 0.28
"""ViT-B's at patch 32 over that at patch 16, as published for Flexi-JEST."""
CLASSES = 18_000
"""Labels of JFT-300M, about; only for what selection costs."""
JEST = {"drawn": 163_840, "kept": 32_768, "width": 768, "chunks": 16}
TEXT = {"length": 64, "vocabulary": 32_000}

SOURCES = {
    "ClassAct": "Evans et al. 2023, arXiv:2312.05328",
    "JEST": "Evans et al. 2024, arXiv:2406.17711",
}


@dataclass(frozen=True)
class Claim:
    """A published figure, in percent of uniform's compute, and what follows from it.

    `cost` is of one iteration instead of a speedup; `sign` says that only its sign is published.
    """

    name: str
    learner: str
    scorer: str
    method: str
    percent: float | None
    beta: float = 1.0
    rho: float = 2.0
    runs: float = 1.0
    cost: bool = False
    paper: str = "ClassAct"


CLAIMS = [
    Claim("RHO", "B", "Ti", "rho", -79),
    Claim("ClassAct-HO", "B", "Ti", "classact-ho", 3, beta=0.82),
    Claim("ClassAct", "B", "Ti", "classact", 3, beta=0.82),
    Claim("ClassAct-Online", "B", "Ti", "classact-online", 2, beta=0.83),
    Claim("ClassAct, ViT-L", "L", "Ti", "classact", 25, beta=0.74, runs=math.inf),
    Claim("ClassAct, ViT-L", "L", "S", "classact", 20, beta=0.72, runs=math.inf),
    Claim("ClassAct, ViT-L", "L", "B", "classact", None, beta=0.69),
    Claim("JEST, f = 0.8", "B", "B", "jest", 233, rho=5, cost=True, paper="JEST"),
    Claim("Flexi-JEST, f = 0.8", "B", "B@32", "flexi-jest", 111, rho=5, cost=True, paper="JEST"),
]


@lru_cache(maxsize=16)
def counted(size: str) -> Cost:
    """FLOPs per image of a ViT by name, `B@32` the one at its coarser patches.

    >>> counted("Ti").forward / 1e9  # doctest: +ELLIPSIS
    2.49...
    """
    name, _, patch = size.partition("@")
    with torch.device("meta"):
        model = vit(name)
    return cost(model.at(int(patch)) if patch else model, (3, 224, 224))


def plan(claim: Claim, published: bool) -> Plan:
    """A claim's plan, on published forward costs (where there are any) or on counted ones."""
    learner, scorer = counted(claim.learner), counted(claim.scorer)
    ratio = {("B", "Ti"): RATIO, ("B", "B@32"): COARSE}.get((claim.learner, claim.scorer))
    if published and ratio is not None:
        learner, scorer = Cost(1.0), Cost(ratio)
    choosing = joint_flops() if claim.cost else selection_flops(1, CLASSES, 2)
    return Plan(
        learner,
        scorer,
        method=claim.method,
        rho=claim.rho,
        beta=claim.beta,
        runs=claim.runs,
        selection=choosing * (not published),
    )


def joint_flops() -> float:
    """FLOPs per row of our joint selection in JEST's super-batch, by the operator's own formula."""
    rows, width = JEST["drawn"], JEST["width"]
    side = [torch.empty(rows, width, device="meta")] * 2 + [torch.empty(1, device="meta")] * 2
    number = [torch.empty(1, dtype=torch.int64, device="meta")] * 2
    with FlopCounterMode(display=False) as counter:
        torch.ops.activesel.joint_select(
            side, side, JEST["kept"], JEST["chunks"], True, *number,
            torch.empty(1, device="meta"), 0, "sigmoid", "auto",
        )  # fmt: skip
    return counter.get_total_flops() / rows


def percent(claim: Claim, column: Column) -> float:
    """A column's figure of the kind that was published."""
    if claim.cost:
        return 100 * sum(column.each.values()) / column.base
    return 100 * column.compute_speedup


def row(claim: Claim) -> Row:
    """A claim beside our figures; "everything" has one run pay for the reference."""
    by_paper, ours = plan(claim, published=True), plan(claim, published=False)
    column, whole = by_paper.published(), replace(ours, runs=1.0).everything()
    training = {n: x for n, x in by_paper.everything().each.items() if n == "online_training"}
    got = percent(claim, column)
    return {
        "name": claim.name,
        "learner": claim.learner,
        "scorer": claim.scorer,
        "kind": "cost of an iteration" if claim.cost else "compute speedup",
        "rho": claim.rho,
        "beta": claim.beta,
        "reference_training": _reference(claim),
        "f_ratio": counted(claim.scorer).forward / counted(claim.learner).forward,
        "published": claim.percent,
        "convention": got,
        "difference": None if claim.percent is None else got - claim.percent,
        "agrees": got < 0 if claim.percent is None else abs(round(got) - claim.percent) <= 1,
        "counted": percent(claim, ours.published()),
        "online": percent(claim, replace(column, each={**column.each, **training}))
        if training
        else None,
        "everything": percent(claim, whole),
        "beta_max": None if claim.cost else whole.beta_max,
        "source": SOURCES[claim.paper],
    }


def coarse() -> Row:
    """What patches of 32 save in ViT-B: a published input of Flexi-JEST, here counted."""
    with torch.device("meta"):
        towers = dual("B", **TEXT)
    pairs = [((3, 224, 224),), ((TEXT["length"],), torch.int64)]
    image = counted("B@32").forward / counted("B").forward
    both = [cost(t, pairs[0][0], pairs[1]).forward for t in (towers.at(32), towers)]
    return {
        "published": -100 * (1 - COARSE),
        "image_tower": -100 * (1 - image),
        "both_towers": -100 * (1 - both[0] / both[1]),
    }


def configs(scale: Scale) -> list[Row]:
    """No runs are needed."""
    return []


def content(
    found: Sequence[Row] = (), missing: Sequence[object] = (), scale: Scale = "smoke"
) -> Row:
    """Every claim, and the input of Flexi-JEST; the same at every scale."""
    rows = [row(claim) for claim in CLAIMS]
    whole = next(r for r in rows if r["name"] == "ClassAct")
    return {
        "rows": rows,
        "coarse": coarse(),
        "ratio": RATIO,
        "headline": {
            "agree": sum(r["agrees"] for r in rows),
            "claims": len(rows),
            "classact": whole["convention"],
            "classact_online_charged": whole["online"],
        },
    }


def pictures(content: Row, path: Path) -> list[Path]:
    """None; the frontier's are `python -m bench pareto`."""
    return []


def text(content: Row) -> str:
    """The table in Markdown, with what does not agree."""
    lines = [
        "| | learner, scorer | rho | beta | published | by its convention | FLOPs counted here | "
        "online training too | everything, one run pays |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in content["rows"]:
        iteration = r["kind"] == "cost of an iteration"
        names = ("convention", "counted", "online", "everything")
        cells = ["-" if r[n] is None else _percent(r[n], iteration) for n in names]
        said = "negative" if r["published"] is None else _percent(r["published"], iteration, 0)
        lines.append(
            f"| {r['name']} | {r['learner']}, {r['scorer']} | {r['rho']:g} | "
            f"{'-' if iteration else format(r['beta'], '.2f')} | {said} | {' | '.join(cells)} |"
        )
    agree = sum(r["agrees"] for r in content["rows"])
    act = next(r for r in content["rows"] if r["name"] == "ClassAct")
    least = next(r for r in content["rows"] if (r["learner"], r["scorer"]) == ("L", "Ti"))
    b = next(r for r in content["rows"] if (r["learner"], r["scorer"]) == ("L", "B"))
    c = content["coarse"]
    return "\n".join(
        [
            *lines,
            "",
            "Compute speedups, and for JEST the cost of an iteration, in percent of uniform's; "
            "published figures and betas are second-hand. The convention leaves out what the "
            "online scorer costs to train, and for JEST all of the reference. RHO and ClassAct "
            f"follow from a forward cost of Ti that is {content['ratio']} of B's (counted here: "
            f"{act['f_ratio']:.4f}). ViT-L with Ti or S is published as if the reference were "
            "free, with B only as a loss: no one convention gives all three, and here B's "
            f"reference is charged (beta to stay below: {b['beta_max']:.2f}).",
            "",
            f"{agree} of {len(content['rows'])} agree within one point, in whole percents as they "
            f"are published (ViT-L with Ti: {least['convention']:.1f} against "
            f"{least['published']:.0f}). **With the online scorer's training charged ClassAct's "
            f"{act['convention']:+.1f} % become {act['online']:+.1f} %.**",
            "",
            f"An input, not a result: patches of 32 are published to take {-c['published']:.0f} % "
            f"off a forward pass; counted, it is {-c['image_tower']:.0f} % of the image tower and "
            f"{-c['both_towers']:.0f} % of both towers, with {TEXT['length']} tokens of text.",
        ]
    )


def _reference(claim: Claim) -> str:
    if claim.cost:
        return "free"
    return "shared by many runs" if math.isinf(claim.runs) else "paid by one run"


def _percent(value: float, iteration: bool, digits: int = 1) -> str:
    return f"{value:{'' if iteration else '+'}.{digits}f} %"
