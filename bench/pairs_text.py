# SPDX-License-Identifier: Apache-2.0
"""The results on image-text pairs as a table and sentences."""

from __future__ import annotations

from typing import Any

from bench import pairs, pairs_table
from bench.aggregate import interval

Row = dict[str, Any]


def image_text(content: Row) -> str:
    """Table, sentences and picture of the runs on image-text pairs."""
    whole, usual = content["updates"], content["config"]
    cells = sorted(content["cells"], key=lambda row: pairs_table.order(row, content))
    full = [c for c in cells if c["updates"] == whole and c["config"]["rows"] == usual["rows"]]
    plain = [c for c in full if c["label"] in pairs_table.NAMES.values()]
    rows = []
    for row in full:
        if row in plain or row["method"] == "uniform":
            rows.append(row)
        shorter = [c for c in cells if c["label"] == row["label"] and c["updates"] < whole]
        if row in plain and row["method"] != "uniform" and shorter:
            reached = [c for c in shorter if c["reaches_uniform"]]
            rows.append(reached[-1] if reached else shorter[0])
    lines = [
        "| method | R@10, % | clean pairs kept, % | FLOPs, all counted / reference cached "
        "| learner speedup | compute speedup |",
        "|---|---|---|---|---|---|",
        *map(_pairs_line, rows),
    ]
    path = f"../bench/results/{pairs.RESULTS.stem}"
    said = [_pairs_setup(content), "", *(f"- {x}" for x in _pairs_findings(content, plain, cells))]
    pictures = [
        f"![{text}]({path}{name})"
        for name, text in (
            (".svg", "R@10 of every method"),
            ("-tiers.svg", "Tiers kept over time"),
            ("-curves.svg", "R@10 against updates and FLOPs"),
            ("-kept.png", "The rows most and least often kept"),
        )
    ]
    return "\n".join([*lines, "", *said, "", *pictures])


def _pairs_line(row: Row) -> str:
    share, costs = row["share_of_updates"], ["-"]
    name, speedups = row["label"], ["-", "-"]
    if share is not None:
        totals = [row[f"flops_share{how}"]["total"] for how in ("", "_cached")]
        costs = [f"{100 * total:.0f} %" for total in totals]
        if share < 1:
            name = f"{name}, {100 * share:.0f} % of updates"
        if share < 1 and row["reaches_uniform"]:
            saved = " / ".join(f"{100 - 100 * total:+.0f} %" for total in totals)
            speedups = [f"{100 - 100 * share:+.0f} %", saved]
    cells = [name, interval(row["r10"]), interval(row["kept"]["clean"]), " / ".join(costs)]
    return f"| {' | '.join([*cells, *speedups])} |"


def _pairs_setup(content: Row) -> str:
    config, rows = content["config"], content["pool"]
    mix = ", ".join(f"{100 * n / sum(rows.values()):.0f} % {tier}" for tier, n in rows.items())
    return (
        f"{sum(rows.values()):,} icons and captions ({mix}; the reference learns from other clean "
        "ones), tested on clean ones of other icon families; R@10 is the mean of both directions. "
        f"Seeds: {len(content['seeds'])}; ± is the 95 % t-interval. Learner `{config['learner']}`, "
        f"{content['updates']:,} updates of {config['keep']} rows, kept of {config['rho']} times "
        f"as many; scorers `{config['scorer']}`. Every method is held against uniform trained with "
        "the same loss; a speedup is given only where the mean R@10 reaches that."
    )


def _pairs_findings(content: Row, plain: list[Row], cells: list[Row]) -> list[str]:
    compared = [c for c in plain if c["method"] != "uniform" and c["r10_gain"]]
    claims = content["targets"]
    said = []
    for claim, text in (
        ("R@10 above uniform's", "R@10 is above uniform's"),
        ("clean share at least twice uniform's", "At least twice uniform's clean share is kept"),
    ):
        sure, mean, no = (list[str]() for _ in range(3))
        for row in compared:
            holds = claims[f"{row['label']}: {claim}"]
            (sure if holds["interval"] else mean if holds["mean"] else no).append(row["label"])
        parts = [
            f"{how} {_list(names)}"
            for how, names in (
                ("with the whole interval by", sure),
                ("on the mean alone by", mean),
                ("**not** by", no),
            )
            if names
        ]
        said += [f"{text} {', '.join(parts)}."] if parts else []
    said += [_joint(entry) for entry in content["joint"]]
    coarse = content["flexi"]
    published = coarse["published"]
    said.append(
        f"Patches of {coarse['patches'][1]} for {coarse['patches'][0]} pixels take "
        f"{100 * coarse['scoring_saved']:.0f} % off the FLOPs of scoring (published, 32 for 16: "
        f"{100 * published['scoring_saved']:.0f} %), and training with half of the rows so costs "
        f"{100 * coarse['training_share']:.0f} % ({100 * published['training_share']:.0f} %)."
    )
    for row in cells:
        if row["method"] == "jest-emoji" and row["r10_gain"]:
            said.append(
                "Reuse: a reference that has only seen emoji, choosing among other icons, keeps "
                f"{row['clean_ratio']['mean']:.1f} times uniform's clean share; R@10 is "
                f"{_difference(row['r10_gain'])} uniform's."
            )
    if content["missing"]:
        total = content["finished"] + len(content["missing"])
        said.append(f"**Unfinished: {len(content['missing'])} of {total} runs are missing.**")
    return said


def _joint(entry: Row) -> str:
    batches, gain = entry["batch_learnability"], entry["r10_gain"]
    above = batches["joint_above"]
    often = {0.0: "in none", 1.0: "in every one"}.get(above, f"in {100 * above:.0f} %")
    low, high = gain["low"], gain["high"]
    if low is None or low <= 0 <= high:
        verdict = "whether joint selection pays cannot be told from these runs"
    else:
        verdict = f"joint selection {'pays' if low > 0 else 'does **not** pay'}"
    return (
        f"{entry['label']} against independent selection: the learnability of the joint batch is "
        f"higher {often} of the {batches['batches']:,} super-batches compared (by "
        f"{batches['gain']['mean']:.2g} a pair on average), R@10 is {_difference(gain)} "
        f"independent's and the clean share {_difference(entry['clean_gain'])}: {verdict}."
    )


def _difference(entry: Row) -> str:
    spread = "" if entry["high"] is None else f" (± {50 * (entry['high'] - entry['low']):.1f})"
    side = "above" if entry["mean"] > 0 else "below"
    return f"{100 * abs(entry['mean']):.1f} points{spread} {side}"


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
