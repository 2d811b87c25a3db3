# SPDX-License-Identifier: Apache-2.0
"""What lets one `ViT` run at several patch sizes, or on a share of its patches."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from activesel.models.vit import ViTConfig

Array = np.ndarray[Any, np.dtype[np.float64]]


@lru_cache(maxsize=64)
def bilinear(old: int, new: int) -> Array:
    """[new, old] float64: linear interpolation with antialiasing along one side.

    >>> bilinear(2, 4)[1].tolist()
    [0.75, 0.25]
    """
    width = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    weights = np.maximum(0.0, 1 - np.abs(np.arange(old) - centre) / width)
    return np.asarray(weights / weights.sum(1, keepdims=True))


@lru_cache(maxsize=64)
def patch_resize(old: int, new: int) -> Array:
    """[new, old] float64 P with w' = P w P^T = pinv(B^T) w, B the bilinear resize of both sides.

    B is the Kronecker product of `bilinear` with itself, so its pseudo-inverse is that of the
    pseudo-inverses.

    >>> patch_resize(4, 8).shape
    (8, 4)
    """
    return np.asarray(np.linalg.pinv(bilinear(old, new).T), np.float64)


class View(NamedTuple):
    """How a `ViT` runs instead of natively; None where it does as natively."""

    patch: int
    weight_map: Tensor | None  # [patch, native patch]
    grid_map: Tensor | None  # [side, native side]
    kept: Tensor | None  # [n] int64, patches in raster order

    def resize(
        self,
        weight: Tensor,  # [D, C * P * P]
        position: Tensor,  # [1, tokens, D]
        config: ViTConfig,
    ) -> tuple[Tensor, Tensor]:  # for this view's patches
        """Weights of the patch embedding and positions, differentiable in those of the model."""
        if self.weight_map is not None and self.grid_map is not None:
            side, width = config.image_size // config.patch, weight.shape[0]
            weight = weight.reshape(width * config.channels, config.patch, config.patch)
            p, g = self.weight_map.to(weight), self.grid_map.to(position)
            weight = (p @ (weight @ p.T)).reshape(width, -1)
            first, grid = position[0].split([config.tokens - side**2, side**2])
            grid = grid.T.reshape(-1, side, side)
            grid = g @ (grid @ g.T)
            position = torch.cat([first, grid.flatten(1).T]).unsqueeze(0)
        if self.kept is not None:
            kept = self.kept.to(position.device)
            extra = config.pool == "class"
            position = torch.cat([position[:, :extra], position[:, extra:][:, kept]], dim=1)
        return weight, position


def view(config: ViTConfig, patch: int, drop: float, seed: int, like: Tensor) -> View:
    """The view of a model of shapes `config`, its constants of `like`'s dtype and device."""
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    side, native = config.image_size // patch, config.image_size // config.patch
    kept = None if drop == 0 else spread(side, drop, seed).to(like.device)
    if patch == config.patch:
        return View(patch, None, None, kept)
    maps = patch_resize(config.patch, patch), bilinear(native, side)
    weight_map, grid_map = (torch.tensor(m).to(like) for m in maps)
    return View(patch, weight_map, grid_map, kept)


def spread(side: int, drop: float, seed: int) -> Tensor:  # [n] int64, ascending
    """Patches of a side x side grid that stay when a share `drop` goes, at least one.

    The ranks are of a plane whose values are evenly distributed among any patch's neighbours (the
    R2 sequence of Roberts 2018); the seed turns it around.

    >>> spread(2, 0.5, seed=0).tolist()
    [0, 3]
    """
    plastic = 1.32471795724474602596
    row, column = np.divmod(np.arange(side**2), side)
    value = (row / plastic + column / plastic**2 + seed * 0.6180339887498949) % 1.0
    n = max(1, round((1 - drop) * side**2))
    return torch.from_numpy(np.sort(np.argsort(value, kind="stable")[:n]))
