# SPDX-License-Identifier: Apache-2.0
"""Cases in a process of their own, which is replaced when a case takes it down or stalls it."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import torch

from bench.gpu.device import Bench
from bench.gpu.timing import Row

PLAN = "bench.gpu.plan"  # imported late, since triton reads its environment when it is
CASE_LIMIT = 120.0  # seconds, compiling included
START_LIMIT = 60.0


def cases(plan: str = PLAN) -> dict[str, Callable[[Bench], Row]]:
    return importlib.import_module(plan).CASES


def rows(
    wanted: Sequence[str],
    rehearse: bool,
    left: Callable[[], float],  # seconds until everything has to be over
    plan: str = PLAN,  # module with CASES
) -> Iterator[Row]:
    """One row per case, in order; a case that gave none says why in `error`."""
    waiting = list(wanted)
    while waiting and left() > 0:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, waiting, rehearse, plan))
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        try:
            yield from _listen(ours, waiting, left)
        finally:
            process.kill()
            process.join()
            ours.close()
    yield from ({"case": name, "error": "not reached: no time left"} for name in waiting)


def _listen(pipe: Connection, waiting: list[str], left: Callable[[], float]) -> Iterator[Row]:
    """Rows until the process is done, dead or stuck; then the case it was at has failed."""
    limit, started = START_LIMIT, False
    while waiting:
        lost = ""
        try:
            if pipe.poll(max(0.0, min(limit, left()))):
                row = pipe.recv()
            else:
                lost = f"stopped after {limit:.0f} s" if left() > 0 else "stopped: no time left"
        except EOFError:
            lost = "the process died"
        if lost and not started:  # nor would the next process start
            yield from ({"case": name, "error": f"at the start, {lost}"} for name in waiting)
            waiting.clear()
            return
        if lost:
            yield {"case": waiting.pop(0), "error": lost}
            return
        limit, started = CASE_LIMIT, True
        if row is not None:  # None: ready
            waiting.pop(0)
            yield row
            if row.get("lost"):
                return


def work(pipe: Connection, wanted: Sequence[str], rehearse: bool, plan: str) -> None:
    """Runs in the process: a row per case, also when it raises."""
    torch.set_grad_enabled(False)
    bench, known = Bench(rehearse), cases(plan)
    pipe.send(None)
    for name in wanted:
        row: Row = {"case": name}
        try:
            row |= known[name](bench)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
            row["traceback"] = traceback.format_exc()[-4000:]
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        try:
            if not rehearse:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as error:
            row |= {"lost": True, "error": row.get("error", f"device lost: {error}")}
        pipe.send(row)
        if row.get("lost"):
            return
