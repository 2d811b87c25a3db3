# SPDX-License-Identifier: Apache-2.0
"""The runs behind the frontier, and from runs to points: beta, speedups, and every cost charged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from activesel.ledger import TRAIN, published_cost
from activesel.loop import records
from activesel.loop.config import RECIPES, Config
from bench import aggregate, study
from bench.aggregate import spread
from bench.common import Row, Scale
from bench.equivalence import beta
from bench.pairs_table import NAMES
from bench.pareto.clock import Clock

PERCENT = 67
"""Budget of the methods, in percent of uniform's updates."""
IMAGES: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "uniform": (100, 50, 133),
        "scorers": ("pico", "nano"),
        "steep": {"pico": (4,)},
        "learners": ("micro",),
    },
    "full": {
        "uniform": (100, 67, 80, 50, 133),
        "scorers": ("nano", "pico", "femto", "mu", "micro"),
        "steep": {"pico": (4, 8)},
        "learners": ("micro", "nano"),
    },
    "gpu": {
        "uniform": (100, 67, 50),
        "scorers": ("micro", "nano", "mini"),
        "steep": {"micro": (4,)},
        "learners": ("Ti",),
    },
}
"""Uniform's budgets in percent; scorers of both methods; larger ratios; other learners."""
SMALL = "pico"
"""Scorer with which learners are compared."""
PAIRS: dict[Scale, dict[str, Any]] = {
    "smoke": {"methods": ("jest",), "percents": (100, 50), "rhos": (2,)},
    "full": {
        "methods": ("jest", "jest++", "jest-easy"), "percents": (100, 67, 50), "rhos": (2, 10),
    },
    "gpu": {"methods": ("jest", "jest-easy"), "percents": (100, 50), "rhos": (2, 10)},
}  # fmt: skip
ALIKE = ("learner", "patch", "keep", "lr", "noise", "loss", "rows", "subset", "mix")
"""Settings in which a method's runs equal those of the uniform runs they are held against."""

LABELS = {
    "classify": {
        **dict(zip(RECIPES, RECIPES, strict=True)),
        **aggregate.LABELS,
        "easy": "easy reference",
    },
    "contrastive": NAMES,
}


def full(scale: Scale) -> dict[str, int]:
    """Uniform's full budget in updates, by loop."""
    return {
        "classify": study.CLASSIFY[scale]["updates"],
        "contrastive": study.PAIRS[scale]["updates"],
    }


def learner(scale: Scale) -> str:
    """The usual learner on images."""
    return str(study.CLASSIFY[scale].get("learner", Config.learner))


def queue(scale: Scale) -> list[Any]:
    """Every run once, the most telling ones first, seed by seed."""
    found = [c for s in study.SEEDS[scale] for c in (*_images(scale, s), *_pairs(scale, s))]
    return list(dict.fromkeys(found))


def _images(scale: Scale, seed: int) -> Iterator[Any]:
    grid = IMAGES[scale]
    for percent in grid["uniform"]:
        yield study.classify(scale, "uniform", percent, seed)
    for scorer in grid["scorers"]:
        for method in ("classact", "easy"):
            yield study.classify(scale, method, PERCENT, seed, scorer=scorer)
    for size in (learner(scale), *grid["learners"]):
        for percent in (100, PERCENT):
            yield study.classify(scale, "uniform", percent, seed, learner=size)
        yield study.classify(scale, "classact", PERCENT, seed, learner=size, scorer=SMALL)
    for scorer, ratios in grid["steep"].items():
        for rho in ratios:
            yield study.classify(scale, "classact", PERCENT, seed, scorer=scorer, rho=rho)


def _pairs(scale: Scale, seed: int) -> Iterator[Any]:
    grid = PAIRS[scale]
    yield study.pairs(scale, "uniform", seed=seed)
    for method in grid["methods"]:
        for percent in grid["percents"]:
            yield study.pairs(scale, method, percent, seed)
    for rho in grid["rhos"]:
        yield study.pairs(scale, "jest", seed=seed, rho=rho)


