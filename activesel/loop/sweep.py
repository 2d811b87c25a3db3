# SPDX-License-Identifier: Apache-2.0
"""Many runs over a few processes; whatever is finished stays finished."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from activesel.loop.config import Config
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.rho_config import RhoConfig

# By default glibc returns the memory of every large activation to the system and asks for it again
# at the next update, which costs a wide forward pass a quarter of its time. Read at process start.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def sweep(
    configs: Sequence[Config | PairsConfig | RhoConfig],
    out: Path,
    workers: int = 2,
    on_progress: Callable[[int], object] | None = None,
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Run every config, in this order, `workers` at a time, one thread each.

    References go first, once each. Stopped half-way, in whatever way, the workers stop too and the
    same call goes on: finished runs are read back, the others continue from their checkpoints.

    Args:
        configs: the runs, most important first.
        out: folder of all runs.
        workers: processes, at least 1.
        on_progress: called a few times a second with the updates done so far, of all runs.
        device: where to train.

    Yields:
        The records of the runs, as they finish.

    Raises:
        ValueError: `workers` out of range; whatever a run raises comes through too.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    missing = [c for c in configs if not (out / c.name / "run.json").is_file()]
    for loop in dict.fromkeys(c.loop for c in missing):
        _module(loop).prepare([c for c in missing if c.loop == loop])
    out.mkdir(parents=True, exist_ok=True)
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("spawn")
    updates = context.Value("q", 0)
    life, ours = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, context, _initialise, (life, updates)) as pool:
        try:
            for wave in _references(missing, out):
                for done in [pool.submit(_reference, config, out, device) for config in wave]:
                    done.result()
            left: set[Future[dict[str, Any]]] = {pool.submit(_run, c, out, device) for c in configs}
            while left:
                finished, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                if on_progress is not None:
                    on_progress(updates.value)
                for run_done in finished:
                    yield run_done.result()
        except BaseException:
            ours.close()  # else leaving the pool would wait for the runs under way
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _references(configs: Sequence[Any], out: Path) -> list[list[Any]]:
    """Missing references, each once, in waves: one that needs another is in a later wave."""
    waves: list[list[Any]] = []
    while configs:
        needed = dict.fromkeys(c.reference for c in configs if c.reference is not None)
        configs = [c for c in needed if not (out / c.name / "reference.json").is_file()]
        waves.insert(0, configs)
    return waves


def _module(loop: str) -> Any:
    return importlib.import_module(f"activesel.loop.{loop}")


def _initialise(life: Connection, updates: Any) -> None:
    """Start a worker, which ends when the other end of `life` closes: by hand, or by any death."""
    global _updates
    _updates = updates
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def follow() -> None:
        life.poll(None)
        os._exit(1)  # files are written whole or not at all, so at any time

    threading.Thread(target=follow, daemon=True).start()


_updates: Any = None
"""Counter shared by the workers of a sweep."""


def _add(updates: int) -> None:
    with _updates.get_lock():
        _updates.value += updates


def _run(config: Any, out: Path, device: str) -> dict[str, Any]:
    seen = 0

    def count(trainer: Any) -> None:
        nonlocal seen
        _add(trainer.step - seen)
        seen = trainer.step

    result: dict[str, Any] = _module(config.loop).run(config, out, on_update=count, device=device)
    _add(config.updates - seen)  # a finished run was only read
    return result


def _reference(config: Any, out: Path, device: str) -> None:
    _module(config.loop).reference(config, out, device=device)
