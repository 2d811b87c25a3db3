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
"""What `run.json` holds; only what is drawn is read."""

# Okabe and Ito's palette, told apart by colour-blind readers too; black is for uniform.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
TIERS = {"clean": "#0072B2", "noisy": "#E69F00", "logo": "#CC79A7"}
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
    with style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
        _curves(groups, axes.ravel(), target)
        return save(figure, path)


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
            band(panel, x.mean(axis=0)[:-1], accuracy[:, :-1], label, look)
            final(panel, x.mean(axis=0)[-1], accuracy[:, -1], look)
        kept = np.diff(_columns(runs, "kept"), prepend=0)
        wrong = np.diff(_columns(runs, "kept_mislabelled"), prepend=0)
        band(panels[3], _columns(runs, "update").mean(axis=0), 100 * wrong / kept, label, look)
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
    with style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
        target = _grid(left, grid)
        _dots(right, methods, percent, target)
        return save(figure, path)


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


def methods(
    cells: Mapping[str, Mapping[str, Any]],
    pool: Mapping[str, float],
    path: Path,
) -> list[Path]:
    """Draw the recall of every method, and the tiers of the rows it kept.

    Args:
        cells: by method, "r10" (by_seed, low, high), "uniform_r10", the level to reach, or None,
            and "kept" (mean, by tier), all in [0, 1].
        pool: share of each tier in the pool.
        path: where to, without suffix; `.svg` and `.png` are written.

    Returns:
        The files.
    """
    with style() as plt:
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11.5, 1.3 + 0.32 * len(cells)), layout="constrained", sharey=True
        )
        labels = list(cells)
        recalls = [entry["r10"] for entry in cells.values()]
        seeds = [100 * np.array(recall["by_seed"]) for recall in recalls]
        for row, (recall, values) in enumerate(zip(recalls, seeds, strict=True)):
            if recall["low"] is not None:
                ends = [100 * recall["low"], 100 * recall["high"]]
                left.plot(ends, [row, row], color="#999999", linewidth=1.6)
            look = {"color": COLOURS[6], "markersize": 5, "markeredgecolor": "#333333"}
            left.plot(values, [row] * len(values), "o", **look)
            left.plot(values.mean(), row, "|", color=COLOURS[1], markersize=16, markeredgewidth=2.5)
            if (level := cells[labels[row]]["uniform_r10"]) is not None:
                left.plot([100 * level] * 2, [row - 0.5, row + 0.5], ":", color=COLOURS[0], lw=1)
        left.set_yticks(range(len(cells)), labels)
        left.set_ylim(len(cells) - 0.4, -0.6)
        left.set_xlim(left=max(0.0, left.get_xlim()[0]))
        left.set_xlabel("R@10, % (dots: seeds; grey: 95 % interval; dotted: uniform)")
        _stack(right, [entry["kept"] for entry in cells.values()])
        for edge in (pool["clean"], pool["clean"] + pool["noisy"]):
            right.axvline(100 * edge, color=COLOURS[0], linestyle="--", linewidth=1)
        right.set(xlim=(0, 100), xlabel="rows kept, % (dashed: the pool)")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        return save(figure, path)


