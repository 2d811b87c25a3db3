# SPDX-License-Identifier: Apache-2.0
"""Which workloads there are, at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench.common import Scale
from bench.kernels import cases
from bench.kernels.place import Place
from bench.peers import workloads


def _matrix(rows: int, columns: int, *_: int) -> int:
    return 40 * rows * columns


def _vector(rows: int, *_: int) -> int:
    return 64 * rows


class Kind(NamedTuple):
    """What builds a workload, its title, and about how many bytes its sizes take."""

    build: Callable[..., workloads.Table]
    title: str
    need: Callable[..., int]


KINDS = {
    "logits": Kind(workloads.logits, "logits 2 x [{:,}, {:,}] -> {:,} rows", _matrix),
    "head": Kind(
        workloads.head, "heads of {1:,} classes, features 2 x [{0:,}, {2:,}] -> {3:,} rows", _matrix
    ),
    "sample": Kind(workloads.sample, "sample {:,} -> {:,}", _vector),
    "top": Kind(workloads.top, "top-k (T = 0) {:,} -> {:,}", _vector),
    "joint": Kind(workloads.joint, "joint {:,} -> {:,}, width {:,}", cases.OPS["joint"].need),
    "backprop": Kind(
        workloads.backprop, "selective backprop, logits [{:,}, {:,}] -> half", _matrix
    ),
}
SIZES: dict[Scale, dict[str, list[tuple[int, ...]]]] = {
    "smoke": {
        "logits": [(512, 1000, 128)],
        "head": [(512, 1000, 64, 128)],
        "sample": [(16_384, 3277)],
        "top": [(16_384, 3277)],
        "joint": [(1024, 205, 64)],
        "backprop": [(512, 100)],
    },
    "full": {
        "logits": [(4096, 1000, 1024), (1024, 21_843, 256)],
        "head": [(4096, 1000, 192, 1024)],
        "sample": [(163_840, 32_768), (1_000_000, 200_000)],
        "top": [(163_840, 32_768), (1_000_000, 200_000)],
        "joint": [(8192, 1640, 256)],
        "backprop": [(4096, 1000)],
    },
    "gpu": {
        "logits": [(4096, 1000, 1024), (4096, 29_592, 819)],
        "head": [(4096, 1000, 192, 1024), (163_840, 1000, 192, 32_768)],
        "sample": [(163_840, 32_768), (1_000_000, 200_000), (20_000_000, 4_000_000)],
        "top": [(163_840, 32_768), (1_000_000, 200_000)],
        "joint": [(8192, 1640, 256), (40_960, 8192, 768)],
        "backprop": [(4096, 1000)],
    },
}


@dataclass(frozen=True)
class Workload:
    kind: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return KINDS[self.kind].title.format(*self.sizes)

    def need(self) -> int:
        return KINDS[self.kind].need(*self.sizes)

    def make(self, at: Place) -> workloads.Table:
        return KINDS[self.kind].build(at, *self.sizes)


def every(scale: Scale) -> list[Workload]:
    return [Workload(kind, sizes) for kind, some in SIZES[scale].items() for sizes in some]
