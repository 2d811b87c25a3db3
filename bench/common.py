# SPDX-License-Identifier: Apache-2.0
"""What every part of the bench shares: scales, where files go, what fits here, the last line."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from activesel import __version__
from activesel.loop import records

Scale = Literal["smoke", "full", "gpu"]
Row = dict[str, Any]
Case = TypeVar("Case")

ROOT = Path(__file__).parent / "results"
SCHEMA = 1
"""Version of the JSON files that the commands here write."""


def results(scale: Scale, name: str) -> Path:
    """Where a command writes, without suffix: committed for "full" and "gpu", else under `runs/`.

    >>> results("full", "pareto").parts[-3:]
    ('results', 'cpu', 'pareto')
    """
    folder = {"smoke": Path("runs") / "smoke", "full": ROOT / "cpu", "gpu": ROOT / "gpu"}[scale]
    return folder / name


def runs(scale: Scale) -> Path:
    """Folder of training runs, which all commands of one scale share: equal runs are run once."""
    return Path("runs") / scale / "runs"


def header() -> Row:
    """How a result file begins: what wrote it, with which command line, and where."""
    from bench.speed import machine

    line = ["python", "-m", "bench", *sys.argv[1:]]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "command": shlex.join(line),
        "machine": machine(),
    }


def write(path: Path, content: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write `path`.json and, for spreadsheets, `rows` as `path`.csv; each whole or not at all.

    In the JSON, lists of objects have one line per object, so that a difference can be read. Rows
    need not have the same columns; one missing is left empty.

    Returns:
        The two files.
    """
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("json", "csv")]
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(files[0], _json(content))
    text, columns = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    records.write_text(files[1], text.getvalue())
    return files


def _json(content: Mapping[str, Any]) -> str:
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path) -> Row:
    """A file that `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or of another schema version; says how to convert it.
    """
    content = records.read_json(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} must be of schema {SCHEMA}, got {content.get('schema')!r} (written by "
            f"activesel {content.get('version', 'unknown')}). To convert it run the command that "
            f"made it again, with this version: {content.get('command', 'python -m bench ...')} ; "
            "runs that are finished are read back, not repeated"
        )
    return content


def result(content: Mapping[str, Any]) -> None:
    """Print the last line of a command, for scripts: `--result {json}`."""
    print(f"--result {json.dumps(content)}", flush=True)


def memory() -> int:
    """Bytes that this process may still take: what the machine has free, or its group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return free if limit.strip() == "max" else min(free, max(int(limit) - int(used), 0))
    except (OSError, StopIteration, ValueError):
        return free  # not Linux, or no such groups


def fitting(
    cases: Iterable[Case],
    need: Callable[[Case], int],
    available: int | None = None,
) -> tuple[list[Case], list[str]]:
    """Split cases into those that fit and a sentence for each that does not.

    Args:
        cases: anything whose `str` names it.
        need: bytes a case takes.
        available: bytes there are; 80 % of `memory()` if not given.

    >>> fitting([1, 30], need=lambda case: case << 20, available=2 << 20)
    ([1], ['30 left out: needs 30 MB, 2 MB available'])
    """
    limit = int(0.8 * memory()) if available is None else available
    kept, left_out = [], []
    for case in cases:
        if need(case) <= limit:
            kept.append(case)
        else:
            megabytes = f"needs {need(case) >> 20:,} MB, {limit >> 20:,} MB available"
            left_out.append(f"{case} left out: {megabytes}")
    return kept, left_out
