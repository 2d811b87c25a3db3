# SPDX-License-Identifier: Apache-2.0
"""What the cost model says of the scorers that the kernels are for, and who should use them.

`activesel.kernels.routes` holds the table of sizes; `python -m bench gpu` measures the same cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from activesel.kernels import routes
from activesel.vit_parts import Shape
from bench.scorer_cost import H200, Row, blocks, needed, one_launch, torch_route

MARGIN = 1.3  # a kernel that was never timed is used where it is to be so much faster
PYTHON = 0.3e-3  # seconds before a kernel's launch: packing, and Triton's launcher


def predict(s: Shape, images: int, sides: int = 2) -> dict[str, Row]:
    """All routes."""
    return {
        "one launch": one_launch(s, images, sides),
        "blocks": blocks(s, images, sides),
        "torch": torch_route(s, images, sides, compiled=True),
        "eager": torch_route(s, images, sides, compiled=False),
    }


def route(s: Shape, images: int) -> str:
    """ "one launch", "blocks" or "torch": a kernel where it is predicted to win by `MARGIN`.

    Packing and a launch from Python count, as they do not in `predict`.

    >>> route(shape(192, 12, 32), 64)
    'torch'
    """
    found = predict(s, images)
    ours = "one launch" if s.DP <= routes.ONE_LAUNCH_WIDTH else "blocks"
    limit = found["torch"]["seconds"] / MARGIN
    return ours if found[ours]["seconds"] + PYTHON <= limit else "torch"


# ----------------------------------------------------------------------------------------- command


def shape(width: int, depth: int, patch: int, side: int = 224, classes: int = 1000) -> Shape:
    """Of an RGB scorer with heads of 64, two at least."""
    heads, tokens = max(2, width // 64), (side // patch) ** 2
    return Shape(
        width, depth, heads, 4 * width, tokens, 3, side, patch, classes, False, False, 1e-5
    )


class Case(NamedTuple):
    """A scorer and images that the kernels are to be good at, and by how much."""

    shape: Shape
    images: int
    route: str
    bound: dict[str, float]  # times faster than
    aim: dict[str, float]


CASES = {
    "mu": Case(
        shape(32, 1, 16), 163_840, "one launch",
        {"eager": 8.0, "torch": 5.0}, {"eager": 13.0, "torch": 9.0},
    ),
    "w64": Case(shape(64, 6, 32), 16_384, "one launch", {"torch": 4.0}, {"torch": 8.0}),
    "w192": Case(shape(192, 12, 32), 4096, "blocks", {"torch": 1.5}, {"torch": 3.0}),
    "Ti/16": Case(shape(192, 12, 16), 4096, "blocks", {"torch": 1.2}, {"torch": 1.65}),
}  # fmt: skip
GRID = [(w, d, p, side) for w in (32, 64, 96, 128, 192) for d in (1, 6, 12)
        for p, side in ((8, 32), (32, 224), (4, 32), (16, 224))]  # fmt: skip
COUNTS = tuple(1 << n for n in range(6, 18))


def smallest(shapes: Sequence[Shape]) -> int | None:
    """Images from which on a kernel is to win for all of these shapes, of `COUNTS`; None: never."""
    found = None
    for images in reversed(COUNTS):
        if any(route(s, images) == "torch" for s in shapes):
            break
        found = images
    return found


def sizes() -> dict[tuple[int, int, int], int | None]:
    """By padded width, and tokens and depth at most, the least images for a kernel."""
    classes: dict[tuple[int, int, int], list[Shape]] = {}
    for given in GRID:
        s = shape(*given)
        classes.setdefault((s.DP, 64 if s.tokens <= 64 else 256, s.depth), []).append(s)
    return {key: smallest(shapes) for key, shapes in sorted(classes.items())}


def _case(case: Case) -> Row:
    rows = predict(case.shape, case.images)
    seconds = rows[case.route]["seconds"]
    work = needed(case.shape, case.images, 2)
    return {
        **case._asdict(),
        "shape": case.shape._asdict(),
        "routes": rows,
        "predicted": {name: rows[name]["seconds"] / seconds for name in case.bound},
        "share_of_peak": work / seconds / H200.flops,
        "fp8": {
            "one launch": one_launch(case.shape, case.images, fp8=True)["seconds"],
            "blocks": blocks(case.shape, case.images, fp8=True)["seconds"],
        },
    }


def content() -> Row:
    """All of it, as the result file has it."""
    return {
        "schema": 1,
        "device": H200._asdict(),
        "margin": MARGIN,
        "cases": {name: _case(case) for name, case in CASES.items()},
        "grid": [
            {"shape": list(given), "images": images, "route": route(shape(*given), images)}
            for given in GRID
            for images in COUNTS[::3]
        ],
        "sizes": [[*key, least] for key, least in sizes().items()],
    }
