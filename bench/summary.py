# SPDX-License-Identifier: Apache-2.0
"""What the results come to, in the README's few lines."""

from __future__ import annotations

from typing import Any

from bench import pairs_table

Row = dict[str, Any]


def summary(results: dict[str, Row]) -> str:
    """One line per set of results that is there, flattering or not."""
    lines = [
        line
        for name, write in (
            ("classify", classification),
            ("pairs", image_text),
            ("speed", speed),
            ("joint", joint),
            ("agreement", agreement),
            ("replicate-published", published),
            ("replicate-scaling", scaling),
            ("replicate-online", online),
            ("replicate-rho", rho),
        )
        if name in results
        for line in write(results[name])
    ]
    return "\n".join(lines)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def more(saved: float) -> str:
    """A saving in words.

    >>> more(0.1), more(-0.5)
    ('10 % fewer', '50 % more')
    """
    return f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'}"


def classification(content: Row) -> list[str]:
    full = next(
        c for c in content["cells"] if c["method"] == "uniform" and c["share_of_updates"] == 1
    )
    at = {c["updates"]: c for c in content["cells"] if _is(c, content, "classact")}
    beta = content["beta"]["classact"]["beta"]
    if beta is None:
        text = "ClassAct reaches uniform's accuracy at no budget tried."
    else:
        row = at[round(content["updates"] * beta)]
        text = (
            f"ClassAct reaches uniform's accuracy ({percent(full['accuracy']['mean'], 1)}) with "
            f"{percent(1 - beta)} fewer updates and {more(row['compute_speedup_if_reached'])} FLOPs"
            f"; of the rows it keeps {percent(row['mislabelled']['share'], 1)} are wrong."
        )
    rho = content["beta"].get("rho", {"beta": 0.0})
    if rho["beta"] is None:
        text += f" RHO does **not** reach it with up to {percent(rho['at'])} of its updates."
    noise = percent(content["noise"])
    return [f"- **Fashion-MNIST, {noise} wrong labels**, {len(content['seeds'])} seeds: {text}"]


def _is(row: Row, content: Row, method: str) -> bool:
    settings = content["settings"][method]
    return row["method"] == method and all(row[k] == v for k, v in settings.items())


def image_text(content: Row) -> list[str]:
    whole = content["updates"]
    full = {c["label"]: c for c in content["cells"] if c["updates"] == whole}
    pool = pairs_table.share(content["pool"])
    names = [pairs_table.NAMES[m] for m in ("uniform", "activesiglip", "jest", "jest++")]
    there = [full[name] for name in names if name in full]
    recalls = ", ".join(f"{c['label']} {percent(c['r10']['mean'], 1)}" for c in there)
    clean = ", ".join(f"{c['label']} {percent(c['kept']['clean']['mean'])}" for c in there[1:])
    lines = [
        f"- **Icons and their captions**, {percent(pool['clean'])} of them clean, "
        f"{len(content['seeds'])} seeds, R@10 after equally many updates: {recalls}; "
        f"of the pairs kept are clean: {clean}."
    ]
    for entry in content["speedups"]:
        if len(entry["budgets"]) > 1:
            lines.append(f"  {_speedup(entry)}")
    for entry in content["joint"]:
        gain = entry["r10_gain"]
        sure = gain["low"] is not None and not gain["low"] <= 0 <= gain["high"]
        points = round(100 * gain["mean"], 1) + 0.0  # no "-0.0"
        said = f"{points:+.1f} points of R@10"
        lines.append(
            f"  {entry['label']} against the same scores chosen independently: {said}"
            f"{'' if sure else ', within chance'}; its batches are more learnable in "
            f"{percent(entry['batch_learnability']['joint_above'])} of cases."
        )
    if content["missing"]:
        lines.append(f"  Unfinished: {len(content['missing'])} runs are missing.")
    return lines


def _speedup(entry: Row) -> str:
    if entry["at"] is None:
        tried = percent(max(entry["budgets"]))
        return (
            f"{entry['label']} does **not** reach uniform's R@10 with up to {tried} of its updates."
        )
    return (
        f"{entry['label']} reaches uniform's with {percent(entry['learner_speedup'])} fewer "
        f"updates: {more(entry['compute_speedup'])} FLOPs with everything counted, "
        f"{more(entry['compute_speedup_cached'])} with the reference's scores cached."
    )


def speed(content: Row) -> list[str]:
    ratios = [row["ratio"] for row in content["rows"]]
    short = sum(row["ratio"] < row["target"] for row in content["rows"])
    return [
        f"- **CPU kernels** are {min(ratios):.1f} to {max(ratios):.0f} times as fast as eager "
        f"torch ({short} of {len(ratios)} figures short of what was aimed at)."
    ]


def _joint_rows(content: Row) -> list[Row]:
    return [row for row in content["rows"] if row["method"] != "ours"]


def joint(content: Row) -> list[str]:
    best = {
        r["method"]: r["ratio"]
        for r in _joint_rows(content)
        if r["loss"] == "sigmoid" and r["threads"] == 1
    }
    memory = content["extra_bytes"]
    return [
        f"- **Joint selection** is {best['published']:.0f} times as fast as the published "
        f"algorithm and {best['incremental']:.1f} times as an incremental one in eager torch (one "
        "thread), in "
        f"{memory['ours'] / 1e6:.0f} MB beside the embeddings instead of "
        f"{memory['published'] / 1e6:,.0f}."
    ]


