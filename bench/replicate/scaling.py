# SPDX-License-Identifier: Apache-2.0
"""Scorer scaling: learnability against easy-reference as the scorer shrinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activesel.loop.config import Config
from bench.common import Row, Scale
from bench.replicate import figures, plots

NAME = "scaling"
TITLE = "Scorer scaling"
CLAIM = "learnability degrades more slowly than easy-reference as the scorer shrinks"
SCORERS: dict[Scale, tuple[str, ...]] = {
    "smoke": ("nano", "pico"),
    "full": ("micro", "nano", "mu", "pico", "femto"),
    "gpu": ("micro", "nano", "mu", "pico", "femto"),
}
METHODS = {"classact": "learnability", "easy": "easy-reference"}


def _settings(scale: Scale) -> dict[tuple[str, str], list[Config]]:
    return {
        (method, scorer): figures.over_seeds(scale, method, scorer=scorer)  # type: ignore[arg-type]
        for scorer in SCORERS[scale]
        for method in METHODS
    }


def configs(scale: Scale) -> list[Config]:
    """Both methods with every scorer at `PERCENT` of the updates, and uniform's budgets."""
    return figures.queue(scale, _settings(scale).values())


def content(found: Sequence[Row], missing: Sequence[Any], scale: Scale) -> Row:
    """Figures of scorer scaling from run records.

    Args:
        found: finished runs, of any configuration.
        missing: configurations not run yet.
        scale: that of the runs.
    """
    settings = _settings(scale)
    rows = {
        (method, scorer): entry
        for (method, scorer), configs in settings.items()
        if (entry := figures.row(f"{METHODS[method]}, {scorer}", configs, found, scale))
    }
    order = sorted(rows.values(), key=lambda r: (-(r["f_ratio"] or 0), r["method"]))
    fits = compare({key: (r["f_ratio"], _by_seed(r)) for key, r in rows.items()}, SCORERS[scale])
    return {
        **figures.basis(scale, [*figures.uniform_rows(found, scale), *order]),
        "claim": CLAIM,
        **fits,
        "headline": {"claim": CLAIM, "verdict": fits["verdict"]},
    }


def _by_seed(row: Row) -> dict[int, float]:
    return dict(zip(row["seeds"], row["accuracy"]["by_seed"], strict=True))


def compare(
    cells: Mapping[tuple[str, str], tuple[float, Mapping[int, float]]],
    scorers: Sequence[str],
) -> Row:
    """How fast either method loses accuracy as the scorer shrinks, paired by seed.

    Args:
        cells: F-ratio, and accuracy by seed, by method and scorer.
        scorers: those that must all be there.

    Returns:
        "slopes" (accuracy per factor of 10 in F-ratio, least squares) and "drops" (accuracy with
        the dearest scorer minus that with the cheapest), each of both methods and easy-reference
        minus learnability; "verdict" by the 95 % interval of the difference of slopes.
    """
    keys = [(method, scorer) for method in METHODS for scorer in scorers]
    if any(key not in cells for key in keys):
        return {"slopes": None, "drops": None, "verdict": "not measured"}
    seeds = sorted(set.intersection(*(set(cells[key][1]) for key in keys)))
    if not seeds:
        return {"slopes": None, "drops": None, "verdict": "not measured"}
    found: dict[str, Row] = {"slopes": {}, "drops": {}}
    for method in METHODS:
        ratios = np.array([cells[method, scorer][0] for scorer in scorers])
        accuracy = np.array([[cells[method, s][1][seed] for s in scorers] for seed in seeds])
        slopes = np.polyfit(np.log10(ratios), accuracy.T, 1)[0]
        drops = accuracy[:, ratios.argmax()] - accuracy[:, ratios.argmin()]
        found["slopes"][method] = figures.each(slopes)
        found["drops"][method] = figures.each(drops)
    for kind in found.values():
        pair = zip(kind["easy"]["by_seed"], kind["classact"]["by_seed"], strict=True)
        kind["difference"] = figures.each(easy - ours for easy, ours in pair)
    verdict = {1: "holds", 0: "not shown", -1: "the opposite"}
    return {**found, "verdict": verdict[figures.sign(found["slopes"]["difference"])]}


def pictures(content: Row, path: Path) -> list[Path]:
    """Accuracy, and wrong labels kept, against F-ratio."""
    return plots.scaling(content, path) if content["slopes"] else []


def text(content: Row) -> str:
    """Table and sentences in Markdown."""
    rows = [
        [
            figures.name(r, content),
            f"{r['f_ratio']:.4f}" if r["f_ratio"] else "-",
            f"{100 * r['share_of_updates']:.0f} %",
            figures.percent(r["accuracy"]),
            figures.points(r["gain"]) if r["f_ratio"] else "-",
            figures.percent(r["wrong_kept"]),
            r["beta"]["text"] if "beta" in r else "-",
            r["compute_speedup"]["text"] if "beta" in r else "-",
        ]
        for r in content["rows"]
    ]
    columns = (
        "score, scorer", "F-ratio", "updates", "accuracy, %", "over uniform, same updates",
        "wrong labels kept, %", "beta", "compute speedup, everything charged",
    )  # fmt: skip
    alt = "Accuracy against the size of the scorer"
    said = [*_verdict(content), figures.setup(content), *figures.unfinished(content)]
    return "\n\n".join([figures.table(columns, rows), *said, figures.picture(content, NAME, alt)])


def _verdict(content: Row) -> list[str]:
    if not content["slopes"]:
        return [f"The claim that {CLAIM} is not measured yet."]
    slopes, drops = content["slopes"], content["drops"]
    verdict = {
        "holds": "holds here",
        "not shown": "is **not shown** here",
        "the opposite": "does **not** hold here: the opposite does",
    }[content["verdict"]]
    return [
        f"The claim that {CLAIM} {verdict}. For every factor of 10 in F-ratio easy-reference loses "
        f"{figures.points(slopes['easy'])} points, learnability "
        f"{figures.points(slopes['classact'])}; the difference, seed by seed, is "
        f"{figures.points(slopes['difference'])}. From the dearest to the cheapest scorer they "
        f"lose {figures.points(drops['easy'])} and {figures.points(drops['classact'])} points "
        f"(difference {figures.points(drops['difference'])})."
    ]
