# SPDX-License-Identifier: Apache-2.0
"""RHO-LOSS's protocol, run here, beside an independent replication's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from activesel.loop import cifar
from activesel.loop.rho_config import FASHION_MNIST, RhoConfig
from bench.aggregate import seconds
from bench.common import Row, Scale
from bench.equivalence import beta
from bench.replicate import figures
from bench.replicate.rho_text import METHODS, NAMES, PUBLISHED, pictures, text
from bench.study import SEEDS

__all__ = ["configs", "content", "pictures", "text"]

NAME = "rho"
TITLE = "RHO-LOSS's protocol"
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {
        **{"updates": 60, "width": 2, "evaluations": 3, "quick": 500},
        **{"reference_updates": 60, "reference_width": 2, "reference_checks": 1},
    },
    "full": {},
    "gpu": {
        **{"updates": 2000, "width": 64},
        **{"reference_updates": 1000, "reference_width": 64, "reference_keep": 320},
    },
}
PERCENT: dict[Scale, tuple[int, ...]] = {
    "smoke": (50, 100, 200),
    "full": (50, 100, 200, 400),
    "gpu": (50, 100, 200),
}
"""Budgets of uniform, against which the others are held."""
PUBLISHED_SETTINGS: dict[str, Any] = {"schedule": "constant", "selection_mode": "train"}


def usual(scale: Scale, data: str = FASHION_MNIST) -> RhoConfig:
    """RHO with uniform's full budget, decayed, seed 0."""
    return RhoConfig(**SETTINGS[scale], data=data, reference_augment=data != FASHION_MNIST)


def configs(scale: Scale, data: str = FASHION_MNIST) -> list[RhoConfig]:
    """The runs, most important first: decayed, uniform's other budgets, and as published.

    On CIFAR those as published have no wrong labels, as what they are held against.
    """
    base, known = usual(scale, data), data != FASHION_MNIST
    published = {**PUBLISHED_SETTINGS, **({"noise": 0.0} if known else {})}

    def runs(methods: Sequence[str], percent: int = 100, **settings: Any) -> list[RhoConfig]:
        settings |= {"updates": round(base.updates * percent / 100)}
        return [replace(base, method=m, seed=s, **settings) for s in SEEDS[scale] for m in methods]

    every = ("uniform", "rho", "train-loss")
    others = [percent for percent in PERCENT[scale] if percent != 100]
    return [
        *runs(every),
        *(run for percent in others for run in runs(["uniform"], percent)),
        *(runs(every, **published) if known or scale != "gpu" else []),
    ]


def content(
    found: Sequence[Row], missing: Sequence[Any], scale: Scale, data: str = FASHION_MNIST
) -> Row:
    """Figures from run records.

    Args:
        found: finished runs, of any configuration.
        missing: configurations not run yet.
        scale, data: as given to `configs`.
    """
    groups: dict[RhoConfig, list[Row]] = {}
    for config in configs(scale, data):
        same = groups.setdefault(replace(config, seed=0), [])
        same += figures.finished(found, [config])
    groups = {config: runs for config, runs in groups.items() if runs}
    config = usual(scale, data)
    base, name = config.updates, data if data == FASHION_MNIST else cifar.find(Path(data))[0]
    rows = [_row(config, groups, base) for config in sorted(groups, key=_order)]
    return {
        "data": name,
        "train_rows": next(iter(groups.values()))[0]["rows"] if groups else None,
        "updates": base,
        "seeds": list(SEEDS[scale]),
        "config": {**asdict(config), "data": name, "seed": None},
        "rows": rows,
        "curves": [point for config, runs in groups.items() for point in _curve(config, runs)],
        "published": [{"data": on, **known} for on, known in PUBLISHED.items()],
        "headline": {
            row["label"]: {
                "accuracy": row["accuracy"]["mean"],
                **({"compute_speedup": row["compute_speedup"]["text"]} if "beta" in row else {}),
            }
            for row in rows
            if row["updates"] == base
        },
    }


def _order(config: RhoConfig) -> tuple[bool, int, int]:
    return config.schedule == "constant", METHODS.index(config.method), config.updates


def _label(config: RhoConfig, base: int) -> str:
    share = f", {100 * config.updates / base:.0f} %" if config.updates != base else ""
    return (
        f"{NAMES[config.method]}{share}{', as published' if config.schedule == 'constant' else ''}"
    )


