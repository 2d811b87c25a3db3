# SPDX-License-Identifier: Apache-2.0
"""How long a scorer pair should take on a GPU, by each route, from what its kernels count.

Work is counted as the kernels do it, padding included. A phase takes the longest of its units where
they overlap, their sum where nothing does; with n programs on a multiprocessor the longest and 1/n
of the rest, since the others work meanwhile. Where operands come in beside the arithmetic
(`cp.async`), a phase takes the longer of arithmetic and memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from activesel.kernels import config
from activesel.kernels.config import ScorerTile
from activesel.kernels.routes import LAST_PROGRAMS_ROWS
from activesel.kernels.scorer import HEAD_M, HEAD_N, KEYS, QUERIES
from activesel.packing import Packed
from activesel.vit_parts import Shape

# Instructions of a thread, by what they are spent on; counted in the loops of sm_90's machine code.
PIXEL = 6.5  # a byte to u in fp16, and its place, for 128 columns
STREAM = 30  # an element of the residual and layer: two norms, biases, load, store, places
HIDDEN, OUTPUT = (15, 4), (3.5, 1.2)  # an element, and more for every 64 of the width
SCALES = 4  # with e4m3, an element of the residual and layer
SCORE, SAME = 10, 3  # scale, mask, maximum, exponent, sum, conversion; where images share a tile
LOGIT, SPLIT = 10.5, 8  # of the head; and for every 32 features, which it takes in two parts
POOL = 12  # an element to be averaged

Row = dict[str, Any]


class Device(NamedTuple):
    """Rates of an H200: `flops` and `hbm` as measured, the rest from its data sheet or assumed."""

    processors: int = 132
    flops: float = 790e12  # fp16, dense
    hbm: float = 4.3e12  # bytes / s
    l2: float = 5.5e12
    exps: float = 16 * 132 * 1.7e9
    lanes: float = 128 * 132 * 1.7e9
    cache: float = 40e6  # bytes of the 50 MB of L2 that scratch and weights can count on
    start: float = 0.3e-6  # seconds until a loop's first operands are there, or past a barrier
    launch: float = 1.5e-6  # in a graph


H200 = Device()


@dataclass(frozen=True)
class Work:
    """FLOPs (at the fp16 rate), exponentials, instructions, bytes, loops that begin.

    >>> Work(flops=2.0, l2=3.0) * 2 + Work(l2=1.0)
    Work(flops=4.0, exps=0.0, lanes=0.0, l2=7.0, hbm=0.0, starts=0.0)
    """

    flops: float = 0.0
    exps: float = 0.0
    lanes: float = 0.0
    l2: float = 0.0
    hbm: float = 0.0
    starts: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, its = asdict(self), asdict(other)
        return Work(**{name: mine[name] + its[name] for name in mine})

    def __mul__(self, times: float) -> Work:
        return Work(**{name: amount * times for name, amount in asdict(self).items()})

    def seconds(self, device: Device) -> dict[str, float]:
        """Of each unit by itself; `starts` apart, which no other program waits for."""
        amounts = asdict(self)
        return {name: amounts[name] / getattr(device, name) for name in amounts if name != "starts"}


def time(work: Work, device: Device, programs: int, streams: bool) -> float:
    """Of a phase that `programs` of each multiprocessor do, `starts` being those of one of them.

    >>> work = Work(flops=H200.flops, l2=H200.l2 / 2)
    >>> [time(work, H200, n, streams) for n, streams in ((1, True), (1, False), (2, False))]
    [1.0, 1.5, 1.25]
    """
    units = work.seconds(device)
    memory = max(units.pop("l2"), units.pop("hbm"))
    parts = [memory, *units.values()]
    waits = work.starts * device.start
    if streams:
        busy = max(memory, max(parts[1:]) + (math.fsum(parts[1:]) - max(parts[1:])) / programs)
    else:
        busy = max(parts) + (math.fsum(parts) - max(parts)) / programs
    return max(busy + waits / programs, math.fsum(parts[1:]) / programs + waits)


# -------------------------------------------------------------------------- phases, of one side


def embed(s: Shape, sides: int, images: float, rows: int, tile: ScorerTile) -> Work:
    """Of all sides: pixels of `images` in `rows` rows."""
    columns = sides * s.DP
    passes, tiles = columns // min(128, columns & -columns), rows / tile.rows
    pixels, x = rows * s.KP, rows * columns * 4
    moved = tiles * columns * s.KP * 2 + passes * pixels + 2 * x
    return Work(
        2 * rows * columns * s.KP,
        0,
        pixels * passes * PIXEL + rows * columns * 3,
        moved,
        images * s.channels * s.image_size**2,
        2 * tiles * passes,
    )


def layers(s: Shape, rows: int, tile: ScorerTile, fp8: bool) -> Work:
    tiles, size = rows / tile.rows, 1 if fp8 else 2
    weights = tiles * s.weights * size
    hidden, output = (first + more * s.DP / 64 for first, more in (HIDDEN, OUTPUT))
    instructions = (STREAM + SCALES * fp8) * s.DP + hidden * s.HP + output * 3 * s.AP
    one = Work(
        2 * rows * s.weights / (2 if fp8 else 1),
        0,
        rows * instructions,
        weights + tiles * s.vectors * 4 + rows * (8 * s.DP + 8 * s.AP),
        0,
        4 * tiles,
    )
    return one * s.depth


def attention(s: Shape, images: float) -> Work:
    shared = max(1, QUERIES // s.tokens)
    span = s.tokens * shared
    tiles = math.ceil(span / QUERIES)
    units = math.ceil(images / shared) * s.heads * tiles
    keys = math.ceil(span / QUERIES) * QUERIES
    scores = QUERIES * keys
    unit = Work(
        4 * scores * s.HD,
        scores,
        scores * (SCORE + (SAME if shared > 1 else 0)),
        4 * QUERIES * s.HD + 4 * span * s.HD,
        0,
        1 + keys / QUERIES,
    )
    return unit * units * s.depth


def pool(s: Shape, images: float) -> Work:
    read = 1 if s.pooled_by_class else s.tokens
    amount = images * read * s.DP
    return Work(lanes=amount * POOL, l2=amount * 4, starts=images * read / 64)


def head(s: Shape, images: float) -> Work:
    """fp32 features, in two fp16 parts, times fp16 weights."""
    tiles = math.ceil(images / HEAD_M)
    logits = tiles * HEAD_M * s.classes
    read = s.classes * s.DP * (2 + 4 * HEAD_M / HEAD_N)  # features again for each tile of classes
    instructions = logits * (LOGIT + SPLIT * s.DP / 32)
    return Work(4 * logits * s.DP, logits, instructions, tiles * read, 0, 3 * tiles)


def needed(s: Shape, images: int, sides: int) -> float:
    """FLOPs of the model itself, head included."""
    d, t = s.width, s.tokens
    layer = 2 * t * (4 * d + 2 * s.hidden) * d + 4 * t * t * d
    return sides * images * (2 * t * s.K * d + s.depth * layer + 2 * d * s.classes)


# ------------------------------------------------------------------------------------------ routes


def tile_of(s: Shape, capability: int = 90) -> ScorerTile:
    """The tile in force on such a device."""
    before = config.capability
    config.capability = lambda device: capability
    try:
        return config.scorer_tile(Packed(s, 2, "meta"))
    finally:
        config.capability = before


def one_launch(
    s: Shape,
    images: int,
    sides: int = 2,
    *,
    fp8: bool = False,
    tile: ScorerTile | None = None,
    group: int | None = None,
    device: Device = H200,
) -> Row:
    tile = tile or tile_of(s)
    most = tile.programs * device.processors
    group = group or config.group(s.tokens, tile.rows, math.ceil(images / most))
    rounds = math.ceil(math.ceil(images / group) / most)
    programs = math.ceil(images / (rounds * group))
    rows = math.ceil(group * s.tokens / tile.rows) * tile.rows
    each = math.ceil(programs / device.processors)  # on the busiest multiprocessor
    wide = each * device.processors  # as if all were so busy
    phases = {
        "embed": (embed(s, sides, group, rows, tile) * rounds, True),
        "layers": (layers(s, rows, tile, fp8) * (sides * rounds), True),
        "attention": (attention(s, group) * (sides * rounds), False),
        "pool": (pool(s, group) * (sides * rounds), False),
        "head": (head(s, rounds * group) * sides, True),
    }
    state = s.DP * 4 * (1 + (sides - 1) / s.depth) + 6 * s.AP  # a row's, in use
    held = wide * rows * state
    weights = sides * s.depth * s.weights * (1 if fp8 else 2)
    missed = max(0.0, 1 - max(device.cache - weights, 0) / held)
    spilled = rows * rounds * missed  # rows whose scratch goes through memory
    extra = {
        "embed": spilled * sides * s.DP * 4,
        "layers": spilled * sides * s.depth * (8 * s.DP + 8 * s.AP),
        "attention": spilled * sides * s.depth * 8 * s.AP,
        "pool": spilled * sides * s.DP * 4,
    }
    work, times = Work(), {}
    for name, (own, streams) in phases.items():
        total = (own + Work(hbm=extra.get(name, 0.0))) * wide
        total = Work(**(asdict(total) | {"starts": own.starts}))
        times[name] = time(total, device, each, streams)
        work += total
    found = 0.0
    if images <= LAST_PROGRAMS_ROWS:
        found = 35 * (math.ceil(images / KEYS) * 0.12e-6 + device.start)
    units = work.seconds(device)
    return {
        "tile": tile._asdict(),
        "group": group,
        "programs": programs,
        "rounds": rounds,
        "phases": times,
        "units": units,
        "scratch_bytes": held,
        "scratch_missed": missed,
        "computed_per_needed": work.flops / needed(s, images, sides),
        "full_overlap": max(units.values()),
        "no_overlap": math.fsum(units.values()) + work.starts * device.start,
        "seconds": math.fsum(times.values()) + found + device.launch,
    }


def blocks(
    s: Shape,
    images: int,
    sides: int = 2,
    *,
    fp8: bool = False,
    tile: ScorerTile | None = None,
    device: Device = H200,
) -> Row:
    """Two launches a layer; what lies between goes through memory. Then the head's launch."""
    tile = tile or tile_of(s)
    rows = math.ceil(images * s.tokens / tile.rows) * tile.rows
    each = tile.programs
    columns, per_layer = sides * s.DP, sides * s.depth * rows
    phases = {
        "embed": (embed(s, sides, images, rows, tile), rows * columns * 4, each, True),
        "layers": (
            layers(s, rows, tile, fp8) * sides, per_layer * 8 * (s.DP + s.AP), each, True,
        ),
        "attention": (attention(s, images) * sides, per_layer * 8 * s.AP, 4, False),
        "pool": (pool(s, images) * sides, sides * rows * s.DP * 4, 8, False),
        "head": (head(s, images) * sides, 0, 2, True),
    }  # fmt: skip
    times, work = {}, Work()
    for name, (own, moved, resident, streams) in phases.items():
        total = own + Work(hbm=moved)
        shared = asdict(total) | {"starts": own.starts / (device.processors * resident)}
        times[name] = time(Work(**shared), device, resident, streams)
        work += total
    launches = 3 + sides * (2 * s.depth + 1)
    units = work.seconds(device)
    return {
        "tile": tile._asdict(),
        "launches": launches,
        "phases": times,
        "units": units,
        "computed_per_needed": work.flops / needed(s, images, sides),
        "full_overlap": max(units.values()),
        "seconds": math.fsum(times.values()) + launches * device.launch,
    }


