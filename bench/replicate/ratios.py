# SPDX-License-Identifier: Apache-2.0
"""JEST's filter ratios: 50, 80 and 90 % of every super-batch dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from activesel.loop.pairs_config import PairsConfig
from bench import pairs_table, study
from bench.common import Row, Scale
from bench.replicate import figures, plots

NAME = "ratios"
TITLE = "JEST's filter ratios"
RATIOS: dict[Scale, tuple[int, ...]] = {"smoke": (2, 5), "full": (2, 5, 10), "gpu": (2, 5, 10)}
SHORTER: dict[Scale, tuple[int, ...]] = {"smoke": (67,), "full": (67, 50), "gpu": (67, 50)}
"""Other budgets, in % of uniform's updates, of the ratio the papers use most."""
USUAL = 5
PUBLISHED = {2: 2.0 / 3.0, 5: 1.0 / 3.0, 10: 0.67 / 3.0}
"""Share of the rows seen with which JEST reached what uniform did with 3 billion, by rho."""


def iteration(rho: int) -> float:
    """FLOPs of an iteration over IID's as published: the learner scores, reference for nothing.

    The forward pass of the rows kept is used again for training, so rho - 1 forwards come on top
    of the 3 of training.

    >>> [f"{100 * iteration(rho):.0f} %" for rho in (2, 5, 10)]
    ['133 %', '233 %', '400 %']
    """
    return (3 + rho - 1) / 3


def _over_seeds(scale: Scale, method: Any, percent: float, **settings: Any) -> list[PairsConfig]:
    return [study.pairs(scale, method, percent, s, **settings) for s in study.SEEDS[scale]]


def configs(scale: Scale) -> list[PairsConfig]:
    """Uniform and JEST at every ratio with all updates, and the usual ratio with fewer."""
    blocks = [_over_seeds(scale, "uniform", 100)]
    blocks += [_over_seeds(scale, "jest", 100, rho=rho) for rho in RATIOS[scale]]
    blocks += [_over_seeds(scale, "jest", percent, rho=USUAL) for percent in SHORTER[scale]]
    return list(dict.fromkeys(config for block in blocks for config in block))


def content(found: Sequence[Row], missing: Sequence[Any], scale: Scale) -> Row:
    """Figures of the filter ratios from run records.

    Args:
        found: finished runs, of any configuration.
        missing: configurations not run yet.
        scale: that of the runs.
    """
    base = json.loads(json.dumps(asdict(study.pairs(scale, "jest", rho=USUAL))))
    groups: dict[str, list[Row]] = {}
    for run in figures.finished(found, configs(scale)):
        groups.setdefault(pairs_table.setting(run["config"]), []).append(run)
    cells = [
        {**pairs_table.cell(runs, base), "rows": sum(runs[0]["pool"].values())}
        for runs in groups.values()
    ]
    uniform = next((c for c in cells if c["method"] == "uniform"), None)
    cells = [{**c, **pairs_table.against(c, uniform)} for c in cells]
    cells.sort(key=lambda c: (c["config"]["rho"], -c["updates"]))
    reached = {e["label"]: e for e in pairs_table.speedups(cells)}
    updates = study.pairs(scale, "uniform").updates
    rows = [
        _row(cell, uniform, reached.get(cell["label"]) if cell["updates"] == updates else None)
        for cell in cells
    ]
    full = [r for r in rows if r["updates"] == updates and r["method"] == "jest"]
    return {
        "updates": updates,
        "seeds": list(study.SEEDS[scale]),
        "config": base,
        "rows": rows,
        "headline": {
            f"rho {r['rho']}": {
                "r10_gain": r["r10_gain"] and r["r10_gain"]["mean"],
                "learner_speedup": r["learner_speedup"],
                "flops_per_iteration": r["flops_per_iteration"],
            }
            for r in full
        },
    }


def _row(cell: Row, uniform: Row | None, reached: Row | None) -> Row:
    config, lines = cell["config"], cell["ledger"]
    rho, chosen = config["rho"], config["method"] == "jest"
    every = (lines["total"] - lines["reference_training"]) / cell["updates"]
    cached = every - lines["scoring_reference"] / cell["updates"]
    plain = uniform["ledger"]["total"] / uniform["updates"] if uniform else None
    none = ("at", "learner_speedup", "compute_speedup", "compute_speedup_cached")
    speedup: Row = {name: reached and reached[name] for name in none}
    compute, share = speedup["compute_speedup"], PUBLISHED.get(rho) if chosen else None
    return {
        "label": f"JEST, {100 - 100 / rho:.0f} % dropped" if chosen else "uniform",
        **{name: config[name] for name in ("method", "rho", "learner", "scorer", "updates")},
        **{name: cell[name] for name in ("share_of_updates", "seeds", "r10")},
        "r10_gain": cell["r10_gain"] if chosen else None,
        "clean_kept": cell["kept"]["clean"],
        "clean_pool": cell["pool"]["clean"],
        "passes": rho * config["keep"] * cell["updates"] / cell["rows"],
        "flops": lines,
        "flops_per_iteration": every / plain if plain else None,
        "flops_per_iteration_cached": cached / plain if plain else None,
        "flops_per_iteration_published": iteration(rho) if chosen else 1.0,
        "flops_share": cell["flops_share"] and cell["flops_share"]["total"],
        "flops_share_cached": cell["flops_share_cached"] and cell["flops_share_cached"]["total"],
        "budgets": reached and reached["budgets"],
        **speedup,
        "compute_positive": None if compute is None else compute > 0,
        "published_share": share,
        "published_compute_speedup": share and 1 - share * iteration(rho),
        "seconds": cell["seconds"]["fresh"],
        "seconds_cached": cell["seconds"]["cached"],
    }


