# SPDX-License-Identifier: Apache-2.0
"""Models as files: weights and shapes in one, whole or refused."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, TypeVar, overload

import torch

from activesel import files
from activesel.models.dual import DualConfig, DualEncoder
from activesel.models.text import TextConfig
from activesel.models.vit import ViT, ViTConfig

KINDS: dict[type[ViT | DualEncoder], str] = {ViT: "vit", DualEncoder: "dual"}

M = TypeVar("M", ViT, DualEncoder)


def save(
    model: ViT | DualEncoder,
    path: str | os.PathLike[str],
) -> None:
    """Write weights and shapes to one safetensors file, all of it or nothing.

    Args:
        model: the model; its tensors are stored as they are (dtype kept), those of a view at the
            native patch size.
        path: the file; its folder must exist.

    Raises:
        TypeError: `model` is neither a `ViT` nor a `DualEncoder`.

    >>> import tempfile
    >>> from activesel.models import vit
    >>> model = vit("mu", image_size=28, patch=7, channels=1, classes=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/scorer.safetensors")
    ...     load(f"{folder}/scorer.safetensors").config == model.config
    True
    """
    kind = next((name for cls, name in KINDS.items() if isinstance(model, cls)), None)
    if kind is None:
        raise TypeError(f"model must be a ViT or DualEncoder, got {type(model).__name__}")
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    files.write(path, kind, asdict(model.config), tensors)


@overload
def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> ViT: ...
@overload
def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, kind: type[M]
) -> M: ...
def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    kind: Any = ViT,
) -> Any:
    """Read a model that `save` wrote.

    Args:
        path: the safetensors file.
        device: where the weights go.
        kind: what the file must hold, `ViT` or `DualEncoder`.

    Raises:
        TypeError: `kind` is neither.
        ValueError: the file is damaged, foreign, of another kind or of another format version.
        FileNotFoundError: there is no such file.

    >>> load("nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: no model file at nowhere.safetensors
    """
    if kind not in KINDS:
        raise TypeError(f"kind must be ViT or DualEncoder, got {kind!r}")
    parse: Any = _dual if kind is DualEncoder else lambda config: ViTConfig(**config)
    config, tensors = files.read(path, KINDS[kind], parse, device)
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} must hold the weights of {config}, got: {error}") from error
    return model


def _dual(config: dict[str, Any]) -> DualConfig:
    return DualConfig(ViTConfig(**config["image"]), TextConfig(**config["text"]))
