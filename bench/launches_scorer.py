# SPDX-License-Identifier: Apache-2.0
"""Launches of the one-launch scorer and of the blocks route, for `bench.launches`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from activesel.kernels import blocks, config, routes, scorer
from activesel.kernels.operands import Labels, Noise
from activesel.packing import Packed, Shape

ROWS, KEPT, CLASSES = 8192, 1638, 1000


class Launch(NamedTuple):
    """A launch, what names it, and how many of its programs are to share a multiprocessor."""

    name: str
    call: Callable[[], object]
    programs: int


# Width, depth, heads, patch side, image side, channels; 16, 49, 64, 196 tokens among them.
FAMILIES = {
    "mu": (32, 1, 2, 16, 224, 3),
    "w48": (48, 6, 3, 4, 28, 1),
    "w64": (64, 6, 2, 32, 224, 3),
    "w64 t196": (64, 6, 2, 16, 224, 3),
    "w96": (96, 12, 3, 8, 32, 3),
    "w128": (128, 6, 2, 4, 32, 3),
    "w192": (192, 12, 3, 32, 224, 3),
    "Ti/16": (192, 12, 3, 16, 224, 3),
}


def shape(family: str, pooled_by_class: bool = False, kept: bool = False) -> Shape:
    """Of a family's model with an MLP 4x as wide.

    >>> shape("w192").tokens, shape("w96", pooled_by_class=True).tokens
    (49, 17)
    """
    width, depth, heads, patch, side, channels = FAMILIES[family]
    tokens = (side // patch) ** 2 // (1 + kept) + pooled_by_class
    return Shape(
        width, depth, heads, 4 * width, tokens, channels, side, patch, CLASSES, pooled_by_class,
        kept, 1e-5,
    )  # fmt: skip


def images(
    of: Shape, dtype: torch.dtype = torch.uint8, last: bool = False, rows: int = ROWS
) -> scorer.Pixels:
    size = [rows, of.channels, of.image_size, of.image_size]
    if last:
        data = torch.empty(*size[:1], *size[2:], of.channels, dtype=dtype).permute(0, 3, 1, 2)
    else:
        data = torch.empty(size, dtype=dtype)
    return scorer.pixels(data)


def launch(
    family: str,
    *,
    dtype: torch.dtype = torch.uint8,
    last: bool = False,
    sides: int = 2,
    given: bool = False,  # losses of the other side
    loss: str | None = "softmax",  # None: features only
    smoothing: float = 0.0,
    keys: bool = True,
    k: int | None = KEPT,
    fp8: bool = False,
    pooled_by_class: bool = False,
    kept: bool = False,
    tile: config.ScorerTile | None = None,
) -> Launch:
    of = shape(family, pooled_by_class, kept)
    packed = Packed(of, sides, channels_last=last, fp8=fp8)
    tile = tile or config.scorer_tile(packed)
    labels: Labels | None = None
    noise: Noise | None = None
    if loss:
        targets = torch.zeros(ROWS, dtype=torch.int64)
        labels = Labels(targets, 1, CLASSES, -100, loss == "sigmoid", smoothing)
    if keys and loss:
        integer = torch.zeros(1, dtype=torch.int64)
        noise = Noise(integer, integer, torch.ones(1), 0)
    others: Tensor | None = torch.empty(ROWS) if given else None
    said = {
        family: True,
        "fp8": fp8,
        str(dtype).removeprefix("torch."): dtype != torch.uint8,
        "losses": given,
        "features": not loss,
        "smoothed": smoothing > 0,
        "scores": loss and not keys,
        "top-k": noise and k,
    }
    name = " ".join(word for word, holds in said.items() if holds)

    def call() -> object:
        found = k if noise else None
        return scorer.scorer(packed, images(of, dtype, last), labels, others, 1, noise, found, tile)

    return Launch(name, call, tile.programs)


def blocks_launch(family: str, fp8: bool = False) -> Launch:
    """All four kernels of the blocks route."""
    packed = Packed(shape(family), 2, fp8=fp8)
    tile = config.scorer_tile(packed)
    read = images(packed.shape, rows=256)
    name = f"{family} fp8" if fp8 else family
    return Launch(name, partial(blocks.features, packed, read, tile), tile.programs)


def of_scorers(arch: int) -> Iterator[Launch]:
    """Every family with every tile of the table; of all else, on Hopper, one of a kind."""
    for family in FAMILIES:
        packed = Packed(shape(family), 2, "meta")
        if routes.one_launch(packed):
            for tile in config.scorer_candidates(packed):
                yield launch(family, tile=tile)
        else:
            yield blocks_launch(family)
    yield launch("w64", loss="sigmoid")
    if arch >= 90:
        yield blocks_launch("Ti/16", fp8=True)
    if arch == 90:
        yield launch("mu", k=None)
        yield launch("w64", loss=None)
        yield launch("w64", pooled_by_class=True, last=True, smoothing=0.1)
        yield launch("w64", dtype=torch.float32, kept=True)
        yield launch("w64", dtype=torch.bfloat16, last=True, keys=False)
        yield launch("w64", sides=1, given=True)
        yield launch("w192", tile=config.SCORER_TILES[90][-1][-1][1])  # not the route that is taken
