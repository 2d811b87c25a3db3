# SPDX-License-Identifier: Apache-2.0
"""From runs to figures: means, intervals, the smallest budget that suffices, and what it cost."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from activesel import __version__
from activesel.ledger import Ledger, learner_speedup
from activesel.loop import records
from activesel.loop.config import Config

SCHEMA = 1
CURVE = ("update", "accuracy", "worst_class", "kept", "kept_mislabelled", "seconds", "flops_total")
LABELS = {
    "classact": "ClassAct",
    "classact-ho": "ClassAct-HO",
    "classact-online": "ClassAct-Online",
    "rho": "RHO",
}

Row = dict[str, Any]


def label(row: Mapping[str, Any]) -> str:
    """Readable name of a run's or cell's method, with the settings that matter.

    >>> label({"method": "classact", "rho": 2, "temperature": 0.25})
    'ClassAct, rho 2, T 0.25'
    """
    name = LABELS.get(row["method"], row["method"])
    if row["method"] == "uniform":
        return name
    if row["method"] == "rho":
        return f"{name}, rho {row['rho']}"
    return f"{name}, rho {row['rho']}, T {row['temperature']:g}"


def load(out: Path, configs: Iterable[Config]) -> tuple[list[Row], list[Config]]:
    """The finished runs among `configs`, and those of `configs` that are missing.

    Runs are told apart by the configuration they recorded, not by their names, and by that of
    their reference. What a method does not use may differ: uniform has no scorer.

    Raises:
        ValueError: a damaged `run.json`, or two runs of the same configuration.
    """
    found = [records.read_json(file) for file in sorted(out.glob("*/run.json"))]
    runs, missing = [], []
    for config in configs:
        same = [run for run in found if _is(run, config)]
        if len(same) > 1:
            names = ", ".join(run["name"] for run in same)
            raise ValueError(f"{out} must hold one run of {config.name}, got {names}")
        runs += same
        missing += [] if same else [config]
    return runs, missing


ONLINE = {"online_lr", "online_smoothing"}
PRETRAINED = {"scorer_lr", "reference_updates"}


def _is(run: Row, config: Config) -> bool:
    """Whether `run` was of `config`, as far as its method uses it."""
    unused = PRETRAINED | (set() if config.recipe.online == "scorer" else ONLINE)
    pairs = [(asdict(config), run["config"])]
    if config.reference is not None and run["reference"] is not None:
        pairs.append((asdict(config.reference), run["reference"]["config"]))
    return all(
        name in unused or (name in found and wanted[name] == found[name])
        for wanted, found in pairs
        for name in wanted
    )


def spread(values: Sequence[float]) -> Row:
    """Mean, standard deviation and 95 % t-interval; the last two are null for a single value.

    >>> spread([1.0, 2.0, 3.0])["mean"], round(spread([1.0, 2.0, 3.0])["high"], 2)
    (2.0, 4.48)
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "std": None, "low": None, "high": None}
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}


def cell(runs: Sequence[Row]) -> Row:
    """One setting over its seeds: everything in [0, 1] unless it says FLOPs or seconds."""
    runs = sorted(runs, key=lambda run: run["config"]["seed"])
    wrong, kept = (sum(run[name] for run in runs) for name in ("kept_mislabelled", "kept"))
    wilson = stats.binomtest(wrong, kept).proportion_ci(method="wilson")
    config = runs[0]["config"]
    lines = runs[0]["ledger"]
    return {
        **{name: config[name] for name in ("method", "rho", "temperature", "updates")},
        "seeds": [run["config"]["seed"] for run in runs],
        "accuracy": {
            **spread([run["accuracy"] for run in runs]),
            "by_seed": [run["accuracy"] for run in runs],
        },
        "worst_class": spread([run["worst_class"] for run in runs]),
        "base_rate": float(np.mean([run["base_rate"] for run in runs])),
        "mislabelled": {
            "kept": kept,
            "kept_mislabelled": wrong,
            "share": wrong / kept,
            "wilson": [wilson.low, wilson.high],
            "seeds": spread([run["kept_mislabelled"] / run["kept"] for run in runs]),
        },
        "ledger": {name: float(np.mean([run["ledger"][name] for run in runs])) for name in lines},
        "seconds": float(np.mean([seconds(run) for run in runs])),
        "cpu_seconds": float(np.mean([seconds(run, "cpu_seconds") for run in runs])),
    }


