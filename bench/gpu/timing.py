# SPDX-License-Identifier: Apache-2.0
"""Clocks for work that runs elsewhere: what a call costs on the device, and what it could cost.

Variants of one case are timed in turns on rotating copies of their inputs, so that a warm cache or
a changing clock rate favours nobody. Short calls are replayed from a CUDA graph: what is measured
is the device, not Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

GRAPH_BELOW = 2e-3  # seconds: a longer call hides its own launches
SAMPLE = 1e-3  # seconds at least between two looks at the clock
MOST_COPIES = 256
AHEAD = 20_000_000  # clocks, about 10 ms, that the device is kept waiting for Python to run ahead
FEWEST_CALLS = 20  # in a graph, so that the gap between two replays does not count
ROUNDS = (5, 100)  # fewest, most

Row = dict[str, Any]  # of a result file


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid, and the formulas that say so."""

    flops: int = 0  # in matrix products
    bytes: int = 0  # inputs read once, outputs written once
    exps: int = 0
    formula: str = ""

    def floor(self, ceilings: Mapping[str, float]) -> tuple[float, str]:  # seconds, what binds
        """The largest of three times, each at the rate measured on this device in this run.

        >>> Work(flops=100, bytes=10).floor({"flops": 50.0, "bytes": 10.0})
        (2.0, 'flops')
        """
        times = {
            name: getattr(self, name) / ceilings[name]
            for name in ("flops", "bytes", "exps")
            if ceilings.get(name)
        }
        return max(((t, name) for name, t in times.items()), default=(0.0, "nothing"))


@dataclass(frozen=True)
class Variant:
    """One way to do the work: `call(i)` on copy i of the inputs."""

    name: str
    call: Callable[[int], Any]
    check: Callable[[Any], str]  # raises AssertionError if wrong; else says what was compared
    ours: bool = False  # a case fails if one of ours is wrong; a baseline may be missing
    from_python: bool = False  # time it with its launches, as a training loop meets it


@dataclass(frozen=True)
class Sampler:
    """`sample()` gives seconds per call, and `method` says how they were taken."""

    sample: Callable[[], float]
    method: str


class Clock(Protocol):
    def prepare(self, variant: Variant, copies: int) -> Sampler: ...


class WallClock:
    """For rehearsals on the CPU; its times mean nothing."""

    def prepare(self, variant: Variant, copies: int) -> Sampler:
        turn = _turns(copies)

        def sample() -> float:
            start = time.perf_counter()
            variant.call(next(turn))
            return time.perf_counter() - start

        return Sampler(sample, "wall clock")


class EventClock:
    """CUDA events around replays of a graph, or around enough calls to fill a millisecond."""

    def prepare(self, variant: Variant, copies: int) -> Sampler:
        turn = _turns(copies)
        self._between(lambda: variant.call(next(turn)), 2)
        estimate = self._between(lambda: variant.call(next(turn)), 3)
        if estimate < GRAPH_BELOW and not variant.from_python:
            calls = -(-max(FEWEST_CALLS, copies) // copies) * copies  # all copies equally often
            try:
                graph = self._capture(variant, copies, calls)
            except RuntimeError as error:
                why = f", launches included (no graph: {str(error).splitlines()[0]})"
            else:
                repeats = max(1, int(SAMPLE / self._between(graph.replay, 3)))
                return Sampler(
                    lambda: self._between(graph.replay, repeats) / calls, f"graph of {calls}"
                )
        else:
            why = ", launches included" if variant.from_python else ""
        calls = max(1, int(SAMPLE / estimate))
        ahead = not variant.from_python
        return Sampler(
            lambda: self._between(lambda: variant.call(next(turn)), calls, ahead),
            f"stream of {calls}{why}",
        )

    @staticmethod
    def _between(function: Callable[[], Any], calls: int, ahead: bool = False) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    @staticmethod
    def _capture(variant: Variant, copies: int, calls: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                variant.call(i % copies)
        graph.replay()
        torch.cuda.synchronize()
        return graph


def _turns(copies: int) -> Any:
    while True:
        yield from range(copies)


def copies_for(each: int, cache: int) -> int:
    """How many copies of inputs of `each` bytes overflow a cache twice over; two at least.

    >>> copies_for(1 << 20, 50 << 20), copies_for(1 << 30, 50 << 20), copies_for(1, 50 << 20)
    (100, 2, 256)
    """
    return min(max(2, -(-2 * cache // max(each, 1))), MOST_COPIES)


def spread(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80.

    >>> spread([5.0, 1.0, 2.0, 4.0, 3.0])
    {'p20': 1.8, 'p50': 3.0, 'p80': 4.2}
    """
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(times), "p80": p80}


def take_turns(
    samplers: Mapping[str, Callable[[], float]],
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Samples of all, round by round; every round starts with another one."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    names, fewest, most = list(samplers), *rounds
    stop = now() + seconds
    for i in range(most):
        if i >= fewest and now() >= stop:
            break
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            times[name].append(samplers[name]())
    return times


def peak_memory(call: Callable[[int], Any]) -> int | None:  # bytes beyond the inputs
    """What one call allocates at its height, its results included; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call(0)
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def measure(
    variants: Sequence[Variant],
    work: Work,
    copies: int,
    clock: Clock,
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
) -> Row:
    """Check every variant, then time those that are right, in turns.

    A variant that is wrong or cannot run leaves its error instead of times; `failed` says whether
    one of ours did. Ratios are to the first variant that has times.
    """
    entries: dict[str, Row] = {}
    samplers: dict[str, Callable[[], float]] = {}
    failed = False
    for v in variants:
        entry = entries[v.name] = {"name": v.name}
        try:
            entry["checked"] = v.check(v.call(0))
            entry["peak_extra_bytes"] = peak_memory(v.call)
            sampler = clock.prepare(v, copies)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            failed |= v.ours
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the device is lost, and with it the case
                torch.cuda.empty_cache()
        else:
            entry["method"] = sampler.method
            samplers[v.name] = sampler.sample
    times = take_turns(samplers, seconds, rounds)
    first = next(iter(times), "")
    for name, taken in times.items():
        entries[name] |= {
            "seconds": spread(taken),
            "rounds": len(taken),
            "times_the_first": spread([b / a for a, b in zip(times[first], taken, strict=True)]),
        }
    row: Row = {"work": asdict(work), "copies": copies, "first": first}
    row["variants"] = list(entries.values())
    return row | ({"failed": True} if failed else {})
