# SPDX-License-Identifier: Apache-2.0
"""The table of methods and update budgets on Fashion-MNIST with wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activesel.loop.config import Config, Method

SEEDS = (0, 1, 2)
UPDATES = 2400
NOISE = 0.1
PERCENT = 67
GRID = (50, 60, 67, 75, 80, 90)
CLASSACT: dict[str, Any] = {"rho": 2, "temperature": 0.5}
RHO: dict[str, Any] = {"rho": 5}
SETTINGS: dict[str, dict[str, Any]] = {"uniform": {}, "classact": CLASSACT, "rho": RHO}
RESULTS = Path(__file__).parent / "results" / "classify-cpu.json"


def queue(noise: float = NOISE) -> list[Config]:
    """Every run of the table once, the most telling ones first, seed by seed."""

    def runs(method: Method, *percents: int, **settings: Any) -> list[Config]:
        return [
            Config(method=method, updates=round(UPDATES * p / 100), noise=noise, seed=s, **settings)
            for p in percents
            for s in SEEDS
        ]

    first = [
        *runs("uniform", 100),
        *runs("classact", 75, 80, PERCENT, **CLASSACT),
        *runs("uniform", 75),
        *runs("rho", PERCENT, **RHO),
        *runs("easy", PERCENT, rho=2),
    ]
    rest = [
        *runs("hard", PERCENT, rho=2),
        *runs("classact-ho", PERCENT, **CLASSACT),
        *runs("classact-online", PERCENT, **CLASSACT),
        *(
            config
            for rho in (2, 5)
            for temperature in (1.0, 0.25, 0.0)
            for config in runs("classact", PERCENT, rho=rho, temperature=temperature)
        ),
        *runs("uniform", *GRID),
        *runs("classact", *GRID, **CLASSACT),
    ]
    rest.sort(key=lambda config: config.seed)  # a stop half-way leaves whole seeds behind
    return list(dict.fromkeys(first + rest + runs("rho", *GRID, **RHO)))  # the dearest last


def command(
    out: Path = Path("runs/classify"),
    workers: int = 2,
    aggregate_only: bool = False,
    results: Path = RESULTS,
) -> None:
    """Run what is missing of the table, then write its figures and pictures.

    Stop it at any time, the same line goes on; finished runs are not repeated.

    Args:
        out: folder of the runs.
        workers: processes, one thread each.
        aggregate_only: run nothing, make do with what there is.
        results: JSON file to write; the pictures go beside it.
    """
    from rich.console import Console

    from activesel.loop.sweep import sweep
    from bench import aggregate

    console, configs = Console(highlight=False), queue()
    if not aggregate_only:
        for number, result in enumerate(sweep(configs, out, workers), start=1):
            console.print(
                f"{number}/{len(configs)} {result['name']}: accuracy {result['accuracy']:.4f}, "
                f"{result['seconds']:.0f} s"
            )
    runs, missing = aggregate.load(out, configs)
    content = aggregate.table(runs, missing, UPDATES, SETTINGS)
    aggregate.write(results, content)
    files = [results, *pictures(content, results.with_suffix(""))]
    for method, entry in content["beta"].items():
        console.print(f"{method}: beta {entry['beta_text']}")
    for claim, holds in content["targets"].items():
        console.print(f"{claim}: {holds}")
    if missing:
        console.print(f"unfinished: {len(missing)} of {len(configs)} runs are missing")
    console.print("written:", *map(str, files))


def pictures(content: dict[str, Any], path: Path) -> list[Path]:
    """The table's picture, and the curves of the runs at `PERCENT` beside uniform's."""
    from activesel.loop import plots
    from bench import aggregate

    cells, full = content["cells"], content["updates"]

    def matches(row: dict[str, Any], method: str) -> bool:
        return row["method"] == method and all(
            row[name] == value for name, value in SETTINGS[method].items()
        )

    grid, groups = {}, {}
    for method in SETTINGS:
        rows = [c for c in cells if matches(c, method)]
        if not rows:
            continue
        name = aggregate.label(rows[0])
        grid[name] = {round(100 * c["share_of_updates"]): c["accuracy"]["by_seed"] for c in rows}
        percent = 100 if method == "uniform" else PERCENT
        groups[f"{name}, {percent} % of updates"] = [
            aggregate.thick(run)
            for run in content["runs"]
            if matches(run, method) and run["updates"] == round(full * percent / 100)
        ]
    at = [c for c in cells if c["updates"] == round(full * PERCENT / 100)]
    order = ["uniform", "hard", "easy", "classact", "classact-ho", "classact-online", "rho"]
    at.sort(key=lambda c: (order.index(c["method"]), c["rho"], -c["temperature"]))
    methods = {aggregate.label(c): c["accuracy"]["by_seed"] for c in at}
    target = next(
        c["accuracy"]["mean"] for c in cells if c["method"] == "uniform" and c["updates"] == full
    )
    groups = {name: runs for name, runs in groups.items() if runs}
    return [
        *plots.budgets(grid, methods, PERCENT, path),
        *plots.curves(groups, path.with_name(f"{path.name}-curves"), target),
    ]
