# SPDX-License-Identifier: Apache-2.0
"""The pictures of a page: curves and bars as inline SVG, rows of the data as small PNGs."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activesel.loop import plots, records
from activesel.loop.report.parts import Figure
from activesel.loop.report.runs import Group, Run, beside, families

SIZE = (4.8, 3.4)  # inches: letters stay readable on a narrow screen
LEDGER = dict(
    zip(
        ("learner", "scoring_online", "scoring_reference", "online_training",
         "reference_training", "selection"),
        ("#999999", *plots.COLOURS[1:]), strict=False,
    )
)  # fmt: skip


def svg(figure: Any, caption: str) -> str:
    """The figure as an element for a page: no prologue, letters as text, ids like no other's."""
    file = io.StringIO()
    none: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=none)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    prefix = f"f{records.digest({caption: text})}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def draw(caption: str, paint: Callable[[Any], None], size: tuple[float, float] = SIZE) -> Figure:
    """One panel."""
    with plots.style() as plt:
        plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif"})
        figure, panel = plt.subplots(figsize=size, layout="constrained")
        paint(panel)
        return Figure(caption, svg(figure, caption))


def looks(groups: Sequence[Group]) -> list[tuple[list[Group], dict[str, str]]]:
    """Families with a colour and a marker each; black is for uniform, which comes first."""
    made, first = [], 0 if groups[0].uniform else 1
    for number, budgets in enumerate(families(groups), first):
        turn, colour = divmod(number, len(plots.COLOURS))
        marker = plots.MARKERS[(number + turn) % len(plots.MARKERS)]
        made.append((budgets, {"color": plots.COLOURS[colour], "marker": marker}))
    return made


def curves(groups: Sequence[Group]) -> list[Figure]:
    """The metric against updates, FLOPs and seconds."""
    metric, title = groups[0].loop.metric, groups[0].loop.title
    axes: list[tuple[str, str, Callable[[Run], NDArray[np.float64]]]] = [
        ("updates", "updates of the learner", lambda run: column(run, "update")),
        ("FLOPs", "TFLOP, every cost counted", lambda run: column(run, "flops_total") / 1e12),
        ("seconds", "seconds, reference included", _seconds),
    ]
    made = []
    for what, label, of in axes:

        def paint(panel: Any, of: Any = of, label: str = label) -> None:
            for budgets, look in looks(groups):
                for group in budgets:
                    x = np.mean([of(run) for run in group.runs], axis=0)
                    y = np.array([100 * column(run, metric) for run in group.runs])
                    part = slice(-1) if "quick" in group.config else slice(None)
                    if group is budgets[0]:
                        plots.band(panel, x[part], y[:, part], _wrap(group.family), look)
                    plots.final(panel, x[-1], 100 * np.array(group.metrics), look)
            panel.plot([], [], "*", color="#777777", markersize=10, label="end of a schedule")
            panel.set(xlabel=label, ylabel=f"{title}, %")
            panel.set_xlim(left=0)
            _legend(panel)

        made.append(draw(f"{title[0].upper()}{title[1:]} against {what}.", paint))
    return made


def _seconds(run: Run) -> NDArray[np.float64]:
    trained, asked = beside(run)
    updates = column(run, "update")
    return column(run, "seconds") + trained + asked * updates / updates[-1]


def wrong(groups: Sequence[Group]) -> list[Figure]:
    """Share of wrong labels among the rows kept, over time."""
    if not all(_has(run, "kept", "kept_mislabelled") for g in groups for run in g.runs):
        return []

    def paint(panel: Any) -> None:
        for (group, *_), look in looks(groups):
            ends = column(group.runs[0], "update")
            kept, bad = (
                np.array([np.diff(column(run, name), prepend=0) for run in group.runs])
                for name in ("kept", "kept_mislabelled")
            )
            middles = ends - np.diff(ends, prepend=0) / 2
            plots.band(panel, middles, 100 * bad / kept, _wrap(group.family), look)
        rates = [run["base_rate"] for g in groups for run in g.runs if "base_rate" in run]
        if rates:
            panel.axhline(100 * np.mean(rates), color="#555555", ls="--", lw=1, label="in the data")
        panel.set(xlabel="updates of the learner", ylabel="wrong labels among rows kept, %")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        _legend(panel)

    return [draw("Wrong labels among the rows kept, over time.", paint)]


