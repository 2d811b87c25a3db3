# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs: what a method gains, against everything it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = Mapping[str, Any]
"""What `run.json` holds; only accuracy, base rate, curve and reference are read."""

# Okabe and Ito's palette, told apart by colour-blind readers too; black is for uniform.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "activesel",  # the same runs give the same file
}


def curves(
    groups: Mapping[str, Sequence[Run]],
    path: Path,
    target: float | None = None,
) -> list[Path]:
    """Draw accuracy against updates, FLOPs and seconds, and the share of wrong labels kept.

    The last point of a curve is measured on all test images, the others on a part of them: it is
    drawn apart.

    Args:
        groups: runs that differ only in their seeds, by label; lines are means, bands the range.
        path: where to, without suffix; `.svg` and `.png` are written.
        target: uniform's accuracy with its full budget, drawn as a level.

    Returns:
        The files.
    """
    if not groups or not all(groups.values()):
        raise ValueError(f"groups must hold at least one run each, got {dict(groups)}")
    with _style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
        _curves(groups, axes.ravel(), target)
        return _write(figure, path)


def _curves(groups: Mapping[str, Sequence[Run]], panels: Any, target: float | None) -> None:
    for number, (label, runs) in enumerate(groups.items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        accuracy = 100 * _columns(runs, "accuracy")
        spent = [entry["seconds"] if (entry := run.get("reference")) else 0.0 for run in runs]
        seconds = _columns(runs, "seconds") + np.array(spent)[:, None]
        for panel, x in zip(
            panels,
            (_columns(runs, "update"), _columns(runs, "flops_total") / 1e12, seconds),
            strict=False,
        ):
            _band(panel, x.mean(axis=0)[:-1], accuracy[:, :-1], label, look)
            _final(panel, x.mean(axis=0)[-1], accuracy[:, -1], look)
        kept = np.diff(_columns(runs, "kept"), prepend=0)
        wrong = np.diff(_columns(runs, "kept_mislabelled"), prepend=0)
        _band(panels[3], _columns(runs, "update").mean(axis=0), 100 * wrong / kept, label, look)
    names = ("updates of the learner", "TFLOP, everything counted", "seconds, reference included")
    top = max(run["accuracy"] for runs in groups.values() for run in runs)
    for panel, name in zip(panels, names, strict=False):
        panel.set(xlabel=name, ylabel="test accuracy, %", ylim=(100 * top - 14, 100 * top + 1))
        if target is not None:
            panel.axhline(100 * target, color=COLOURS[0], linestyle=":", linewidth=1)
    if target is not None:
        panels[0].text(
            0.02, 100 * target + 0.15, "uniform, full budget", size=9, transform=_left(panels[0])
        )
    base = np.mean([run["base_rate"] for runs in groups.values() for run in runs])
    panels[3].axhline(100 * base, color="#777777", linestyle="--", linewidth=1)
    panels[3].text(
        0.98, 97 * base, "base rate", size=9, ha="right", va="top", transform=_left(panels[3])
    )
    panels[3].set(xlabel=names[0], ylabel="wrong labels among rows kept, %")
    panels[3].set_ylim(bottom=0)
    for panel in panels:
        panel.set_xlim(left=0)
    panels[0].plot([], [], "*", color="#777777", markersize=11, label="end, all test images")
    panels[0].legend(loc="lower right")


def budgets(
    grid: Mapping[str, Mapping[int, Sequence[float]]],
    methods: Mapping[str, Sequence[float]],
    percent: int,
    path: Path,
) -> list[Path]:
    """Draw accuracy against budget, and all methods at one budget.

    Args:
        grid: accuracies in [0, 1], one per seed, by method and percent of uniform's updates;
            the first method is uniform, and its last budget the level to reach.
        methods: accuracies, one per seed, by method, at `percent`.
        percent: budget of `methods`.
        path: where to, without suffix; `.svg` and `.png` are written.

    Returns:
        The files.
    """
    with _style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
        target = _grid(left, grid)
        _dots(right, methods, percent, target)
        return _write(figure, path)


def _grid(left: Any, grid: Mapping[str, Mapping[int, Sequence[float]]]) -> float:
    uniform = next(iter(grid.values()))
    target = 100 * float(np.mean(uniform[max(uniform)]))
    for number, (label, by_budget) in enumerate(grid.items()):
        shift = 0.5 * (number - (len(grid) - 1) / 2)  # else error bars hide each other
        x = sorted(by_budget)
        values = [100 * np.asarray(by_budget[p]) for p in x]
        means = np.array([v.mean() for v in values])
        left.errorbar(
            [p + shift for p in x],
            means,
            yerr=[
                means - [v.min() for v in values],
                np.array([v.max() for v in values]) - means,
            ],
            label=label,
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=5,
            capsize=3,
        )
    left.axhline(target, color=COLOURS[0], linestyle=":", linewidth=1)
    left.set(
        xlabel="updates, % of uniform's; each run decayed to zero",
        ylabel="test accuracy, % (mean and range of seeds)",
    )
    left.legend()
    return target


def _dots(right: Any, methods: Mapping[str, Sequence[float]], percent: int, target: float) -> None:
    for row, accuracies in enumerate(methods.values()):
        values = 100 * np.asarray(accuracies)
        right.plot(values, [row] * len(values), "o", color=COLOURS[6], markersize=5)
        right.plot(values.mean(), row, "|", color=COLOURS[1], markersize=16, markeredgewidth=2.5)
    right.axvline(target, color=COLOURS[0], linestyle=":", linewidth=1)
    right.text(target, -0.7, "uniform, 100 % of updates ", size=9, ha="right")
    right.set_yticks(range(len(methods)), list(methods))
    right.set_ylim(len(methods) - 0.5, -1.3)
    right.set_xlabel(f"test accuracy at {percent} % of uniform's updates, % (dots: seeds)")


def _columns(runs: Sequence[Run], name: str) -> NDArray[np.float64]:  # [runs, points]
    return np.array([[point[name] for point in run["curve"]] for run in runs], dtype=np.float64)


def _band(
    panel: Any,
    x: NDArray[np.float64],  # [points]
    y: NDArray[np.float64],  # [runs, points]
    label: str,
    look: dict[str, str],
) -> None:
    panel.plot(x, y.mean(axis=0), label=label, linewidth=1.6, markersize=4, **look)
    panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=look["color"], alpha=0.18, lw=0)


def _final(panel: Any, x: float, y: NDArray[np.float64], look: dict[str, str]) -> None:
    spread = np.array([[y.mean() - y.min()], [y.max() - y.mean()]])
    panel.errorbar(
        x, y.mean(), yerr=spread, color=look["color"], marker="*", markersize=11, capsize=3
    )


def _left(panel: Any) -> Any:
    """Coordinates with x a share of the panel's width and y in data."""
    return panel.get_yaxis_transform()


@contextmanager
def _style() -> Iterator[Any]:
    """matplotlib, imported only when something is drawn, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        yield plt
    plt.close("all")


def _write(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=130)
    return files
