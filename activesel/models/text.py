# SPDX-License-Identifier: Apache-2.0
"""A small transformer over the words of a caption."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from activesel.models.vit import Block, linear, positive


@dataclass(frozen=True)
class TextConfig:
    """Everything that fixes the shapes of a `TextTower`.

    Args:
        width, depth, heads: of the blocks.
        vocabulary: tokens are in [0, vocabulary), 0 is padding.
        length: most tokens of a caption.
        embed: width of the output.

    >>> TextConfig(width=32, depth=1, heads=2, vocabulary=100, length=8, embed=16).length
    8
    """

    width: int
    depth: int
    heads: int
    vocabulary: int
    length: int
    embed: int

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "heads", "vocabulary", "length", "embed")


class TextTower(nn.Module):
    """Text transformer: words -> blocks -> mean over the words -> linear head.

    Padding follows the words and changes nothing. The first token counts even where it is padding,
    so that a caption without words has a (learnt) embedding as well.

    Args:
        config: the shapes.

    Raises:
        TypeError: tokens are not int64. ValueError: they are not [B, L]. An id outside the
            vocabulary is torch's IndexError on the CPU and a device assert on a GPU.

    >>> tower = TextTower(TextConfig(32, 1, 2, vocabulary=100, length=8, embed=16))
    >>> tower(torch.tensor([[7, 9, 0, 0], [0, 0, 0, 0]])).shape
    torch.Size([2, 16])
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.words = nn.Embedding(config.vocabulary, width)
        self.position = nn.Parameter(torch.empty(1, config.length, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.embed)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        linear(self)

    def forward(
        self,
        tokens: Tensor,  # [B, L] int64 in [0, vocabulary), 0 = padding; L <= length
    ) -> Tensor:  # [B, embed]
        """Embeddings of a batch of captions, not yet normalised."""
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {tokens.dtype}")
        length = tokens.shape[-1]
        if tokens.ndim != 2 or not 1 <= length <= self.config.length:
            raise ValueError(
                f"tokens must be [B, L], L in [1, {self.config.length}], got {list(tokens.shape)}"
            )
        present = tokens != 0
        present[:, 0] = True
        x = self.words(tokens) + self.position[:, :length]
        for block in self.blocks:
            x = block(x, present[:, None, None])
        share = present.to(x.dtype)
        share = share / share.sum(1, keepdim=True)
        embeddings: Tensor = self.head(self.norm((share.unsqueeze(1) @ x).squeeze(1)))
        return embeddings