def seconds(run: Row, name: str = "seconds") -> float:
    """Training of the run and, in full, of its reference."""
    return float(run[name] + (run["reference"][name] if run["reference"] else 0.0))


def against(row: Row, uniform: Row) -> Row:
    """What `row` gains over uniform sampling with its full budget, every line of both counted."""
    ours, theirs = _ledger(row), _ledger(uniform)
    pairs = [
        mine - dict(zip(uniform["seeds"], uniform["accuracy"]["by_seed"], strict=True))[seed]
        for seed, mine in zip(row["seeds"], row["accuracy"]["by_seed"], strict=True)
        if seed in uniform["seeds"]
    ]
    published = ours + Ledger(online_training=-ours.online_training)
    share = row["updates"] / uniform["updates"]
    return {
        "share_of_updates": share,
        "reaches_uniform": row["accuracy"]["mean"] >= uniform["accuracy"]["mean"],
        "accuracy_gain": spread(pairs) if pairs else None,
        "learner_speedup_if_reached": learner_speedup(share),
        "compute_speedup_if_reached": ours.compute_speedup(theirs),
        "compute_speedup_without_online_training": published.compute_speedup(theirs),
        "compute_positive": ours.compute_positive(theirs),
        "cpu_seconds_share": row["cpu_seconds"] / uniform["cpu_seconds"],
    }


def _ledger(row: Row) -> Ledger:
    return Ledger(**{name: value for name, value in row["ledger"].items() if name != "total"})


def beta(cells: Sequence[Row]) -> Row:
    """The smallest budget whose mean accuracy reaches uniform's, with what it cost.

    Args:
        cells: of one method, with the entries of `against`, budgets of any order.
    """
    reached = [c for c in cells if c["reaches_uniform"]]
    at = min(reached, key=lambda c: c["updates"]) if reached else None
    best = at or max(cells, key=lambda c: c["accuracy"]["mean"])
    largest = max(c["share_of_updates"] for c in cells)
    return {
        "budgets": sorted(c["share_of_updates"] for c in cells),
        "beta": at["share_of_updates"] if at else None,
        "beta_text": f"{at['share_of_updates']:.2f}" if at else f"> {largest:.2f}",
        "learner_speedup": at["learner_speedup_if_reached"] if at else None,
        "compute_speedup": at["compute_speedup_if_reached"] if at else None,
        "compute_positive": at["compute_positive"] if at else None,
        "at": best["share_of_updates"],
        "flops_share_there": 1 - best["compute_speedup_if_reached"],
        "accuracy_gain_there": best["accuracy_gain"],
        "cpu_seconds_share_there": best["cpu_seconds_share"],
    }


