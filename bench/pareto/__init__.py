# SPDX-License-Identifier: Apache-2.0
"""The frontier of scorer size and ratio: what selection gains, and from where on it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common, study
from bench.common import Row, Scale
from bench.pareto import paper, points
from bench.pareto.clock import Clock, measured
from bench.pareto.words import columns, flat, shares, text

__all__ = ["NAME", "command", "content", "pictures", "text"]

NAME = "pareto"


def command(
    scale: Scale = "smoke",
    workers: int = 2,
    minutes: float | None = None,
    aggregate_only: bool = False,
    out: Path | None = None,
    clock: Path | None = None,
) -> None:
    """Scorer sizes and ratios: speedups, FLOPs to uniform's metric, and scaling over learners.

    From runs of both loops, and apart from them from published betas. Stop it at any time, the
    same line goes on; finished runs are not repeated.

    Args:
        scale: smoke, full or gpu.
        workers: processes, one thread each.
        minutes: stop after so many.
        aggregate_only: run nothing, make do with what there is.
        out: files to write, without suffix.
        clock: JSON file of seconds per row to charge, taken elsewhere; by default this machine's,
            which is taken first where OUT-clock.json does not hold it.
    """
    from rich.console import Console
    from rich.table import Table

    console, path = Console(highlight=False, soft_wrap=True), out or common.results(scale, NAME)
    console.width = max(console.width, 180)  # narrower, its table is one of single letters
    found, missing = study.gather(points.queue(scale), scale, workers, minutes, aggregate_only)
    rates, no_rates = _clock(clock, path, scale) if found else (None, [])
    figures = content(found, missing, scale, rates)
    figures["left_out"] += no_rates
    for title, rows in _tables(figures).items():
        table = Table(title=title)
        for cells in map(columns, rows):
            if not table.columns:
                for name in cells:
                    table.add_column(name)
            table.add_row(*cells.values())
        console.print(table)
    files = common.write(path, figures, [flat(r) for r in figures["points"] + figures["published"]])
    files += pictures(figures, path)
    for sentence in figures["left_out"] + shares(figures["forward_shares"]):
        console.print(sentence)
    if missing:
        console.print(f"unfinished: {len(missing)} of {len(found) + len(missing)} runs are missing")
    console.print("written:", *map(str, files))
    common.result(figures["headline"])


def _clock(given: Path | None, path: Path, scale: Scale) -> tuple[Clock | None, list[str]]:
    """The reference system's seconds per row, or a sentence why there are none."""
    from torch.cuda import is_available

    configs = points.queue(scale)
    if given is not None:
        return Clock(common.read(given), configs), []
    if scale == "gpu" and not is_available():
        return None, ["reference-system seconds left out: no GPU; --clock takes a file of one"]
    device = "cuda" if scale == "gpu" else "cpu"
    return measured(path.with_name(f"{path.name}-clock"), configs, scale, device), []


def _tables(figures: Row) -> dict[str, list[Row]]:
    measured = [row for row in figures["points"] if row["method"] != "uniform"]
    return {
        **({"Measured here": measured} if measured else {}),
        "Computed from published betas (second-hand)": figures["published"],
    }


def content(
    found: Sequence[Row], missing: Sequence[Any], scale: Scale, clock: Clock | None = None
) -> Row:
    """Everything behind the pictures, from records of runs and a clock for all of them."""
    rows, left_out = points.points(found, points.full(scale), clock)
    rows = [{**r, "usual_learner": _usual(r, scale)} for r in sorted(rows, key=_order)]
    published = paper.points()
    if not found:
        left_out.append("measured points left out: no run is finished")
    environments = [run["environment"] for run in found]
    return {
        **common.header(),
        "scale": scale,
        "budgets": points.full(scale),
        "environments": [e for i, e in enumerate(environments) if e not in environments[:i]],
        "finished": len(found),
        "missing": [config.name for config in missing],
        "left_out": left_out,
        "headline": _headline(rows, published, len(missing)),
        "clock": clock and {n: clock.content[n] for n in ("machine", "device", "command")},
        "forward_shares": clock.shares if clock else [],
        "points": rows,
        "published": published,
    }


def _order(row: Row) -> tuple[Any, ...]:
    """Loops apart, uniform first, larger scorers and budgets first."""
    plain = row["method"] != "uniform"
    return row["loop"], plain, row["label"], row["rho"], -row["scorer_flops"], -row["updates"]


