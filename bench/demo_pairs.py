# SPDX-License-Identifier: Apache-2.0
"""Selection from real image-text pairs in minutes: mixed quality, nothing left off the bill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activesel.loop.pairs_config import Method, PairsConfig
from bench import pairs
from bench.demo import LINES, percent

if TYPE_CHECKING:
    from rich.table import Table

    from bench.aggregate import Row

METHODS: tuple[Method, ...] = ("uniform", "activesiglip", "jest", "jest++")
# As many passes over this smaller pool as the table makes over its own. With 600 updates, thirteen
# passes, selection gains nothing (results/demo-pairs-600-cpu.json).
UPDATES = 200
SETTINGS: dict[str, Any] = {**pairs.SETTINGS, "subset": "demo"}


def command(
    out: Path = Path("runs/demo-pairs"),
    minutes: float = 12,
    seeds: int = 3,
    workers: int = 2,
    updates: int = UPDATES,
) -> None:
    """Train on icons and their captions, a fifth of them curated, with and without selection.

    Stopped half-way, the same line goes on.

    Args:
        out: folder of runs, pictures and summary.
        minutes: no further seed is begun that would end later than this, the first apart.
        seeds: at most so many.
        workers: processes, one thread each.
        updates: of every method.
    """
    from rich.console import Console

    from activesel.loop import records
    from bench import pairs_table

    console = Console(highlight=False)
    usual = PairsConfig(**{**SETTINGS, "updates": updates})
    runs = train(out, usual, minutes, seeds, workers)
    content = pairs_table.table(runs, [], usual)
    console.print(table(content))
    console.print(verdict(content))
    summary = out / "summary.json"
    records.write_json(summary, content)
    sheet = pairs.contact_sheet(out, usual, out / "kept")
    files = [*pairs.pictures(content, out / "methods"), *sheet, summary]
    console.print("written:", *map(str, files), soft_wrap=True)


def train(out: Path, usual: PairsConfig, minutes: float, seeds: int, workers: int) -> list[Row]:
    """Runs of every method, as many seeds as fit in the time."""
    from dataclasses import replace

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from activesel.loop.contrastive import prepare
    from activesel.loop.sweep import sweep

    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    runs: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        fetch = progress.add_task("icons: fetch, render", total=None)
        prepare([usual])
        progress.remove_task(fetch)
        began = time.monotonic()
        for seed in range(seeds):
            spent = (time.monotonic() - began) / 60
            if seed and spent * (seed + 1) / seed > minutes:
                break
            configs = [replace(usual, method=method, seed=seed) for method in METHODS]
            total = len(configs) * usual.updates
            bar = progress.add_task(f"seed {seed}: references, {len(configs)} runs", total=total)

            def show(done: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done)

            runs += sweep(configs, out, workers, show)
            progress.update(bar, completed=total)
    return runs


def _ordered(content: Row) -> list[Row]:
    """Uniform first: runs come as they finish."""
    return sorted(content["cells"], key=lambda cell: METHODS.index(cell["method"]))


def table(content: Row) -> Table:
    """Every number of every method, FLOPs as shares of uniform's total."""
    from rich.table import Table

    rows, whole = content["pool"], sum(content["pool"].values())
    mix = ", ".join(f"{100 * n / whole:.0f} % {tier}" for tier, n in rows.items())
    grid = Table(title=f"{whole:,} icon-text pairs: {mix}", title_justify="left")
    grid.add_column("")
    cells = _ordered(content)
    for cell in cells:
        grid.add_column(cell["label"], justify="right", no_wrap=True)

    def add(name: str, *values: str, last: bool = False) -> None:
        grid.add_row(name, *values, end_section=last)

    add("seeds", *(str(len(c["seeds"])) for c in cells))
    add("updates, decayed to zero", *(f"{c['updates']:,}" for c in cells))
    add("R@10, %, ± 95 % interval", *(percent(c["r10"]) for c in cells))
    for name, text in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        for k in ("1", "10"):
            found = (percent(c["recall"][f"{name}_{k}"]) for c in cells)
            add(f"  {text}, R@{k}", *found, last=name == "text_to_image" and k == "10")
    for tier in rows:
        found = (percent(c["kept"][tier]) for c in cells)
        add(f"{tier} pairs kept, %", *found, last=tier == "logo")
    add("FLOPs, % of uniform's total:", *("" for _ in cells))
    for name, text in LINES.items():
        asked = (f"{100 * c['flops_share'][name]:.1f}" for c in cells)
        add(f"  {text}", *asked)
        if name in ("scoring_reference", "total"):
            once = (f"{100 * c['flops_share_cached'][name]:.1f}" for c in cells)
            add(f"  {text}, if cached", *once, last=name == "total")
    add("seconds a run, reference included", *(f"{c['seconds']['fresh']:.0f}" for c in cells))
    return grid


def verdict(content: Row) -> str:
    """A sentence or two on each method."""
    lines = []
    for cell in _ordered(content)[1:]:
        gain, ratio = cell["r10_gain"], cell["clean_ratio"]["mean"]
        text = (
            f"{cell['label']} kept {ratio:.1f} times as many clean pairs as uniform; its R@10 is "
            f"{100 * abs(gain['mean']):.1f} points {'above' if gain['mean'] > 0 else 'below'} "
            f"uniform's after as many updates, for {100 * cell['flops_share']['total']:.0f} % of "
            "the FLOPs."
        )
        if gain["high"] is None:
            text += " One seed says little."
        elif gain["low"] <= 0 <= gain["high"]:
            text += f" With {len(cell['seeds'])} seeds the difference may be chance."
        lines.append(text)
    return "\n".join(lines)
