# SPDX-License-Identifier: Apache-2.0
"""One launch of every variant of every Triton kernel, through the backend's own functions.

Names hold what no compile-time constant of the kernel tells: dtypes, sides, and which sizes Triton
treats on their own (1, and multiples of 16, unless told otherwise). Nothing here looks at values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from activesel import _triton
from activesel.kernels import config, pairs
from activesel.kernels.topk import topk
from bench import launches_scorer

Case = tuple[str, Callable[[], object]] | launches_scorer.Launch
ROWS, KEPT = 8192, 1024
CPU = torch.device("cpu")
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launches(arch: int) -> Iterator[Case]:
    """Everything, on a device of that compute capability. Take each before asking for the next."""
    config.capability = lambda device: arch
    yield from of_keys()  # first, or they would be named after what makes the keys
    yield from of_losses()
    yield from of_logits()
    yield from of_heads()
    yield from of_pairs()
    yield from launches_scorer.of_scorers(arch)


def of_keys() -> Iterator[Case]:
    def call(rows: int, k: int, programs: int | None = 16) -> Callable[[], object]:
        words = None if programs is None else torch.empty(programs, dtype=torch.int32)
        return partial(topk, torch.empty(rows), k, words)

    yield "", call(ROWS, KEPT)
    yield "large", call(163_840, 32_768, 1280)
    yield "huge", call(1 << 24, 1 << 20, 4096)
    yield "odd", call(ROWS + 1, KEPT + 1, 17)
    yield "single", call(ROWS, 1, 1)
    yield "everything", call(ROWS + 2, ROWS + 2, 17)
    yield "keys alone", call(ROWS, KEPT, None)


def _call(
    *sides: list[Tensor],  # [B], [B, (T,) C] or [B, (T,) D], [C, D], ([C])
    loss: str = "softmax",
    smoothing: float = 0.0,
    keys: bool = True,
) -> Callable[[], object]:
    shape = max((side[0].shape[:-1] for side in sides if side), key=len)
    targets = torch.zeros(shape, dtype=torch.int64) if shape else None
    how = loss, smoothing, -100
    if not keys:
        return partial(_triton.score, *sides, targets, *how)
    integer, temperature = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    return partial(_triton.select, *sides, targets, KEPT, integer, integer, temperature, 0, *how)


def of_losses() -> Iterator[Case]:
    for name, dtype in NAMES.items():
        x = [torch.empty(ROWS, dtype=dtype)]
        yield f"{name} losses pair", _call(x, x)
    yield "fp32 losses online", _call(x, [])
    yield "fp32 losses reference", _call([], x)
    yield "fp32 losses pair scores", _call(x, x, keys=False)
    x = [torch.empty(2 * ROWS)[::2]]
    yield "fp32 losses pair strided", _call(x, x)


def of_logits() -> Iterator[Case]:
    def logits(name: str, *shape: int) -> list[Tensor]:
        return [torch.empty(ROWS, *shape, dtype=NAMES[name])]

    losses = logits("fp32")
    for name in NAMES:
        for loss in ("softmax", "sigmoid"):
            x = logits(name, 1000)
            yield f"{name} logits pair", _call(x, x, loss=loss, smoothing=0.1)
    for classes in (2, 10, 100, 1024, 32_768):
        x = logits("bf16", classes)
        yield f"bf16 logits pair C={classes}", _call(x, x, smoothing=0.1)
    for classes in (2, 99):
        x = logits("bf16", classes)
        yield f"bf16 logits pair C={classes}", _call(x, x, smoothing=0.1, loss="sigmoid")
    x = logits("bf16", 1000)
    yield "bf16 logits pair", _call(x, x)
    yield "bf16 logits online, fp32 losses", _call(x, losses)
    yield "bf16 logits online", _call(x, [])
    yield "bf16 logits reference", _call([], x)
    yield "bf16 logits pair scores", _call(x, x, keys=False)
    x = [torch.empty(1000, ROWS, dtype=torch.bfloat16).T]
    yield "bf16 logits pair transposed", _call(x, x)
    x = logits("bf16", 4, 1000)
    for loss in ("softmax", "sigmoid"):
        yield f"bf16 logits pair T=4 {loss}", _call(x, x, loss=loss)
    yield "bf16 logits online T=4, fp32 losses", _call(x, losses)


def of_heads() -> Iterator[Case]:
    """Softmax with every tile of every table, all else with the tile that is used for it."""

    def head(name: str, width: int, *, classes: int = 1000, weight: str = "", bias: bool = True,
             tokens: tuple[int, ...] = ()) -> list[Tensor]:  # fmt: skip
        x = torch.empty(ROWS, *tokens, width, dtype=NAMES[name])
        w = torch.empty(classes, width, dtype=NAMES[weight or name])
        return [x, w, w[:, 0]] if bias else [x, w]

    losses = [torch.empty(ROWS)]
    for name, width in (("bf16", config.NARROW), ("bf16", 768), ("fp32", 768)):
        x = head(name, width)
        kind, call = config.kind([x]), _call(x, x, smoothing=0.1)
        used = config.tile(CPU, kind, False)
        for tile in config.candidates(CPU, kind):
            config.use(CPU, kind, False, tile)
            yield f"{name} head pair smoothed", call
        config.use(CPU, kind, False, used)
        yield f"{name} head pair smoothed", _call(x, x, smoothing=0.1, loss="sigmoid")
    for name in NAMES:
        for width in (config.NARROW, 768):
            x = head(name, width)
            yield f"{name} head pair", _call(x, x)
            yield f"{name} head online, fp32 losses", _call(x, losses)
    x = head("bf16", config.NARROW)
    yield "bf16 head online", _call(x, [])
    yield "bf16 head reference", _call([], x)
    yield "bf16 head pair scores", _call(x, x, keys=False)
    yield "bf16 head, fp32 losses online", _call(losses, x)
    for loss in ("softmax", "sigmoid"):
        many = head("bf16", config.NARROW, tokens=(4,))
        yield f"bf16 head pair T=4 {loss}", _call(many, many, loss=loss)
    yield "bf16 head online T=4, fp32 losses", _call(many, losses)
    plain = head("bf16", config.NARROW, classes=1024, bias=False)
    yield "bf16 head pair C=1024 no bias", _call(plain, plain)
    yield "bf16 heads of two widths", _call(head("bf16", 64), head("bf16", 384))
    for width in (32, 64, 100, 200):  # the last two: rows that are not aligned
        x = head("bf16", width)
        yield "bf16 head pair", _call(x, x)
    mixed = head("bf16", config.NARROW, weight="fp32")
    yield "bf16 head pair, fp32 weights", _call(mixed, mixed)


def of_pairs() -> Iterator[Case]:
    """Both losses with every tile of the table, all else with the one that is used for it."""

    def side(name: str, width: int = 768) -> list[Tensor]:
        x, number = torch.empty(ROWS, width, dtype=NAMES[name]), torch.ones(1)
        return [x, x, number, number]

    def add(loss: str, x: list[Tensor], *, all_rows: bool = True, tile: config.Tile | None = None,
            ) -> Callable[[], object]:  # fmt: skip
        rows = None if all_rows else torch.zeros(ROWS, dtype=torch.int64)
        state = torch.empty(1 if loss == "sigmoid" else 4, ROWS)
        chunk = torch.zeros(512, dtype=torch.int64)
        return partial(pairs.pair_add, state, x, [], rows, chunk, loss, tile)

    for loss in ("sigmoid", "softmax"):
        for name in NAMES:
            yield f"{name} pairs", add(loss, side(name))
        x = side("bf16")
        for tile in config.pair_candidates(x[0]):
            yield "bf16 pairs", add(loss, x, tile=tile)
        yield "bf16 pairs, rows given", add(loss, x, all_rows=False)
        for width in (32, 100, 200):
            yield "bf16 pairs", add(loss, side("bf16", width))
    for name in NAMES:
        yield f"{name} pairs", partial(_triton.pair_logits, side(name))
    yield "bf16 pairs", partial(_triton.pair_logits, side("bf16", 100))
    own, chosen = torch.empty(ROWS), torch.zeros(ROWS, dtype=torch.bool)
    for name, state, terms, sides in (
        ("first chunk", None, None, (True, True)),
        ("sigmoid", torch.empty(1, ROWS), None, (True, True)),
        ("sigmoid, means", torch.empty(1, ROWS), torch.ones(1), (True, True)),
        ("softmax", torch.empty(4, ROWS), None, (True, True)),
        ("softmax online", torch.empty(4, ROWS), None, (True, False)),
    ):
        yield f"keys of pairs, {name}", partial(
            _triton.pair_keys, own, state, chosen, own.clone(), own.clone(), terms, sides,
            *(torch.zeros(1, dtype=torch.int64),) * 2, torch.ones(1), 0, 1,
        )  # fmt: skip
