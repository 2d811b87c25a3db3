# SPDX-License-Identifier: Apache-2.0
"""Image and text towers whose embeddings are of one width."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activesel.models.text import TextConfig, TextTower
from activesel.models.vit import ViT, ViTConfig, named
from activesel.operands import Pairs

TEXT_SIZES: dict[str, tuple[int, int, int]] = {
    "femto": (8, 1, 1),
    "pico": (16, 1, 2),
    "nano": (32, 1, 2),
    "micro": (64, 2, 2),
    "mini": (96, 2, 3),
    "midi": (160, 3, 5),
    "mu": (32, 1, 2),
    "Ti": (192, 6, 3),
    "S": (384, 6, 6),
    "B": (512, 12, 8),
    "L": (768, 12, 12),
}
"""Width, depth and heads of the text tower by name; its width is that of the embeddings."""


@dataclass(frozen=True)
class DualConfig:
    """The shapes of a `DualEncoder`; the image tower's classes are the width of the embeddings.

    >>> image = ViTConfig(32, 2, 2, image_size=32, patch=8, channels=1, classes=16)
    >>> DualConfig(image, TextConfig(32, 1, 2, vocabulary=100, length=8, embed=16)).image.patch
    8
    """

    image: ViTConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if self.image.classes != self.text.embed:
            raise ValueError(
                f"text.embed must be image.classes={self.image.classes}, got {self.text.embed}"
            )


class DualEncoder(nn.Module):
    """Image and text towers trained together: (images, tokens) -> `Pairs`.

    logit_ij = scale * z_i . t_j + bias, z and t of length 1, scale = exp(`log_scale`); scale starts
    at 10 and bias at -10.

    Args:
        config: the shapes.
        mean, std: image statistics, see `ViT`.

    Train it on `contrastive_loss`, or as a scorer of `Selector`.

    Source: Zhai et al. 2023 (arXiv:2303.15343).

    >>> model = dual("nano", image_size=32, patch=8, channels=1, vocabulary=100, length=8)
    >>> images, tokens = torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.ones(4, 8).long()
    >>> pairs = model.forward_pairs(images, tokens)
    >>> pairs.image.shape, pairs.text.shape, pairs.scale.item()
    (torch.Size([4, 32]), torch.Size([4, 32]), 10.0)
    """

    def __init__(
        self,
        config: DualConfig,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
    ) -> None:
        super().__init__()
        self.config = config
        self.image = ViT(config.image, mean, std)
        self.text = TextTower(config.text)
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def at(self, patch: int, drop: float = 0.0, seed: int = 0) -> DualEncoder:
        """The same weights with the image tower at another patch size: see `ViT.at`.

        >>> model = dual("nano", image_size=32, patch=8, channels=1, vocabulary=100, length=8)
        >>> model.at(16).text is model.text
        True
        """
        view = copy.copy(self)
        view._modules = self._modules | {"image": self.image.at(patch, drop, seed)}
        return view

    def forward_pairs(
        self,
        images: Tensor,  # [B, C, H, W] uint8 in 0..255, or float in 0..1
        tokens: Tensor,  # [B, L] int64, 0 = padding
    ) -> Pairs:
        """Embeddings of a batch of pairs, with the scale and bias of the loss as they stand.

        Raises:
            ValueError: the towers' inputs differ in rows, or do not fit them.
        """
        if len(images) != len(tokens):
            raise ValueError(
                f"tokens must have as many rows as images ({len(images)}), got {len(tokens)}"
            )
        image, text = (
            F.normalize(x, dim=1, eps=1e-6) for x in (self.image(images), self.text(tokens))
        )
        return Pairs(image, text, self.log_scale.exp(), self.bias)

    forward = forward_pairs


def dual(
    size: str,
    *,
    vocabulary: int,
    length: int,
    image_size: int = 224,
    patch: int = 16,
    channels: int = 3,
    pool: Literal["mean", "class"] = "mean",
    mean: float | tuple[float, ...] = 0.5,
    std: float | tuple[float, ...] = 0.5,
) -> DualEncoder:
    """Build a `DualEncoder` of a named size, freshly initialised from torch's default generator.

    Args:
        size: a key of `SIZES`.
        vocabulary, length: tokens are in [0, vocabulary), at most `length` to a caption.
        image_size, patch, channels, pool, mean, std: of the image tower, see `vit`.

    Raises:
        ValueError: an unknown size, or shapes that do not fit together.

    >>> dual("micro", vocabulary=100, length=8, image_size=32, patch=4).config.text.embed
    64
    """
    width, depth, heads = named(size)
    embed = TEXT_SIZES[size][0]
    image = ViTConfig(width, depth, heads, image_size, patch, channels, embed, pool)
    text = TextConfig(*TEXT_SIZES[size], vocabulary, length, embed)
    return DualEncoder(DualConfig(image, text), mean, std)
