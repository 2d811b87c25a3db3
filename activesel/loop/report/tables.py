# SPDX-License-Identifier: Apache-2.0
"""The sections of a page about runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from activesel.loop.report import figures
from activesel.loop.report.parts import NOTHING, Section, Table, number, percent, signed, text
from activesel.loop.report.runs import (
    Group,
    baseline,
    command,
    difference,
    families,
    interval,
    seeds,
    verdict,
)
from activesel.loop.report.sheets import CLASSES, FRAMES, sheets

OPEN = 4  # contact sheets; more are opened by hand


def title(groups: Sequence[Group], files: Sequence[Path]) -> str:
    if not groups:
        return f"Results: {', '.join(file.stem for file in files)}"
    names = list(dict.fromkeys(g.family.split(",")[0] for g in groups if not g.uniform))
    noise = groups[0].config.get("noise")
    data = groups[0].loop.data + (f", {percent(noise, 0)} wrong labels" if noise else "")
    against = " against uniform sampling" if any(g.uniform for g in groups) and names else ""
    return f"{', '.join(names) or 'uniform sampling'}{against}: {data}"


def verdicts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Of every method; uniform sampling alone is a baseline without anything to compare."""
    methods = [g for g in groups if not g.uniform] or list(groups)
    return [verdict(family, groups) for family in families(methods)]


def sections(groups: Sequence[Group]) -> list[Section]:
    quick, several = "quick" in groups[0].config, len(families(groups)) < len(groups)
    made = [
        Section(
            "Overview",
            tables=[overview(groups)],
            text=["± is half of the 95 % interval over seeds (Student's t). Differences are from "
                  "uniform sampling of the same learner with the most updates."],
        ),
        Section(
            "Curves",
            figures=figures.curves(groups),
            text=["Lines are means over seeds, bands their range; stars are the ends of schedules"
                  + (", on all test rows, where points before are on some" if quick else "")
                  + ("; of smaller budgets only these are drawn" if several else "")
                  + ". Costs include the reference's."],
        ),
        Section("Ledger", figures=[figures.costs(groups)],
                tables=ledgers(groups)),
        kept(groups),
        quality(groups),
        _sheets(groups),
        Section("Configuration", tables=[*configuration(groups), *references(groups)]),
        Section("Environment, seeds, commands", tables=[environments(groups), every(groups)],
                code=list(dict.fromkeys(command(run["config"]) for g in groups for run in g.runs))),
    ]  # fmt: skip
    return [s for s in made if s.text or s.figures or s.tables or s.sheets]


def overview(groups: Sequence[Group]) -> Table:
    head = ["method", "seeds", "updates", groups[0].loop.title, "difference, points",
            "worst class", "wrong labels kept", "FLOPs", "FLOPs, of uniform's", "seconds",
            "seconds, of uniform's"]  # fmt: skip
    rows = []
    for g in groups:
        base = baseline(g, groups)
        ends, gap = interval(g.metrics), NOTHING
        if base and not g.uniform:
            gain, span = difference(g, base)
            gap = signed(gain) + _half(span)
        rows.append([
            g.label,
            text(g.seeds),
            f"{g.updates:,}",
            f"{100 * g.metric:.1f}{_half(ends)}\u00a0%",
            gap,
            percent(g.mean(lambda r: r.get("worst_class"))),
            percent(g.mean(_wrong)),
            number(g.flops, 3),
            percent(g.flops / base.flops, 0) if base else NOTHING,
            number(g.seconds, 3),
            percent(g.seconds / base.seconds, 0) if base else NOTHING,
        ])  # fmt: skip
    return _without_empty(Table("All methods", head, rows))


def _half(ends: tuple[float, float] | None) -> str:
    return f" ± {50 * (ends[1] - ends[0]):.1f}" if ends else ""


def _wrong(run: dict[str, Any]) -> float | None:
    return (
        run["kept_mislabelled"] / run["kept"] if run.get("kept_mislabelled") is not None else None
    )


def _without_empty(table: Table) -> Table:
    some = [i for i in range(len(table.head)) if any(row[i] != NOTHING for row in table.rows)]
    rows = [[row[i] for i in some] for row in table.rows]
    return Table(table.caption, [table.head[i] for i in some], rows, table.note, table.folded)


