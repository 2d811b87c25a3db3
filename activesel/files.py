# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
"""Version of the JSON header that `write` writes."""

T = TypeVar("T")


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a hidden file beside `path`, which then takes that name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(
    path: str | os.PathLike[str],
    kind: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """One safetensors file of a kind of model, with a header that says what it holds."""
    header = json.dumps({"format": FORMAT, "model": kind, "config": config})
    whole(Path(path), lambda file: save_file(tensors, file, metadata={"activesel": header}))


def read(
    path: str | os.PathLike[str],
    kind: str,
    parse: Callable[[dict[str, Any]], T],  # of the header's config
    device: str | torch.device,
) -> tuple[T, dict[str, Tensor]]:
    """What `write` wrote.

    Raises:
        ValueError: the file is damaged, foreign, of another kind or of another format version.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get("activesel")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from error
    expected = f"an 'activesel' header of format {FORMAT} for a {kind}"
    if header is None:
        raise ValueError(f"{path} must hold {expected}, got none")
    try:
        content: dict[str, Any] = json.loads(header)
        if content["format"] != FORMAT or content["model"] != kind:
            raise ValueError(f"format {content['format']}, model {content['model']!r}")
        return parse(content["config"]), tensors
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} must hold {expected}, got: {error}") from error
