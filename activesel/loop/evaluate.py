# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier, overall and by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Accuracy:
    """Share of rows classified rightly: `overall` and `by_class`, each in [0, 1]."""

    overall: float
    by_class: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The class that fares worst; data selection can hurt it unseen."""
        return min(self.by_class)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] uint8 or float
    labels: Tensor,  # [N] int64
    batch: int = 500,
) -> Accuracy:
    """Top-1 accuracy of `model`, which is left in the mode it came in.

    Args:
        model: maps images to logits [B, classes].
        images, labels: at least one row of every class.
        batch: rows per forward pass.

    >>> identity = nn.Flatten()
    >>> accuracy(identity, torch.eye(4)[:, None, None], torch.tensor([0, 1, 2, 2])).by_class
    (1.0, 1.0, 0.5, 0.0)
    """
    training = model.training
    device = next((p.device for p in model.parameters()), images.device)
    model.eval()
    try:
        parts = torch.split(images, batch)
        predicted = [model(part.to(device)).argmax(dim=1).to(labels.device) for part in parts]
        classes = model(images[:1].to(device)).shape[1]
    finally:
        model.train(training)
    hit = (torch.cat(predicted) == labels).double()
    seen = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels, weights=hit, minlength=classes)
    by_class = right / seen.clamp(min=1)
    return Accuracy(float(hit.mean()), tuple(by_class.tolist()))
