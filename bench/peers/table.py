# SPDX-License-Identifier: Apache-2.0
"""Checks, times and probes every workload, one after the other, and makes a table of it."""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import common, speed
from bench.common import Row, Scale
from bench.kernels.place import Place, place
from bench.peers import probes
from bench.peers.sizes import Workload, every
from bench.peers.workloads import COMPILE, Peer

NAME = "peers"
SECONDS = {"smoke": 0.5, "full": 8.0, "gpu": 1.0}  # of turns, a workload


class Wrong(Exception):
    """A result of ours is wrong, so nothing may be timed."""


def command(
    scale: Scale = "smoke",
    minutes: float | None = None,
    out: Path | None = None,
    threads: int | None = None,
    compile: bool = True,
) -> None:
    """Compare with what a user would pick instead: time, memory, waits for the device, FLOPs.

    All in one process. Results are checked first, equality or distribution; what is wrong is not
    timed, and if it is ours nothing is written. Then the variants of a workload take turns.

    Args:
        scale: "smoke" for small sizes, "full" for those that people meet, "gpu" on a CUDA device.
        minutes: begin no workload after so many; the same line resumes.
        out: files to write, without suffix.
        threads: of torch and the kernels on the CPU; None: as many as torch takes.
        compile: whether `torch.compile` is among the peers (its first call takes a minute).

    Raises:
        SystemExit: a result of ours is wrong.
    """
    at = place(scale, SECONDS.get(scale, 0.0))
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    path = out or common.results(scale, NAME)
    with torch.no_grad(), speed.threads(threads or torch.get_num_threads()):
        content = _resumed(path, at, scale)
        done = {row["workload"] for row in content["rows"]}
        fit, left_out = common.fitting(every(scale), Workload.need, at.free())
        if not compile:
            left_out.append(f"{COMPILE} left out: --no-compile was given")
        _say(content, left_out)
        content["missing"] = [str(w) for w in fit if str(w) not in done]
        start = time.monotonic()
        for workload in fit:
            late = minutes is not None and time.monotonic() - start > 60 * minutes
            if str(workload) in done or late:
                continue
            try:
                rows, left_out = measure(workload, at, compile)
            except Wrong as error:
                sys.exit(f"{workload}: {error}; nothing is timed and nothing written")
            content["rows"] += rows
            content["missing"].remove(str(workload))
            _say(content, left_out)
            show(content, str(workload))
            common.write(path, content, content["rows"])
    if content["missing"]:
        count = len(content["missing"])
        print(f"unfinished: {count} of {len(fit)} workloads are missing; the same line resumes")
    print(f"written to {common.write(path, content, content['rows'])[0]}")
    common.result(headline(content))


def _resumed(path: Path, at: Place, scale: Scale) -> Row:
    """What an interrupted call has written on the same machine; a new table else."""
    new = {
        **common.header(),
        "scale": scale,
        "device": at.name,
        "threads": torch.get_num_threads(),
        "backends": at.backends(),
        "missing": [],
        "left_out": [],
        "rows": [],
    }
    file = path.with_name(f"{path.name}.json")
    if file.is_file():
        old = common.read(file)
        same = all(old.get(name) == new[name] for name in ("machine", "scale", "device", "threads"))
        if old.get("missing") and same:
            return old
    return new


def _say(content: Row, left_out: list[str]) -> None:
    for line in left_out:
        if line not in content["left_out"]:
            content["left_out"].append(line)
            print(line)


