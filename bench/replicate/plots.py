# SPDX-License-Identifier: Apache-2.0
"""Pictures of the papers' numbers measured here; bars and bands are 95 % t-intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activesel.loop.plots import COLOURS, MARKERS, save, style
from bench.common import Row

GREY = "#777777"


def _error(entry: Mapping[str, Any]) -> list[list[float]] | None:
    """Asymmetric bar in % of a spread; None without an interval."""
    if entry["low"] is None:
        return None
    mean = entry["mean"]
    return [[100 * (mean - entry["low"])], [100 * (entry["high"] - mean)]]


def _dots(panel: Any, rows: Sequence[Row], name: str = "accuracy") -> None:
    """A line per row, uniform black: seeds as dots, mean and interval."""
    for place, row in enumerate(rows):
        colour = COLOURS[0] if row["method"] == "uniform" else COLOURS[1]
        seeds = [100 * value for value in row[name]["by_seed"]]
        panel.plot(seeds, [place] * len(seeds), "o", color=COLOURS[6], markersize=4, zorder=1)
        panel.errorbar(
            100 * row[name]["mean"], place, xerr=_error(row[name]), color=colour, marker="|",
            markersize=13, markeredgewidth=2, capsize=3, zorder=2,
        )  # fmt: skip
    panel.set_yticks(range(len(rows)), [str(row["label"]) for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)


def _levels(panel: Any, content: Row, vertical: bool = False) -> None:
    """Uniform's mean with as many updates and with its full budget."""
    wanted = {content["percent"] / 100: ":", 1.0: "--"}
    for row in content["rows"]:
        near = [s for s in wanted if abs(row["share_of_updates"] - s) < 0.005]
        if row["method"] == "uniform" and near:
            level, line = 100 * row["accuracy"]["mean"], wanted[near[0]]
            draw = panel.axvline if vertical else panel.axhline
            label = f"uniform, {100 * near[0]:.0f} % of updates"
            draw(level, color=COLOURS[0], linestyle=line, linewidth=1.2, label=label)


def ablation(content: Row, path: Path) -> list[Path]:
    """Accuracy by method, and speedups measured here beside the published ones."""
    ours = [row for row in content["rows"] if row["method"] != "uniform"]
    fixed = [row for row in content["rows"] if row["method"] == "uniform"]
    with style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
        _dots(left, [*fixed, *ours])
        _levels(left, content, vertical=True)
        left.set_xlabel(f"test accuracy, % (methods: {content['percent']} % of updates)")
        for number, what in enumerate(("learner", "compute")):
            look = {"color": COLOURS[1 + number], "marker": MARKERS[number], "linestyle": ""}
            for place, row in enumerate(ours):
                y, label = place + 0.3 * number - 0.15, None if place else f"{what}, measured here"
                published = 100 * row[f"published_{what}_speedup"]
                theirs = None if place else f"{what}, published (ViT-Ti for ViT-B, JFT)"
                right.plot(published, y, **look, markerfacecolor="white", label=theirs, zorder=1)
                if (found := row.get(f"{what}_speedup")) is not None:
                    ends = [100 * x for x in found["clamped"]]
                    beyond = "" if found["value"] is not None else found["text"].split()[0]
                    right.plot(ends[1:], [y] * len(ends[1:]), "-", color=look["color"])
                    right.plot(ends[0], y, **look, label=label, zorder=2)
                    if beyond:
                        right.annotate(
                            f"{beyond} ", (ends[0], y), xytext=(0, 5), textcoords="offset points",
                            color=look["color"], ha="center", size=9,
                        )  # fmt: skip
        right.axvline(0, color=GREY, linewidth=1)
        right.set_yticks(range(len(ours)), [str(row["label"]) for row in ours])
        right.set_ylim(len(ours) - 0.5, -0.5)
        right.set_xlabel("speedup over uniform, % (compute: everything charged)")
        figure.legend(
            *map(list.__add__, left.get_legend_handles_labels(), right.get_legend_handles_labels()),
            loc="outside upper center", ncols=3, fontsize=9,
        )  # fmt: skip
        return save(figure, path)


def scaling(content: Row, path: Path) -> list[Path]:
    """Accuracy and wrong labels kept against F-ratio, learnability and easy-reference."""
    names = {"classact": "learnability", "easy": "easy-reference"}
    with style() as plt:
        from matplotlib.ticker import LogLocator

        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
        for number, (method, label) in enumerate(names.items(), start=1):
            rows = [row for row in content["rows"] if row["method"] == method]
            rows.sort(key=lambda row: row["f_ratio"])
            look = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5}
            x = [row["f_ratio"] for row in rows]
            for panel, name in ((left, "accuracy"), (right, "wrong_kept")):
                panel.plot(x, [100 * row[name]["mean"] for row in rows], **look, label=label)
                low, high = (
                    [100 * (row[name][end] if row[name][end] is not None else row[name]["mean"])
                     for row in rows] for end in ("low", "high")
                )  # fmt: skip
                panel.fill_between(x, low, high, color=COLOURS[number], alpha=0.18, lw=0)
            for row in rows if number == 1 else ():
                right.text(
                    row["f_ratio"], 0.86, row["scorer"], size=8, color=GREY, ha="center",
                    transform=right.get_xaxis_transform(),
                )  # fmt: skip
        _levels(left, content)
        base = np.mean([row["base_rate"] for row in content["rows"]])
        right.axhline(100 * base, color=COLOURS[0], linestyle="--", linewidth=1.2)
        left.set_ylabel("test accuracy, %")
        right.set_ylabel("wrong labels among rows kept, %")
        right.set_ylim(bottom=0)
        for panel in (left, right):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
            panel.margins(x=0.08)
            panel.set_xlabel("F-ratio: FLOPs of scorer / learner, a forward pass")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return save(figure, path)


