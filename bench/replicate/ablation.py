# SPDX-License-Identifier: Apache-2.0
"""ClassAct's ablation: who scores, and what the reference was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activesel.loop.config import Config, Method
from bench.aggregate import LABELS
from bench.common import Row, Scale
from bench.replicate import figures, plots

NAME = "ablation"
TITLE = "ClassAct's ablation"
METHODS: dict[Method, dict[str, Any]] = {
    "rho": {"rho": 5},
    "classact-ho": {},
    "classact": {},
    "classact-online": {},
}
PUBLISHED: dict[str, tuple[float, float]] = {
    "rho": (0.00, -0.79),
    "classact-ho": (0.18, 0.03),
    "classact": (0.18, 0.03),
    "classact-online": (0.17, 0.02),
}
"""Learner and compute speedup, ViT-Ti choosing for ViT-B on JFT-300M (Evans et al. 2024)."""


def configs(scale: Scale) -> list[Config]:
    """The four methods at `PERCENT` of the updates, and uniform's budgets."""
    return figures.queue(scale, [figures.over_seeds(scale, m, **s) for m, s in METHODS.items()])


def content(found: Sequence[Row], missing: Sequence[Any], scale: Scale) -> Row:
    """Figures of the ablation from run records.

    Args:
        found: finished runs, of any configuration.
        missing: configurations not run yet.
        scale: that of the runs.
    """
    rows, base = [], figures.finished(found, figures.over_seeds(scale, "classact"))
    for method, settings in METHODS.items():
        configs = figures.over_seeds(scale, method, **settings)
        entry = figures.row(LABELS[method], configs, found, scale)
        if entry is not None:
            learner, compute = PUBLISHED[method]
            rows.append(
                {
                    **entry,
                    "over_classact": figures.paired(figures.finished(found, configs), base)
                    if method != "classact"
                    else None,
                    "published_learner_speedup": learner,
                    "published_compute_speedup": compute,
                }
            )
    return {
        **figures.basis(scale, [*figures.uniform_rows(found, scale), *rows]),
        "headline": {
            r["method"]: {
                name: r[name]["text"]
                for name in ("learner_speedup", "compute_speedup")
                if name in r
            }
            for r in rows
        },
    }


def pictures(content: Row, path: Path) -> list[Path]:
    """Accuracies, and the speedups beside the published ones."""
    return plots.ablation(content, path)


def text(content: Row) -> str:
    """Table and sentences in Markdown."""
    rows = []
    for r in content["rows"]:
        shown = [f"{100 * r['share_of_updates']:.0f} %", figures.percent(r["accuracy"])]
        shown += [figures.percent(r["worst_class"]), figures.percent(r["wrong_kept"])]
        ours = ["-"] * 5
        if r["method"] != "uniform" and "beta" in r:
            theirs = [r[f"published_{what}_speedup"] for what in ("learner", "compute")]
            ours = [
                r["learner_speedup"]["text"],
                f"{100 * theirs[0]:+.0f} %",
                r["compute_speedup"]["text"],
                r["compute_speedup_published"]["text"],
                f"{100 * theirs[1]:+.0f} %",
            ]
        rows.append([figures.name(r, content), *shown, *ours])
    columns = (
        "method", "updates", "accuracy, %", "worst class, %", "wrong labels kept, %",
        "learner speedup", "published", "compute speedup, everything charged",
        "without training the online scorer", "published",
    )  # fmt: skip
    said = [
        f"{figures.setup(content)} Speedups are over the updates (FLOPs) uniform needs for the "
        "same accuracy, from its runs at the budgets above; the intervals are the method's alone. "
        "Published: ViT-Ti choosing for ViT-B on JFT-300M, rho 2 for RHO too (here 5, as in its "
        "own paper); training the online scorer is not charged there.",
        *_compared(content),
        *figures.unfinished(content),
    ]
    alt = "Accuracy and speedups of RHO and the ClassAct family"
    return "\n\n".join([figures.table(columns, rows), *said, figures.picture(content, NAME, alt)])


def _compared(content: Row) -> list[str]:
    parts = [
        f"{r['label']} is {figures.told(r['over_classact'])} ClassAct "
        f"({figures.points(r['over_classact'])} points)"
        for r in content["rows"]
        if r.get("over_classact")
    ]
    return [f"Accuracy, seed by seed: {'; '.join(parts)}."] if parts else []
