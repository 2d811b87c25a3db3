# SPDX-License-Identifier: Apache-2.0
"""RHO-LOSS's protocol in tables, sentences and pictures, beside an independent replication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from activesel.loop.plots import COLOURS, MARKERS, save, style
from activesel.loop.rho_config import FASHION_MNIST
from bench.common import Row
from bench.replicate import figures

METHODS = ("uniform", "train-loss", "rho")
NAMES = {"uniform": "uniform", "train-loss": "train-loss", "rho": "RHO", "reducr": "REDUCR"}
_ORDER = (*METHODS, "reducr")
_ACCURACY: dict[str, tuple[tuple[float, ...], ...]] = {  # mean and, but for REDUCR's own, deviation
    "CIFAR-10": ((85.09, 0.52), (88.86, 0.22), (90.00, 0.33), (90.02,)),
    "CINIC-10": ((79.51, 0.30), (79.25, 0.33), (82.09, 0.30), (81.68,)),
    "CIFAR-100": ((57.94, 0.69), (59.77, 0.71), (60.95, 0.64), (62.21,)),
    "Clothing-1M": ((69.60, 0.85), (69.63, 0.30), (71.07, 0.46), (72.69,)),
}
_WORST: dict[str, tuple[tuple[float, ...], ...]] = {
    "CIFAR-10": ((75.0,), (), (78.8,), ()),
    "Clothing-1M": ((39.2,), (), (27.8, 10.2), ()),
}
PUBLISHED: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    name: {
        what: {method: found for method, found in zip(_ORDER, table[name], strict=True) if found}
        for what, table in (("accuracy", _ACCURACY), ("worst_class", _WORST))
        if name in table
    }
    for name in _ACCURACY
}
"""By data set, metric and method: mean, and standard deviation where there is one, in %."""
PUBLISHED_BY = (
    "Published: REDUCR's replication (ResNet-18, AdamW, 10 % of rows kept, no wrong labels added; "
    "mean ± standard deviation of 10 runs, 5 for CIFAR-100 and Clothing-1M)."
)


def pictures(content: Row, path: Path) -> list[Path]:
    """Accuracy against FLOPs, wrong labels kept, and accuracy over runs as published, if any."""
    published = any(point["schedule"] == "constant" for point in content["curves"])
    with style() as plt:
        size = (13 if published else 9, 4.4)
        figure, panels = plt.subplots(1, 3 if published else 2, figsize=size, layout="constrained")
        cost, wrong = panels[:2]
        kinds = {"decayed": (wrong, "wrong_kept")}
        if published:
            kinds["constant"] = (panels[2], "accuracy")
        _cost(cost, content)
        for number, method in enumerate(METHODS):
            look = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
            points = [p for p in content["curves"] if p["method"] == method]
            points = [p for p in points if p["updates"] == content["updates"]]
            for schedule, (panel, name) in kinds.items():
                shown = [p for p in points if p["schedule"] == schedule]
                if not shown:
                    continue
                at = [p["update"] for p in shown]
                values = [p[name] for p in shown]
                panel.plot(at, [100 * v["mean"] for v in values], label=NAMES[method], **look)
                low, high = ([100 * v[end] for v in values] for end in ("least", "most"))
                panel.fill_between(at, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
        for panel in panels[2:]:
            panel.set(
                xlabel="updates", ylabel="test accuracy, %", title="constant rate, as published"
            )
        wrong.set(xlabel="updates", ylabel="wrong labels among rows kept, %", title="decayed rate")
        for row in content["rows"]:
            if row["method"] == "uniform" and row["schedule"] == "constant":
                panels[2].axhline(100 * row["accuracy"]["mean"], color=COLOURS[0], linestyle=":")
            if row["schedule"] == "decayed":
                wrong.axhline(100 * row["base_rate"], color="#777777", linestyle="--", linewidth=1)
        for panel in panels[1:]:
            if panel.collections:
                panel.legend()
        return save(figure, path)


def _cost(panel: Any, content: Row) -> None:
    """Decayed runs: uniform's budgets as a line, methods as points with intervals."""
    for number, method in enumerate(METHODS):
        rows = [r for r in content["rows"] if (r["method"], r["schedule"]) == (method, "decayed")]
        if not rows:
            continue
        x = [row["flops"]["total"] / 1e12 for row in rows]
        y, low, high = (
            [100 * (row["accuracy"][name] or row["accuracy"]["mean"]) for row in rows]
            for name in ("mean", "low", "high")
        )
        look = {"color": COLOURS[number], "marker": MARKERS[number]}
        if method == "uniform":
            panel.plot(x, y, label="uniform, several budgets", **look)
            panel.fill_between(x, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
            continue
        bars = [[y[0] - low[0]], [high[0] - y[0]]]
        panel.errorbar(x, y, bars, linestyle="", capsize=3, label=NAMES[method], **look)
        row = rows[0]
        free = row["flops_share_amortised"] * row["flops"]["learner"] / 1e12
        if method == "rho":
            label = "RHO, irreducible-loss model free"
            panel.plot(free, y[0], linestyle="", fillstyle="none", label=label, **look)
    panel.set(xscale="log", xlabel="TFLOP, everything counted", title="decayed rate")
    low, high = panel.get_ylim()
    panel.set(ylim=(max(low, 0), min(high, 100)), ylabel="test accuracy, %")
    if panel.lines:
        panel.legend()


def text(content: Row) -> str:
    """Tables and sentences in Markdown."""
    if not content["rows"]:
        return "No run is finished."
    lines = [_line(row, content) for row in content["rows"]]
    columns = (
        "method", "updates", "accuracy, %", "worst class, %", "wrong labels kept, %",
        "FLOPs over the learner's", "learner speedup", "compute speedup, everything charged",
        "irreducible-loss model free",
    )  # fmt: skip
    rows = [
        [*_published(p, "accuracy"), *_published(p, "worst_class")[1:]]
        for p in content["published"]
    ]
    names = [NAMES[method] for method in METHODS]
    heads = (
        "published, other data" if content["data"] == FASHION_MNIST else "published",
        *(f"{name}, accuracy, %" for name in (*names, "REDUCR")),
        *(f"{name}, worst class, %" for name in (*names, "REDUCR")),
    )  # fmt: skip
    keep = [i for i in range(len(heads)) if not i or any(row[i] != "-" for row in rows)]
    published = figures.table([heads[i] for i in keep], [[row[i] for i in keep] for row in rows])
    return "\n\n".join(
        [
            figures.table(columns, lines),
            _setup(content),
            *_findings(content),
            published,
            PUBLISHED_BY,
            *_gaps(content),
            figures.picture(content, "rho", "Accuracy against FLOPs, and wrong labels kept"),
        ]
    )


def _line(row: Row, content: Row) -> list[str]:
    shown = [figures.name(row, content), f"{row['updates']:,}"]
    shown += [figures.percent(row[name]) for name in ("accuracy", "worst_class", "wrong_kept")]
    shown.append(f"{row['flops_share']:.1f} x")
    if "beta" in row:
        columns = ("learner_speedup", "compute_speedup", "compute_speedup_amortised")
        return [*shown, *(row[name]["text"] for name in columns)]
    if not row.get("reached"):
        return [*shown, "-", "-", "-"]
    at = row["reached"]
    if at["share_of_updates"] is None:
        return [*shown, "not reached", "not reached", "-"]
    saved = (f"{100 - 100 * at[name]:+.0f} %" for name in ("share_of_updates", "flops_share"))
    return [*shown, *saved, "-"]


def _published(entry: Row, name: str) -> list[str]:
    """Data set, then the figures of the methods."""
    cells = [entry["data"]]
    for method in (*METHODS, "reducr"):
        mean, std = (*entry.get(name, {}).get(method, ()), None, None)[:2]
        middle = "-" if mean is None else f"{mean:.1f}" if name == "worst_class" else f"{mean:.2f}"
        cells.append(middle if std is None else f"{middle} ± {std:.2f}")
    return cells


def _setup(content: Row) -> str:
    c = content["config"]
    name = {FASHION_MNIST: "Fashion-MNIST"}.get(content["data"], content["data"].upper())
    wrong = next(row["base_rate"] for row in content["rows"])
    return (
        f"{name}, {100 * wrong:.0f} % wrong labels, {content['train_rows']:,} training rows and as "
        f"many held out; {c['keep']} rows kept of every {c['super_batch']}, AdamW "
        f"{c['lr']:g}, ResNet-18 {c['width']} wide (64 as published). The irreducible-loss model, "
        f"{c['reference_width']} wide, learns {c['reference_updates']:,} updates of "
        f"{c['reference_keep']} held-out rows. Every run decays to zero over its own updates and "
        "scores in evaluation mode; those marked as published have a constant rate and score in "
        f"training mode. Seeds: {len(content['seeds'])}; ± and brackets are 95 % t-intervals. "
        "Speedups are over the updates (FLOPs) with which uniform gets as far, from its runs of "
        "several budgets; as published, over its updates (FLOPs), from where the mean curve, on "
        f"{c['quick']:,} test rows, first is at its final accuracy."
    )


def _findings(content: Row) -> list[str]:
    said = [
        f"{row['label']} is {figures.told(row['gain'])} uniform with as many updates "
        f"({figures.points(row['gain'])} points, seed by seed)"
        for row in content["rows"]
        if row.get("gain")
    ]
    return [f"{'; '.join(said)}."] if said else []


def _gaps(content: Row) -> list[str]:
    """How far runs as published are from the published figures of this data set, if it has any."""
    theirs = PUBLISHED.get(content["data"].upper(), {}).get("accuracy", {})
    said = []
    for row in content["rows"]:
        if row["schedule"] != "constant" or row["method"] not in theirs:
            continue
        mean, std = theirs[row["method"]]
        gap = 100 * row["accuracy"]["mean"] - mean
        where = "within" if abs(gap) <= std else "beyond"
        said.append(f"{row['label']} {gap:+.2f} points, {where} ± {std:.2f}")
    steps = f"{content['updates']:,} updates, ResNet-18 {content['config']['width']} wide"
    return [f"Here ({steps}) against the published figures: {'; '.join(said)}."] if said else []
