# SPDX-License-Identifier: Apache-2.0
"""Which operators are timed, at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.common import Scale
from bench.kernels import builders
from bench.kernels.builders import Made
from bench.kernels.place import Place


class Op(NamedTuple):
    """A builder, what of the package it times, and about how many bytes its sizes take."""

    sizes: str  # their names, in the builder's order
    build: Callable[..., Made]
    stage: str  # of `ops.STAGES`, or empty
    function: str  # of the public ones that is called, or empty
    need: Callable[..., int]


def _matrix(rows: int, classes: int, *_: Any) -> int:
    return 40 * rows * classes


def _vector(rows: int, *_: Any) -> int:
    return 64 * rows


OPS: dict[str, Op] = {
    "logits -> rows": Op("B C k", builders.logits_to_rows, "logits", "select", _matrix),
    "logits -> losses": Op("B C loss", builders.logits_to_losses, "logits", "score", _matrix),
    "losses -> scores": Op("B", builders.losses_to_scores, "scores", "score", _vector),
    "losses -> rows": Op("B k", builders.losses_to_rows, "losses", "select", _vector),
    "head -> rows": Op("B C D k", builders.head_to_rows, "head", "select", _matrix),
    "pairs -> rows": Op("B D k", builders.pairs_to_rows, "scores", "select", _matrix),
    "images -> rows": Op(
        "B ViT k", builders.images_to_rows, "scorer", "select", lambda b, *_: 200_000 * b
    ),
    "sample": Op("B k", builders.sampled, "losses", "sample", _vector),
    "noise": Op("B", builders.noise, "", "", _vector),
    "keys -> rows": Op("B k", builders.keys_to_rows, "topk", "", _vector),
    "joint": Op(
        "B k D loss",
        builders.joint,
        "joint",
        "joint_select",
        lambda b, k, d, *_: 32 * b * d + b * k,
    ),
    "take": Op("B D k", builders.take, "", "take", lambda b, d, *_: 12 * b * d),
}
SIZES: dict[Scale, dict[str, list[tuple[Any, ...]]]] = {
    "smoke": {
        "logits -> rows": [(512, 1000, 128)],
        "logits -> losses": [(512, 1000), (512, 1000, "sigmoid")],
        "losses -> scores": [(16_384,)],
        "losses -> rows": [(256, 64)],
        "head -> rows": [(512, 1000, 64, 128)],
        "pairs -> rows": [(1024, 64, 256)],
        "images -> rows": [(256, "femto", 64)],
        "sample": [(16_384, 3277)],
        "noise": [(16_384,)],
        "keys -> rows": [(16_384, 3277)],
        "joint": [(1024, 205, 64), (1024, 205, 64, "softmax")],
        "take": [(256, 784, 64)],
    },
    "full": {
        "logits -> rows": [(4096, 1000, 1024), (1024, 21_843, 256)],
        "logits -> losses": [(4096, 1000), (1024, 21_843), (4096, 1000, "sigmoid")],
        "losses -> scores": [(256,), (163_840,)],
        "losses -> rows": [(256, 64), (4096, 819), (163_840, 32_768)],
        "head -> rows": [(4096, 1000, 192, 1024), (1024, 21_843, 192, 256)],
        "pairs -> rows": [(8192, 256, 1640)],
        "images -> rows": [(256, "nano", 64), (2048, "micro", 512)],
        "sample": [(163_840, 32_768), (1_000_000, 200_000)],
        "noise": [(163_840,), (1_000_000,)],
        "keys -> rows": [(163_840, 32_768), (1_000_000, 200_000)],
        "joint": [(8192, 1640, 256), (8192, 1640, 256, "softmax")],
        "take": [(4096, 3072, 1024)],
    },
    "gpu": {
        "logits -> rows": [(4096, 1000, 1024), (4096, 29_593, 819)],
        "logits -> losses": [(4096, 1000), (4096, 29_593), (4096, 1000, "sigmoid")],
        "losses -> scores": [(163_840,)],
        "losses -> rows": [(4096, 819), (163_840, 32_768)],
        "head -> rows": [(4096, 1000, 192, 1024), (163_840, 1000, 192, 32_768)],
        "pairs -> rows": [(40_960, 768, 8192)],
        "images -> rows": [(4096, "nano", 819), (4096, "micro", 819)],
        "sample": [(163_840, 32_768), (16_000_000, 3_300_000)],
        "noise": [(163_840,), (16_000_000,)],
        "keys -> rows": [(163_840, 32_768), (16_000_000, 3_300_000)],
        "joint": [(8192, 1640, 256), (40_960, 8192, 768)],
        "take": [(4096, 3072, 1024)],
    },
}


@dataclass(frozen=True)
class Case:
    """One operator at one size; its `str` is its id."""

    op: str
    sizes: tuple[Any, ...]

    @property
    def shape(self) -> str:
        named = zip(OPS[self.op].sizes.split(), self.sizes, strict=False)
        return ", ".join(f"{name} {n:,}" if isinstance(n, int) else n for name, n in named)

    def __str__(self) -> str:
        return f"{self.op}: {self.shape}"

    def need(self) -> int:
        return OPS[self.op].need(*self.sizes)

    def make(self, at: Place) -> Made:
        return OPS[self.op].build(at, *self.sizes)


def cases(scale: Scale) -> list[Case]:
    return [Case(op, sizes) for op, every in SIZES[scale].items() for sizes in every]