def pictures(content: Row, path: Path) -> list[Path]:
    """R@10 and clean share by ratio, and what an iteration costs."""
    return plots.ratios(content, path) if content["rows"] else []


def text(content: Row) -> str:
    """Table and sentences in Markdown."""
    columns = (
        "kept of each super-batch", "updates", "R@10, %", "over uniform", "clean rows kept, %",
        "FLOPs per iteration: counted / reference cached", "published convention",
        "reaches uniform's R@10 with", "published", "compute speedup: all charged / cached",
        "by the published figures",
    )  # fmt: skip
    config = content["config"]
    said = (
        f"Icons and captions; learner `{config['learner']}`, {content['updates']:,} updates of "
        f"{config['keep']} rows, scorers `{config['scorer']}`. Seeds: {len(content['seeds'])}; ± "
        "is the 95 % t-interval, gains seed by seed. Published: share of the rows seen by uniform "
        "(3 billion) with which JEST got as far; there the learner scores and the reference costs "
        "nothing, here a small scorer does and both are counted."
    )
    most = max((r for r in content["rows"]), key=lambda r: r["passes"], default=None)
    if most is not None and most["passes"] > 1:
        said += (
            f" No row came twice there; at rho {most['rho']} the pool is passed over "
            f"{most['passes']:.1f} times here, so that the rows worth keeping are seen again."
        )
    alt = "R@10 by filter ratio, and what an iteration costs"
    rows = [_line(r, content) for r in content["rows"]]
    parts = [figures.table(columns, rows), said, *_order(content), *figures.unfinished(content)]
    return "\n\n".join([*parts, figures.picture(content, NAME, alt)])


def _line(r: Row, content: Row) -> list[str]:
    costs = [r["flops_per_iteration"], r["flops_per_iteration_cached"]]
    compute = [r["compute_speedup"], r["compute_speedup_cached"]]
    published = r["published_share"]
    share = r["updates"] / content["updates"]
    reached = "-"
    if r["budgets"]:
        tried = ", ".join(f"{100 * b:.0f}" for b in r["budgets"])
        got = "not" if r["at"] is None else f"{100 * r['at']:.0f} % of updates"
        reached = f"{got} (tried: {tried} %)"
    return [
        figures.name(r, content),
        f"{100 * share:.0f} %",
        figures.percent(r["r10"]),
        figures.points(r["r10_gain"]),
        figures.percent(r["clean_kept"]),
        "-" if costs[0] is None else " / ".join(f"{100 * c:.0f} %" for c in costs),
        f"{100 * r['flops_per_iteration_published']:.0f} %",
        reached,
        f"{100 * published:.0f} % of rows" if published and share == 1 else "-",
        "-" if None in compute else " / ".join(f"{100 * c:+.0f} %" for c in compute),
        f"{100 * r['published_compute_speedup']:+.0f} %" if published and share == 1 else "-",
    ]


def _order(content: Row) -> list[str]:
    """Whether dropping more helps, as published."""
    rows = [r for r in content["rows"] if r["updates"] == content["updates"]]
    rows = [r for r in rows if r["method"] == "jest"]
    if len(rows) < 2:
        return []
    means = [r["r10"]["mean"] for r in rows]
    rises = means == sorted(means)
    first, last = rows[0], rows[-1]
    pairs = dict(zip(first["seeds"], first["r10"]["by_seed"], strict=True))
    difference = figures.each(
        r - pairs[s]
        for s, r in zip(last["seeds"], last["r10"]["by_seed"], strict=True)
        if s in pairs
    ) if set(last["seeds"]) & set(pairs) else None  # fmt: skip
    return [
        f"Mean R@10 {'rises' if rises else 'does **not** rise'} with every ratio, as the published "
        f"order has it; from {first['label']} to {last['label']} it changes by "
        f"{figures.points(difference)} points."
    ]