def ledgers(groups: Sequence[Group]) -> list[Table]:
    """One per method; of many, a table of all before, and theirs folded."""
    many = len(groups) > 3
    tables = [ledger(g, baseline(g, groups), many) for g in groups]
    if not many:
        return tables
    names = list(dict.fromkeys(n for g in groups for n in g.runs[0]["ledger"]))
    rows = []
    for g in groups:
        whole = baseline(g, groups) or g
        parts = [g.mean(lambda r: r["ledger"].get(n, 0.0)) or 0.0 for n in names]  # noqa: B023
        rows.append([g.label, *(percent(x / whole.flops) for x in parts), number(g.flops, 3)])
    head = ("method", *(n.replace("_", " ") for n in names), "FLOPs")
    note = "Of the baseline's total; of the own where there is none."
    return [Table("All lines, all methods", head, rows, note), *tables]


def ledger(group: Group, base: Group | None, folded: bool) -> Table:
    """Every line, its share of the total and of uniform's total, and what a cache would save."""
    rows = []
    for name in group.runs[0]["ledger"]:
        flops = group.mean(lambda r: r["ledger"].get(name, 0.0)) or 0.0  # noqa: B023
        once = group.mean(lambda r: (r.get("ledger_cached") or {}).get(name))  # noqa: B023
        rows.append([
            name.replace("_", " "),
            number(flops, 3),
            percent(flops / group.flops),
            percent(flops / base.flops) if base else NOTHING,
            number(once, 3) if once is not None and not group.uniform else NOTHING,
        ])  # fmt: skip
    head = ("line", "FLOPs", "of total", "of uniform's total", "reference scored once")
    title = f"{group.label}, mean of {seeds(len(group.runs))}"
    return _without_empty(Table(title, head, rows, folded=folded))


def kept(groups: Sequence[Group]) -> Section:
    """Wrong labels, tiers, and how learnable jointly chosen batches were."""
    made = []
    tiered = [g for g in groups if isinstance(g.runs[0].get("kept"), dict)]
    if tiered:
        names = list(figures.pool(tiered[0]))
        rows = [["(the pool)", *(percent(s) for s in figures.pool(tiered[0]).values())]]
        for g in tiered:
            totals = [sum(r["kept"].values()) for r in g.runs]
            shares = (
                statistics.fmean(r["kept"][n] / t for r, t in zip(g.runs, totals, strict=True))
                for n in names
            )
            rows.append([g.label, *map(percent, shares)])
        made.append(Table("Tiers of the pairs kept", ("method", *names), rows))
    joint = [
        (g, [r["batch_learnability"] for r in g.runs])
        for g in groups
        if all(r.get("batch_learnability") for r in g.runs)
    ]
    if joint:
        rows = [
            [g.label, *(number(statistics.fmean(s[how] for s in said), 3)
                        for how in ("joint", "independent"))]
            for g, said in joint
        ]  # fmt: skip
        note = "Per pair kept, of a joint and an independent choice from the same super-batches."
        head = ("method", "joint", "independent")
        made.append(Table("Learnability of the batches", head, rows, note))
    return Section(
        "What was kept",
        figures=[*figures.wrong(groups), *figures.tiers(groups)],
        tables=made,
    )