def measure(workload: Workload, at: Place, compile: bool = True) -> tuple[list[Row], list[str]]:
    """Rows of one workload, ours first, and who is not among them.

    Raises:
        Wrong: a result of ours is not what it must be.
    """
    table = workload.make(at)
    variants = [v for v in table.variants if compile or v.name != COMPILE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers, on their own defaults
        found = at.measure(variants, table.work, table.copies)
        entries = {entry["name"]: entry for entry in found["variants"]}
        if found.get("failed"):
            raise Wrong(next(entries[v.name]["error"] for v in variants if v.ours))
        rows, left_out = [], table.left_out
        for v in variants:
            entry = entries[v.name]
            if "error" in entry:
                left_out.append(f"{v.name} left out of {workload}: {entry['error']}")
                continue
            call = partial(v.call, 0)
            counted = v.counted if isinstance(v, Peer) and v.counted else call
            rows.append(
                {
                    "workload": str(workload),
                    "peer": v.name,
                    **_spread("seconds", entry["seconds"]),
                    **_spread("times_ours", entry["times_the_first"]),
                    "extra_bytes": probes.memory(call, at.device),
                    "syncs": probes.syncs(call, at.device),
                    "flops": probes.flops(counted),
                    "flops_formula": table.work.flops,
                    "bytes_formula": table.work.bytes,
                    "formula": table.work.formula,
                    "turns": entry["rounds"],
                    "method": entry["method"],
                    "checked": entry["checked"],
                }
            )
    return rows, left_out


def _spread(name: str, found: Row) -> Row:
    return {name: found["p50"], f"{name}_p20": found["p20"], f"{name}_p80": found["p80"]}


# ------------------------------------------------------------------------------------------- tables

COLUMNS = "with", "ms", "times ours (p20 to p80)", "extra MB", "host waits", "GFLOP"


def _cells(row: Row) -> list[str]:
    ratio = f"{row['times_ours']:.2f}"
    if row["peer"] != "ours":
        ratio += f" ({row['times_ours_p20']:.2f} to {row['times_ours_p80']:.2f})"
    memory = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.1f}"
    return [
        row["peer"],
        f"{1e3 * row['seconds']:,.3f}",
        ratio,
        memory,
        str(row["syncs"]),
        f"{row['flops'] / 1e9:,.2f}" if row["flops"] else "-",
    ]


def show(content: Row, workload: str) -> None:
    title = f"{workload}; {content['device']}, {content['threads']} threads"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in content["rows"]:
        if row["workload"] == workload:
            table.add_row(*_cells(row))
    Console(width=max(100, Console().width)).print(table)


def headline(content: Row) -> Row:
    peers = [row for row in content["rows"] if row["peer"] != "ours"]
    best: dict[str, float] = {}
    for row in peers:
        name = row["workload"]
        best[name] = min(best.get(name, float("inf")), row["times_ours"])
    return {
        "workloads": len(best),
        "best_peer_times_ours": best,
        "peers_faster_than_ours": sum(row["times_ours"] < 1 for row in peers),
        "missing": len(content["missing"]),
        "left_out": len(content["left_out"]),
    }


def text(content: Row) -> str:
    """Markdown for docs/results.md."""
    lines = [f"| task | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    task = ""
    for row in content["rows"]:
        lines.append(
            f"| {row['workload'] if row['workload'] != task else ''} | "
            + " | ".join(_cells(row))
            + " |"
        )
        task = row["workload"]
    faster = [r for r in content["rows"] if r["peer"] != "ours" and r["times_ours"] < 1]
    threads = content["threads"]
    said = [
        f"On {content['device']}, {threads} thread{'s' if threads > 1 else ''}, in one process: "
        "results checked first (the same scores, rows or law of draws), then timed in turns; "
        "medians, and quantiles of the ratios of neighbouring turns. Extra memory is the peak "
        "beyond the inputs. Host waits are operators for which a GPU's host would have to wait; on "
        "the CPU, where nothing waits, ours reads flags and scalars by a path of its own. GFLOP "
        "counts products alone.",
    ]
    if faster:
        named = "; ".join(
            f"{r['peer']} for {r['workload']} ({r['times_ours']:.2f})" for r in faster
        )
        said.append(f"Faster than activesel: {named}.")
    if content["missing"]:
        said.append(f"**Unfinished: {', '.join(content['missing'])}.**")
    said += [f"{line}." for line in content["left_out"]]
    return "\n".join([*lines, "", " ".join(said)])
