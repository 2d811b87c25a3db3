# SPDX-License-Identifier: Apache-2.0
"""The frontier in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from bench.aggregate import interval
from bench.common import Row

WAYS = {
    "learner_speedup": "learner speedup",
    "compute_speedup_published": "compute speedup, as published",
    "compute_speedup_shared": "reference shared",
    "compute_speedup": "everything charged",
}
PICTURES = {
    "images-speedup": "Learner speedup against the F-ratio, and break-even: measured, images",
    "images-flops": "FLOPs to uniform's accuracy against scorer size: measured, images",
    "images-metric": "Accuracy against FLOPs and seconds: measured, images",
    "images-learners": "Accuracy and beta over learner sizes: measured, images",
    "pairs-speedup": "Learner speedup against rho, and break-even: measured, pairs",
    "pairs-flops": "FLOPs to uniform's recall against rho: measured, pairs",
    "pairs-metric": "Recall against FLOPs and seconds: measured, pairs",
    "paper-speedup": "Learner speedup against the F-ratio: published betas, ClassAct",
    "paper-jest-speedup": "Learner speedup against rho: published betas, JEST",
    "paper-flops": "FLOPs to uniform's accuracy against scorer size: published betas",
    "paper-charged": "FLOPs to uniform's metric by three ways of charging: published betas",
    "paper-learners": "Beta over learner sizes: published",
}


def columns(row: Row) -> dict[str, str]:
    """A row of the tables, for people."""
    measured = row["source"] == "measured"
    budget = f", {row['percent']} % of updates" if measured else ""
    slower = f" ({r:.2g} in seconds)" if (r := row.get("system_f_ratio")) else ""
    cells = {
        "method": f"{row['label']}, rho {row['rho']:g}{budget}",
        "scorer to learner": f"{row['scorer']} to {row['learner']}",
        "F-ratio": f"{row['f_ratio']:.2g}{slower}",
        **({"reached, %": interval(row["metric"])} if measured else {}),
        "beta": row["beta"]["text"],
        **{name: row[way]["text"] for way, name in WAYS.items()},
    }
    if measured:
        return {**cells, "seconds saved": (row["system_speedup"] or {"text": "unknown"})["text"]}
    return {**cells, "where": "; ".join(filter(None, (row["where"], row["note"])))}


def flat(row: Row) -> Row:
    """One level, for spreadsheets: {"beta": {"value": 1, "low": 0}} becomes beta and beta_low."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            for part, inner in value.items():
                found[name if part in ("value", "mean") else f"{name}_{part}"] = _plain(inner)
        else:
            found[name] = _plain(value)
    return found


def _plain(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [columns(row) for row in rows]
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(c.values()) for c in cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


def text(content: Row) -> str:
    """Markdown of the committed results: what was measured, then what was published."""
    measured = [row for row in content["points"] if row["method"] != "uniform"]
    lines: list[str] = []
    for loop, name in (("classify", "images"), ("contrastive", "pairs")):
        rows = [row for row in measured if row["loop"] == loop]
        if rows:
            lines += [f"**Measured here: {name}.** {_setup(content, loop)}", ""]
            lines += [*_table(rows), "", _finding(rows), "", *_shown(f"{name}-"), ""]
    rows = content["published"]
    lines += [
        "**Computed from published betas**, which are second-hand (reviews and abstracts, not the "
        "papers' own tables), on FLOPs counted on our vision transformers of the same sizes "
        "(224 x 224, patch 16, 1,000 classes). Where only a bound is known, the speedup is one "
        "too; a reference is taken as trained on as many examples as uniform saw, unless the row "
        "says otherwise.",
        "",
        *_table(rows),
        "",
        _finding(rows),
        "",
        *_shown("paper-"),
    ]
    if content["missing"]:
        lines += ["", f"Unfinished: {len(content['missing'])} runs are missing."]
    return "\n".join(lines)


def _setup(content: Row, loop: str) -> str:
    rows = [row for row in content["points"] if row["loop"] == loop]
    plain = [row for row in rows if row["method"] == "uniform" and row["usual_learner"]]
    budgets = sorted(row["percent"] for row in plain)
    seeds = sorted({len(row["seeds"]) for row in rows})
    said = (
        f"{' to '.join(map(str, seeds))} seeds; 95 % intervals over the method's seeds, in which "
        "uniform's own uncertainty is not. Beta is the run's updates over those uniform needs for "
        "the same metric; uniform was trained with "
        f"{', '.join(map(str, budgets))} % of {content['budgets'][loop]} updates, each decayed to "
        "zero, and nothing is extrapolated: < and > mark what lies beyond. "
    )
    if found := content["clock"]:
        machine, forward = found["machine"], content["forward_shares"]
        cpu = found["device"] == "cpu"
        said += (
            "*Seconds saved* are those of one reference system "
            f"({machine['cpu'] + ', one thread' if cpu else machine['gpu']}, torch "
            f"{machine['torch']}): the rows through each model times its seconds per row, all "
            "models timed in turn, medians; fetching rows is not in them, and everything is "
            "charged. What the runs themselves took is recorded, but not compared: they shared "
            "their machine. "
            f"{' '.join(shares([row for row in forward if row['loop'] == loop]))} "
        )
    return said + (
        "*As published* leaves out what the online scorer costs to train, *reference shared* only "
        "what the reference costs, *everything charged* nothing."
    )


def shares(steps: Sequence[Row]) -> list[str]:
    """A sentence per loop on what a forward pass takes of a training step, from the clock."""
    found = []
    for loop in dict.fromkeys(row["loop"] for row in steps):
        rows = sorted((r for r in steps if r["loop"] == loop), key=lambda row: -row["seconds"])
        said = (f"{r['model']} {r['share']:.0%} ({r['share_step']:.0%})" for r in rows)
        found.append(
            f"A forward pass takes, of forward and backward (and of a whole step, optimizer "
            f"included): {', '.join(said)}; by the convention for FLOPs it is 33 %, and 41 % by "
            "the seconds published with No Train No Gain."
        )
    return found


def _finding(rows: Sequence[Row]) -> str:
    """How many settings cost less than uniform, and which costs least."""
    positive = [row for row in rows if row["compute_positive"]]
    surely = [row for row in positive if _surely(row)]
    known = [row for row in rows if row["compute_speedup"]["value"] is not None]
    said = f"With everything charged {len(positive)} of {len(rows)} settings cost less than uniform"
    said += (
        f", {len(surely)} with their whole interval." if rows[0]["source"] == "measured" else "."
    )
    if known:
        ends = [f(known, key=lambda row: row["compute_speedup"]["value"]) for f in (max, min)]
        for name, row in zip(("The best", "the worst"), ends, strict=True):
            said += (
                f"{' ' if name[0] == 'T' else '; '}{name} is {row['label']}, rho {row['rho']:g}, "
                f"{row['scorer']} to {row['learner']}: {row['compute_speedup']['text']}"
            )
        said += "."
    return said


def _surely(row: Row) -> bool:
    """Whether the whole interval is above zero; a single seed has none."""
    entry = row["compute_speedup"]
    if len(row.get("seeds", ())) < 2:
        return False
    beyond = entry["value"] is None and "(" not in entry["text"]
    low = entry["most"] if beyond else entry["low"]
    return low is not None and bool(low > 0)


def _shown(start: str) -> list[str]:
    path = "../bench/results/cpu/pareto"
    return [f"![{a}]({path}-{name}.svg)" for name, a in PICTURES.items() if name.startswith(start)]