def ratios(content: Row, path: Path) -> list[Path]:
    """R@10 by filter ratio, the usual one with fewer updates too, and FLOPs per iteration."""
    rows = [row for row in content["rows"] if row["method"] == "jest"]
    full = [row for row in rows if row["updates"] == content["updates"]]
    uniform = next((row for row in content["rows"] if row["method"] == "uniform"), None)
    with style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
        shown = [
            {**row, "label": f"{row['label']}, {100 * row['updates'] / content['updates']:.0f} %"}
            for row in ([uniform] if uniform else []) + rows
        ]
        _dots(left, shown, "r10")
        if uniform:
            left.axvline(100 * uniform["r10"]["mean"], color=COLOURS[0], linestyle="--")
            right.axhline(100, color=COLOURS[0], linestyle="--", label="uniform")
        left.set_xlabel("R@10, %, mean of both directions (labels: % of updates)")
        kinds = (
            ("_published", "published convention", COLOURS[5]),
            ("", "counted here", COLOURS[1]),
            ("_cached", "counted here, reference cached", COLOURS[6]),
        )
        for number, (suffix, label, colour) in enumerate(kinds):
            heights = [row[f"flops_per_iteration{suffix}"] for row in full]
            if None in heights:
                continue
            places = np.arange(len(full)) + 0.27 * (number - 1)
            bars = right.bar(places, [100 * h for h in heights], 0.25, color=colour, label=label)
            right.bar_label(bars, fmt="%.0f", size=8)
        right.set_xticks(range(len(full)), [f"{100 - 100 / r['rho']:.0f} %" for r in full])
        right.set(xlabel="rows dropped of each super-batch", ylabel="FLOPs per iteration, %")
        right.set_axisbelow(True)
        right.grid(axis="x", visible=False)
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return save(figure, path)


def online(content: Row, path: Path) -> list[Path]:
    """Accuracy of every variant by name, and against its total FLOPs by number."""
    rows = [row for row in content["rows"] if row["method"] != "uniform"]
    grid = [row for row in content["rows"] if row["method"] == "uniform"]
    ranked = sorted(rows, key=lambda row: -row["accuracy"]["mean"])
    with style() as plt:
        size = (10.5, 2.6 + 0.28 * len(rows))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
        numbered = [{**row, "label": f"{row['label']}  {n}"} for n, row in enumerate(ranked, 1)]
        _dots(left, numbered)
        _levels(left, content, vertical=True)
        left.set_xlabel(f"test accuracy, % ({content['percent']} % of updates)")
        grid.sort(key=lambda row: row["flops"]["total"])
        x = [row["flops"]["total"] / 1e12 for row in grid]
        right.plot(
            x, [100 * row["accuracy"]["mean"] for row in grid], color=COLOURS[0],
            marker=MARKERS[0], markersize=4, label="uniform, its budgets",
        )  # fmt: skip
        ends = [[100 * (row["accuracy"][e] or row["accuracy"]["mean"]) for row in grid]
                for e in ("low", "high")]  # fmt: skip
        right.fill_between(x, *ends, color=COLOURS[0], alpha=0.12, lw=0)
        for n, row in enumerate(ranked, 1):
            flops, accuracy = row["flops"]["total"] / 1e12, 100 * row["accuracy"]["mean"]
            right.errorbar(
                flops, accuracy, yerr=_error(row["accuracy"]), color=COLOURS[1], alpha=0.45,
                linewidth=1, capsize=2,
            )  # fmt: skip
            right.plot(flops, accuracy, "o", color=COLOURS[1], markersize=4, zorder=4)
            near = [
                r for r in ranked[: n - 1] if abs(r["flops"]["total"] / 1e12 / flops - 1) < 0.05
            ]
            right.annotate(
                str(n), (flops, accuracy), xytext=((10, -10, 22, -22)[len(near) % 4], 0), size=9,
                textcoords="offset points", ha="center", va="center", color=COLOURS[1], zorder=5,
            )  # fmt: skip
        right.margins(x=0.1)
        right.set(xlabel="TFLOP in all, everything charged", ylabel="test accuracy, %")
        figure.legend(
            *map(list.__add__, left.get_legend_handles_labels(), right.get_legend_handles_labels()),
            loc="outside upper center", ncols=3, fontsize=9,
        )  # fmt: skip
        return save(figure, path)