def quality(groups: Sequence[Group]) -> Section:
    """Accuracy by class, or recall either way."""
    made = []
    classed = [g for g in groups if all(r.get("by_class") for r in g.runs)]
    if classed:
        means = [[statistics.fmean(c) for c in zip(*(r["by_class"] for r in g.runs), strict=True)]
                 for g in classed]  # fmt: skip
        count = len(means[0])
        clothes = classed[0].loop.data == "Fashion-MNIST" or (
            classed[0].config.get("data") == "fashion-mnist"
        )
        names = CLASSES if clothes and count == len(CLASSES) else [str(i) for i in range(count)]
        lowest = [min(range(count), key=list(m).__getitem__) for m in means]
        rows = [
            [name, *(percent(m[i]) + (" (worst)" if i == low else "")
                     for m, low in zip(means, lowest, strict=True))]
            for i, name in enumerate(names)
        ]  # fmt: skip
        worst = ["worst class of each run", *(percent(g.mean(lambda r: r.get("worst_class")))
                                              for g in classed)]  # fmt: skip
        head = ("class", *(g.label for g in classed))
        made.append(Table("Test accuracy by class, mean over seeds", head, [*rows, worst],
                          folded=count > 20))  # fmt: skip
    recalled = [g for g in groups if "recall" in g.runs[0]]
    if recalled:
        ways = [(way, k) for way in ("image_to_text", "text_to_image") for k in ("1", "10")]
        head = ("method", *(f"{way.replace('_', ' ')}, R@{k}" for way, k in ways), "R@10, mean")
        rows = [
            [g.label, *(percent(g.mean(lambda r: (r["recall"].get(w) or {}).get(k)))  # noqa: B023
                        for w, k in ways), percent(g.metric)]
            for g in recalled
        ]  # fmt: skip
        made.append(Table("Recall on the test pairs, mean over seeds", head, rows))
    return Section("Quality", tables=made)


def _sheets(groups: Sequence[Group]) -> Section:
    made = [sheets(budgets[0]) for budgets in families(groups)]
    drawn = [sheet for some, _ in made for sheet in some]
    drawn = [replace(sheet, folded=number >= OPEN) for number, sheet in enumerate(drawn)]
    lines = [*([FRAMES] * bool(drawn)), *(line for _, line in made)]
    return Section("Contact sheet", text=lines, sheets=drawn)


def configuration(groups: Sequence[Group]) -> list[Table]:
    """What sets the groups apart, and what they share."""
    names = dict.fromkeys(name for g in groups for name in g.config)
    rows = [[name, *(_plain(g.config.get(name)) for g in groups)] for name in names]
    rows.append(["seed", *(text(g.seeds) for g in groups)])
    differ = [row for row in rows if len(set(row[1:])) > 1]
    shared = [row[:2] for row in rows if len(set(row[1:])) == 1]
    head = ("setting", *(g.label for g in groups))
    tables = Table("Settings that differ", head, differ), Table("Shared", ("setting", ""), shared)
    return [table for table in tables if table.rows]


def _plain(value: Any) -> str:
    """As it was given: 0.0001 is no 1e-04, 2400 no 2,400."""
    return text(value) if value is None or isinstance(value, bool | list) else str(value)


def references(groups: Sequence[Group]) -> list[Table]:
    """What the reference scorers reached, and what their training cost."""
    rows = []
    for g in groups:
        said = [r["reference"] for r in g.runs if isinstance(r.get("reference"), dict)]
        if not said:
            continue
        scores = [s["recall"]["r10"] if "recall" in s else s.get("accuracy") for s in said]
        config = said[0].get("config") or {}
        rows.append([
            g.label,
            text(config.get("part")),
            text(config.get("updates")),
            NOTHING if None in scores else percent(statistics.fmean(scores)),
            number(statistics.fmean(s.get("flops", 0.0) for s in said), 3),
            number(statistics.fmean(s.get("seconds", 0.0) for s in said), 3),
        ])  # fmt: skip
    head = ("method", "trained on", "updates", groups[0].loop.title, "FLOPs", "seconds")
    return [_without_empty(Table("Reference scorers", head, rows))] if rows else []


def environments(groups: Sequence[Group]) -> Table:
    found = [json.dumps(run.get("environment") or {}) for g in groups for run in g.runs]
    some = [json.loads(entry) for entry in dict.fromkeys(found)]
    names = dict.fromkeys(name for entry in some for name in entry)
    head = ("", *(f"{found.count(entry)} runs" for entry in dict.fromkeys(found)))
    return Table("Machines", head, [[n, *(_plain(e.get(n)) for e in some)] for n in names])


def every(groups: Sequence[Group]) -> Table:
    rows = [
        [run["name"], text(seed), percent(metric, 2), number(run["ledger"]["total"], 3),
         number(run["seconds"], 3)]
        for g in groups
        for run, seed, metric in zip(g.runs, g.seeds, g.metrics, strict=True)
    ]  # fmt: skip
    head = ("name", "seed", groups[0].loop.title, "FLOPs", "seconds without reference")
    return Table("Every run", head, rows)
