# SPDX-License-Identifier: Apache-2.0
"""Batches of any structure: taking rows, finding an array in them, taking the ids out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAVES = (str, bytes, int, float)


def take(batch: Any, indices: Tensor, rows: int) -> Any:
    """The rows `indices` of everything in the batch that has `rows` rows, see `Selection.take`."""

    def has_rows(leaf: Any) -> bool:
        return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 and leaf.shape[0] == rows

    if isinstance(batch, Tensor):
        return batch.index_select(0, indices.to(batch.device)) if has_rows(batch) else batch
    if isinstance(batch, np.ndarray):
        return batch[indices.cpu().numpy()] if has_rows(batch) else batch
    if isinstance(batch, list) and len(batch) == rows:
        arrays = [v for v in batch if isinstance(v, (Tensor, np.ndarray))]
        if not arrays or not all(map(has_rows, arrays)):
            return [batch[i] for i in indices.tolist()]
    if type(batch) is tuple and len(batch) == rows and all(isinstance(v, LEAVES) for v in batch):
        return tuple(batch[i] for i in indices.tolist())  # torch's default collate makes these
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(take(v, indices, rows) for v in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(take(v, indices, rows) for v in batch)
    if isinstance(batch, Mapping):
        taken = {name: take(v, indices, rows) for name, v in batch.items()}
        if type(batch) is dict:
            return taken
        out: Any = copy.copy(batch)  # keeps the type and whatever else it carries
        out.update(taken)
        return out
    return batch


def first_array(batch: Any) -> Any:
    """The first tensor or array in it."""
    leaves = tree_leaves(batch, is_leaf=lambda x: isinstance(x, Mapping) and type(x) is not dict)
    for leaf in leaves:
        if isinstance(leaf, Mapping):
            leaf = first_array(dict(leaf))
        if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
            return leaf
    raise TypeError(f"batch must hold a tensor with rows, got {type(batch).__name__}")


def split_ids(batch: Any, key: str | int | None) -> tuple[Any, Any]:
    """The batch without the entry that holds its rows' ids, and that entry."""
    if key is None:
        return batch, None
    if isinstance(key, int) and isinstance(batch, (list, tuple)):
        if -len(batch) <= key < len(batch):
            rest = list(batch)
            ids = rest.pop(key)
            return type(batch)(rest), ids
    elif isinstance(batch, Mapping) and key in batch:
        batch = copy.copy(batch)
        return batch, batch.pop(key)
    kind = "tuple" if isinstance(key, int) else "dict"
    raise ValueError(f"batch must be a {kind} with id_key {key!r}, got {type(batch).__name__}")
