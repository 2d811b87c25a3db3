# SPDX-License-Identifier: Apache-2.0
"""From runs on icon-text pairs to figures: recall, tiers kept, cost, joint against independent."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np

from activesel import __version__
from activesel.ledger import learner_speedup
from activesel.loop import records
from activesel.loop.icons import TIERS
from activesel.loop.pairs_config import RECIPES, PairsConfig
from activesel.loop.pairs_cost import pair_flops, train_flops
from bench.aggregate import Row, spread

SCHEMA = 1
WAYS = ("image_to_text", "text_to_image")
CURVE = ("update", "r10", "flops_total", "flops_scoring_reference", *(f"kept_{t}" for t in TIERS))
NAMES = {
    "uniform": "uniform",
    "hard": "hard",
    "easy": "easy",
    "independent": "independent",
    "activeclip": "ActiveCLIP",
    "activesiglip": "ActiveSigLIP",
    "jest": "JEST",
    "jest-easy": "JEST (easy reference)",
    "flexi-jest": "Flexi-JEST",
    "jest++": "JEST++",
    "jest-pool": "JEST (pool reference)",
    "jest-emoji": "JEST (emoji reference)",
}
LOUD = {"rows": {"ui": "no emoji"}, "loss": {"softmax": "softmax", "sigmoid": "sigmoid"}}
QUIET = {"method", "seed", "updates"}
ALIKE = ("rows", "loss", "keep", "subset", "mix", "noise", "learner", "patch", "lr")
PUBLISHED = {"scoring_saved": 0.72, "training_share": 0.64}  # Flexi-JEST, patches 32 and 16


def label(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Readable name of a method, with the settings in which it differs from `base`.

    >>> base = {"method": "uniform", "rows": "all", "loss": "sigmoid", "chunks": 16}
    >>> label({**base, "method": "jest", "rows": "ui", "chunks": 64}, base)
    'JEST (no emoji, chunks 64)'
    """
    quiet = QUIET | {"rows"} if config["method"] == "jest-emoji" else QUIET
    recipe = RECIPES[config["method"]]
    quiet = quiet | ({"loss"} if recipe.loss else set())
    if config["method"] == "uniform":
        quiet = quiet | {"rho", "temperature", "chunks"}
    said = [
        LOUD.get(name, {}).get(value, f"{name} {value}")
        for name, value in config.items()
        if name not in quiet and value != base.get(name)
    ]
    return f"{NAMES[config['method']]} ({', '.join(said)})" if said else NAMES[config["method"]]


def table(runs: Sequence[Row], missing: Sequence[PairsConfig], usual: PairsConfig) -> Row:
    """Everything behind the README's table of pairs.

    Args:
        runs: finished runs.
        missing: configurations not run yet.
        usual: JEST with the settings and the updates of all that does not say otherwise.

    Raises:
        ValueError: uniform's full budget is among the missing; nothing can be compared then.
    """
    runs = json.loads(json.dumps(runs))  # fresh from a worker, tuples are not lists yet
    groups: dict[str, list[Row]] = defaultdict(list)
    for run in runs:
        groups[setting(run["config"])].append(run)
    plain = groups.get(setting(asdict(replace(usual, method="uniform"))))
    if plain is None:
        raise ValueError(
            f"runs must hold uniform with {usual.updates} updates, got {len(runs)} others"
        )
    base, updates = json.loads(json.dumps(asdict(usual))), usual.updates
    cells = [cell(group, base) for group in groups.values()]
    cells = [{**c, **against(c, _uniform(cells, c, updates))} for c in cells]
    environments = [run["environment"] for run in runs]
    content = {
        "schema": SCHEMA,
        "version": __version__,
        "environments": [e for i, e in enumerate(environments) if e not in environments[:i]],
        "updates": updates,
        "seeds": sorted({run["config"]["seed"] for run in runs}),
        "finished": len(runs),
        "missing": [config.name for config in missing],
        "config": base,
        "pool": plain[0]["pool"],
        "speedups": speedups(cells),
        "joint": joint(cells),
        "flexi": flexi(base),
    }
    return {
        **content,
        "targets": targets(cells, content),
        "cells": cells,
        "runs": [thin(run) for run in runs],
    }


def setting(config: Mapping[str, Any]) -> str:
    """Runs share it that differ only in their seeds."""
    return records.digest({**config, "seed": None})


def _uniform(cells: Sequence[Row], row: Row, updates: int) -> Row | None:
    """Uniform with its full budget, on the same rows, trained with the same loss."""
    for other in cells:
        same = all(other["config"][name] == row["config"][name] for name in ALIKE)
        if other["method"] == "uniform" and other["updates"] == updates and same:
            return other
    return None


