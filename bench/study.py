# SPDX-License-Identifier: Apache-2.0
"""The training runs that several commands share, at every scale, and one way to run them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activesel.loop.config import Config, Method
from activesel.loop.pairs_config import Method as PairsMethod
from activesel.loop.pairs_config import PairsConfig
from bench.common import Row, Scale, runs

SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0, 1), "full": (0, 1, 2), "gpu": (0, 1, 2)}
CLASSIFY: dict[Scale, dict[str, Any]] = {
    "smoke": {"updates": 100, "reference_updates": 200, "warmup": 10, "evaluations": 4},
    "full": {"updates": 2400},
    "gpu": {"updates": 6000, "keep": 256, "learner": "S", "scorer": "micro", "patch": 4},
}
PAIRS: dict[Scale, dict[str, Any]] = {
    "smoke": {"updates": 30, "keep": 64, "subset": "tiny", "reference_updates": 40, "warmup": 5},
    "full": {"updates": 600, "keep": 128, "subset": "full"},
    "gpu": {"updates": 1500, "keep": 512, "subset": "full", "learner": "mini"},
}
SELECTION: dict[str, Any] = {"rho": 2, "temperature": 0.5}
"""Of every method that selects among rows by scorers, unless a study varies it."""


def classify(
    scale: Scale, method: Method, percent: float = 100, seed: int = 0, **settings: Any
) -> Config:
    """A run on Fashion-MNIST with `percent` of uniform's updates, decayed to zero over them."""
    given: dict[str, Any] = {**CLASSIFY[scale], "noise": 0.1, **SELECTION, **settings}
    given["updates"] = round(given["updates"] * percent / 100)
    return Config(method=method, seed=seed, **given)


def pairs(
    scale: Scale, method: PairsMethod, percent: float = 100, seed: int = 0, **settings: Any
) -> PairsConfig:
    """A run on icons and captions with `percent` of uniform's updates."""
    given = {**PAIRS[scale], **settings}
    given["updates"] = round(given["updates"] * percent / 100)
    return PairsConfig(method=method, seed=seed, **given)


def gather(
    configs: Sequence[Any],
    scale: Scale,
    workers: int = 2,
    minutes: float | None = None,
    aggregate_only: bool = False,
    folder: Path | None = None,
) -> tuple[list[Row], list[Any]]:
    """Run what is missing, in this order, and read what is there.

    Stopped at any time, or after `minutes`, the same call goes on: finished runs are not repeated.

    Args:
        configs: the runs, most important first; of any loop.
        scale: whose folder of runs.
        workers: processes, one thread each; on a GPU one.
        minutes: stop the runs under way after so many; they resume from their checkpoints.
        aggregate_only: run nothing.
        folder: instead of the scale's.

    Returns:
        The records found, in the order of `configs`, and the configurations still missing.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from activesel.loop import records
    from activesel.loop.sweep import sweep

    out = folder or runs(scale)
    configs = list(dict.fromkeys(configs))
    if not aggregate_only:
        stop = None if minutes is None else time.monotonic() + 60 * minutes
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            bar = progress.add_task("runs", total=sum(c.updates for c in configs))

            def show(updates: int) -> None:
                progress.update(bar, completed=updates)
                if stop is not None and time.monotonic() > stop:
                    raise TimeoutError

            device = "cuda" if scale == "gpu" else "cpu"
            try:
                for number, run in enumerate(
                    sweep(configs, out, 1 if scale == "gpu" else workers, show, device), start=1
                ):
                    progress.update(bar, description=f"{number}/{len(configs)} {run['name']}")
            except TimeoutError:
                progress.console.print(f"stopped after {minutes:g} minutes; the same line goes on")
    files = {config: out / config.name / "run.json" for config in configs}
    found = [records.read_json(file) for file in files.values() if file.is_file()]
    return found, [config for config, file in files.items() if not file.is_file()]
