# SPDX-License-Identifier: Apache-2.0
"""A plain vision transformer with the scaling-study names, small enough to read in one go."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activesel.models import flexi
from activesel.models.parts import Parts, parts

SIZES: dict[str, tuple[int, int, int]] = {
    "femto": (8, 1, 1),
    "pico": (16, 1, 2),
    "nano": (32, 2, 2),
    "micro": (64, 4, 2),
    "mini": (96, 4, 3),
    "midi": (160, 6, 5),
    "mu": (32, 1, 2),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}
"""Width, depth and heads by name; the first six are meant for CPUs. The MLP is 4x as wide."""


def positive(config: Any, *names: str) -> None:
    """Refuse a configuration unless the named fields are whole and >= 1, and heads divide width."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.width % config.heads:
        raise ValueError(
            f"width must be a multiple of heads={config.heads}, got width={config.width}"
        )


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes the shapes of a `ViT`, and so what a weight file must carry.

    >>> ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, channels=1).pool
    'mean'
    """

    width: int
    depth: int
    heads: int
    image_size: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    pool: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "heads", "image_size", "patch", "channels", "classes")
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch={self.patch}, got {self.image_size}"
            )
        if self.pool not in ("mean", "class"):
            raise ValueError(f"pool must be 'mean' or 'class', got {self.pool!r}")

    @property
    def tokens(self) -> int:
        """Sequence length inside the blocks, class token included.

        >>> ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, pool="class").tokens
        17
        """
        return (self.image_size // self.patch) ** 2 + (self.pool == "class")


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,  # [B, T, D] float
        mask: Tensor | None = None,  # [B, 1, 1, T] bool, tokens to attend to
    ) -> Tensor:  # [B, T, D]
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, tokens, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class ViT(nn.Module):
    """Vision transformer classifier: patches -> blocks -> pool -> linear head.

    logits = head(pool(norm(blocks(patch(x') + pos)))), with x' = (x - mean) / std, and x / 255
    first where x is uint8. Any image statistics are buffers, so a saved scorer needs no
    pre-processing of its own.

    Args:
        config: the shapes.
        mean, std: image statistics per channel (or one for all), for images in [0, 1].

    Raises:
        ValueError: the shapes do not fit together, or `std` is not positive.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); mean pooling as in Zhai et al. 2022.

    >>> model = ViT(ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, channels=1))
    >>> model(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape
    torch.Size([3, 1000])
    """

    mean: Tensor  # [1, C, 1, 1] float32
    std: Tensor  # [1, C, 1, 1] float32
    _view: flexi.View | None = None

    def __init__(
        self,
        config: ViTConfig,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", _per_channel("mean", mean, config.channels))
        self.register_buffer("std", _per_channel("std", std, config.channels))
        width = config.width
        self.patch = nn.Linear(config.channels * config.patch**2, width)
        self.position = nn.Parameter(torch.empty(1, config.tokens, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if config.pool == "class" else None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        linear(self)

    def at(self, patch: int, drop: float = 0.0, seed: int = 0) -> ViT:
        """The same weights run at another patch size, or on a share of the patches: a cheap scorer.

        A view, not a copy: training either trains both, and whatever is saved has the shapes of
        `config`. The patch embedding w becomes pinv(B^T) w, with B the bilinear resize from native
        patches to the new ones, so that <B x, w'> = <x, w> for larger patches (in the least squares
        for smaller ones); position embeddings are resized bilinearly. Approximate unless the model
        was trained at both sizes.

        Args:
            patch: side in pixels, a divisor of `config.image_size`.
            drop: share of patches left out, in [0, 1). The same ones in every image and call,
                evenly spread; at least one stays.
            seed: which ones; every patch is kept by about the same share of seeds.

        Raises:
            ValueError: out of range. TypeError: `patch` is not an int.

        Source: Beyer et al. 2023 (arXiv:2212.08013); dropping as in Li et al. 2023
            (arXiv:2212.00794).

        >>> model = vit("mu", image_size=32, patch=4)
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> model.at(16)(images).shape, model.at(4, drop=0.5)(images).shape
        (torch.Size([2, 1000]), torch.Size([2, 1000]))
        """
        replace(self.config, patch=patch)  # checks it
        view = copy.copy(self)  # nn.Module keeps parameters in dicts, which the two then share
        view._view = flexi.view(self.config, patch, drop, seed, self.position)
        return view

    def forward_features(
        self,
        x: Tensor,  # [B, C, H, W] or [B, H, W, C], uint8 in 0..255, or float in 0..1
    ) -> Tensor:  # [B, D]
        """Pooled and normalised features, the input of `head`.

        Raises:
            TypeError: images neither uint8 nor floating.
            ValueError: images of another shape than the model was built for.

        >>> vit("mu", classes=5).forward_features(torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 32])
        """
        c = self.config
        first = (c.channels, c.image_size, c.image_size)
        last = (c.image_size, c.image_size, c.channels)
        if x.shape[1:] == last != first:
            x = x.permute(0, 3, 1, 2)
        if x.shape[1:] != first:
            raise ValueError(f"x must be [B, {str(first)[1:-1]}], got {list(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"x must be uint8 or floating, got {x.dtype}")
        weight: Tensor = self.patch.weight
        position: Tensor = self.position
        patch = c.patch
        if self._view is not None:
            weight, position = self._view.resize(weight, position, c)
            patch = self._view.patch
        side = c.image_size // patch
        x = x.reshape(-1, c.channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, side * side, c.channels, patch**2)
        if self._view is not None and self._view.kept is not None:
            x = x[:, self._view.kept.to(x.device)]
        if x.dtype == torch.uint8:
            x = x.to(self.mean.dtype) / 255
        x = (x - self.mean.view(-1, 1)) / self.std.view(-1, 1)
        x = F.linear(x.flatten(2), weight, self.patch.bias)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + position
        for block in self.blocks:
            x = block(x)
        x = x[:, 0] if self.token is not None else x.mean(dim=1)
        features: Tensor = self.norm(x)
        return features

    def forward(
        self,
        x: Tensor,  # as in `forward_features`
    ) -> Tensor:  # [B, classes]
        """Logits of a batch of images; `head(forward_features(x))`."""
        logits: Tensor = self.head(self.forward_features(x))
        return logits

    def parts(self) -> Parts:
        """Its tensors, not copied, for the one-launch scorer.

        Raises:
            TypeError: a layer is not what `__init__` made it.

        >>> len(vit("nano").parts().blocks)
        2
        """
        return parts(self)


def linear(module: nn.Module) -> None:
    """Initialise every linear layer of `module`: Xavier weights, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def _per_channel(name: str, value: float | tuple[float, ...], channels: int) -> Tensor:
    values = (value,) if isinstance(value, int | float) else tuple(value)
    if len(values) not in (1, channels):
        raise ValueError(f"{name} must hold 1 or {channels} numbers, got {len(values)}")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be positive, got {min(values)}")
    return torch.tensor(values, dtype=torch.float32).expand(channels).clone().reshape(1, -1, 1, 1)


def named(size: str) -> tuple[int, int, int]:
    """Width, depth and heads of a named size."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return SIZES[size]


def vit(
    size: str,
    *,
    image_size: int = 224,
    patch: int = 16,
    channels: int = 3,
    classes: int = 1000,
    pool: Literal["mean", "class"] = "mean",
    mean: float | tuple[float, ...] = 0.5,
    std: float | tuple[float, ...] = 0.5,
) -> ViT:
    """Build a `ViT` of a named size, freshly initialised from torch's default generator.

    Args:
        size: a key of `SIZES`.
        image_size, patch: side lengths in pixels; the first a multiple of the second.
        channels, classes: input channels and outputs of the head.
        pool: "mean" over the tokens, or a "class" token.
        mean, std: image statistics, for images in [0, 1].

    Raises:
        ValueError: an unknown size, or shapes that do not fit together.

    >>> sum(p.numel() for p in vit("Ti", classes=1).parameters()) // 100_000  # 5.5 M
    55
    """
    width, depth, heads = named(size)
    config = ViTConfig(width, depth, heads, image_size, patch, channels, classes, pool)
    return ViT(config, mean, std)