def cell(runs: Sequence[Row], base: Mapping[str, Any]) -> Row:
    """One setting over its seeds: everything in [0, 1] unless it says FLOPs or seconds."""
    runs = sorted(runs, key=lambda run: run["config"]["seed"])
    config = runs[0]["config"]
    steps = np.mean([[list(s.values()) for s in over_time(run)] for run in runs], axis=0)
    compared = [run["batch_learnability"] for run in runs if run["batch_learnability"]]
    return {
        "label": label(config, base),
        "setting": setting(config),
        "method": config["method"],
        "updates": config["updates"],
        "seeds": [run["config"]["seed"] for run in runs],
        "r10": _each(run["recall"]["r10"] for run in runs),
        "recall": {
            f"{way}_{k}": _each(run["recall"][way][k] for run in runs)
            for way in WAYS
            for k in ("1", "10")
        },
        "kept": {tier: _each(share(run["kept"])[tier] for run in runs) for tier in TIERS},
        "kept_over_time": dict(zip(TIERS, steps.T.round(4).tolist(), strict=True)),
        "pool": {tier: _mean(share(run["pool"])[tier] for run in runs) for tier in TIERS},
        "ledger": _lines(runs, "ledger"),
        "ledger_cached": _lines(runs, "ledger_cached"),
        "seconds": {how: _mean(seconds(run, how) for run in runs) for how in ("fresh", "cached")},
        "reference_r10": _mean(run["reference"]["recall"]["r10"] for run in runs)
        if runs[0]["reference"]
        else None,
        "batch_learnability": {
            "joint": _each(found["joint"] for found in compared),
            "independent": _each(found["independent"] for found in compared),
            "gain": _each(found["joint"] - found["independent"] for found in compared),
            "batches": sum(len(found["compared"]) for found in compared),
            "joint_above": _mean(j > i for found in compared for j, i in found["compared"]),
        }
        if len(compared) == len(runs)
        else None,
        "config": {**config, "seed": None},
    }  # fmt: skip


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _each(values: Any) -> Row:
    by_seed = [float(value) for value in values]
    return {**spread(by_seed), "by_seed": by_seed}


def _lines(runs: Sequence[Row], name: str) -> Row:
    return {line: _mean(run[name][line] for run in runs) for line in runs[0][name]}


def share(rows: Mapping[str, float]) -> dict[str, float]:
    """Of each tier.

    >>> share({"clean": 1, "noisy": 3})
    {'clean': 0.25, 'noisy': 0.75}
    """
    return {tier: n / sum(rows.values()) for tier, n in rows.items()}


def over_time(run: Row) -> list[dict[str, float]]:
    """Share of each tier among the rows kept since the point of the curve before."""
    points = [dict.fromkeys((f"kept_{t}" for t in TIERS), 0), *run["curve"]]
    return [share({t: b[f"kept_{t}"] - a[f"kept_{t}"] for t in TIERS}) for a, b in pairwise(points)]


def seconds(run: Row, how: str) -> float:
    """Training of the run and, in full, of its reference, and what that took to score."""
    if not run["reference"]:
        return float(run["seconds"])
    reference = run["reference"]["seconds"] + run["reference_scoring_seconds"][how]
    return float(run["seconds"] + reference)


def order(row: Row, content: Row) -> tuple[bool, int, bool, int]:
    """Key to sort cells by: losses apart, methods as named, the full budget first."""
    method = list(NAMES).index(row["method"])
    loss = row["config"]["loss"] != content["config"]["loss"]
    return loss, method, row["label"] != NAMES[row["method"]], -row["updates"]


def paired(ours: Row, theirs: Row, value: Callable[[Row], Row], ratio: bool = False) -> Row | None:
    """Difference (or ratio) of two cells, seed by seed; None if they share no seed."""
    other = dict(zip(theirs["seeds"], value(theirs)["by_seed"], strict=True))
    pairs = [
        (mine, other[seed])
        for seed, mine in zip(ours["seeds"], value(ours)["by_seed"], strict=True)
        if seed in other
    ]
    return _each(a / b if ratio else a - b for a, b in pairs) if pairs else None


def _r10(row: Row) -> Row:
    return dict(row["r10"])


def _clean(row: Row) -> Row:
    return dict(row["kept"]["clean"])


def against(row: Row, uniform: Row | None) -> Row:
    """What `row` gains over uniform sampling with its full budget; nulls where that is missing."""
    if uniform is None:
        names = ("share_of_updates", "reaches_uniform", "uniform_r10", "r10_gain", "clean_ratio")
        return dict.fromkeys((*names, "flops_share", "flops_share_cached"))
    whole = uniform["ledger"]["total"]
    every = row["seeds"] == uniform["seeds"]
    return {
        "share_of_updates": row["updates"] / uniform["updates"],
        "reaches_uniform": row["r10"]["mean"] >= uniform["r10"]["mean"] if every else None,
        "uniform_r10": uniform["r10"]["mean"],
        "r10_gain": paired(row, uniform, _r10),
        "clean_ratio": paired(row, uniform, _clean, ratio=True),
        "flops_share": {line: flops / whole for line, flops in row["ledger"].items()},
        "flops_share_cached": {line: flops / whole for line, flops in row["ledger_cached"].items()},
    }


