# SPDX-License-Identifier: Apache-2.0
"""What this package has to reach on a GPU, and whether a run did."""

from __future__ import annotations

from typing import NamedTuple

from bench.gpu.timing import Row


class Target(NamedTuple):
    case: str
    what: str  # "speedup" over a variant, "ms" or "extra MB" of the first, "overlap" with the truth
    against: str  # the variant's name begins so
    bound: float  # at least; time and extra memory: at most
    aim: float

    def found(self, row: Row) -> float | None:
        """The number in a row of the result file; None if ours or the other has none."""
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
        others = (e for e in entries if e["name"].startswith(self.against))
        return next((e["times_the_first"]["p50"] for e in others), None)


HEAD = "head to key: B 163,840, C 29,593, D 192, 2 sides, softmax"
TOPK = "key to top-k: B 163,840, k 32,768"
JOINT = "joint selection: B {}, k {}, D 768"
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
]


def compare(rows: list[Row]) -> list[Row]:
    """Each target with what was found; `met` is None where nothing was."""
    by_case = {row["case"]: row for row in rows if "variants" in row or "agreement" in row}
    out = []
    for target in TARGETS:
        found = target.found(by_case[target.case]) if target.case in by_case else None
        sign = -1 if target.what in ("ms", "extra MB") else 1
        met = None if found is None else sign * found >= sign * target.bound
        out.append(target._asdict() | {"found": found, "met": met})
    return out
