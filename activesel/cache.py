# SPDX-License-Identifier: Apache-2.0
"""What a reference says of a data set, computed once: `write_cache` and `ReferenceCache`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from activesel import cache_files as disk
from activesel.files import whole
from activesel.operands import FLOATS, Forward, Pairs, log, untouched
from activesel.select import Loss, score

Kind: TypeAlias = Literal["loss", "embeddings"]
Scored: TypeAlias = "Tensor | Pairs"

FIELDS = {"loss": ("inputs", "targets", "id"), "embeddings": ("images", "texts", "id")}


def write_cache(
    folder: str | os.PathLike[str],
    model: nn.Module,
    data: Iterable[Any],
    *,
    kind: Kind = "loss",
    loss: Loss = "softmax",
    dtype: torch.dtype | None = None,
    batch: int = 1024,
    shard_rows: int = 1 << 18,
    preprocessing: str = "",
    overwrite: bool = False,
) -> ReferenceCache:
    """Score a data set once; an interrupted call goes on when repeated with the same arguments.

    Shards (safetensors) are written whole or not at all, the index last. Going on reads the data
    again, to see that it is the same, and scores what is missing. With random augmentation a cached
    score is an approximation: it is that of the one view seen here.

    Args:
        folder: new, empty, or of this cache.
        model: the reference, on its own device; has ``forward_pairs`` for embeddings.
        data: batches, {"inputs", "targets"} for losses, {"images", "texts"} for embeddings, all
            with "id" or all without; or tuples in this order. Ids are 64-bit integers, or strings
            that stand for their `row_id`, all different; without them a row's id is its number. An
            attribute ``fingerprint`` (str) stands for the content, which else is digested.
        kind: "loss", what `score` gives, float32; or "embeddings", for `joint_select`.
        loss: "softmax" or "sigmoid", for losses.
        dtype: of embeddings, float32, bfloat16 or float16; None keeps the model's.
        batch, shard_rows: rows scored at a time, and in a file, at most.
        preprocessing: whatever else scores depend on, in words or as a digest.
        overwrite: first remove the cache that is in the folder.

    Returns:
        The cache, read back.

    Raises:
        ValueError: the folder holds something else, the data changed, an id is there twice, shapes.
        TypeError: dtype or kind.

    Example:
        >>> import tempfile, torch, activesel
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = activesel.write_cache(folder, net, [(x, y)])
        ...     losses = cache.lookup(torch.arange(8))
        >>> torch.equal(losses, activesel.score(online=activesel.Forward(net, x), targets=y))
        True
    """
    if kind not in FIELDS:
        raise ValueError(f'kind must be "loss" or "embeddings", got {kind!r}')
    if kind == "embeddings" and not callable(getattr(model, "forward_pairs", None)):
        raise TypeError(f"model must have forward_pairs, got {type(model).__name__}")
    if loss not in ("softmax", "sigmoid"):
        raise ValueError(f'loss must be "softmax" or "sigmoid", got {loss!r}')
    if dtype is not None and (kind == "loss" or dtype not in FLOATS):
        raise TypeError(f"dtype must be a float, for embeddings only, got {dtype} for {kind}")
    if min(batch, shard_rows) < 1:
        raise ValueError(f"batch and shard_rows must be >= 1, got {batch} and {shard_rows}")
    given = getattr(data, "fingerprint", None)
    if not isinstance(given, str | None):
        raise TypeError(f"data.fingerprint must be a str, got {type(given).__name__}")
    settings = {
        "format": disk.FORMAT, "kind": kind, "loss": loss if kind == "loss" else None,
        "dtype": str(dtype) if dtype else None, "shard_rows": shard_rows,
        "model": disk.fingerprint(model), "preprocessing": preprocessing,
    }  # fmt: skip
    folder = Path(folder)
    disk.prepare(folder, settings, overwrite)
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    digest, ids, files, rows = disk.Digest(), list[Tensor](), dict[str, Any](), 0
    constants: dict[str, Tensor] = {}  # scale and bias
    pieces = _pieces(data, kind, batch, shard_rows)
    for piece in pieces:
        path, start = folder / f"shard-{rows // shard_rows:05d}.safetensors", rows
        todo, parts, keys = not path.exists(), list[dict[str, Tensor]](), list[Tensor]()
        for columns in _shard(piece, pieces):
            x, y, *key = columns.values()
            rows += len(y)
            keys += key
            if given is None:
                digest.update(columns)
            if todo:
                scored = _score(model, kind, loss, x.to(device), y.to(device))
                parts.append(_pack(scored, kind, len(y), dtype, constants))
        _sorted(keys)
        ids += keys
        header = {"start": start, "rows": rows - start, "data": given or digest.value()}
        if todo:
            joined = {kind: torch.cat([part[kind] for part in parts])}
            disk.write(path, parts[0] | joined, settings | header)
            log.info("activesel: %s is written, %d rows so far", path, rows)
        files[path.name], tensors = disk.read(path, settings | header)
        constants |= {name: x for name, x in tensors.items() if name != kind}
    stray = sorted(path.name for path in folder.glob("shard-*") if path.name not in files)
    if not rows or stray:
        beyond = f", which is less than {folder} holds" if stray else ""
        raise ValueError(f"data must have rows, got {rows}{beyond}")
    header = {"start": 0, "rows": rows, "data": given or digest.value()}
    if ids:
        keyed = dict(zip(("id", "row"), _sorted(ids), strict=True))
        disk.write(folder / disk.KEYS, keyed, settings | header)
        files[disk.KEYS], _ = disk.read(folder / disk.KEYS, settings | header)
    from activesel import __version__

    index = {**settings, **header, "files": files, "activesel": __version__}
    whole(folder / disk.INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n"))
    return ReferenceCache(folder, model=model)


class ReferenceCache:
    """What a reference said of every row of a data set, by row id: see `write_cache`.

    Stands for the reference in `Selector`. Files are mapped into memory; opening checks all their
    bytes, which takes about 2 s per GB.

    Args:
        folder: of a whole cache.
        data, model: fingerprints that must be the stored ones. The model itself will do, and then
            scores rows that are missing, see `scoring`.
        preprocessing: must be the stored text.
        miss: ids that are not there: "error" refuses them, "compute" has them scored and remembers
            that in memory.
        device: where the values go, whole; "cpu" leaves them in the files.

    Attributes:
        kind, loss, data, preprocessing: as stored. len() is the number of rows.

    Raises:
        ValueError: another fingerprint; a file that is truncated, damaged or foreign.
        FileNotFoundError: a file is missing, or there is no finished cache.

    Example:
        >>> import tempfile, torch, activesel
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = activesel.write_cache(folder, net, [(x[:2], y[:2], ["a", "b"])])
        ...     cache = activesel.ReferenceCache(folder, model=net, miss="compute")
        >>> cache.lookup(["b", "a"]).shape
        torch.Size([2])
        >>> cache.lookup(["c", "a"], cache.scoring(x[[2, 0]], y[[2, 0]])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        data: str | None = None,
        model: str | nn.Module | None = None,
        preprocessing: str | None = None,
        miss: Literal["error", "compute"] = "error",
        device: str | torch.device = "cpu",
    ) -> None:
        if miss not in ("error", "compute"):
            raise ValueError(f'miss must be "error" or "compute", got {miss!r}')
        self.folder, self.miss = Path(folder), miss
        index = disk.read_index(self.folder / disk.INDEX)
        self.model = model if isinstance(model, nn.Module) else None
        model = disk.fingerprint(model) if isinstance(model, nn.Module) else model
        given = {"data": data, "model": model, "preprocessing": preprocessing}
        disk.agree(
            self.folder / disk.INDEX, index, {k: v for k, v in given.items() if v is not None}
        )
        self.kind, self.loss = index["kind"], index["loss"]
        self.data, self.preprocessing = index["data"], index["preprocessing"]
        self._rows, self._shard_rows = index["rows"], index["shard_rows"]
        settings = {name: index[name] for name in disk.SETTINGS}
        read = {n: disk.read(self.folder / n, settings | e)[1] for n, e in index["files"].items()}
        keyed = read.pop(disk.KEYS, {})
        keys = [keyed[name] for name in ("id", "row") if keyed]
        self._tables = [tensors.pop(self.kind) for tensors in read.values()]
        self._constants = {k: x.to(device) for k, x in next(iter(read.values())).items()}
        if torch.device(device).type != "cpu":
            self._tables = [torch.cat(self._tables).to(device)]
        self.device = self._tables[0].device
        self._keys = {d: [x.to(d) for x in keys] for d in (torch.device("cpu"), self.device)}
        self._computed: dict[int, Tensor] = {}  # rows of ids that were missing

    def __len__(self) -> int:
        return self._rows

    def lookup(
        self,
        ids: Tensor | np.ndarray[Any, Any] | Sequence[int | str],  # [B]
        compute: Callable[[Tensor], Scored] | None = None,
    ) -> Scored:
        """Losses [B] float32, or `Pairs` of [B, D], of the rows with these ids.

        Args:
            ids: integers, or strings that stand for their `row_id`, on the CPU or the cache's
                device.
            compute: with miss="compute", takes the positions [M] int64 in `ids` of ids that are
                missing, each but once, and gives their losses or `Pairs`.

        Raises:
            ValueError: ids are missing. On a CUDA device seeing that would stall: miss="error" says
                NaN of them there, which selection never picks and counts; miss="compute" stalls.
        """
        ids = disk.integers(ids)
        if ids.device not in self._keys:
            raise RuntimeError(f"ids must be on the CPU or {self.device}, got {ids.device}")
        rows, there = self._find(ids)
        values = self._take(rows.to(self.device))
        if ids.is_cuda and self.miss == "error":
            values.masked_fill_(~there.view(-1, *[1] * (values.ndim - 1)), torch.nan)
        elif not there.all():
            missing = (~there).nonzero()[:, 0]
            values[missing.to(self.device)] = self._missing(ids, missing, compute)
        if self.kind == "loss":
            return values
        return Pairs(values[:, 0], values[:, 1], **self._constants)

    def scoring(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Scored] | None:
        """`compute` of `lookup` for a batch: inputs and targets, or images and texts.

        None unless the cache was given the model itself.
        """
        model, loss = self.model, self.loss
        if model is None:
            return None
        return lambda at: _score(model, self.kind, loss, x[at.to(x.device)], y[at.to(y.device)])

    # -------------------------------------------------------------------------------------- inside

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # [B] int64, [B] bool
        if not self._keys[ids.device]:
            rows = ids.clamp(0, self._rows - 1)
            return rows, rows == ids
        keys, order = self._keys[ids.device]
        asked, back = ids.sort()  # in order, a million keys are searched three times as fast
        at = torch.searchsorted(keys, asked).clamp_(max=self._rows - 1)
        at = torch.empty_like(at).scatter_(0, back, at)
        return order[at], keys[at] == ids

    def _take(self, rows: Tensor) -> Tensor:
        if len(self._tables) == 1:
            return self._tables[0][rows]
        out = torch.empty(len(rows), *self._tables[0].shape[1:], dtype=self._tables[0].dtype)
        shards = rows // self._shard_rows
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            out[here] = self._tables[shard][rows[here] - shard * self._shard_rows]
        return out

    def _missing(self, ids: Tensor, missing: Tensor, compute: Any) -> Tensor:  # [M, ...]
        keys = ids[missing].tolist()
        at = dict(zip(keys, missing.tolist(), strict=True))
        new = [key for key in at if key not in self._computed]
        if new and (self.miss == "error" or compute is None):
            how = "" if self.miss == "error" else ", and there is nothing to compute them with"
            raise ValueError(
                f"ids must be in the cache {self.folder}, got {len(at)} that are not, the first"
                f" {', '.join(map(str, new[:3]))}{how}"
            )
        if new:
            scored = compute(torch.tensor([at[key] for key in new], device=ids.device))
            like, cpu = self._tables[0], {k: x.cpu() for k, x in self._constants.items()}
            values = _pack(scored, self.kind, len(new), like.dtype, cpu)[self.kind]
            if values.shape[1:] != like.shape[1:]:
                raise ValueError(
                    f"computed embeddings must be {like.shape[2]} wide, got {values.shape[2]}"
                )
            self._computed.update(zip(new, values.to(self.device), strict=True))
        return torch.stack([self._computed[key] for key in keys])