JOINT = {
    "published": "dense, as published: masked product",
    "matvec": "dense, matrix-vector products",
    "incremental": "incremental, eager torch",
    "products": "its matrix products alone",
}


def joint_table(content: Row) -> str:
    """How many times faster joint selection is than what else there is, wall clock and CPU time."""
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in _joint_rows(content):
        cells.setdefault((row["method"], row["loss"]), {})[row["threads"]] = row
    threads = sorted({row["threads"] for row in content["rows"]})
    titles = (f"{n} thread{'s' if n > 1 else ''} (CPU time)" for n in threads)
    lines = [
        f"| joint selection, times faster than | wanted | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(threads)}",
    ]
    for (method, loss), by_threads in cells.items():
        target = content["targets"].get(method) if loss == "sigmoid" else None
        wanted = "-" if target is None else f"{target:g}"
        found = [
            f"{r['ratio']:.1f} ({r['ratio_cpu']:.1f})" if (r := by_threads.get(n)) else "-"
            for n in threads
        ]
        lines.append(f"| {JOINT[method]}, {loss} | {wanted} | {' | '.join(found)} |")
    linear = ", ".join(
        f"{1e6 * seconds:.0f} at {int(rows):,}"
        for rows, seconds in content["cpu_seconds_per_row"].items()
    )
    shape, machine, memory = content["shape"], content["machine"], content["extra_bytes"]
    rows = min(row["rows"] for row in content["rows"])
    said = (
        f"B = {rows:,}, k = {shape['keep']:,}, d = {shape['width']}, {shape['chunks']} chunks, on "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; turns interleaved, "
        f"the same rows picked first. CPU microseconds a row: {linear}. Memory beside the "
        + "embeddings, MB: "
        + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in memory.items())
        + "."
    )
    return "\n".join([*lines, "", said])


def agreement(content: Row) -> list[str]:
    found = {name: row["agreement"] for name, row in content["backends"].items()}
    any_ = next(iter(found.values()))
    rounded = next(v for k, v in any_.items() if "bf16 throughout" in k)
    ours = min(row["ours"]["overlap"] for row in found.values())
    return [
        f"- **Rounding**: of the rows that float64 keeps, activesel keeps {percent(ours, 1)}, "
        f"eager torch in bf16 {percent(rounded['overlap'], 1)}."
    ]


def published(content: Row) -> list[str]:
    found = content["headline"]
    return [
        f"- **The papers' own ledger**: {found['agree']} of {found['claims']} published savings "
        f"come out within a point; with the online scorer's training charged ClassAct's "
        f"{found['classact']:+.1f} % become {found['classact_online_charged']:+.1f} %."
    ]


def scaling(content: Row) -> list[str]:
    if not content["slopes"]:
        return []
    known = [row for row in content["rows"] if row.get("f_ratio")]
    rows = [row for row in known if row["method"] == "classact"]
    ratios = [1 / row["f_ratio"] for row in rows]
    positive = [row["scorer"] for row in rows if row["compute_positive"]]
    slopes = content["slopes"]
    differs = f"a difference of {_points(slopes['difference'])}"
    words = {
        "holds": f"{differs}: learnability degrades more slowly",
        "not shown": f"{differs}, within chance with {_seeds(content)} seeds",
        "the opposite": f"{differs}: learnability degrades **faster**",
    }
    said = (
        f"- **Scorers {min(ratios):.0f} to {max(ratios):.0f} times cheaper than the learner**: "
        f"ten times cheaper costs learnability {_points(slopes['classact'])} points of accuracy, "
        f"easy-reference {_points(slopes['easy'])}, {words[content['verdict']]}. "
    )
    pays = f"with {', '.join(positive)}" if positive else "with none of them"
    return [f"{said}Everything charged, ClassAct pays {pays} (mean of {_seeds(content)} seeds)."]


def online(content: Row) -> list[str]:
    if not content["gap"]:
        return []
    said = f"scoring with the learner gains {_points(content['gap'])} points over plain ClassAct"
    free = [
        row
        for row in content["rows"]
        if row.get("gap_closed") is not None and row["extra_flops"] < 1e-3
    ]
    sure = [row for row in free if row["label"] in content["above_plain"]]
    for row in sure[:1]:
        said += (
            f"; {row['label']} of the online scorer close {percent(row['gap_closed'])} of that "
            "for nothing"
        )
    return [f"- **A better online scorer**: {said}."]


def rho(content: Row) -> list[str]:
    at = {
        row["method"]: row
        for row in content["rows"]
        if row["updates"] == content["updates"] and row["schedule"] == "decayed"
    }
    if len(at) < 2:
        return []
    accuracies = ", ".join(f"{r['label']} {_percent(r['accuracy'])}" for r in at.values())
    said = f"- **RHO-LOSS's protocol** ({content['data']}, 32 of 320 rows): {accuracies}"
    ours = at.get("rho", {})
    if "compute_speedup" in ours:
        said += f"; compute speedup, everything charged: {ours['compute_speedup']['text']}"
    return [f"{said}."]


def _percent(entry: Row) -> str:
    half = "" if entry["low"] is None else f" ± {50 * (entry['high'] - entry['low']):.1f}"
    return f"{100 * entry['mean']:.1f}{half} %"


def _points(entry: Row) -> str:
    half = "" if entry["low"] is None else f" ± {50 * (entry['high'] - entry['low']):.2f}"
    return f"{100 * entry['mean']:.2f}{half}"


def _seeds(content: Row) -> int:
    return len(content["seeds"])
