# SPDX-License-Identifier: Apache-2.0
"""Random embeddings of pairs, for tests."""

import torch
import torch.nn.functional as F

from activesel import Pairs


def embed(rows, width, scale=10.0, bias=-10.0, dtype=torch.float64):
    z = F.normalize(torch.randn(2, rows, width, dtype=torch.float64), dim=2).to(dtype)
    return Pairs(z[0], z[1], scale, bias)


def tensors(pairs):
    if pairs is None:
        return []
    number = torch.tensor([[pairs.scale], [pairs.bias]], dtype=pairs.image.dtype)
    return [pairs.image, pairs.text, *number]


def single(pairs):
    return pairs and Pairs(pairs.image.float(), pairs.text.float(), pairs.scale, pairs.bias)


def two(kind, rows=130, width=24, **how):
    """Models of different widths, scales and biases; one of them where that is the kind."""
    online, reference = embed(rows, width, **how), embed(rows, width - 5, 17.0, -6.0)
    return None if kind == "easy" else online, None if kind == "hard" else reference
