# SPDX-License-Identifier: Apache-2.0
"""What a result file says, for people; and how near each case came to what the device can do."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu import targets
from bench.gpu.timing import Row, Work

BOUNDS = {"flops": "products", "bytes": "memory", "exps": "exponentials", "nothing": "nothing"}


def rate_rows(content: Row) -> None:
    """Write into each row the floor that this run's best ceilings set, and how near it came.

    And which targets were met, unless it was a rehearsal.
    """
    ceilings: dict[str, float] = {}
    for row in content["rows"]:
        for name, rate in row.get("ceilings", {}).items():
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
    for row in content["rows"]:
        if "work" not in row or not ceilings:
            continue
        seconds, bound = Work(**row["work"]).floor(ceilings)
        row["floor"] = {"seconds": seconds, "bound": bound}
        for entry in row["variants"]:
            if "seconds" in entry:
                entry["percent_of_roofline"] = 100 * seconds / entry["seconds"]["p50"]
    if not content["rehearsal"]:
        content["targets"] = targets.compare(content["rows"])


def line(row: Row, rehearsal: bool) -> str:
    """One case, as it comes in."""
    if "error" in row:
        return f"  {row['case']}: {row['error']}"
    entries = row.get("variants", [])
    if rehearsal:
        wrong = [f"{e['name']}: {e['error']}" for e in entries if "error" in e]
        return f"  {row['case']}: " + ("; ".join(wrong) or "ran")
    said = [
        f"{e['name']} {e['error'][:80]}" if "error" in e else f"{e['name']} {time(e)}"
        for e in entries
    ]
    return f"  {row['case']}: " + ("; ".join(said) or "measured")


def time(entry: Row) -> str:
    p50 = entry["seconds"]["p50"]
    return f"{1e3 * p50:.3g} ms" if p50 >= 1e-3 else f"{1e6 * p50:.3g} us"


def table(content: Row) -> str:
    """Everything measured; nothing of a rehearsal, whose times mean nothing."""
    if content["rehearsal"]:
        return "a rehearsal: nothing was measured"
    return "\n".join([*_lines(content), "", *map(_target, content["targets"])])


def _lines(content: Row) -> Iterator[str]:
    m = content["machine"]
    yield f"{m.get('gpu')}, driver {m.get('driver')}, torch {m['torch']}, triton {m['triton']}"
    for row in content["rows"]:
        yield ""
        if "error" in row:
            yield f"{row['case']}: {row['error']}"
        if "ceilings" in row:
            c = row["ceilings"]
            yield "ceilings: " + ", ".join(
                f"{c[name] / scale:.4g} {unit}"
                for name, scale, unit in (
                    ("bytes", 1e12, "TB/s"), ("flops", 1e12, "TFLOP/s"), ("exps", 1e12, "Texp/s"),
                )
                if name in c
            )  # fmt: skip
        if "agreement" in row:
            yield f"{row['case']} (learnability rms {row['learnability_rms']:.4g})"
            for name, found in row["agreement"].items():
                yield (
                    f"  {name:32} keeps {100 * found['overlap']:8.4f} % of the true {row['kept']:,}"
                    f", error rms {found['error_rms']:.2g}"
                )
        if "variants" in row:
            yield row["case"] + _floor(row.get("floor"))
            for entry in row["variants"]:
                yield _entry(entry)


def _floor(floor: Row | None) -> str:
    return f" (floor {1e3 * floor['seconds']:.4g} ms, {BOUNDS[floor['bound']]})" if floor else ""


def _entry(entry: Row) -> str:
    if "error" in entry:
        return f"  {entry['name']:32} {entry['error']}"
    s, times = entry["seconds"], entry["times_the_first"]["p50"]
    extra = entry["peak_extra_bytes"]
    return (
        f"  {entry['name']:32} {1e3 * s['p50']:10.4f} ms"
        f" [{1e3 * s['p20']:.4f}, {1e3 * s['p80']:.4f}] {times:7.2f} x"
        f" {entry.get('percent_of_roofline', 0):6.1f} % of roofline"
        f" {0 if extra is None else extra / 1e6:10.1f} MB extra  {entry['method']}"
    )


def _target(t: Row) -> str:
    verdict = {True: "met", False: "NOT met", None: "not measured"}[t["met"]]
    what = f"{t['what']} over {t['against']}" if t["against"] else t["what"]
    said = "" if t["found"] is None else f"{t['found']:.4g}, "
    return f"{t['case']}: {what} {said}wanted {t['bound']:g} (aim {t['aim']:g}): {verdict}"
