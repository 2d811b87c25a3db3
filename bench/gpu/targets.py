# SPDX-License-Identifier: Apache-2.0
"""What this package has to reach on a GPU, and whether a run did."""

from __future__ import annotations

from typing import NamedTuple

from bench.gpu.timing import Row


class Target(NamedTuple):
    case: str
    what: str  # see `found`
    against: str  # the variant's name begins so
    bound: float  # at least; of what is in `COSTS` at most
    aim: float

    def found(self, row: Row) -> float | None:
        """The number in a row of the result file; None if ours or the other has none.

        "speedup" over a variant, or "fp8 speedup"; "ms", "extra MB", "% of roofline"; of a
        variant's time "% more" than it, and "% of it"; "overlap" with the truth.
        """
        if self.what == "overlap":
            overlap: float = row["agreement"]["ours"]["overlap"]
            return overlap
        entries = [e for e in row["variants"] if "seconds" in e]
        if not row["first"].startswith("ours"):
            return None
        if self.what == "ms":
            return 1e3 * float(entries[0]["seconds"]["p50"])
        if self.what == "extra MB":
            extra: int | None = entries[0]["peak_extra_bytes"]
            return None if extra is None else extra / 1e6
        if self.what == "% of roofline":
            return entries[0].get("percent_of_roofline")
        times = {e["name"]: float(e["times_the_first"]["p50"]) for e in entries}
        other = next((t for name, t in times.items() if name.startswith(self.against)), None)
        if other is None:
            return None
        if self.what == "fp8 speedup":
            return other / times["ours, fp8"] if "ours, fp8" in times else None
        if self.what == "% more":
            return 100 * (1 / other - 1)
        return 100 * other if self.what == "% of it" else other


COSTS = ("ms", "extra MB", "% more", "% of it")
HEAD = "head to key: B 163,840, C 29,593, D 192, 2 sides, softmax"
TOPK = "key to top-k: B 163,840, k 32,768"
JOINT = "joint selection: B {}, k {}, D 768"
SCORERS = {
    "mu": "width 32, depth 1, 196 tokens: B 163,840",
    "w64": "width 64, depth 6, 49 tokens: B 16,384",
    "w192": "width 192, depth 12, 49 tokens: B 4,096",
    "Ti/16": "width 192, depth 12, 196 tokens: B 4,096",
}
MU, W64, W192, TI = (f"images to rows: {scorer}" for scorer in SCORERS.values())
TARGETS = [
    Target(HEAD, "speedup", "eager, bf16", 4.0, 7.0),
    Target(HEAD, "speedup", "torch.compile", 1.0, 1.8),
    Target(HEAD, "extra MB", "", 8.0, 8.0),
    Target(TOPK, "speedup", "torch.topk, sort", 5.0, 10.0),
    Target("agreement: B 163,840, C 29,593, D 192", "overlap", "", 0.99, 0.999),
    Target("agreement: B 163,840, C 1,000, D 192", "overlap", "", 0.99, 0.999),
    Target(JOINT.format("40,960", "8,192"), "ms", "", 5.0, 3.5),
    Target(JOINT.format("163,840", "32,768"), "ms", "", 90.0, 55.0),
    Target(JOINT.format("163,840", "32,768"), "speedup", "torch.compile", 1.0, 1.25),
    Target(MU, "speedup", "eager", 8.0, 13.0),
    Target(MU, "speedup", "torch.compile", 5.0, 9.0),
    Target(W64, "speedup", "torch.compile", 4.0, 8.0),
    Target(W192, "speedup", "torch.compile", 1.5, 3.0),
    Target(W192, "% of roofline", "", 30.0, 60.0),
    Target(TI, "speedup", "torch.compile", 1.2, 1.65),
    Target(TI, "fp8 speedup", "torch.compile", 1.2, 2.6),
    *(Target(case, "% more", "features alone", 2.0, 0.5) for case in (MU, W64, W192, TI)),
    *(Target(case, "% of it", "packing alone", 1.0, 1.0) for case in (MU, W64, W192, TI)),
    *(
        Target(f"agreement of scorers: {scorer}", "overlap", "", 0.98, 0.995)
        for scorer in SCORERS.values()
    ),
]


def compare(rows: list[Row]) -> list[Row]:
    """Each target with what was found; `met` is None where nothing was."""
    by_case = {row["case"]: row for row in rows if "variants" in row or "agreement" in row}
    out = []
    for target in TARGETS:
        found = target.found(by_case[target.case]) if target.case in by_case else None
        sign = -1 if target.what in COSTS else 1
        met = None if found is None else sign * found >= sign * target.bound
        out.append(target._asdict() | {"found": found, "met": met})
    return out