def _stack(panel: Any, kept: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    panel.grid(visible=False)
    for row, shares in enumerate(kept):
        start = 0.0
        for tier, colour in TIERS.items():
            share = 100 * shares[tier]["mean"]
            panel.barh(row, share, left=start, color=colour, label=None if row else tier)
            if share > 5:
                ink = "white" if tier == "clean" else "black"
                panel.text(start + 1.5, row, f"{share:.0f}", color=ink, va="center", size=8)
            start += share


def tiers(
    groups: Mapping[str, Sequence[Run]],
    pool: Mapping[str, float],
    path: Path,
) -> list[Path]:
    """Draw which tiers were kept as training went on, a panel per method.

    Args:
        groups: runs that differ only in their seeds, by label; lines are means, bands the range.
        pool: share of each tier in the pool, drawn dashed.
        path: where to, without suffix; `.svg` and `.png` are written.

    Returns:
        The files.
    """
    width = min(4, len(groups))
    height = -(-len(groups) // width)
    with style() as plt:
        figure, axes = plt.subplots(
            height, width, figsize=(2.9 * width, 0.5 + 2.1 * height), layout="constrained",
            sharex=True, sharey=True, squeeze=False,
        )  # fmt: skip
        for panel, (label, runs) in zip(axes.flat, groups.items(), strict=False):
            kept = {tier: np.diff(_columns(runs, f"kept_{tier}"), prepend=0) for tier in TIERS}
            whole = sum(kept.values())
            ends = _columns(runs, "update").mean(axis=0)
            middles = ends - np.diff(ends, prepend=0) / 2
            for (tier, counts), marker in zip(kept.items(), MARKERS, strict=False):
                look = {"color": TIERS[tier], "marker": marker}
                band(panel, middles, 100 * counts / whole, tier, look)
                panel.axhline(100 * pool[tier], color=TIERS[tier], linestyle="--", linewidth=1)
            panel.set_title(label, size=10)
            panel.set(ylim=(0, 100), xlim=(0, None))
        for panel in axes.flat[len(groups) :]:
            panel.set_axis_off()
        figure.supxlabel("updates", size=10)
        figure.supylabel("rows kept, % (dashed: the pool)", size=10)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
        return save(figure, path)


def recall_curves(
    groups: Mapping[str, Sequence[Sequence[Run]]],
    path: Path,
    target: float,
) -> list[Path]:
    """Draw R@10 against updates and FLOPs, the reference asked afresh and but once per row.

    Args:
        groups: by method, its budgets, the largest first: runs that differ only in their seeds.
            The largest is drawn whole, the others as the point they end at.
        path: where to, without suffix; `.svg` and `.png` are written.
        target: uniform's R@10 with its full budget, in [0, 1].

    Returns:
        The files.
    """
    names = ("updates of the learner", "TFLOP, all counted", "TFLOP, reference cached")
    with style() as plt:
        figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained", sharey=True)
        for number, (label, budgets) in enumerate(groups.items()):
            look = {"color": COLOURS[number], "marker": MARKERS[number]}
            for runs in budgets:
                recall = 100 * _columns(runs, "r10")
                xs = (
                    _columns(runs, "update"),
                    _columns(runs, "flops_total") / 1e12,
                    _cached(runs) / 1e12,
                )
                for panel, x in zip(axes, xs, strict=True):
                    if runs is budgets[0]:
                        band(panel, x.mean(axis=0), recall, label, look)
                    final(panel, x.mean(axis=0)[-1], recall[:, -1], look)
        for panel, name in zip(axes, names, strict=True):
            panel.axhline(100 * target, color=COLOURS[0], linestyle=":", linewidth=1)
            panel.set(xlabel=name, xlim=(0, None), ylim=(0, None))
        axes[0].plot([], [], "*", color="#777777", markersize=11, label="end of a schedule")
        axes[0].set_ylabel("R@10, %, mean of both directions")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(groups) + 1
        )
        return save(figure, path)


def _cached(runs: Sequence[Run]) -> NDArray[np.float64]:  # [runs, points]
    once = [run["ledger_cached"]["scoring_reference"] for run in runs]
    asked = _columns(runs, "flops_scoring_reference")
    return _columns(runs, "flops_total") - asked + np.array(once)[:, None]


def _columns(runs: Sequence[Run], name: str) -> NDArray[np.float64]:  # [runs, points]
    return np.array([[point[name] for point in run["curve"]] for run in runs], dtype=np.float64)


def band(
    panel: Any,
    x: NDArray[np.float64],  # [points]
    y: NDArray[np.float64],  # [runs, points]
    label: str,
    look: dict[str, str],
) -> None:
    """Draw the mean of some runs as a line, their range as a band."""
    panel.plot(x, y.mean(axis=0), label=label, linewidth=1.6, markersize=4, **look)
    panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=look["color"], alpha=0.18, lw=0)


def final(panel: Any, x: float, y: NDArray[np.float64], look: dict[str, str]) -> None:
    """Draw the end of their schedules apart, as a star with their range."""
    spread = np.array([[y.mean() - y.min()], [y.max() - y.mean()]])
    panel.errorbar(
        x, y.mean(), yerr=spread, color=look["color"], marker="*", markersize=11, capsize=3
    )


def _left(panel: Any) -> Any:
    """Coordinates with x a share of the panel's width and y in data."""
    return panel.get_yaxis_transform()


@contextmanager
def style() -> Iterator[Any]:
    """matplotlib, imported only when something is drawn, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        yield plt
    plt.close("all")


def save(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=130)
    return files
