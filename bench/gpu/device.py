# SPDX-License-Identifier: Apache-2.0
"""The device by itself: inputs and clocks on it, what it can do at most, and what cuBLAS gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from activesel import ops
from bench.gpu.baselines import Inputs
from bench.gpu.timing import (
    Clock,
    EventClock,
    Row,
    Variant,
    WallClock,
    Work,
    copies_for,
    measure,
)

BF16, FP32 = torch.bfloat16, torch.float32
SECONDS = 2.0  # of timing, a case


class Bench:
    """The device, its clock, and inputs that are never zeros."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.clock: Clock = WallClock() if rehearse else EventClock()
        self.seconds = 0.0 if rehearse else SECONDS
        self.rounds = (2, 2) if rehearse else (5, 100)
        self.backend = "triton" if rehearse else "auto"  # of the public functions
        self.cache = 0
        if not rehearse:
            self.cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.seed = torch.tensor([1234], device=self.device)
        self.step = torch.tensor([5], device=self.device)
        self.temperature = torch.ones(1, device=self.device)

    def size(self, real: int, rehearsed: int) -> int:
        return min(real, rehearsed) if self.rehearse else real

    def randn(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def labels(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), generator=self.generator, device=self.device)

    def head(self, rows: int, classes: int, width: int) -> list[Tensor]:
        """Features and weight in bf16 whose logits have unit variance."""
        weight = self.randn(classes, width) * width**-0.5
        return [self.randn(rows, width, dtype=BF16), weight.to(BF16)]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.rehearse:  # traced all the same, but no code is made
            return torch.compile(function, backend="eager", fullgraph=True)
        return torch.compile(function, dynamic=False, fullgraph=True)

    def copies(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Inputs of one kind, drawn again and again until they overflow the cache."""
        first = make()
        return [first, *(make() for _ in range(copies_for(first.bytes, self.cache) - 1))]

    def measure(self, variants: Sequence[Variant], work: Work, copies: int) -> Row:
        return measure(variants, work, copies, self.clock, self.seconds, self.rounds)


def ceilings(bench: Bench) -> Row:
    """Three rates that nothing here can exceed for long: copy, bf16 product, exponentials.

    And which backend the public functions take here for each stage, and why.
    """
    n = bench.size(1 << 30, 1 << 10)  # elements of 2 bytes
    side = bench.size(8192, 64)
    chain, elements = bench.size(128, 4), bench.size(1 << 24, 1 << 6)
    source, target = bench.randn(n, dtype=BF16), torch.empty(n, dtype=BF16, device=bench.device)
    a, b = (bench.randn(side, side, dtype=BF16) for _ in range(2))
    x = bench.randn(elements).abs()

    def exps(x: Tensor) -> Tensor:
        for _ in range(chain):
            x = torch.exp(-x)
        return x

    def check_exps(out: Tensor) -> str:
        if not torch.allclose(out, exps(x.double()).float(), atol=1e-4):
            raise AssertionError("exponentials must be those of float64")
        return "all exponentials within 1e-4 of float64"

    compiled = bench.compile(exps)
    trials = {
        "bytes": (
            Variant("copy", lambda _: target.copy_(source), lambda out: _same(out, source)),
            4 * n,
            f"4 bytes an element moved, {n} elements",
        ),
        "flops": (
            Variant("product", lambda _: a @ b, lambda out: _close(out, a, b)),
            2 * side**3,
            f"2 n^3, n = {side}, bf16",
        ),
        "exps": (
            Variant("exponentials", lambda _: compiled(x), check_exps),
            chain * elements,
            f"{chain} one after the other for each of {elements} elements",
        ),
    }
    chosen = {stage: ops.choose(bench.backend, bench.device, stage) for stage in ops.STAGES}
    row: Row = {"backends": chosen, "ceilings": {}, "formulas": {}, "spread": {}}
    for name, (variant, amount, formula) in trials.items():
        (entry,) = bench.measure([variant], Work(), 1)["variants"]
        if "error" in entry:
            row["failed"] = entry["error"]
            continue
        row["ceilings"][name] = amount / entry["seconds"]["p50"]
        row["formulas"][name] = formula
        row["spread"][name] = entry["seconds"]
    return row


def _same(out: Tensor, expected: Tensor) -> str:
    if not torch.equal(out, expected):
        raise AssertionError("the copy must equal its source")
    return "bit for bit"


def _close(out: Tensor, a: Tensor, b: Tensor) -> str:
    """A few rows of a @ b against float64, within a bf16 rounding."""
    rows = slice(0, 16)
    truth = a[rows].double() @ b.double()
    error = ((out[rows].double() - truth).norm() / truth.norm()).item()
    if not error < 1e-2:
        raise AssertionError(f"the product must be within 1e-2 of float64, got {error:.2g}")
    return f"16 rows within {error:.1g} of float64"


def product(rows: int, classes: int, width: int, bench: Bench) -> Row:
    """cuBLAS at the head's width: the product alone, its bf16 logits written."""
    rows, classes = bench.size(rows, 32), bench.size(classes, 64)
    x, w = bench.head(rows, classes, width)
    out = torch.empty(rows, classes, dtype=BF16, device=bench.device)
    variant = Variant(
        "cuBLAS", lambda _: torch.mm(x, w.T, out=out), lambda out: _close(out, x, w.T)
    )
    work = Work(
        2 * rows * classes * width,
        x.nbytes + w.nbytes + out.nbytes,
        formula="flops: 2 B C D; bytes: 2 B D + 2 C D in, 2 B C out",
    )
    return bench.measure([variant], work, 1)
