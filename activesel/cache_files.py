# SPDX-License-Identifier: Apache-2.0
"""Files of a reference cache, whole and of one cache, and the fingerprints that say which."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from activesel.files import whole

FORMAT = 1
SETTINGS = ("format", "kind", "loss", "dtype", "shard_rows", "model", "preprocessing")
INDEX, KEYS = "index.json", "ids.safetensors"
OURS = re.compile(r"shard-\d{5,}\.safetensors|ids\.safetensors|index\.json|\..*\.partial")


def row_id(key: str) -> int:
    """64-bit id of a row known by name: BLAKE2b of the name in UTF-8, signed, little-endian.

    Example:
        >>> row_id("n01440764/7.jpg")
        4492875810581875071
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(what: nn.Module | Tensor | np.ndarray[Any, Any] | Mapping[str, Any]) -> str:
    """Hex BLAKE2b over names, dtypes, shapes and bytes: of a model's state, or of a data set.

    A data set's is that of its whole columns, ``{"inputs": x, "targets": y, "id": ids}``. A model's
    tells weights apart, not code: what else changes scores (patch size, token dropping) belongs in
    the cache's `preprocessing`.

    Args:
        what: a module, a tensor, an array, or tensors and arrays by name.

    Raises:
        TypeError: anything else.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0)
        >>> len({fingerprint(y) for y in (x, x.numpy(), x.view(2, 3))})
        2
    """
    if isinstance(what, nn.Module):
        what = what.state_dict()
    digest = Digest()
    digest.update(what if isinstance(what, Mapping) else {"what": what})
    return digest.value()


class Digest:
    """`fingerprint` of columns whose rows come in pieces."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[Any, str, list[int]]] = {}  # hash, kind of rows, their number

    def update(self, columns: Mapping[str, Any]) -> None:
        for name, values in columns.items():
            x = column(values, name)
            kind = f"{x.dtype} {x.ndim} {list(x.shape[1:])}"
            start = hashlib.blake2b(digest_size=16), kind, [0]
            digest, before, rows = self.columns.setdefault(name, start)
            if kind != before:
                raise ValueError(
                    f"{name} must be alike in all batches, unless data has a fingerprint, got"
                    f" {kind} after {before}"
                )
            flat = x.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
            rows[0] += len(x) if x.ndim else 1

    def value(self) -> str:
        parts = [(k, kind, *rows, h.hexdigest()) for k, (h, kind, rows) in self.columns.items()]
        return hashlib.blake2b(json.dumps(sorted(parts)).encode(), digest_size=16).hexdigest()


def column(x: Any, name: str) -> Tensor:
    x = torch.from_numpy(np.require(x, requirements="W")) if isinstance(x, np.ndarray) else x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor or an array, got {type(x).__name__}")
    return x


def integers(ids: Any) -> Tensor:  # [B] int64
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "OU":
        ids = ids.tolist()
    if isinstance(ids, list | tuple):
        ids = [row_id(i) if isinstance(i, str) else i for i in ids]
        ids = torch.tensor(ids, dtype=None if ids else torch.int64)
    ids = column(ids, "ids")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype in (torch.bool, torch.uint64):
        raise TypeError(f"ids must be signed integers or strings, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"ids must be [B], got shape {list(ids.shape)}")
    return ids.long()


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    text = json.dumps(header | {"content": fingerprint(tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    whole(path, lambda temporary: save_file(tensors, temporary, {"activesel": text}))


def read(path: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file's header says beside the settings, and its tensors, all seen to be right."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["activesel"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} must be a whole file of a cache, got: {error!r}") from error
    agree(path, header, expected)
    if header.get("content") != fingerprint(tensors):
        raise ValueError(f"{path} must hold what was written, got other bytes")
    return {name: value for name, value in header.items() if name not in SETTINGS}, tensors


def agree(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} is of another cache: {name} must be {value!r}, got {found.get(name)!r}"
            )


def read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} must hold a finished cache, got no {path.name}")
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        _ = [index[name] for name in (*SETTINGS, "data", "rows", "files")]
        agree(path, index, {"format": FORMAT})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the index of a cache, got: {error!r}") from error
    return index


def prepare(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Clear the folder, or see that what is in it can be gone on with."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    for path in files:
        if not OURS.fullmatch(path.name):
            raise ValueError(f"{folder} must be empty or hold a cache, got {path.name} in it")
    for path in sorted(files, key=lambda path: path.name != INDEX):  # without it, no cache
        if overwrite or path.name.endswith(".partial"):
            path.unlink()
        elif path.name != INDEX:
            read(path, settings)
