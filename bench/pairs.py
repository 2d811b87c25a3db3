# SPDX-License-Identifier: Apache-2.0
"""The table of methods on real image-text pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activesel.loop.pairs_config import Method, PairsConfig

if TYPE_CHECKING:
    from bench.aggregate import Row

SEEDS = (0, 1, 2)
UPDATES = 600
SETTINGS: dict[str, Any] = {"subset": "full", "keep": 128}
PERCENTS = (67, 50)  # of the updates, for speedups
VARIANTS: tuple[dict[str, Any], ...] = ({"loss": "softmax"},)  # does joint pay there?
RESULTS = Path(__file__).parent / "results" / "pairs-cpu.json"
MAIN: tuple[Method, ...] = (
    "uniform", "jest", "independent", "activesiglip", "jest++", "jest-easy", "easy", "hard",
    "flexi-jest", "activeclip",
)  # fmt: skip
CURVES = ("uniform", "activesiglip", "independent", "jest", "jest++", "jest-easy", "flexi-jest")


def usual(method: Method = "jest", **settings: Any) -> PairsConfig:
    """A run of the table, where nothing is said about it."""
    return PairsConfig(**{"method": method, "updates": UPDATES, **SETTINGS, **settings})


def queue() -> list[PairsConfig]:
    """Every run of the table once, the most telling ones first, seed by seed."""

    def runs(*methods: Method, **settings: Any) -> list[PairsConfig]:
        return [usual(method, seed=s, **settings) for s in SEEDS for method in methods]

    losses = dict.fromkeys(usual(method).loss for method in MAIN)
    first = [c for loss in losses for c in runs("uniform", loss=loss)] + runs(*MAIN)
    shorter = [
        config
        for percent in PERCENTS
        for config in runs("jest", "jest++", "jest-easy", updates=round(UPDATES * percent / 100))
    ]
    other = runs("jest-emoji") + runs("uniform", rows="ui")
    variants = [c for changed in VARIANTS for c in runs("jest", "independent", **changed)]
    blocks = [sorted(block, key=lambda c: c.seed) for block in (first, shorter, other, variants)]
    return list(dict.fromkeys(config for block in blocks for config in block))


def load(
    out: Path,
    configs: Iterable[PairsConfig],
) -> tuple[list[Row], list[PairsConfig]]:
    """The records of the finished runs among `configs`, and those of `configs` missing."""
    from activesel.loop import records

    files = {config: out / config.name / "run.json" for config in configs}
    runs = [records.read_json(file) for file in files.values() if file.is_file()]
    return runs, [config for config, file in files.items() if not file.is_file()]


def command(
    out: Path = Path("runs/pairs"),
    workers: int = 2,
    aggregate_only: bool = False,
    results: Path = RESULTS,
) -> None:
    """Run what is missing of the table of pairs, then write its figures and pictures.

    Stop it at any time, the same line goes on; finished runs are not repeated.

    Args:
        out: folder of the runs.
        workers: processes, one thread each.
        aggregate_only: run nothing, make do with what there is.
        results: JSON file to write; the pictures go beside it.
    """
    from rich.console import Console

    from activesel.loop.sweep import sweep
    from bench import aggregate, pairs_table

    console, configs = Console(highlight=False, soft_wrap=True), queue()
    if not aggregate_only:
        for number, result in enumerate(sweep(configs, out, workers), start=1):
            console.print(
                f"{number}/{len(configs)} {result['name']}: R@10 {result['recall']['r10']:.4f}, "
                f"{result['seconds']:.0f} s"
            )
    runs, missing = load(out, configs)
    content = pairs_table.table(runs, missing, usual())
    aggregate.write(results, content)
    path = results.with_suffix("")
    sheet = contact_sheet(out, usual(), path.with_name(f"{path.name}-kept"))
    files = [results, *pictures(content, path), *sheet]
    for claim, holds in content["targets"].items():
        console.print(f"{claim}: {holds['mean']}; with its whole interval: {holds['interval']}")
    if missing:
        console.print(f"unfinished: {len(missing)} of {len(configs)} runs are missing")
    console.print("written:", *map(str, files))


def pictures(content: Row, path: Path) -> list[Path]:
    """Recall and tiers by method, tiers over time, recall against updates and FLOPs."""
    from activesel.loop import plots
    from bench import aggregate, pairs_table

    full, whole = content["updates"], sum(content["pool"].values())
    pool = {tier: rows / whole for tier, rows in content["pool"].items()}
    everyone = sorted(content["cells"], key=lambda cell: pairs_table.order(cell, content))
    cells = [
        cell
        for cell in everyone
        if cell["updates"] == full and cell["config"]["rows"] == content["config"]["rows"]
    ]
    runs: dict[str, list[Row]] = {}
    for run in content["runs"]:
        runs.setdefault(run["setting"], []).append(aggregate.thick(run))
    curves = {}
    for label in (pairs_table.NAMES[method] for method in CURVES):
        budgets = sorted((c for c in everyone if c["label"] == label), key=lambda c: -c["updates"])
        if budgets and budgets[0]["updates"] == full:
            curves[label] = [runs[cell["setting"]] for cell in budgets]
    uniform = next(cell for cell in cells if cell["label"] == pairs_table.NAMES["uniform"])
    return [
        *plots.methods({cell["label"]: cell for cell in cells}, pool, path),
        *plots.tiers(
            {cell["label"]: runs[cell["setting"]] for cell in cells},
            pool,
            path.with_name(f"{path.name}-tiers"),
        ),
        *plots.recall_curves(curves, path.with_name(f"{path.name}-curves"), uniform["r10"]["mean"]),
    ]


def contact_sheet(
    out: Path, config: PairsConfig, path: Path, count: int = 40, least: int = 5
) -> list[Path]:
    """The pairs that the runs of `config`, of any seed, kept most and least often of one pool.

    None where too few were drawn often enough, or no run is there.
    """
    import torch
    from safetensors.torch import load_file

    from activesel.loop.pairs_reference import pairs_of
    from activesel.loop.sheet import sheet

    configs = [replace(config, seed=seed) for seed in SEEDS]
    files = [out / c.name / "kept.safetensors" for c in configs]
    found = [(c, load_file(file)) for c, file in zip(configs, files, strict=True) if file.is_file()]
    if not found:
        return []
    rows = pairs_of(found[0][0]).pool
    ids, order = rows.ids.sort()
    counts = torch.zeros(2, len(rows), dtype=torch.int64)
    for _, tensors in found:
        there = torch.isin(tensors["ids"], ids)
        at = order[torch.searchsorted(ids, tensors["ids"][there])]
        counts[:, at] += torch.stack([tensors["kept"][there], tensors["drawn"][there]])
    known = int((counts[1] >= least).sum())
    return sheet(rows, counts[0], counts[1], path, count, least) if known >= 2 * count else []