def table(
    runs: Sequence[Row],
    missing: Sequence[Config],
    updates: int,
    settings: Mapping[str, Mapping[str, float]],
) -> Row:
    """Everything behind the README's table.

    Args:
        runs: finished runs.
        missing: configurations not run yet.
        updates: uniform's full budget.
        settings: of the methods with a budget grid, uniform among them.

    Raises:
        ValueError: uniform's full budget is among the missing; nothing can be compared then.
    """
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for run in runs:
        c = run["config"]
        groups[c["method"], c["rho"], c["temperature"], c["updates"]].append(run)
    cells = [cell(group) for group in groups.values()]
    full = [c for c in cells if c["method"] == "uniform" and c["updates"] == updates]
    if not full:
        raise ValueError(f"runs must hold uniform with {updates} updates, got {len(runs)} others")
    cells = [{**c, **against(c, full[0])} for c in cells]
    betas = {
        method: beta(grid)
        for method, setting in settings.items()
        if (grid := [c for c in _grid(cells, method, setting) if c["seeds"] == full[0]["seeds"]])
    }
    environments = [run["environment"] for run in runs]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "command": "python -m bench classify",
        "data": "Fashion-MNIST: 50,000 training, 10,000 held-out, 10,000 test images",
        "environments": [e for i, e in enumerate(environments) if e not in environments[:i]],
        "noise": runs[0]["config"]["noise"],
        "updates": updates,
        "seeds": sorted({run["config"]["seed"] for run in runs}),
        "finished": len(runs),
        "missing": [config.name for config in missing],
        "settings": {name: dict(setting) for name, setting in settings.items()},
        "config": runs[0]["config"],
        "beta": betas,
        "targets": targets(cells, betas, settings),
        "cells": cells,
        "runs": [thin(run) for run in runs],
    }


def _grid(cells: Sequence[Row], method: str, setting: Mapping[str, float]) -> list[Row]:
    """The cells of one method, at every budget."""
    return [
        c
        for c in cells
        if c["method"] == method and all(c[name] == value for name, value in setting.items())
    ]


def targets(
    cells: Sequence[Row],
    betas: Mapping[str, Row],
    settings: Mapping[str, Mapping[str, float]],
) -> Row:
    """The claims, each true, false, or null where it was not measured.

    A share of wrong labels is below a level if both of its intervals are: that over all rows kept,
    and that over seeds, which is the wider one.
    """

    def below(method: str, factor: float) -> bool | None:
        rows = _grid(cells, method, settings.get(method, {}))
        checks = [
            bound < factor * row["base_rate"]
            for row in rows
            for bound in (row["mislabelled"]["wilson"][1], row["mislabelled"]["seeds"]["high"])
            if bound is not None
        ]
        return all(checks) if checks else None

    ours = betas.get("classact")
    reached = ours is not None and ours["beta"] is not None
    return {
        "classact_learner_speedup_at_least_25_percent": (
            reached and ours["learner_speedup"] >= 0.25 if ours else None
        ),
        "classact_compute_positive": reached and ours["compute_positive"] if ours else None,
        "classact_keeps_fewer_mislabelled_than_base_rate": below("classact", 1.0),
        "easy_keeps_under_half_of_base_rate": below("easy", 0.5),
    }


def thin(run: Row) -> Row:
    """A run without what its configuration implies."""
    essential = ("method", "rho", "temperature", "updates", "seed")
    reference = run["reference"]
    return {
        **{name: run["config"][name] for name in essential},
        **{name: run[name] for name in ("name", "accuracy", "worst_class", "by_class")},
        **{name: run[name] for name in ("base_rate", "kept", "kept_mislabelled", "ledger")},
        **{name: round(run[name], 2) for name in ("seconds", "cpu_seconds")},
        "reference": (
            {
                "updates": reference["config"]["updates"],
                "accuracy": reference["accuracy"],
                **{name: round(reference[name], 2) for name in ("seconds", "cpu_seconds")},
            }
            if reference
            else None
        ),
        "curve": {name: [round(point[name], 4) for point in run["curve"]] for name in CURVE},
    }


def thick(run: Row) -> Row:
    """Back to the curve's form in `run.json`, which the plots read."""
    curve = run["curve"]
    rows = zip(*curve.values(), strict=True)
    return {**run, "curve": [dict(zip(curve, row, strict=True)) for row in rows]}


def write(path: Path, content: Row) -> None:
    """JSON with one line per run and cell, so that a difference can be read."""
    lines = []
    for name, value in content.items():
        if name in ("cells", "runs"):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f' "{name}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{name}": {json.dumps(value)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def interval(entry: Row) -> str:
    """Percent, with the half-width of the 95 % interval where there is one."""
    text = f"{100 * entry['mean']:.1f}"
    return text if entry["high"] is None else f"{text} ± {50 * (entry['high'] - entry['low']):.1f}"