def _row(config: RhoConfig, groups: Mapping[RhoConfig, Sequence[Row]], base: int) -> Row:
    """One setting over its seeds; shares and accuracies in [0, 1].

    `gain` is over uniform with as many updates and the same schedule, seed by seed. Speedups are
    over what uniform needs for the same accuracy; `compute_speedup` charges all that was spent,
    `compute_speedup_amortised` leaves out the irreducible-loss model, for one that serves many
    runs. With a constant rate they are read from the curves instead, see `_reached`.
    """
    runs = groups[config]
    lines = {k: float(np.mean([run["ledger"][k] for run in runs])) for k in runs[0]["ledger"]}
    once = lines["scoring_reference"] + lines["reference_training"]
    uniform = {
        c.updates: same
        for c, same in groups.items()
        if c.method == "uniform" and c.schedule == config.schedule and c.noise == config.noise
    }
    entry: Row = {
        "label": _label(config, base),
        "method": config.method,
        "schedule": config.schedule,
        "selection_mode": config.selection_mode,
        "learner": f"ResNet-18, {config.width} wide",
        "scorer": "learner" if config.method != "uniform" else None,
        "rho": config.super_batch / config.keep,
        "updates": config.updates,
        "share_of_updates": config.updates / base,
        "seeds": [run["config"]["seed"] for run in runs],
        "accuracy": figures.each(run["accuracy"] for run in runs),
        "worst_class": figures.each(run["worst_class"] for run in runs),
        "wrong_kept": figures.each(run["kept_mislabelled"] / run["kept"] for run in runs),
        "base_rate": float(np.mean([run["base_rate"] for run in runs])),
        "flops": lines,
        "flops_share": lines["total"] / lines["learner"],
        "flops_share_amortised": (lines["total"] - once) / lines["learner"],
        "seconds": float(np.mean([seconds(run) for run in runs])),
        "cpu_seconds": float(np.mean([seconds(run, "cpu_seconds") for run in runs])),
    }
    if config.method == "uniform" or not uniform:
        return entry
    entry["gain"] = figures.paired(runs, uniform.get(config.updates, []))
    if config.schedule == "constant":
        return {**entry, "reached": _reached(runs, uniform.get(config.updates, []))}
    grid = {updates: [run["accuracy"] for run in same] for updates, same in uniform.items()}
    ratio = beta(config.updates, entry["accuracy"]["by_seed"], grid)
    everything = figures.saved(ratio, entry["flops_share"])
    plain = uniform.get(config.updates) or next(iter(uniform.values()))
    pace = {
        name: float(np.mean([run[name] / run["config"]["updates"] for run in plain]))
        for name in ("seconds", "cpu_seconds")
    }
    return {
        **entry,
        "beta": asdict(ratio),
        "learner_speedup": figures.saved(ratio),
        "compute_speedup": everything,
        "compute_speedup_amortised": figures.saved(ratio, entry["flops_share_amortised"]),
        "compute_positive": figures.positive(everything),
        **{
            f"{name}_speedup": figures.saved(ratio, entry[column] / config.updates / pace[column])
            for name, column in (("wall", "seconds"), ("cpu", "cpu_seconds"))
        },
    }


def _reached(runs: Sequence[Row], uniform: Sequence[Row]) -> Row | None:
    """Where the mean curve first is at uniform's final accuracy, as the paper counts.

    `flops_share` is everything spent until then over all that uniform spent. None where uniform is
    missing; its entries are None where the curve never gets there.
    """
    if not uniform:
        return None
    target = float(np.mean([run["accuracy"] for run in uniform]))
    spent = float(np.mean([run["ledger"]["total"] for run in uniform]))
    for points in zip(*(run["curve"] for run in runs), strict=True):
        if np.mean([point["accuracy"] for point in points]) >= target:
            total = float(np.mean([point["flops_total"] for point in points]))
            share = points[0]["update"] / runs[0]["config"]["updates"]
            return {"share_of_updates": share, "flops_share": total / spent}
    return {"share_of_updates": None, "flops_share": None}


def _curve(config: RhoConfig, runs: Sequence[Row]) -> list[Row]:
    """Accuracy, and the wrong labels among the rows kept since the point before, over seeds."""
    rows, before = [], [{"kept": 0, "kept_mislabelled": 0}] * len(runs)
    for points in zip(*(run["curve"] for run in runs), strict=True):
        wrong, kept = (
            [now[name] - then[name] for now, then in zip(points, before, strict=True)]
            for name in ("kept_mislabelled", "kept")
        )
        values = {
            "accuracy": [point["accuracy"] for point in points],
            "wrong_kept": [w / k for w, k in zip(wrong, kept, strict=True)],
        }
        rows.append(
            {
                "method": config.method,
                "schedule": config.schedule,
                "updates": config.updates,
                "update": points[0]["update"],
                **{
                    name: {"mean": float(np.mean(x)), "least": min(x), "most": max(x)}
                    for name, x in values.items()
                },
            }
        )
        before = points
    return rows
