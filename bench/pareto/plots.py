# SPDX-License-Identifier: Apache-2.0
"""The frontier's pictures, narrow enough for a phone; what was measured and what was published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activesel.loop.plots import COLOURS, MARKERS, save, style
from bench.common import Row

GREY = "#777777"
BLACK: Row = {"color": COLOURS[0], "marker": MARKERS[0]}
ACROSS = {
    "rho": "rho: rows drawn per row kept",
    "f_ratio": "F-ratio: forward FLOPs, scorer / learner",
    "scorer_flops": "scorer, forward FLOPs per row",
    "learner_flops": "learner, forward FLOPs per row",
    "flops_total": "TFLOP, everything counted",
    "system_seconds": "seconds of one reference system, everything counted",
}
BREAK_EVEN = (("beta_max_shared", "-"), ("beta_max", "--"))


def label(row: Row, x: str = "") -> str:
    """Readable name of a series; with rho unless that is drawn across."""
    plain = row["method"] == "uniform" or x == "rho"
    return str(row["label"]) if plain else f"{row['label']}, rho {row['rho']:g}"


def looks(rows: Sequence[Row], x: str = "") -> dict[str, Row]:
    """Colour and marker by series; black circles are uniform's."""
    order = sorted(rows, key=lambda row: (row["label"], row["rho"]))
    names = dict.fromkeys(label(row, x) for row in order if row["method"] != "uniform")
    pairs = list(zip(COLOURS[1:], MARKERS[1:], strict=True))
    return {
        name: {"color": pairs[i % 6][0], "marker": pairs[i % 6][1]} for i, name in enumerate(names)
    }


def tightest(rows: Sequence[Row]) -> list[Row]:
    """Of runs that differ in their budget alone, the one that says most about beta.

    That is one with a value, else the smallest bound from above, else the largest from below.
    """

    def rank(row: Row) -> tuple[int, float]:
        b = row["beta"]
        kind = 0 if b["value"] is not None else 1 if b["text"][0] == "<" else 2
        return kind, b["least"] if kind == 1 else -b["most"]

    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(n) for n in ("method", "learner", "scorer", "rho", "where"))
        if key not in best or rank(row) < rank(best[key]):
            best[key] = row
    return list(best.values())


def inverse(entry: Row) -> Row:
    """1 - a share, with what is known of it."""
    other = {"value": "value", "low": "high", "high": "low", "least": "most", "most": "least"}
    ends = {n: None if entry[o] is None else 1 - entry[o] for n, o in other.items()}
    return {**ends, "text": entry["text"].translate(str.maketrans("<>", "><"))}


def drawn(entry: Row) -> tuple[float, float, float, str]:
    """Where to draw a share: value, both ends, and "<" or ">" if the value is a mere bound."""
    side = entry["text"][0] if entry["value"] is None else ""
    value = {"": entry["value"], "<": entry["least"], ">": entry["most"]}[side]
    known = "(" in entry["text"]  # several seeds: an end that is null lies beyond what is known
    low, high = (
        entry[end] if entry[end] is not None else entry[bound] if known else value
        for end, bound in (("low", "least"), ("high", "most"))
    )
    return value, min(low, value), max(high, value), side


def draw(panel: Any, x: float, entry: Row, look: Row, name: str = "") -> None:
    """A share in percent with its interval; an arrow where only a bound is known."""
    value, low, high, side = drawn(entry)
    _errorbar(panel, x, value, low, high, look)
    if side:
        arrow = {"arrowstyle": "<|-", "color": look["color"], "lw": 1.6, "shrinkB": 0}
        ahead = (0, 20 if side == ">" else -20)
        panel.annotate("", (x, 100 * value), ahead, textcoords="offset points", arrowprops=arrow)
    _name(panel, x, value, name)


def _errorbar(panel: Any, x: float, y: float, low: float, high: float, look: Row) -> None:
    spread = [[100 * (y - low)], [100 * (high - y)]]
    panel.errorbar(x, 100 * y, yerr=spread, capsize=2.5, markersize=6, lw=1.2, ls="none", **look)