def _usual(row: Row, scale: Scale) -> bool:
    return row["loop"] != "classify" or row["learner"] == points.learner(scale)


def _headline(rows: Sequence[Row], published: Sequence[Row], missing: int) -> Row:
    """The cheapest point of each loop, and how many are compute-positive."""
    headline: Row = {"missing": missing}
    for name, those in (
        ("images", [r for r in rows if r["loop"] == "classify"]),
        ("pairs", [r for r in rows if r["loop"] == "contrastive"]),
        ("published", published),
    ):
        those = [r for r in those if r["method"] != "uniform"]
        if not those:
            continue
        best = max(those, key=lambda row: _surely(row["compute_speedup"]))
        headline[name] = {
            "points": len(those),
            "compute_positive": sum(r["compute_positive"] is True for r in those),
            "best": f"{best['label']}, rho {best['rho']:g}, {best['scorer']} to {best['learner']}",
            "beta": best["beta"]["text"],
            "compute_speedup": best["compute_speedup"]["text"],
            **({"system_speedup": found["text"]} if (found := best.get("system_speedup")) else {}),
        }
    return headline


def _surely(entry: Row) -> float:
    """A speedup, or what it is above."""
    above = entry["most"] if entry["text"][0] == ">" else -math.inf
    return float(above if entry["value"] is None else entry["value"])


def pictures(figures: Row, path: Path) -> list[Path]:
    """Four figures of the images' runs, three of the pairs', four at paper scale."""
    from bench.pareto import plots

    def named(name: str) -> Path:
        return path.with_name(f"{path.name}-{name}")

    files: list[Path] = []
    rows = {
        loop: [r for r in figures["points"] if r["loop"] == loop]
        for loop in ("classify", "contrastive")
    }
    methods = {loop: [r for r in those if r["method"] != "uniform"] for loop, those in rows.items()}
    if methods["classify"]:
        title = "Measured here: Fashion-MNIST, 10 % wrong labels"
        usual = [r for r in rows["classify"] if r["usual_learner"]]
        panels = {
            name: those
            for name, method in (("online and reference", "classact"), ("reference alone", "easy"))
            if (those := [r for r in usual if r["method"] == method])
        }
        files += plots.speedups(panels, named("images-speedup"), title)
        files += plots.totals(
            [r for r in usual if r["method"] != "uniform"], named("images-flops"), title
        )
        files += plots.metrics(usual, named("images-metric"), title, "test accuracy, %")
        small = [r for r in rows["classify"] if _compared(r)]
        if len({r["learner"] for r in small}) > 1:
            files += plots.learners(small, named("images-learners"), title, "test accuracy, %")
    if pairs := methods["contrastive"]:
        title = "Measured here: icons and captions"
        row = pairs[0]
        name = f"{row['scorer']} to {row['learner']}, F-ratio {row['f_ratio']:.2f}"
        files += plots.speedups({name: pairs}, named("pairs-speedup"), title, "rho")
        files += plots.totals(pairs, named("pairs-flops"), title, "rho")
        files += plots.metrics(rows["contrastive"], named("pairs-metric"), title, "R@10, %")
    title = "Computed from published betas (second-hand)"
    published = figures["published"]
    online = [r for r in published if r["method"].startswith("classact")]
    alone = [r for r in published if r["method"] == "easy"]
    panels = {"online and reference": online, "reference alone": alone}
    files += plots.speedups(panels, named("paper-speedup"), title)
    jest = [r for r in published if r["label"] == "JEST"]
    name = "learner and reference of one size, F-ratio 1"
    files += plots.speedups({name: jest}, named("paper-jest-speedup"), title, "rho")
    large = [r for r in online + alone if r["learner"] == "L" != r["scorer"]]
    files += plots.totals(large, named("paper-flops"), f"{title}, learner L")
    files += plots.costs(published, named("paper-charged"), title)
    classact = [r for r in online if r["method"] == "classact" and r["scorer"] == "Ti"]
    return files + plots.learners(classact, named("paper-learners"), f"{title}, scorer Ti", "")


def _compared(row: Row) -> bool:
    """Whether the run is one of those that compare learners."""
    if row["method"] == "uniform":
        return row["percent"] in (100, points.PERCENT)
    return row["method"] == "classact" and row["rho"] == 2 and row["scorer"] == points.SMALL
