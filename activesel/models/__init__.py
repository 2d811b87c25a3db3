# SPDX-License-Identifier: Apache-2.0
"""Scorers and learners that activesel can build, save and load by name."""

from activesel.losses import contrastive_loss
from activesel.models.dual import TEXT_SIZES, DualConfig, DualEncoder, dual
from activesel.models.files import load, save
from activesel.models.text import TextConfig, TextTower
from activesel.models.vit import SIZES, ViT, ViTConfig, vit
from activesel.packing import Packed

__all__ = [
    "SIZES",
    "TEXT_SIZES",
    "DualConfig",
    "DualEncoder",
    "Packed",
    "TextConfig",
    "TextTower",
    "ViT",
    "ViTConfig",
    "contrastive_loss",
    "dual",
    "load",
    "save",
    "vit",
]
