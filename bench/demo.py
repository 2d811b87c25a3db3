# SPDX-License-Identifier: Apache-2.0
"""Uniform sampling against ClassAct in minutes, with nothing left off the bill."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activesel.loop.config import Config
from bench import classify

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

PERCENT = 75
LINES = {
    "learner": "learner",
    "scoring_online": "scoring, online",
    "scoring_reference": "scoring, reference",
    "online_training": "training the online scorer",
    "reference_training": "training the reference",
    "selection": "selection",
    "total": "total",
}


def command(
    out: Path = Path("runs/demo"),
    minutes: float = 8,
    seeds: int = 3,
    workers: int = 2,
    updates: int = classify.UPDATES,
    percent: int = PERCENT,
) -> None:
    """Train with and without selection on Fashion-MNIST with 10 % wrong labels; say what it pays.

    Both schedules decay to zero over their own updates. Stopped half-way, the same line goes on.

    Args:
        out: folder of runs, pictures and summary.
        minutes: no further seed is begun that would end later than this, the first apart.
        seeds: at most so many.
        workers: processes, one thread each.
        updates: of uniform.
        percent: ClassAct's share of them.
    """
    from rich.console import Console

    from activesel.loop import plots, records
    from bench import aggregate

    console = Console(highlight=False)
    uniform, ours = train(out, minutes, seeds, workers, updates, percent)
    before = aggregate.cell(uniform)
    after = aggregate.cell(ours)
    gain = aggregate.against(after, before)
    console.print(table(before, after, gain))
    console.print(verdict(after, before, gain))
    groups = {
        f"uniform, {updates:,} updates": uniform,
        f"{aggregate.label(after)}, {after['updates']:,} updates": ours,
    }
    files = plots.curves(groups, out / "curves", before["accuracy"]["mean"])
    summary = {
        "schema": records.SCHEMA,
        "environment": records.environment(),
        "uniform": before,
        "classact": {**after, **gain},
    }
    records.write_json(out / "summary.json", summary)
    console.print("written:", *map(str, [*files, out / "summary.json"]), soft_wrap=True)


def train(
    out: Path, minutes: float, seeds: int, workers: int, updates: int, percent: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs of uniform and of ClassAct, as many seeds as fit in the time."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from activesel.loop.sweep import sweep

    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    results: list[dict[str, Any]] = []
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        for seed in range(seeds):
            spent = (time.monotonic() - began) / 60
            if seed and spent * (seed + 1) / seed > minutes:
                break
            uniform = Config("uniform", updates=updates, noise=classify.NOISE, seed=seed)
            less = round(updates * percent / 100)
            configs = [
                uniform,
                replace(uniform, method="classact", updates=less, **classify.CLASSACT),
            ]
            bar = progress.add_task(
                f"seed {seed}: reference, uniform, ClassAct", total=sum(c.updates for c in configs)
            )
            show = partial(_show, progress, bar)
            results += sweep(configs, out, workers, show)
            progress.update(bar, completed=sum(c.updates for c in configs))
    methods = [[r for r in results if r["config"]["method"] == m] for m in ("uniform", "classact")]
    return methods[0], methods[1]


def _show(progress: Progress, bar: TaskID, updates: int) -> None:
    progress.update(bar, completed=updates)


def table(before: dict[str, Any], after: dict[str, Any], gain: dict[str, Any]) -> Table:
    """Every number of both methods, FLOPs as shares of uniform's total."""
    from rich.table import Table

    from bench import aggregate

    grid = Table(title="Fashion-MNIST, 10 % wrong labels", title_justify="left")
    grid.add_column("")
    grid.add_column("uniform", justify="right")
    grid.add_column(aggregate.label(after), justify="right")
    both = (before, after)

    def add(name: str, *values: str, last: bool = False) -> None:
        grid.add_row(name, *values, end_section=last)

    add("seeds", *(str(len(c["seeds"])) for c in both))
    add("updates, decayed to zero", *(f"{c['updates']:,}" for c in both))
    add("test accuracy, %, ± 95 % interval", *(percent(c["accuracy"]) for c in both))
    add("accuracy of the worst class, %", *(percent(c["worst_class"]) for c in both), last=True)
    add("FLOPs, % of uniform's total:", "", "")
    whole = before["ledger"]["total"]
    for name, text in LINES.items():
        shares = (f"{100 * c['ledger'][name] / whole:.2f}" for c in both)
        add(f"  {text}", *shares, last=name == "total")
    reached = gain["reaches_uniform"]
    add(
        "learner speedup, %",
        "-",
        f"{100 * gain['learner_speedup_if_reached']:.0f}" if reached else "not reached",
    )
    add(
        "compute speedup, %, every line counted",
        "-",
        f"{100 * gain['compute_speedup_if_reached']:.1f}" if reached else "not reached",
    )
    add(
        "  online training left out, as published",
        "-",
        f"{100 * gain['compute_speedup_without_online_training']:.1f}"
        if reached
        else "not reached",
        last=True,
    )
    add(
        f"wrong labels kept, % (base {100 * after['base_rate']:.1f})",
        *(percent({"mean": c["mislabelled"]["share"], **_ends(c)}) for c in both),
    )
    add("seconds a run, reference included", *(f"{c['seconds']:.0f}" for c in both))
    return grid


def _ends(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["mislabelled"]["seeds"][name] for name in ("low", "high")}


def percent(entry: dict[str, Any]) -> str:
    """Mean and half-width of the interval, in percent.

    >>> percent({"mean": 0.5, "low": 0.48, "high": 0.52}), percent({"mean": 0.5, "high": None})
    ('50.00 ± 2.00', '50.00')
    """
    text = f"{100 * entry['mean']:.2f}"
    if entry["high"] is None:
        return text
    return f"{text} ± {50 * (entry['high'] - entry['low']):.2f}"


def verdict(after: dict[str, Any], before: dict[str, Any], gain: dict[str, Any]) -> str:
    """One honest sentence or two."""
    points = 100 * gain["accuracy_gain"]["mean"]
    saved = 100 * (1 - gain["share_of_updates"])
    flops = 100 * gain["compute_speedup_if_reached"]
    spent = f"{abs(flops):.1f} % {'fewer' if flops >= 0 else 'more'} FLOPs, every line counted"
    if gain["reaches_uniform"]:
        text = (
            f"ClassAct reached uniform's accuracy ({points:+.2f} points) with {saved:.0f} % fewer "
            f"updates and {spent}."
        )
    else:
        text = (
            f"ClassAct did not reach uniform's accuracy ({points:+.2f} points) with {saved:.0f} % "
            f"fewer updates and {spent}: no speedup is shown at this budget."
        )
    gained = gain["accuracy_gain"]
    if gained["high"] is None:
        text += " One seed says little."
    elif gained["low"] < 0 < gained["high"]:
        text += f" With {len(after['seeds'])} seeds the difference may be chance."
    kept, base = 100 * after["mislabelled"]["share"], 100 * after["base_rate"]
    return f"{text} {kept:.1f} % of the rows it kept had wrong labels; base rate {base:.1f} %."