def torch_route(
    s: Shape,
    images: int,
    sides: int = 2,
    *,
    compiled: bool,
    device: Device = H200,
) -> Row:
    """bf16, an operation at a time: each takes its product or its bytes, the longer of the two.

    Products at 65 % of the peak from width 192 on, 35 % below. Compiling joins residual and norm,
    and all that happens to pixels.
    """
    efficiency = 0.65 if s.width >= 192 else 0.35
    d, t, pixels = s.width, s.tokens, s.channels * s.image_size**2

    def op(flops: float = 0.0, elements: float = 0.0, exps: float = 0.0) -> float:
        rate = efficiency * device.flops
        return max(flops / rate, 2 * elements / device.hbm, exps / device.exps)

    apart = 0.0 if compiled else 2 * op(elements=d)  # the sum written, and read again by the norm
    token = (
        op(6 * d * d, 4 * d)
        + op(4 * t * d, 4 * d, t * s.heads)
        + op(2 * d * d, 2 * d)
        + 2 * op(2 * s.hidden * d, d + s.hidden)
        + op(elements=2 * s.hidden)
        + 2 * (op(elements=4 * d) + apart)
    )
    prepared = op(elements=1.5 * pixels) if compiled else op(elements=8 * pixels)
    image = (
        prepared
        + op(2 * t * s.K * d, pixels + t * d)
        + op(elements=3 * t * d)
        + t * s.depth * token
        + op(2 * d * s.classes, s.classes)
        + op(elements=s.classes * (2 if compiled else 7), exps=s.classes)
    )
    launches = sides * (10 * s.depth + 10) * (1 if compiled else 1.6)
    return {
        "seconds": max(sides * images * image, launches * device.launch),
        "launches": launches,
    }
