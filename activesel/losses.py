# SPDX-License-Identifier: Apache-2.0
"""Losses to train on, differentiable, that go with the scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.operands import Pairs


def contrastive_loss(
    pairs: Pairs,
    loss: str = "sigmoid",
) -> Tensor:  # []
    """Contrastive loss of a batch of pairs, per pair; gradients flow into embeddings, scale, bias.

    sigmoid (SigLIP): sum_ij softplus(-m_ij x_ij) / B, m = 1 for a pair and -1 for any other two,
    x_ij = scale z_i . t_j + bias. softmax (CLIP): the mean of both directions' cross-entropies.

    Args:
        pairs: embeddings [B, D].
        loss: "sigmoid" or "softmax".

    Raises:
        ValueError: another loss.

    Source: Zhai et al. 2023 (arXiv:2303.15343), Radford et al. 2021 (arXiv:2103.00020).

    Example:
        >>> z = torch.eye(4)
        >>> contrastive_loss(Pairs(z, z, scale=100.0, bias=-50.0)).item() < 1e-6
        True
    """
    x = pairs.scale * (pairs.image @ pairs.text.T)
    if loss == "sigmoid":
        x = x + pairs.bias
        own = x.diagonal()  # softplus(-x) = softplus(x) - x
        return (F.softplus(x).sum() - own.sum()) / x.shape[0]
    if loss == "softmax":
        own = torch.arange(x.shape[0], device=x.device)
        return 0.5 * (F.cross_entropy(x, own) + F.cross_entropy(x.T, own))
    raise ValueError(f'loss must be "sigmoid" or "softmax", got {loss!r}')


def classification_loss(
    logits: Tensor,  # [B, C] | [B, T, C] float
    targets: Tensor,  # [B] | [B, T] int, or of the logits' shape
    loss: str,
    smoothing: float,
) -> Tensor:  # []
    """The mean over rows, or over tokens that count; sigmoid: BCE summed over classes."""
    classes = logits.shape[-1]
    logits = logits.float().reshape(-1, classes)
    if targets.is_floating_point():
        y = targets.reshape(logits.shape).float()
    elif loss == "softmax":
        return F.cross_entropy(logits, targets.reshape(-1).long(), label_smoothing=smoothing)
    else:
        counts = targets.reshape(-1) != -100
        logits, y = logits[counts], targets.reshape(-1)[counts]
        y = F.one_hot(y.long(), classes).float()
    if loss == "softmax":
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    y = (1 - smoothing) * y + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / logits.shape[0]
