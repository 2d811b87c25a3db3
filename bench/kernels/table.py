# SPDX-License-Identifier: Apache-2.0
"""Runs the pytest-benchmark suite beside, and makes a table of what it wrote."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import common
from bench.common import Row, Scale

NAME = "kernels"
SUITE = Path(__file__).parent
LIMITS = {  # seconds of timing a case and side, rounds at least
    "smoke": ("0.1", "3"),
    "full": ("2", "5"),
    "gpu": ("0.5", "5"),
}


def command(
    scale: Scale = "smoke",
    threads: int | None = None,
    pytest: str = "",
    out: Path | None = None,
) -> None:
    """Time every operator beside its twin in torch, by pytest-benchmark, and write the table.

    All results are checked first; if one is wrong, nothing is timed or written. pytest-benchmark
    keeps and compares figures: `--pytest="--benchmark-autosave --benchmark-compare"`, and with
    pygal installed `--benchmark-histogram`.

    Args:
        scale: "smoke" for small sizes, "full" for those that people meet, "gpu" on a CUDA device.
        threads: that torch and the kernels use on the CPU; None: as many as torch takes.
        pytest: further arguments for pytest, such as `-k "logits and rows"`.
        out: files to write, without suffix.

    Raises:
        SystemExit: a result is wrong, or nothing was timed.
    """
    if scale not in LIMITS:
        raise ValueError(f"scale must be one of {', '.join(LIMITS)}, got {scale!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    path = out or common.results(scale, NAME)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "benchmark.json"
        code, said = _suite(scale, threads, found, pytest)
        if code or not found.is_file() or not found.stat().st_size:
            print(said)
            sys.exit(f"nothing is written: pytest ended with {code}, see above")
        report = json.loads(found.read_text())
    left_out = list(dict.fromkeys(line for line in said.splitlines() if " left out: " in line))
    content = from_report(report, scale) | {"left_out": left_out}
    show(content)
    print(f"written to {common.write(path, content, content['rows'])[0]}")
    common.result(headline(content))


def _suite(scale: Scale, threads: int | None, found: Path, more: str) -> tuple[int, str]:
    seconds, rounds = LIMITS[scale]
    line = [
        sys.executable, "-m", "pytest", str(SUITE / "test_ops.py"), f"--scale={scale}",
        "-q", "--maxfail=1", "--capture=no", "-p", "no:cacheprovider",
        f"--benchmark-json={found}", f"--benchmark-max-time={seconds}",
        f"--benchmark-min-rounds={rounds}", "--benchmark-columns=median,iqr,rounds",
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
        "--benchmark-disable-gc", *shlex.split(more),
    ]  # fmt: skip
    # Under pytest-xdist, of which these variables tell, pytest-benchmark times nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def from_report(report: Row, scale: Scale) -> Row:
    """What pytest-benchmark wrote, as rows: ours and the twin of each case.

    Raises:
        ValueError: the report holds no times, or a twin is missing.
    """
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for entry in report["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        by_case.setdefault((info["op"], info["shape"]), {})[info["who"]] = {
            "op": info["op"],
            "shape": info["shape"],
            "who": info["who"],
            "variant": info["variant"],
            "seconds": info.get("device_seconds", stats["median"]),
            "seconds_q1": stats["q1"],
            "seconds_q3": stats["q3"],
            "rounds": stats["rounds"],
            **{name: info[name] for name in ("bytes", "flops", "gb_per_s", "gflop_per_s")},
            "roofline": info["roofline"],
            "binds": info["binds"],
            "device": info["device"],
            "threads": info["threads"],
            "checked": info["checked"],
            "formula": info["formula"],
        }
    rows = []
    for (op, shape), sides in by_case.items():
        if set(sides) != {"ours", "twin"}:
            raise ValueError(f"{op} {shape} must be timed with its twin, got {', '.join(sides)}")
        twin = sides["twin"]["seconds"]
        rows += [sides[w] | {"times_faster": twin / sides[w]["seconds"]} for w in ("ours", "twin")]
    if not rows:
        raise ValueError("the report must hold times, got none")
    info = report["benchmarks"][0]["extra_info"]
    return {
        **common.header(),
        "scale": scale,
        "device": info["device"],
        "threads": info["threads"],
        "backends": info["backends"],
        "ceilings": info["ceilings"],
        "rows": rows,
    }


def _pairs(content: Row) -> list[tuple[Row, Row]]:
    rows = content["rows"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def headline(content: Row) -> Row:
    ratios = sorted(ours["times_faster"] for ours, _ in _pairs(content))
    return {
        "cases": len(ratios),
        "slowest_against_twin": ratios[0],
        "median_against_twin": ratios[len(ratios) // 2],
        "slower_than_twin": sum(r < 1 for r in ratios),
        "left_out": len(content["left_out"]),
    }


COLUMNS = "operator", "shape", "ours, us", "torch, us", "times faster", "GB/s", "% of roofline"


def _cells(ours: Row, twin: Row) -> list[str]:
    said = f"{100 * ours['roofline']:.0f} ({ours['binds']})"
    return [
        ours["op"],
        ours["shape"],
        f"{1e6 * ours['seconds']:,.1f}",
        f"{1e6 * twin['seconds']:,.1f}",
        f"{ours['times_faster']:.2f}",
        f"{ours['gb_per_s']:.1f}",
        said,
    ]


def show(content: Row) -> None:
    title = f"{content['device']}, {content['threads']} threads"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for pair in _pairs(content):
        table.add_row(*_cells(*pair))
    Console(width=max(100, Console().width)).print(table)
    for line in content["left_out"]:
        print(line)


def text(content: Row) -> str:
    """Markdown for docs/results.md."""
    rates = content["ceilings"]
    threads = content["threads"]
    slower = [ours for ours, _ in _pairs(content) if ours["times_faster"] < 1]
    said = (
        f"Medians of pytest-benchmark on {content['device']}, {threads} "
        f"thread{'s' if threads > 1 else ''}; every result is checked against float64, the "
        "specification or the exact law before anything is timed. The roofline is what this "
        f"process reached by itself: {rates['bytes'] / 1e9:.0f} GB/s of copying or reading, "
        f"{rates['flops'] / 1e9:,.0f} GFLOP/s of products; what stays in a cache can be above it."
    )
    if slower:
        named = "; ".join(f"{r['op']}, {r['shape']} ({r['times_faster']:.2f})" for r in slower)
        said += f" Slower than torch: {named}."
    return "\n".join(
        [
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(f"| {' | '.join(_cells(*pair))} |" for pair in _pairs(content)),
            "",
            " ".join([said, *(f"{line}." for line in content["left_out"])]),
        ]
    )
