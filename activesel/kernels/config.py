# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the head kernel, and what they depend on: the device and the product.

The table is fixed, so that nothing is timed behind a user's back. `python -m bench gpu` times all
candidates of a device; `use` puts another one in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from activesel.packing import Packed

INTERPRETED = triton.knobs.runtime.interpret  # which multiplies bf16 wrongly, so it is not asked to
NARROW = 192  # features up to here stay in shared memory; wider ones are read again for every tile


class Tile(NamedTuple):
    """BLOCK_M tokens by BLOCK_N classes, in slices of BLOCK_K features."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most; fewer let two programs share a processor


# By capability and kind of product. The first is used, for the sigmoid loss the last, which leaves
# most registers for its logarithms.
TILES = {
    (80, "narrow"): (Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
    (80, "wide"): (
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
    ),
    (80, "float32"): (Tile(128, 32, 32, 8, 3), Tile(64, 64, 16, 8, 3), Tile(64, 32, 32, 8, 3)),
    (90, "narrow"): (
        Tile(128, 64, 64, 8, 2, 128),
        Tile(128, 64, 64, 8, 3, 128),
        Tile(128, 64, 64, 4, 2),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 64, 64, 4, 3),
    ),
    (90, "wide"): (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
    ),
    (90, "float32"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    (100, "narrow"): (
        Tile(128, 64, 64, 8, 2, 255),
        Tile(128, 64, 64, 8, 3, 255),
        Tile(64, 64, 64, 4, 2, 255),
    ),
    (100, "wide"): (Tile(128, 64, 64, 8, 4, 255), Tile(128, 64, 64, 8, 3, 255)),
    (100, "float32"): (Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
}
# Of joint selection, by capability and whether the product is one of float32. Wide ones first: both
# factors stream from the L2 cache, at 85 FLOP a byte with 128 x 256, at 64 with 128 x 128.
PAIR_TILES = {
    (80, False): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 64, 8, 3)),
    (80, True): (Tile(64, 64, 16, 8, 3),),
    (90, False): (
        Tile(128, 256, 64, 8, 3, 255),
        Tile(128, 256, 64, 8, 4, 255),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 3),
    ),
    (90, True): (Tile(128, 64, 32, 8, 3),),
    (100, False): (
        Tile(128, 128, 64, 8, 3, 255),
        Tile(128, 128, 64, 8, 4, 255),
        Tile(128, 64, 64, 8, 3, 255),
    ),
    (100, True): (Tile(128, 64, 32, 8, 3),),
}


class ScorerTile(NamedTuple):
    """Tiles of the one-launch scorer, and programs of it that share a multiprocessor."""

    rows: int  # tokens at a time
    hidden: int  # columns of the hidden layer at a time
    warps: int
    stages: int
    programs: int
    registers: int | None = None
    calls: bool = False  # phases are functions, which costs Hopper's products their pace


# By capability, and by width and tokens at most; of each, the first is used. The widest class goes
# by launches of one phase, where nothing is called; its second tile is for one launch.
SCORER_TILES = {
    80: (
        (128, 1024, (ScorerTile(64, 32, 4, 2, 2, 255, True),)),
        (192, 1024, (ScorerTile(32, 32, 4, 3, 2, None, True),)),
    ),
    90: (
        (32, 1024, (ScorerTile(64, 64, 4, 2, 3, 168), ScorerTile(64, 64, 4, 2, 2))),
        (64, 64, (ScorerTile(64, 64, 4, 2, 2), ScorerTile(128, 32, 8, 2, 1))),
        (128, 1024, (ScorerTile(128, 32, 8, 2, 1),)),
        (192, 1024, (ScorerTile(128, 64, 8, 2, 1, None, True), ScorerTile(64, 32, 4, 2, 2))),
    ),
    100: (
        (64, 1024, (ScorerTile(64, 64, 4, 2, 2),)),
        (192, 1024, (ScorerTile(64, 64, 8, 2, 1),)),
    ),
}
_used: dict[tuple[int, str, bool], Tile] = {}


@cache
def _device(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor, torch.cuda.get_device_properties(index).multi_processor_count


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; the interpreter goes by the tiles of 80."""
    return _device(device.index or 0)[0] if device.type == "cuda" else 80


def multiprocessors(device: torch.device) -> int:
    return _device(device.index or 0)[1] if device.type == "cuda" else 1


def kind(
    sides: Sequence[Sequence[Tensor]],  # [features, weight, ...]
) -> str:
    """What the product is like: different dtypes, as float32 itself, are multiplied in float32."""
    if any(x.dtype != w.dtype or x.dtype == torch.float32 for x, w, *_ in sides):
        return "float32"
    return "narrow" if max(side[0].shape[-1] for side in sides) <= NARROW else "wide"


def candidates(device: torch.device, product: str) -> tuple[Tile, ...]:
    known = max(c for c, _ in TILES if c <= capability(device))
    return TILES[known, product]


def tile(device: torch.device, product: str, sigmoid: bool) -> Tile:
    key = capability(device), product, sigmoid
    return _used.get(key) or candidates(device, product)[-1 if sigmoid else 0]


def use(device: torch.device, product: str, sigmoid: bool, tile: Tile) -> None:
    """Put a tile in force for a device's capability, in this process."""
    _used[capability(device), product, sigmoid] = tile


def pair_candidates(x: Tensor) -> tuple[Tile, ...]:
    """For a product of embeddings such as `x`."""
    known = max(c for c, _ in PAIR_TILES if c <= capability(x.device))
    return PAIR_TILES[known, x.dtype == torch.float32]


def pair_tile(x: Tensor, chunk: int) -> Tile:
    """The first whose columns a chunk fills, but for a fifth of them; else the narrowest."""
    tiles = pair_candidates(x)
    filled = (t for t in tiles if 4 * triton.cdiv(chunk, t.block_n) * t.block_n <= 5 * chunk)
    return next(filled, tiles[-1])


def split(device: torch.device, blocks: int, classes: int, block_n: int) -> tuple[int, int]:
    """Classes of one split, and splits: enough of them to give every multiprocessor a program."""
    tiles = triton.cdiv(classes, block_n)
    wanted = min(max(multiprocessors(device) // max(blocks, 1), 1), max(tiles // 4, 1))
    share = triton.cdiv(tiles, wanted) * block_n
    return share, triton.cdiv(classes, share)


def scorer_candidates(packed: Packed) -> tuple[ScorerTile, ...]:
    known = max(c for c in SCORER_TILES if c <= capability(packed.patch.device))
    width, tokens = packed.shape.DP, packed.shape.tokens
    fit = (tiles for w, t, tiles in SCORER_TILES[known] if width <= w and tokens <= t)
    return next(fit, SCORER_TILES[known][-1][-1])


def scorer_tile(packed: Packed) -> ScorerTile:
    return scorer_candidates(packed)[0]


def group(tokens: int, block: int, most: int) -> int:
    """Images to take at a time: the fewest that leave no more of their last tile of rows empty."""

    def rows(images: int) -> float:  # per image
        return triton.cdiv(images * tokens, block) * block / images

    choices = range(1, max(1, min(most, 1024 // tokens)) + 1)
    best = min(map(rows, choices))
    return next(n for n in choices if rows(n) <= 1.03 * best)
