# SPDX-License-Identifier: Apache-2.0
"""Which sizes are timed, in order of importance, since a run may end early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from bench.gpu import joint, scorers
from bench.gpu.agreement import agreement
from bench.gpu.cases import head, logits, select, tiles, topk
from bench.gpu.device import BF16, FP32, Bench, ceilings, product
from bench.gpu.targets import SCORERS
from bench.gpu.timing import Row

BIG, SMALL = 163_840, 4096
HEADS = [  # rows, classes, width, reference losses cached, loss
    (BIG, 29_593, 192, False, "softmax"),
    (BIG, 29_593, 64, False, "softmax"),
    (BIG, 29_593, 192, True, "softmax"),
    (BIG, 1000, 192, False, "softmax"),
    (SMALL, 29_593, 192, False, "softmax"),
    (SMALL, 1000, 192, False, "softmax"),
    (BIG, 29_593, 768, False, "softmax"),
    (BIG, 1000, 192, False, "sigmoid"),
]
TOPK = [
    (BIG, 32_768), (BIG, 2048), (SMALL, 819), (262_144, 52_428), (1_000_000, 200_000),
    (16_000_000, 3_300_000),
]  # fmt: skip
LOGITS = [
    (rows, classes, dtype)
    for rows, classes in ((SMALL, 1000), (SMALL, 29_593), (16_384, 29_593))
    for dtype in (BF16, FP32)
]
TILES = [
    (29_593, 192, "softmax"), (29_593, 64, "softmax"), (29_593, 768, "softmax"),
    (1000, 192, "softmax"), (1000, 192, "sigmoid"),
]  # fmt: skip

JOINT = [(40_960, 8192, 768), (BIG, 32_768, 768)]  # rows, kept, width
PAIR_TILES = [(40_960, 512, 768), (BIG, 2048, 768)]  # rows, chunk, width

Case = Callable[[Bench], Row]


def _cases() -> Iterator[tuple[str, Case]]:
    def title(stage: str, **sizes: object) -> str:
        said = (f"{name} {v:,}" if isinstance(v, int) else str(v) for name, v in sizes.items())
        return f"{stage}: " + ", ".join(said)

    heads: list[tuple[str, Case]] = []
    for b, c, d, cached, loss in HEADS:
        sides = "1 side and losses" if cached else "2 sides"
        name = title("head to key", B=b, C=c, D=d, sides=sides, loss=loss)
        heads.append((name, partial(head, b, c, d, cached, loss)))
    topks = [(title("key to top-k", B=b, k=k), partial(topk, b, k)) for b, k in TOPK]
    yield "ceilings", ceilings
    for size, what in SCORERS.items():
        yield f"images to rows: {what}", partial(scorers.select, size, what.startswith("width 192"))
    yield heads[0]
    yield topks[0]
    for b, k, d in JOINT:
        yield title("joint selection", B=b, k=k, D=d), partial(joint.joint, b, k, d)
    for size, what in SCORERS.items():
        yield f"agreement of scorers: {what}", partial(scorers.agreement, size)
    yield title("agreement", B=BIG, C=29_593, D=192), partial(agreement, BIG, 29_593, 192)
    for d in (64, 192):
        name = title("product alone", B=65_536, C=29_696, D=d)
        yield name, partial(product, 65_536, 29_696, d)
    yield from heads[1:]
    yield from topks[1:]
    yield title("losses to rows", B=BIG, k=32_768), partial(select, BIG, 32_768, 0, 0)
    name = title("heads to rows", B=BIG, C=29_593, D=192, k=32_768)
    yield name, partial(select, BIG, 32_768, 29_593, 192)
    for b, c, dtype in LOGITS:
        name = title("logits to key", B=b, C=c, dtype=str(dtype).removeprefix("torch."))
        yield name, partial(logits, b, c, dtype)
    yield title("agreement", B=BIG, C=1000, D=192), partial(agreement, BIG, 1000, 192)
    for c, d, loss in TILES:
        yield title("tiles", B=BIG, C=c, D=d, loss=loss), partial(tiles, BIG, c, d, loss)
    for b, chunk, d in PAIR_TILES:
        for loss in ("sigmoid", "softmax"):
            name = title("tiles of pairs", B=b, chunk=chunk, D=d, loss=loss)
            yield name, partial(joint.tiles, b, chunk, d, loss)
    for size, what in SCORERS.items():
        yield f"tiles of scorers: {what}", partial(scorers.tiles, size)
    yield "ceilings again", ceilings


CASES = dict(_cases())
