# SPDX-License-Identifier: Apache-2.0
"""How often a caption finds its picture, and a picture its caption."""

from __future__ import annotations

import torch
from torch import Tensor

from activesel.models import DualEncoder
from activesel.operands import Pairs, untouched

KS = (1, 10)


def recall(
    queries: Tensor,  # [N, D] float
    keys: Tensor,  # [N, D] float
    ks: tuple[int, ...] = KS,
    block: int = 1024,
) -> dict[str, float]:
    """R@K: share of rows i whose own key is among the K with the highest q_i . k_j.

    Keys that tie with the right one, and scores that are not finite, count against it.

    Args:
        queries, keys: row i of one belongs to row i of the other; at least one.
        ks: the K, each at least 1.
        block: queries compared at a time.

    Raises:
        ValueError: the two differ in shape, or have no rows.

    >>> z = torch.eye(3)
    >>> recall(z, z), recall(z, z.roll(1, 0), ks=(1,))
    ({'1': 1.0, '10': 1.0}, {'1': 0.0})
    """
    if queries.shape != keys.shape or len(keys) == 0:
        raise ValueError(
            f"keys must be of the shape of queries {list(queries.shape)}, at least one row, "
            f"got {list(keys.shape)}"
        )
    better = []
    for first in range(0, len(queries), block):
        scores = queries[first : first + block] @ keys.T
        own = scores.diagonal(first)[:, None]
        better.append((~(scores < own)).sum(1) - 1)
    rank = torch.cat(better)
    return {str(k): float((rank < k).double().mean()) for k in ks}


def retrieval(pairs: Pairs) -> dict[str, dict[str, float]]:
    """R@1 and R@10 of a set of pairs in both directions.

    >>> z = torch.eye(2)
    >>> retrieval(Pairs(z, z, scale=10.0))["text_to_image"]
    {'1': 1.0, '10': 1.0}
    """
    return {
        "image_to_text": recall(pairs.image, pairs.text),
        "text_to_image": recall(pairs.text, pairs.image),
    }


def embed(
    model: DualEncoder,
    images: Tensor,  # [N, C, H, W] uint8 or float
    tokens: Tensor,  # [N, L] int64
    batch: int = 512,
) -> Pairs:
    """Embeddings of all rows, without gradients; `model` is left in the mode it came in.

    >>> from activesel.models import dual
    >>> model = dual("nano", image_size=32, patch=8, channels=1, vocabulary=9, length=3)
    >>> embed(model, torch.rand(5, 1, 32, 32), torch.ones(5, 3).long(), batch=2).text.shape
    torch.Size([5, 32])
    """
    device = next(model.parameters()).device
    with untouched(model):
        parts = [
            model.forward_pairs(x.to(device), t.to(device))
            for x, t in zip(images.split(batch), tokens.split(batch), strict=True)
        ]
    image, text = torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts])
    return Pairs(image, text, parts[0].scale, parts[0].bias)