def points(
    found: Sequence[Row], budgets: Mapping[str, int], clock: Clock | None = None
) -> tuple[list[Row], list[str]]:
    """A point for every setting over its seeds, and a sentence for each that has none.

    Args:
        found: records of runs, of both loops.
        budgets: uniform's full budget by loop, as `full` returns it.
        clock: of the reference system; without it, its seconds are null.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in found:
        config = {**run["config"], "seed": None}
        groups[_loop(run), records.digest(config)].append(run)
    rows, left_out = [], []
    for (loop, _), runs in groups.items():
        config = runs[0]["config"]
        grid: dict[int, list[Row]] = defaultdict(list)
        for run in found:
            c = run["config"]
            alike = all(c.get(name) == config.get(name) for name in ALIKE)
            if _loop(run) == loop and c["method"] == "uniform" and alike:
                grid[c["updates"]].append(run)
        if budgets[loop] in grid:
            rows.append(point(runs, grid, budgets[loop], clock))
        else:
            left_out.append(
                f"{config['method']} on learner {config['learner']} left out: uniform's "
                f"{budgets[loop]} updates of that learner are missing"
            )
    return rows, list(dict.fromkeys(left_out))


def point(
    runs: Sequence[Row],
    grid: Mapping[int, Sequence[Row]],
    budget: int,
    clock: Clock | None = None,
) -> Row:
    """One setting against uniform's runs.

    Reaching uniform's metric at `budget` updates takes beta * `budget` updates of the method, and
    its reference once: compute speedup = 1 - (beta * budget * update + reference) / uniform, with
    every line of both ledgers. Where beta is only known to be below (above) a bound, the speedup at
    the bound stands as `low` (`high`), and `value` is null. The system speedup is the same in
    seconds of the reference system; `recorded_` ones are the runs' own, each on a machine as busy
    as it was, and not to be compared.

    Args:
        runs: of one configuration, over seeds.
        grid: uniform's, by updates; `budget` among them.
        budget: the updates whose metric is to be reached.
        clock: of the reference system.
    """
    runs = sorted(runs, key=lambda run: run["config"]["seed"])
    config, updates = runs[0]["config"], runs[0]["config"]["updates"]
    metrics = [_metric(run) for run in runs]
    lines = {line: _mean(run["ledger"][line] for run in runs) for line in runs[0]["ledger"]}
    rows = updates * config["keep"]
    forward = lines["learner"] / TRAIN / rows
    scoring = [lines[f"scoring_{who}"] / rows / config["rho"] for who in ("online", "reference")]
    entry = {
        "source": "measured",
        "loop": _loop(runs[0]),
        "label": LABELS[_loop(runs[0])][config["method"]],
        **{name: config[name] for name in ("method", "learner", "scorer", "rho", "temperature")},
        "updates": updates,
        "percent": round(100 * updates / budget),
        "seeds": [run["config"]["seed"] for run in runs],
        "metric": {**spread(metrics), "by_seed": metrics},
        "learner_flops": forward,
        "scorer_flops": max(scoring),
        "f_ratio": max(scoring) / forward,
        **{f"flops_{line}": flops for line, flops in lines.items()},
        **_system(runs, clock),
        **{f"recorded_{f}": _mean(_own(r, f) for r in runs) for f in ("seconds", "cpu_seconds")},
    }
    if config["method"] == "uniform":
        return {**entry, "scorer": None, "f_ratio": None}
    whole = _mean(run["ledger"]["total"] for run in grid[budget])
    once = lines["reference_training"] if runs[0]["reference"] else 0.0
    update = (lines["total"] - once) / updates
    uniform = {u: [_metric(run) for run in others] for u, others in grid.items()}
    found = beta(updates, metrics, uniform)
    b: Row = {**asdict(found), "least": updates / max(uniform), "most": updates / min(uniform)}

    def cost(value: float) -> float:
        return (value * budget * update + once) / whole

    def published(value: float) -> float:
        size = scoring[1]
        return published_cost(value, forward, size, sum(scoring), config["rho"]) / TRAIN / forward

    system = _system(grid[budget], clock)["system_seconds"]

    def seconds(value: float) -> float:
        first = entry["system_once_seconds"]
        return (value * budget / updates * (entry["system_seconds"] - first) + first) / system

    return {
        **entry,
        "beta": b,
        "beta_max": (whole - once) / (budget * update),
        "beta_max_shared": whole / (budget * update),
        **gains(b, cost, published),
        "system_speedup": speedup(b, seconds) if clock else None,
    }


def gains(b: Row, cost: Callable[[float], float], published: Callable[[float], float]) -> Row:
    """Speedups at beta, from two functions of it: FLOPs over uniform's, all charged and as printed.

    `compute_speedup_shared` is of many runs that share a reference.
    """
    charged, once = speedup(b, cost), cost(0.0)
    return {
        "learner_speedup": speedup(b, lambda value: value),
        "compute_speedup": charged,
        "compute_speedup_shared": speedup(b, lambda value: cost(value) - once),
        "compute_speedup_published": speedup(b, published),
        "compute_positive": _positive(charged),
    }


def speedup(b: Row, cost: Callable[[float], float]) -> Row:
    """1 - cost(beta) with its interval; `least` and `most` bound what is known.

    >>> b = {"value": None, "low": None, "high": 0.7, "text": "< 0.5 (< 0.5 to 0.7)"}
    >>> speedup({**b, "least": 0.5, "most": 1.0}, lambda value: value)["text"]
    '> 50 % (30 to > 50)'
    """
    ends = {"value": "value", "low": "high", "high": "low", "least": "most", "most": "least"}
    entry: Row = {n: None if b[o] is None else 1 - cost(b[o]) for n, o in ends.items()}

    def said(value: float | None, above: bool) -> str:
        if value is not None:
            return f"{100 * value:.0f}"
        return f"> {100 * entry['most']:.0f}" if above else f"< {100 * entry['least']:.0f}"

    text = f"{said(entry['value'], b['text'][0] == '<')} %"
    if "(" in b["text"]:
        text += f" ({said(entry['low'], False)} to {said(entry['high'], True)})"
    return {**entry, "text": text}


def _positive(entry: Row) -> bool | None:
    """Whether the mean says so; where only a bound is known, whether that does, else None."""
    if entry["value"] is not None:
        return bool(entry["value"] > 0)
    if entry["text"][0] == ">":
        return True if entry["most"] > 0 else None
    return None if entry["least"] > 0 else False


def _loop(run: Row) -> str:
    return "contrastive" if "recall" in run else "classify"


def _metric(run: Row) -> float:
    return float(run["recall"]["r10"] if "recall" in run else run["accuracy"])


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _system(runs: Sequence[Row], clock: Clock | None) -> Row:
    """Seconds of the reference system: all, what is spent once however long the run, and lines."""
    if clock is None:
        return dict.fromkeys(("system_seconds", "system_once_seconds", "system_f_ratio"))
    spent = [clock.spent(run) for run in runs]
    lines = [asdict(updates + once) for updates, once in spent]
    return {
        "system_seconds": _mean(updates.total + once.total for updates, once in spent),
        "system_once_seconds": _mean(once.total for _, once in spent),
        "system_f_ratio": clock.f_ratio(runs[0]),
        **{f"system_{name}_seconds": _mean(line[name] for line in lines) for name in lines[0]},
    }


def _own(run: Row, name: str) -> float:
    """Seconds that the run's record has, and its reference's.

    What a reference takes to score pairs afresh was only measured by the wall clock, and counts as
    CPU seconds too: at most too much.
    """
    reference = run["reference"]
    scoring = (run.get("reference_scoring_seconds") or {}).get("fresh", 0.0)
    return float(run[name] + scoring + (reference[name] if reference else 0.0))
