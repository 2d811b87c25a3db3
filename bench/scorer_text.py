# SPDX-License-Identifier: Apache-2.0
"""Predicted times of scorers, in words and figures; only the model behind them needs Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activesel.loop import records

RESULTS = Path(__file__).parent / "results" / "scorer-cost.json"
Row = dict[str, Any]


def predictions(content: Row) -> str:
    """Table of what a scorer pair should take by each route, against compiled torch."""
    lines = [
        "| scorer pair | images | one launch, ms | launch per phase, ms | torch compiled, ms "
        "| default route | times faster, predicted | wanted, aim |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, content["cases"].values()),
    ]
    slow = [c for c in content["cases"].values() if c["predicted"]["torch"] < c["bound"]["torch"]]
    said = (
        "**Predicted for an H200, never timed**: FLOPs, exponentials, instructions, L2 and HBM "
        "bytes as the kernels make them (`bench/scorer_cost.py`), 1,000 classes, uint8 pixels to "
        "features of both sides. Compiled torch is predicted likewise, an operation at a time. "
        f"{len(slow)} of {len(content['cases'])} are short of what is wanted: in all of them the "
        'weights that every tile of rows reads from the L2 cache bind. `backend="auto"` takes a '
        f"kernel where it should be {content['margin']} times as fast as compiled torch or more."
    )
    return "\n".join([*lines, "", said])


def _line(case: Row) -> str:
    s, seconds = case["shape"], {k: v["seconds"] for k, v in case["routes"].items()}
    wanted = case["bound"]["torch"], case["aim"]["torch"]
    cells = [
        f"width {s['width']}, depth {s['depth']}, {s['tokens']} tokens",
        f"{case['images']:,}",
        *(f"{1e3 * seconds[name]:.1f}" for name in ("one launch", "blocks", "torch")),
        case["route"].replace("blocks", "launch per phase"),
        f"{case['predicted']['torch']:.1f}",
        "{:g}, {:g}".format(*wanted),
    ]
    return f"| {' | '.join(cells)} |"


def command(out: Path = RESULTS) -> None:
    """Predict the time of a scorer pair on an H200 by each route, and write it down.

    Args:
        out: JSON file to write.
    """
    from rich.console import Console
    from rich.table import Table

    from bench import scorer_predictions  # reads the kernels' tiles

    content = scorer_predictions.content()
    records.write_json(out, content)
    console, told = Console(), Table("scorer", "images", "route", "ms", "of it", "times faster")
    for name, row in content["cases"].items():
        for way, found in row["routes"].items():
            phases = found.get("phases", {})
            faster = [
                f"{other}: {row['predicted'][other]:.2g} ({row['bound'][other]:g}, {aim:g})"
                for other, aim in row["aim"].items()
                if way == row["route"]
            ]
            told.add_row(
                name, f"{row['images']:,}", way, f"{1e3 * found['seconds']:.2f}",
                ", ".join(f"{phase} {1e3 * t:.2f}" for phase, t in phases.items()),
                ", ".join(faster),
            )  # fmt: skip
    console.print(told)
    least = Table("padded width", "tokens, at most", "depth, at most", "kernels from images on")
    for *key, images in content["sizes"]:
        least.add_row(*map(str, key), "-" if images is None else f"{images:,}")
    console.print(least)
    console.print(f"written to {out}", markup=False)