def _name(panel: Any, x: float, y: float, name: str, below: bool = False) -> None:
    at = (5, -10) if below else (5, 4)
    panel.annotate(name, (x, 100 * y), at, textcoords="offset points", size=8)


def _page(plt: Any, panels: int, title: str, height: float = 3.1, **settings: Any) -> Any:
    figure, axes = plt.subplots(
        panels, 1, figsize=(5, 1.5 + height * panels), layout="constrained", squeeze=False,
        **settings,
    )  # fmt: skip
    figure.suptitle(title, size=10, x=0.02, ha="left")
    return figure, axes[:, 0]


def _keys(figure: Any, look: dict[str, Row], lines: dict[str, Row], columns: int = 2) -> None:
    """One legend for all panels: series as markers, then lines."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ls="none", label=name, **mine) for name, mine in look.items()]
    handles += [Line2D([], [], **{"color": GREY, "label": n, **line}) for n, line in lines.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=columns)


UNIFORM = {"uniform": {"color": COLOURS[0], "lw": 1.2}}


def _across(panel: Any, rows: Sequence[Row], x: str) -> bool:
    """Log scale with a tick for each size or ratio; False if points need names of their own."""
    panel.set(xscale="log", xlabel=ACROSS[x])
    values = [row[x] for row in rows]
    panel.set_xlim(min(values) / 1.7, max(values) * 1.7)
    who = "learner" if x == "learner_flops" else "scorer"
    if x == "f_ratio" and len({row["learner"] for row in rows}) > 1:
        return False
    unit = 1 if x in ("rho", "f_ratio") else 1e6 if max(values) < 1e9 else 1e9
    names = {
        row[x]: f"{row[x]:g}" if x == "rho" else f"{row[who]}\n{row[x] / unit:.3g}" for row in rows
    }
    if unit > 1:
        prefix = {1e6: "MFLOP", 1e9: "GFLOP"}[unit]
        panel.set_xlabel(ACROSS[x].replace("FLOPs", prefix))
    panel.set_xticks(list(names), list(names.values()), size=8)
    panel.set_xticks([], minor=True)
    return True


def break_even(rows: Sequence[Row], x: Any) -> tuple[Any, Any]:
    """1 - beta_max at F-ratios x, the reference shared or for one run, from what rows are charged.

    1 / beta_max = 1 + a * x, the reference shared; its training takes c * x of uniform's FLOPs.
    """
    r, shared, paid = (
        np.array([row[name] for row in rows]) for name in ("f_ratio", "beta_max_shared", "beta_max")
    )
    a, c = np.median((1 / shared - 1) / r), np.median((1 - paid / shared) / r)
    return 1 - 1 / (1 + a * x), 1 - (1 - c * x) / (1 + a * x)


def speedups(
    panels: dict[str, list[Row]], path: Path, title: str, x: str = "f_ratio"
) -> list[Path]:
    """Learner speedup against the F-ratio (or rho), and from where on training is cheaper.

    Args:
        panels: points by panel title.
        path: where to, without suffix; `.svg` and `.png` are written.
        title: of the picture.
        x: the column across.
    """
    every = [row for rows in panels.values() for row in rows]
    look = looks(every, x)
    with style() as plt:
        figure, axes = _page(plt, len(panels), title, sharey=True)
        for panel, (name, rows) in zip(axes, panels.items(), strict=True):
            named = _across(panel, every, x)
            panel.axhline(0, **UNIFORM["uniform"])
            series = dict.fromkeys(label(row, x) for row in rows)
            for number, s in enumerate(series):
                mine = [row for row in tightest(rows) if label(row, x) == s]
                shift = 1.05 ** (number - (len(series) - 1) / 2)
                if x == "f_ratio":
                    start, stop = panel.get_xlim()
                    at = np.geomspace(start, stop, 200)
                    for line, (_, dashes) in zip(break_even(mine, at), BREAK_EVEN, strict=True):
                        panel.plot(at, 100 * line, dashes, color=look[s]["color"], lw=1.2)
                for row in mine:
                    at = row[x] * shift
                    pair = "" if named else f"{row['scorer']} to {row['learner']}"
                    known = pair in [t.get_text() for t in panel.texts]
                    draw(panel, at, row["learner_speedup"], look[s], "" if known else pair)
                    for column, dashes in BREAK_EVEN if x == "rho" else ():
                        ends, level = [at / 1.06, at * 1.06], [100 * (1 - row[column])] * 2
                        panel.plot(ends, level, dashes, color=look[s]["color"], lw=1.6)
            panel.set_title(name, size=10)
            panel.set_ylabel("learner speedup, 1 - beta, %")
            panel.margins(y=0.12)
        axes[0].set_ylim(top=min(100, axes[0].get_ylim()[1]))  # once all is drawn: of every panel
        shared, one = ({"ls": dashes} for _, dashes in BREAK_EVEN)
        lines = {"break-even, reference shared": shared, "break-even, reference for one run": one}
        _keys(figure, look, {**UNIFORM, **lines})
        return save(figure, path)


def totals(rows: Sequence[Row], path: Path, title: str, x: str = "scorer_flops") -> list[Path]:
    """FLOPs to uniform's metric, every cost charged, against the scorer's size (or rho)."""
    rows, look, corners = tightest(rows), looks(rows, x), []
    with style() as plt:
        figure, (panel,) = _page(plt, 1, title, 3.4)
        _across(panel, rows, x)
        panel.axhline(100, **UNIFORM["uniform"])
        for number, (s, mine) in enumerate(look.items()):
            for row in (row for row in rows if label(row, x) == s):
                entry = inverse(row["compute_speedup"])
                draw(panel, row[x] * 1.05 ** (number - (len(look) - 1) / 2), entry, mine)
                value, _, _, side = drawn(entry)
                if side != ">":  # at most so much
                    corners.append((row[x], 100 * value))
        front = hull(corners)
        thick = {"lw": 5, "alpha": 0.4}
        if len(front) > 1:
            panel.plot(*zip(*front, strict=True), color=GREY, zorder=1, **thick)
        panel.set_ylabel("FLOPs to uniform's metric, all charged, %")
        panel.margins(y=0.15)
        _keys(figure, look, {**UNIFORM, **({"hull": thick} if len(front) > 1 else {})})
        return save(figure, path)


def hull(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull, x on a log scale: no point lies below it.

    >>> hull([(1, 5), (10, 1), (100, 4), (10, 3), (1000, 2)])
    [(1, 5), (10, 1), (1000, 2)]
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(corners):
        if found and found[-1][0] == x:
            continue
        while len(found) > 1:
            (x0, y0), (x1, y1) = found[-2:]
            if (y1 - y0) * np.log(x / x0) < (y - y0) * np.log(x1 / x0):
                break
            found.pop()
        found.append((x, y))
    return found


def _metric(row: Row) -> tuple[float, float, float]:
    m = row["metric"]
    low, high = (m["mean"] if m[end] is None else m[end] for end in ("low", "high"))
    return m["mean"], low, high


def metrics(rows: Sequence[Row], path: Path, title: str, metric: str) -> list[Path]:
    """What runs reached against all they spent, FLOPs and, with a clock, reference-system seconds.

    Every run is decayed over its own budget.
    """
    known = all(row["system_seconds"] is not None for row in rows)
    spent = ("flops_total", "system_seconds") if known else ("flops_total",)
    look = {"uniform": BLACK, **looks(rows)}
    level = next(r for r in rows if r["method"] == "uniform" and r["percent"] == 100)
    with style() as plt:
        figure, axes = _page(plt, len(spent), title, 3.6, sharey=True)
        for panel, column in zip(axes, spent, strict=True):
            for s, mine in look.items():
                series = sorted((r for r in rows if label(r) == s), key=lambda r: r[column])
                scorers = len({r["scorer"] for r in series}) > 1  # else budgets along the line
                x = [r[column] * (1e-12 if column == "flops_total" else 1) for r in series]
                y = [100 * r["metric"]["mean"] for r in series]
                panel.plot(x, y, color=mine["color"], lw=1.2, alpha=0.4 if scorers else 1)
                for at, row in zip(x, series, strict=True):
                    _errorbar(panel, at, *_metric(row), mine)
                    end = row in (series[0], series[-1])
                    name = row["scorer"] if scorers else f"{row['percent']} %"
                    name = name if end or not scorers else ""
                    _name(panel, at, row["metric"]["mean"], name, below=s == "uniform")
            panel.axhline(100 * level["metric"]["mean"], color=COLOURS[0], ls=":", lw=1)
            panel.set(xlabel=ACROSS[column], ylabel=metric, xscale="log")
            panel.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 3, 4, 6, 8)))
            panel.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
            panel.set_xticks([], minor=True)
        _keys(figure, look, {"uniform, full budget": {"color": COLOURS[0], "ls": ":"}})
        return save(figure, path)


def learners(rows: Sequence[Row], path: Path, title: str, metric: str) -> list[Path]:
    """What is reached, and beta, over learner sizes; beta alone where no metric is known."""
    look, measured = looks(rows), "metric" in rows[0]
    with style() as plt:
        figure, axes = _page(plt, 1 + measured, title, sharex=True)
        last = axes[-1]
        budgets = dict.fromkeys((label(r), r["percent"]) for r in rows) if measured else {}
        for name, percent in sorted(budgets, key=lambda b: (b[0] != "uniform", -b[1])):
            mine = look.get(name, BLACK if percent == 100 else {"color": GREY, "marker": "P"})
            those = [r for r in rows if (label(r), r["percent"]) == (name, percent)]
            those.sort(key=lambda row: row["learner_flops"])
            x = [row["learner_flops"] for row in those]
            mean, low, high = 100 * np.array([_metric(row) for row in those]).T
            axes[0].plot(x, mean, label=f"{name}, {percent} % of updates", markersize=5, **mine)
            axes[0].fill_between(x, low, high, color=mine["color"], alpha=0.15, lw=0)
        if measured:
            axes[0].set_ylabel(metric)
            axes[0].legend(fontsize=8)
        last.axhline(100, **UNIFORM["uniform"])
        for row in (row for row in rows if row["method"] != "uniform"):
            draw(last, row["learner_flops"], row["beta"], look[label(row)])
        _across(last, rows, "learner_flops")
        last.set_ylabel("beta: updates, % of uniform's")
        _keys(figure, look, UNIFORM)
        return save(figure, path)


def costs(rows: Sequence[Row], path: Path, title: str) -> list[Path]:
    """FLOPs to uniform's metric by three ways of charging, a row each."""
    ways = {
        "compute_speedup_published": "as published",
        "compute_speedup_shared": "online training charged, reference shared",
        "compute_speedup": "everything charged, reference for one run",
    }
    with style() as plt:
        figure, (panel,) = _page(plt, 1, title, 0.3 * len(rows))
        look = {}
        for number, (way, name) in enumerate(ways.items()):
            x = [100 * drawn(inverse(row[way]))[0] for row in rows]
            look[name] = {"color": COLOURS[1 + number], "marker": MARKERS[1 + number]}
            y = np.arange(len(rows)) + 0.18 * (number - 1)
            panel.plot(x, y, ls="none", markersize=5, **look[name])
        panel.axvline(100, **UNIFORM["uniform"])
        names = [f"{label(row)}: {row['scorer']} to {row['learner']}" for row in rows]
        panel.set_yticks(range(len(rows)), names, size=8)
        panel.invert_yaxis()
        panel.set(xlabel="FLOPs to uniform's final metric, %", xscale="log")
        ticks = [10, 20, 50, 100, 200]
        panel.set_xticks(ticks, map(str, ticks))
        panel.set_xticks([], minor=True)
        _keys(figure, look, UNIFORM, columns=1)
        return save(figure, path)
