# SPDX-License-Identifier: Apache-2.0
"""From pixels to keys: which way for which scorer, by a fixed table of sizes.

`python -m bench scorer-cost` predicts the times behind it, `python -m bench gpu` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from activesel.kernels import blocks, head, scorer
from activesel.kernels.config import INTERPRETED, capability
from activesel.kernels.operands import Labels, Noise, Rows
from activesel.packing import Packed
from activesel.vit_parts import Shape

WIDEST, LONGEST = 192, 1024
LAST_PROGRAMS_ROWS = 8192  # of which one program finds the highest faster than another launch does
# Beyond that width the residual stream leaves a program few registers, and all the weights between
# layers come from the L2 cache for too few rows: phases by themselves have larger tiles.
ONE_LAUNCH_WIDTH = 128


def one_launch(packed: Packed) -> bool:
    """Whether a program takes images through all layers; else a launch does one phase of all."""
    return packed.shape.DP <= ONE_LAUNCH_WIDTH


# By width, tokens and layers, rounded up: from so many images on torch's compiled forward should
# take 1.3 times as long on an H200, says `bench.scorer_predictions.sizes`. Others are torch's.
SIZES = {
    (32, 64, 1): 65_536, (32, 64, 6): 16_384, (32, 64, 12): 16_384, (32, 256, 1): 8192,
    (64, 64, 6): 32_768, (64, 64, 12): 16_384,
    (128, 64, 6): 8192, (128, 64, 12): 8192,
}  # fmt: skip
WIDTHS, TOKENS, LAYERS = (32, 64, 96, 128), (64, 256), (1, 6, 12)


def faster(shape: Shape, images: Tensor) -> bool:
    """Whether the table has the kernels beat torch's compiled forward."""
    size = (shape.DP, WIDTHS), (shape.tokens, TOKENS), (shape.depth, LAYERS)
    key = tuple(min((c for c in classes if n <= c), default=0) for n, classes in size)
    least = SIZES.get((key[0], key[1], key[2]))
    return not INTERPRETED and least is not None and len(images) >= least


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether the device multiplies e4m3; the interpreter does."""
    return device.type != "cuda" or capability(device) >= 89


def reason(shape: Shape, device: torch.device, fp8: bool) -> str:
    """Empty if these kernels take such scorers there, else why not."""
    if shape.width > WIDEST:
        return f"width must be at most {WIDEST} for the kernels, got {shape.width}"
    if shape.HD > 64:
        return f"heads must be at most 64 wide for the kernels, got {shape.width // shape.heads}"
    if shape.tokens > LONGEST:
        return f"tokens must be at most {LONGEST} for the kernels, got {shape.tokens}"
    if fp8 and not multiplies_e4m3(device):
        return f"fp8 needs compute capability 8.9 or more, {device} has less"
    return ""


def rows(
    packed: Packed,
    images: Tensor,  # [B, C, H, W]
    labels: Labels,
    given: Sequence[Tensor],
    sign: int,
    noise: Noise | None,
    k: int | None = None,
) -> tuple[Rows, tuple[Tensor, Tensor, Tensor] | None]:
    """Scores, keys and flags by the route for such scorers; rows where one launch finds them."""
    other, read = next(iter(given), None), scorer.pixels(images)
    if one_launch(packed):
        k = k if len(images) <= LAST_PROGRAMS_ROWS else None
        _, out, found = scorer.scorer(packed, read, labels, other, sign, noise, k)
        assert out is not None
        return out, found
    features = blocks.features(packed, read)
    sides: list[list[Tensor]] = [
        [x[:, : packed.shape.width], w[:, : packed.shape.width], b]
        for x, w, b in zip(features, packed.head, packed.head_bias, strict=True)
    ]
    sides = sides if len(sides) > 1 else [sides[0], list(given)][::sign]
    return head.head(sides[0], sides[1], labels, noise), None