def tiers(groups: Sequence[Group]) -> list[Figure]:
    """Tiers of the pairs kept over time, a picture per method."""
    made = []
    for group, *_ in families(groups):
        if not all(_has(run, *(f"kept_{tier}" for tier in plots.TIERS)) for run in group.runs):
            continue

        def paint(panel: Any, group: Group = group) -> None:
            kept = {
                tier: np.array(
                    [np.diff(column(run, f"kept_{tier}"), prepend=0) for run in group.runs]
                )
                for tier in plots.TIERS
            }
            ends = column(group.runs[0], "update")
            middles = ends - np.diff(ends, prepend=0) / 2
            for (tier, counts), marker in zip(kept.items(), plots.MARKERS, strict=False):
                look = {"color": plots.TIERS[tier], "marker": marker}
                plots.band(panel, middles, 100 * counts / sum(kept.values()), _wrap(tier), look)
                if share := pool(group).get(tier):
                    panel.axhline(100 * share, color=look["color"], linestyle="--", linewidth=1)
            panel.set(xlabel="updates of the learner", ylabel="pairs kept, %", ylim=(0, 100))
            panel.set_xlim(left=0)
            _legend(panel)

        made.append(draw(f"{group.label}: tiers of the pairs kept (dashed: the pool).", paint))
    return made


def pool(group: Group) -> dict[str, float]:
    """Share of every tier in the pool."""
    counts: Mapping[str, int] = group.runs[0].get("pool") or {}
    return {tier: n / sum(counts.values()) for tier, n in counts.items()}


def costs(groups: Sequence[Group]) -> Figure:
    """Where each method's FLOPs went, stacked."""
    lines = list(dict.fromkeys(n for g in groups for n in g.runs[0]["ledger"] if n != "total"))

    def paint(panel: Any) -> None:
        start = np.zeros(len(groups))
        for number, name in enumerate(lines):
            flops = np.array([g.mean(lambda r: r["ledger"].get(name, 0.0)) for g in groups])  # noqa: B023
            colour = LEDGER.get(name, plots.COLOURS[number % len(plots.COLOURS)])
            if flops.any():
                panel.barh(range(len(groups)), flops / 1e12, left=start / 1e12, color=colour,
                           label=name.replace("_", " "))  # fmt: skip
            start += flops
        panel.set_yticks(range(len(groups)), [_wrap(g.label) for g in groups])
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")
        panel.set_xlabel("TFLOP")
        panel.figure.legend(loc="outside upper left", ncols=2, fontsize=9)

    return draw("Where the FLOPs went.", paint, (SIZE[0], 1.7 + 0.42 * len(groups)))


def column(run: Run, name: str) -> NDArray[np.float64]:  # [points]
    return np.array([point[name] for point in run["curve"]], dtype=np.float64)


def _has(run: Run, *names: str) -> bool:
    return all(name in point for name in names for point in run["curve"])


def _legend(panel: Any) -> None:
    """Above the panel, where it hides no curve."""
    lines = panel.get_legend_handles_labels()[1]
    figure = panel.figure
    figure.set_figheight(figure.get_figheight() + 0.17 * sum(2 + x.count("\n") for x in lines) / 2)
    figure.legend(loc="outside upper left", ncols=2, fontsize=9, columnspacing=1.2)


def _wrap(label: str, width: int = 28) -> str:
    """Plain text of short lines: matplotlib reads dollars as mathematics."""
    return "\n".join(textwrap.wrap(label.replace("$", r"\$"), width)) or " "


def png(pixels: NDArray[np.uint8]) -> str:  # [H, W] or [H, W, 3]
    """`data:` address of a picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return address("image/png", file.getvalue())


def address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
