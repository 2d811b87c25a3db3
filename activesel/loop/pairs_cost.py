# SPDX-License-Identifier: Apache-2.0
"""Dual encoders for icon-text pairs, and what an update with them costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from activesel.ledger import TRAIN, Ledger, forward_flops
from activesel.loop.icons import LENGTH
from activesel.loop.pairs_config import PairsConfig
from activesel.models import DualEncoder, dual

SIDE = 32
MEAN, STD = 0.70, 0.42  # of the icons' pixels, in [0, 1]


def build(size: str, patch: int, vocabulary: int) -> DualEncoder:
    return dual(
        size,
        vocabulary=vocabulary,
        length=LENGTH,
        image_size=SIDE,
        patch=patch,
        channels=1,
        mean=MEAN,
        std=STD,
    )


@lru_cache(maxsize=64)
def pair_flops(size: str, patch: int) -> float:
    """FLOPs of one forward pass per pair, both towers; the vocabulary is looked up, not multiplied.

    >>> 0.2 < pair_flops("nano", 16) / pair_flops("nano", 8) < 0.6
    True
    """
    with torch.device("meta"):
        model = build(size, patch, 3)
    return forward_flops(model.image, (1, SIDE, SIDE)) + forward_flops(
        model.text, ((LENGTH,), torch.int64)
    )


def train_flops(size: str, patch: int, keep: int) -> float:
    """FLOPs to train on `keep` pairs at once, their comparison with each other included."""
    width = _width(size)
    return keep * TRAIN * (pair_flops(size, patch) + 2 * keep * width)


@lru_cache(maxsize=64)
def _width(size: str) -> int:
    with torch.device("meta"):
        return build(size, SIDE, 3).config.text.embed


def joint_flops(
    drawn: int,
    keep: int,
    chunks: int | None,
    widths: Sequence[int],
) -> float:
    """FLOPs to choose `keep` of `drawn` pairs, models of these widths compared.

    40 per row and chunk for the keys, as in `selection_flops`; per row and model the own product,
    and for joint selection the products with the rows chosen, both ways, at 10 more FLOPs each for
    the loss.

    >>> joint_flops(10, 4, None, []), joint_flops(10, 4, 1, [8])
    (0.0, 560.0)
    """
    if not widths:
        return 0.0
    own = sum(2 * width for width in widths)
    others = sum(2 * (2 * width + 10) for width in widths)
    counted = 0 if chunks in (None, 1) else keep
    return float(drawn * (own + others * counted + 40 * (chunks or 1)))


def price(config: PairsConfig, online_training: bool) -> Ledger:
    """FLOPs of one update; what resizing a patch embedding takes once a call is left out."""
    recipe, keep, drawn = config.recipe, config.keep, config.super_batch
    sizes = {  # of whoever scores
        "scorer": (config.scorer, config.scorer_patch),
        "learner": (config.learner, config.patch),
        "coarse": (config.learner, config.coarse),
    }
    who = "learner" if config.online == "learner" else recipe.online
    models = [sizes[name] for name in (who, "scorer" if recipe.reference else None) if name]
    learner = [config.patch, config.coarse] if recipe.flexi else [config.patch]
    return Ledger(
        learner=sum(train_flops(config.learner, p, keep) for p in learner) / len(learner),
        scoring_online=drawn * pair_flops(*sizes[who]) if who else 0.0,
        scoring_reference=drawn * pair_flops(*sizes["scorer"]) if recipe.reference else 0.0,
        online_training=train_flops(*sizes["scorer"], keep) if online_training else 0.0,
        selection=joint_flops(drawn, keep, config.picks, [_width(size) for size, _ in models]),
    )
