# SPDX-License-Identifier: Apache-2.0
"""Where kernels and peers are timed: a device, its clock, its rates, and what fits there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from activesel import ops
from bench import common, speed
from bench.gpu import device as gpu
from bench.gpu.baselines import Inputs
from bench.gpu.timing import Sampler, Variant

TURN = 2e-3  # seconds at least between two looks at the clock
PROBE = 1 << 24  # float32 elements, 64 MB: more than a cache holds
SIDE = 1024  # of the matrices whose product is timed
ROUNDS = (5, 500)  # fewest, most


class Pace:
    """Wall clock for the CPU, over as many calls as a turn takes."""

    def prepare(self, variant: Variant, copies: int) -> Sampler:
        def call() -> Any:
            return variant.call(0)

        calls = max(1, int(TURN / speed.time_of(call, 1)))
        return Sampler(lambda: speed.time_of(call, calls), f"wall clock, {calls} calls a turn")


class Place(gpu.Bench):
    """A device and inputs on it at their real sizes: fp32 on the CPU, bf16 on a GPU."""

    def __init__(self, device: str, seconds: float) -> None:
        cpu = device == "cpu"
        super().__init__(rehearse=cpu)
        self.backend, self.seconds, self.rounds = "auto", seconds, ROUNDS
        self.dtype = gpu.FP32 if cpu else gpu.BF16
        if cpu:
            self.clock = Pace()

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def name(self) -> str:
        machine = speed.machine()
        return str(machine["cpu"] if self.cpu else torch.cuda.get_device_name(self.device))

    def size(self, real: int, rehearsed: int) -> int:
        return real

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True)

    def copies(self, make: Callable[[], Inputs]) -> list[Inputs]:
        return [make()] if self.cpu else super().copies(make)

    def free(self) -> int:  # bytes
        return int(0.8 * (common.memory() if self.cpu else torch.cuda.mem_get_info()[0]))

    def backends(self) -> dict[str, str]:
        """Which backend the public functions take for each stage here."""
        return {stage: ops.choose(self.backend, self.device, stage)[0] for stage in ops.STAGES}

    def ceilings(self) -> dict[str, float]:
        """Bytes and FLOPs a second that this process gets here at best, with its threads."""
        if not self.cpu:
            return dict(gpu.ceilings(self)["ceilings"])
        x, a = torch.rand(PROBE), torch.rand(SIDE, SIDE)
        y, b = torch.empty_like(x), torch.empty_like(a)

        def best(call: Callable[[], Any]) -> float:
            call()
            return min(speed.time_of(call, 1) for _ in range(7))

        copied, read = 2 * x.nbytes / best(lambda: y.copy_(x)), x.nbytes / best(x.sum)
        return {
            "bytes": max(copied, read),
            "flops": 2 * SIDE**3 / best(lambda: torch.mm(a, a, out=b)),
        }


def place(scale: common.Scale, seconds: float) -> Place:
    """The GPU for "gpu", else the CPU.

    Raises:
        ValueError: no such scale. RuntimeError: there is no GPU.
    """
    if scale not in ("smoke", "full", "gpu"):
        raise ValueError(f"scale must be one of smoke, full, gpu, got {scale!r}")
    if scale == "gpu" and not torch.cuda.is_available():
        raise RuntimeError('scale "gpu" needs a CUDA device, got none: use "smoke" or "full"')
    return Place("cuda" if scale == "gpu" else "cpu", seconds)
