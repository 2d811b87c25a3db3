# SPDX-License-Identifier: Apache-2.0
"""What selection costs against eager torch: same inputs, same process, turn by turn, medians.

Eager is what one writes without this package: two `F.cross_entropy(reduction="none")`, Gumbel noise
by `exponential_().log()`, `topk`, `sort`.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import _native, spec
from activesel.loop import records
from activesel.testing import assert_as_accurate

RESULTS = Path(__file__).parent / "results" / "speed-cpu.json"
THREADS = (1, 2)
SECONDS = 4.0  # per case and number of threads


@dataclass(frozen=True)
class Case:
    """One comparison: B rows, k kept, C classes (0: the losses are given)."""

    name: str
    rows: int
    keep: int
    classes: int
    sides: int
    target: float  # eager's time over ours that we want at least

    @property
    def bytes(self) -> int:
        """Read once: logits and labels, or losses; written: scores, keys, rows kept."""
        per_row = 4 * self.sides * max(self.classes, 1) + (8 if self.classes else 0)
        return self.rows * (per_row + 8) + 8 * self.keep

    def make(self) -> tuple[Callable[[], activesel.Selection], Callable[[], Tensor]]:
        """Ours and eager's, on the same inputs; eager's returns indices."""
        g = torch.Generator().manual_seed(0)
        shape = (self.rows, self.classes) if self.classes else (self.rows,)
        inputs = [torch.randn(shape, generator=g) for _ in range(self.sides)]
        labels = torch.randint(self.classes, (self.rows,), generator=g) if self.classes else None
        sides = dict(zip(("online", "reference"), inputs, strict=False))
        step = iter(range(1 << 32))

        def ours() -> activesel.Selection:
            return activesel.select(**sides, targets=labels, k=self.keep, seed=1, step=next(step))  # type: ignore[arg-type]

        def eager() -> Tensor:
            scores = eager_scores(inputs, labels)
            keys = scores - torch.empty_like(scores).exponential_().log()
            return keys.topk(self.keep).indices.sort().values

        check(ours(), inputs, labels)
        assert eager().shape == (self.keep,)
        return ours, eager


CASES = [
    Case("logits 2 x [4096, 1000]", 4096, 1024, 1000, 2, 4.0),
    Case("logits 2 x [1024, 21843]", 1024, 256, 21843, 2, 8.0),
    Case("sample 163,840 -> 32,768", 163_840, 32_768, 0, 1, 4.0),
    Case("losses 2 x [256]", 256, 64, 0, 2, 1.0),
]


def eager_scores(inputs: list[Tensor], labels: Tensor | None) -> Tensor:
    losses = [x if labels is None else F.cross_entropy(x, labels, reduction="none") for x in inputs]
    return losses[0] - losses[1] if len(losses) > 1 else losses[0]


def check(picked: activesel.Selection, inputs: list[Tensor], labels: Tensor | None) -> None:
    """Refuse to time anything that is wrong: scores against float64, the rest bit for bit."""
    truth = eager_scores([x.double() for x in inputs], labels)
    assert_as_accurate(picked.scores, eager_scores(inputs, labels), truth, 1e-6)
    noise = spec.noise(len(truth), torch.tensor([1]), torch.tensor([0]))
    keys, _ = spec.key(picked.scores, noise, torch.ones(1))
    indices, threshold, _ = spec.topk(keys, len(picked.indices))
    if not (
        torch.equal(picked.keys, keys)
        and torch.equal(picked.indices, indices)
        and torch.equal(picked.threshold, threshold)
    ):
        raise AssertionError("keys and rows must be those of the specification")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_of(function: Callable[[], Any], calls: int) -> float:  # seconds a call
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    first: Callable[[], Any],
    second: Callable[[], Any],
    seconds: float = SECONDS,
) -> tuple[list[float], list[float]]:
    """Times of both, taken in turns, so that what disturbs the machine disturbs both alike."""
    time_of(first, 3), time_of(second, 3)
    pace = time_of(first, 3) + time_of(second, 3)
    calls = max(1, int(2e-3 / pace))  # at least 2 ms between two looks at the clock
    times: tuple[list[float], list[float]] = [], []
    stop = time.perf_counter() + seconds
    while len(times[0]) < 15 or time.perf_counter() < stop:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for i in order:
            times[i].append(time_of((first, second)[i], calls))
    return times


@dataclass(frozen=True)
class Row:
    case: str
    threads: int
    eager_us: float
    ours_us: float
    ratio: float
    ratio_p20: float  # of the ratios of neighbouring turns
    ratio_p80: float
    ours_gb_per_s: float
    target: float
    turns: int


def measure(case: Case, n: int, seconds: float = SECONDS) -> Row:
    ours, eager = case.make()
    with threads(n):
        mine, theirs = interleave(ours, eager, seconds)
    ours_s, eager_s = statistics.median(mine), statistics.median(theirs)
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    return Row(
        case.name, n, eager_s * 1e6, ours_s * 1e6, eager_s / ours_s, ratios[len(ratios) // 5],
        ratios[4 * len(ratios) // 5], case.bytes / ours_s / 1e9, case.target, len(mine),
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """The loop's description of the machine; threads are a column of the table here."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    described = records.environment()
    del described["threads"]
    return {**described, "kernels": _native.reason(), "commit": commit or "unknown"}


def save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, "machine": machine(), "rows": [asdict(row) for row in rows]}
    records.write_json(path, content)


def command(out: Path = RESULTS, seconds: float = SECONDS) -> None:
    """Time selection against eager torch at one and two threads, and write the table.

    Args:
        out: JSON file to write.
        seconds: time to spend per case and number of threads.
    """
    rows = []
    for case in CASES:
        for n in THREADS:
            row = measure(case, n, seconds)
            rows.append(row)
            print(
                f"{row.case:26} {row.threads} thread{'s' * (n > 1):1}  eager {row.eager_us:9.1f} us"
                f"  ours {row.ours_us:9.1f} us  {row.ratio:5.2f} x"
                f" [{row.ratio_p20:.2f}, {row.ratio_p80:.2f}], wanted {row.target:g} x"
            )
    save(rows, out)
    print(f"written to {out}")
