# SPDX-License-Identifier: Apache-2.0
"""Scorers and learners that activesel can build, save and load by name."""

from activesel.models.vit import SIZES, ViT, ViTConfig, load, save, vit

__all__ = ["SIZES", "ViT", "ViTConfig", "load", "save", "vit"]
