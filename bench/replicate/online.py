# SPDX-License-Identifier: Apache-2.0
"""The online scorer: what closes the gap to scoring with the learner itself, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activesel.loop.config import Config
from bench.common import Row, Scale
from bench.replicate import figures, plots

NAME = "online"
TITLE = "The online scorer"
BASELINE, LEARNER = "ClassAct, plain", "scored by the learner"
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (BASELINE, {"online_smoothing": 0.0}),
    (LEARNER, {"online": "learner"}),
    ("RHO", {"method": "rho", "rho": 5}),
    ("smoothed labels", {}),
    ("smoothed, averaged weights", {"online_average": 0.99}),
    ("smoothed, from all rows drawn", {"online_rows": "drawn"}),
    (
        "smoothed, averaged, from all rows drawn",
        {"online_average": 0.99, "online_rows": "drawn"},
    ),
    ("smoothed, distilled by half", {"distil": 0.5}),
    ("smoothed, temperature 1", {"temperature": 1.0}),
    ("smoothed, temperature 0.25", {"temperature": 0.25}),
    ("smoothed, scorers micro", {"scorer": "micro"}),
)
"""Changes to ClassAct, by label; the first two are the ends of the gap. Labels are smoothed by 0.2,
the loop's default; the average forgets 1 % per update."""
SMOKE = (BASELINE, LEARNER, "RHO", "smoothed labels", "smoothed, distilled by half")


def variants(scale: Scale) -> dict[str, list[Config]]:
    """Runs by label; what changes nothing at this scale is left out."""
    kept: dict[str, list[Config]] = {}
    for label, settings in VARIANTS:
        given = {"method": "classact", **settings}
        configs = figures.over_seeds(scale, given.pop("method"), **given)
        if (scale != "smoke" or label in SMOKE) and configs not in kept.values():
            kept[label] = configs
    return kept


def configs(scale: Scale) -> list[Config]:
    """Every variant at `PERCENT` of the updates, and uniform's budgets."""
    return figures.queue(scale, variants(scale).values())


def content(found: Sequence[Row], missing: Sequence[Any], scale: Scale) -> Row:
    """Figures of the variants from run records.

    Args:
        found: finished runs, of any configuration.
        missing: configurations not run yet.
        scale: that of the runs.
    """
    named = variants(scale)
    runs = {label: figures.finished(found, configs) for label, configs in named.items()}
    base = runs[BASELINE]
    gap = figures.paired(runs.get(LEARNER, []), base)
    open_gap = figures.sign(gap) > 0
    plain = sum(run["ledger"]["total"] for run in base) / max(len(base), 1)
    rows = []
    for label, configs in named.items():
        entry = figures.row(label, configs, found, scale)
        if entry is None:
            continue
        gained = figures.paired(runs[label], base) if label != BASELINE else None
        total = entry["flops"]["total"]
        entry |= {"over_plain": gained, "gap_closed": None, "extra_flops": None}
        if gained and gap and open_gap:
            entry["gap_closed"] = gained["mean"] / gap["mean"]
        if base and label != BASELINE:
            entry["extra_flops"] = (total - plain) / (total / entry["flops_share"])
        rows.append(entry)
    above = [r["label"] for r in rows if figures.sign(r["over_plain"]) > 0]
    return {
        **figures.basis(scale, [*figures.uniform_rows(found, scale), *rows]),
        "gap": gap,
        "gap_shown": open_gap,
        "above_plain": above,
        "left_out": [
            f"{label} left out: {'not at smoke scale' if scale == 'smoke' else 'changes nothing'}"
            for label, _ in VARIANTS
            if label not in named
        ],
        "headline": {"gap": gap and gap["mean"], "gap_shown": open_gap, "above_plain": above},
    }


def pictures(content: Row, path: Path) -> list[Path]:
    """Accuracy of every variant against all it costs."""
    rows = [row for row in content["rows"] if row["method"] != "uniform"]
    return plots.online(content, path) if rows else []


def text(content: Row) -> str:
    """Table and sentences in Markdown."""
    rows = []
    for r in content["rows"]:
        closed, extra = r.get("gap_closed"), r.get("extra_flops")
        name = figures.name(r, content)
        rows.append(
            [
                name if r["method"] != "uniform" else f"{name} of updates",
                figures.percent(r["accuracy"]),
                figures.points(r.get("over_plain")),
                "-" if closed is None else f"{100 * closed:.0f} %",
                figures.percent(r["wrong_kept"]),
                "-" if extra is None else f"{100 * extra:+.1f} %",
                r["compute_speedup"]["text"] if "beta" in r else "-",
            ]
        )
    columns = (
        "online scorer", "accuracy, %", "over plain ClassAct, points", "gap closed",
        "wrong labels kept, %", "extra FLOPs, % of uniform's total",
        "compute speedup, everything charged",
    )  # fmt: skip
    alt = "Accuracy of every online scorer against all it costs"
    said = [
        _gap(content),
        f"{figures.setup(content)} Everything runs at {content['percent']} % of uniform's updates "
        "but uniform's own budgets; what is not named is as for plain ClassAct.",
        *figures.unfinished(content),
    ]
    return "\n\n".join([figures.table(columns, rows), *said, figures.picture(content, NAME, alt)])


def _gap(content: Row) -> str:
    gap, above = content["gap"], content["above_plain"]
    if gap is None:
        return "The distance from plain ClassAct to scoring with the learner is not measured yet."
    said = (
        "Scoring with the learner itself, not with plain ClassAct's online scorer, changes "
        f"accuracy by {figures.points(gap)} points. "
    )
    if content["gap_shown"]:
        said += "The column of the gap closed refers to this. "
    else:
        said += "Its interval is not above 0: no gap is shown, and no share of one is given. "
    compared = sum(1 for row in content["rows"] if row.get("over_plain"))
    others = [label for label in above if label != LEARNER]
    found = f"those above plain ClassAct with their whole interval: {', '.join(others) or 'none'}"
    return (
        f"{said}Of {compared} changes, {found}. With as many comparisons and as few seeds one such "
        "may be chance."
    )