def speedups(cells: Sequence[Row]) -> list[Row]:
    """By method with several budgets, the smallest whose mean R@10 reaches uniform's; its cost."""
    grids: dict[str, list[Row]] = defaultdict(list)
    for row in cells:
        if row["reaches_uniform"] is not None and row["method"] != "uniform":
            grids[row["label"]].append(row)
    found = []
    for name, grid in grids.items():
        reached = [row for row in grid if row["reaches_uniform"]]
        at = min(reached, key=lambda row: row["updates"]) if reached else None
        found.append(
            {
                "label": name,
                "budgets": sorted(row["share_of_updates"] for row in grid),
                "at": at["share_of_updates"] if at else None,
                "learner_speedup": learner_speedup(at["share_of_updates"]) if at else None,
                "compute_speedup": 1 - at["flops_share"]["total"] if at else None,
                "compute_speedup_cached": 1 - at["flops_share_cached"]["total"] if at else None,
            }
        )
    return found


def joint(cells: Sequence[Row]) -> list[Row]:
    """Joint against independent selection, where runs differ in nothing else.

    The batches' learnability, per pair kept, is that of both picks from the same super-batches.
    """
    found = []
    for ours in cells:
        rest = {**ours["config"], "method": "independent", "chunks": None}
        theirs = next((c for c in cells if {**c["config"], "chunks": None} == rest), None)
        if ours["method"] != "jest" or theirs is None:
            continue
        found.append(
            {
                "label": ours["label"],
                **{name: ours["config"][name] for name in ("loss", "chunks", "updates")},
                "batch_learnability": ours["batch_learnability"],
                "batch_learnability_in_independent_runs": theirs["batch_learnability"],
                "r10_gain": paired(ours, theirs, _r10),
                "clean_gain": paired(ours, theirs, _clean),
            }
        )
    return found


def flexi(config: Mapping[str, Any]) -> Row:
    """FLOPs of coarse patches over those of fine ones, both towers, beside the published."""
    size, keep = config["learner"], config["keep"]
    fine, coarse = config["patch"], config["coarse"]
    dear, cheap = (train_flops(size, patch, keep) for patch in (fine, coarse))
    return {
        "patches": [fine, coarse],
        "scoring_saved": 1 - pair_flops(size, coarse) / pair_flops(size, fine),
        "training_share": (dear + cheap) / 2 / dear,
        "published": PUBLISHED,
    }


def targets(cells: Sequence[Row], content: Row) -> Row:
    """The claims: whether the mean says so, and whether its whole 95 % interval does.

    The second is null where there is one seed; a claim that was not measured is not there.
    """
    claims = {}
    for row in cells:
        name = row["label"]
        if row["updates"] == content["updates"] and row["method"] != "uniform" and row["r10_gain"]:
            claims[f"{name}: R@10 above uniform's"] = _above(row["r10_gain"])
            claims[f"{name}: clean share at least twice uniform's"] = _above(row["clean_ratio"], 2)
    for entry in content["joint"]:
        name = f"{entry['label']} against independent"
        gains = {
            "learnability of the batch": entry["batch_learnability"]["gain"],
            "R@10": entry["r10_gain"],
            "clean share": entry["clean_gain"],
        }
        claims |= {f"{name}: {what} above": _above(gain) for what, gain in gains.items() if gain}
    for entry in content["speedups"]:
        if len(entry["budgets"]) > 1:
            for kind, text in (
                ("learner_speedup", "learner speedup"),
                ("compute_speedup", "compute speedup, all counted"),
                ("compute_speedup_cached", "compute speedup, reference cached"),
            ):
                reached = entry["at"] is not None and entry[kind] > 0
                claims[f"{entry['label']}: {text}"] = {"mean": reached, "interval": None}
    return claims


def _above(entry: Row, level: float = 0.0) -> Row:
    low = entry["low"]
    return {"mean": entry["mean"] > level, "interval": None if low is None else low > level}


def thin(run: Row) -> Row:
    """A run without what its configuration implies."""
    reference, found = run["reference"], run["batch_learnability"]
    return {
        **{name: run[name] for name in ("name", "recall", "kept", "ledger", "ledger_cached")},
        "setting": setting(run["config"]),
        "seed": run["config"]["seed"],
        "seconds": round(run["seconds"], 1),
        "reference": reference and {
            "name": reference["config"]["part"],
            "rows": reference["rows"],
            "r10": reference["recall"]["r10"],
            "seconds": round(reference["seconds"], 1),
        },
        "batch_learnability": found and {
            name: round(found[name], 4) for name in ("mean", "joint", "independent")
        },
        "curve": {name: [round(point[name], 4) for point in run["curve"]] for name in CURVE},
    }  # fmt: skip
