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