# -------------------------------------------------------------------------------------------- rows


def _sorted(ids: list[Tensor]) -> tuple[Tensor, Tensor]:  # ids, their rows
    keys, rows = torch.cat([torch.empty(0, dtype=torch.int64), *ids]).sort()
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise ValueError(f"ids must all be different, got {len(twice)} again: {twice[:3].tolist()}")
    return keys, rows


def _pieces(
    data: Iterable[Any], kind: Kind, batch: int, shard_rows: int
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Batches cut to at most `batch` rows of one shard: the columns, and whether they fill it."""
    names, row, keyed = FIELDS[kind], 0, None
    for rows in data:
        if isinstance(rows, list | tuple) and len(rows) <= 3:
            rows = dict(zip(names, rows, strict=False))
        if not isinstance(rows, Mapping) or not {*names[:2]} <= {*rows}:
            raise ValueError(
                f"data must give dicts or tuples with {names}, got {type(rows).__name__}"
            )
        columns = {name: disk.column(rows[name], name) for name in names[:2]}
        if "id" in rows:
            columns["id"] = disk.integers(rows["id"]).cpu()
        lengths = [len(x) for x in columns.values()]
        if min(lengths) != max(lengths) or keyed not in (None, "id" in rows):
            raise ValueError(
                f"columns must be of the same length, ids in all batches or none, got {lengths}"
            )
        keyed, at = "id" in rows, 0
        while at < lengths[0]:
            size = min(batch, lengths[0] - at, shard_rows - row % shard_rows)
            cut = {name: x[at : at + size] for name, x in columns.items()}
            at, row = at + size, row + size
            yield cut, row % shard_rows == 0


def _shard(
    piece: tuple[dict[str, Tensor], bool] | None, rest: Iterator[tuple[dict[str, Tensor], bool]]
) -> Iterator[dict[str, Tensor]]:
    """Pieces from this one to the end of its shard."""
    while piece:
        yield piece[0]
        piece = None if piece[1] else next(rest, None)


def _score(model: nn.Module, kind: Kind, loss: Any, x: Tensor, y: Tensor) -> Scored:
    if kind == "loss":
        return score(online=Forward(model, x), targets=y, loss=loss)
    with untouched(model):
        return model.forward_pairs(x, y)  # type: ignore[operator]


def _pack(
    scored: Scored,
    kind: str,
    rows: int,
    dtype: torch.dtype | None,
    constants: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What a file holds of rows scored, seen to be right, and to have scale and bias of others."""
    if isinstance(scored, Pairs) is (kind == "loss"):
        raise TypeError(f"what was computed must be {kind}, got {type(scored).__name__}")
    n = len(score(reference=scored, loss="softmax" if kind == "loss" else "dot"))
    if n != rows:
        raise ValueError(f"what was computed must have {rows} rows, got {n}")
    if not isinstance(scored, Pairs):
        return {kind: scored.detach().float().cpu()}
    values = torch.stack([scored.image, scored.text], 1).detach().to("cpu", dtype)
    out = {kind: values}
    for name in ("scale", "bias"):
        out[name] = torch.as_tensor(getattr(scored, name)).detach().float().reshape(1).cpu()
        if not torch.allclose(out[name], constants.setdefault(name, out[name])):
            raise ValueError(
                f"{name} must be {constants[name].item()} in all batches, got {out[name].item()}"
            )
    return out
