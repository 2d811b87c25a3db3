# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside time: memory, looks at device data from the host, FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import profiler_legacy
from torch.utils.flop_counter import FlopCounterMode

from bench import joint
from bench.gpu import timing

Call = Callable[..., Any]

# On CUDA tensors each of these waits for the device; the methods copy all of a tensor, and whoever
# wants an array has to call one of them first.
READS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"})
METHODS = ("cpu", "tolist", "to")


@contextmanager
def _copies() -> Iterator[list[str]]:
    """Methods that copy to the host, which leave no trace where the data is there already.

    Watched by name: under a mode `torch.compile` would compile once more.
    """
    seen: list[str] = []

    def watched(name: str) -> Call:
        method = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = (x for x in (*args[1:], *kwargs.values()) if isinstance(x, str))
            if name != "to" or "cpu" in given:  # a torch.device may be the data's own
                seen.append(name)
            return method(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, watched(name)))
        yield seen


def syncs(call: Call, device: torch.device) -> int:
    """How often the host waits for the device in one call.

    On a GPU torch warns of each. On the CPU, where nothing waits, counted are the operators that
    would: scalars read, sizes that depend on data (by torch's profiler, which sees inside C++
    operators such as `multinomial`; a dispatch mode does not), and copies to the host.

    >>> syncs(lambda: torch.ones(3).multinomial(2), torch.device("cpu"))
    2
    """
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return sum("synchronizing CUDA operation" in str(w.message) for w in seen)
    with _copies() as copies, profiler_legacy.profile() as profile:
        call()
    return len(copies) + sum(event.name in READS for event in profile.function_events)


def memory(call: Call, device: torch.device) -> int | None:
    """Bytes beyond those before the call, at most, results included; None where nothing can tell.

    On the CPU: resident pages (Linux), those of C++ and NumPy among them, the least of three.
    """
    if device.type == "cuda":
        return timing.peak_memory(lambda _: call())
    try:
        return max(0, min(joint.peak(call) for _ in range(3)))
    except OSError:
        return None


def _matvec(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def flops(call: Call) -> int:
    """FLOPs of products in one call, two per multiply-add; what torch's counter sees.

    >>> flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
    48
    """
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _matvec}) as counter:
        call()
    return int(counter.get_total_flops())
