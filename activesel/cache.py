# SPDX-License-Identifier: Apache-2.0
"""What a reference says of a data set, computed once: `write_cache` and `ReferenceCache`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from activesel.operands import FLOATS, Forward, Pairs, log, untouched
from activesel.select import Loss, score

Kind: TypeAlias = Literal["loss", "embeddings"]
Ids: TypeAlias = "Tensor | np.ndarray[Any, Any] | Sequence[int] | Sequence[str]"
Scored: TypeAlias = "Tensor | Pairs"

FORMAT = 1
FIELDS = {"loss": ("inputs", "targets"), "embeddings": ("images", "texts")}
INDEX, KEYS = "index.json", "ids.safetensors"
OURS = re.compile(r"shard-\d{5,}\.safetensors|ids\.safetensors|index\.json|\..*\.partial")


def row_id(key: str) -> int:
    """64-bit id of a row that is known by name: BLAKE2b of the name, as a signed integer.

    Example:
        >>> row_id("n01440764/img_7.jpg")
        -8170264041592926270
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(what: nn.Module | Tensor | np.ndarray[Any, Any] | Mapping[str, Any]) -> str:
    """Hex BLAKE2b over names, dtypes, shapes and bytes: of a model's state, or of a data set.

    A data set's is that of its columns, ``{"inputs": x, "targets": y}``, with "id" where rows have
    ids, whatever its batches. A model's tells weights apart, not code: what else changes scores
    (patch size, token dropping) belongs in `preprocessing`, see `write_cache`.

    Args:
        what: a module, a tensor, an array, or tensors and arrays by name.

    Raises:
        TypeError: anything else.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0)
        >>> fingerprint(x) == fingerprint(x.numpy()), fingerprint(x) == fingerprint(x.view(2, 3))
        (True, False)
    """
    if isinstance(what, nn.Module):
        what = what.state_dict()
    elif not isinstance(what, Mapping):
        what = {"": what}
    digest = _Digest()
    digest.update({name: _tensor(x, name or "what") for name, x in what.items()})
    return digest.value()


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
    """Score a data set once; what is interrupted goes on when called again with the same arguments.

    Shards (safetensors) are written whole or not at all, the index last. Going on reads the data
    again from the start, to see that it is the same, but scores only what is missing. With random
    augmentation a cached score is an approximation: it is that of the one view seen here.

    Args:
        folder: new, empty, or of this cache.
        model: the reference; runs where it is, as `Forward` or by `forward_pairs`.
        data: batches, {"inputs", "targets"} for losses, {"images", "texts"} for embeddings, with or
            without "id"; or tuples in that order. Ids are 64-bit integers or strings (see
            `row_id`), all different; without them, a row's id is its number. An attribute
            ``fingerprint`` (str) stands for the data's content, which otherwise is read.
        kind: "loss", what `score` gives, float32; or "embeddings", for joint selection.
        loss: "softmax" or "sigmoid", for losses.
        dtype: of embeddings, float32, bfloat16 or float16; None keeps the model's.
        batch: rows scored at a time, at most.
        shard_rows: rows of a shard.
        preprocessing: whatever else scores depend on, in words or as a digest.
        overwrite: remove another cache from the folder first.

    Raises:
        ValueError: the folder holds something else, the data changed, an id is there twice, shapes.
        TypeError: dtype or kind.

    Example:
        >>> import tempfile, torch, activesel
        >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = write_cache(f"{folder}/cache", net, [(x, y)])
        ...     losses = cache.lookup(torch.arange(8))
        >>> torch.equal(losses, activesel.score(online=activesel.Forward(net, x), targets=y))
        True
    """
    if kind not in FIELDS:
        raise ValueError(f'kind must be "loss" or "embeddings", got {kind!r}')
    if kind == "embeddings" and not callable(getattr(model, "forward_pairs", None)):
        raise TypeError(f"model must have forward_pairs, got {type(model).__name__}")
    if dtype is not None and (kind == "loss" or dtype not in FLOATS):
        raise TypeError(f"dtype must be a float of embeddings, or None, got {dtype} for {kind}")
    for value, name in ((batch, "batch"), (shard_rows, "shard_rows")):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    given = getattr(data, "fingerprint", None)
    if not isinstance(given, str | None):
        raise TypeError(f"data.fingerprint must be a str, got {type(given).__name__}")
    settings = {
        "format": FORMAT, "kind": kind, "loss": loss if kind == "loss" else None,
        "dtype": str(dtype) if dtype else None, "shard_rows": shard_rows,
        "model": fingerprint(model), "preprocessing": preprocessing,
    }  # fmt: skip
    folder = Path(folder)
    _prepare(folder, settings, overwrite)
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    digest, ids, files, rows = _Digest(), [], {}, 0
    constants: dict[str, Tensor] = {}
    for shard, pieces in groupby(_pieces(data, kind, batch, shard_rows), lambda piece: piece[0]):
        path, start = folder / f"shard-{shard:05d}.safetensors", rows
        todo, parts, keys = not path.exists(), [], []
        for _, (x, y, *key) in pieces:
            rows += len(y)
            keys += key
            if given is None:
                digest.update(dict(zip((*FIELDS[kind], "id"), (x, y, *key), strict=False)))
            if todo:
                scored = _score(model, kind, loss, x.to(device), y.to(device))
                parts.append(_pack(scored, kind, len(y), dtype))
        if keys:
            _sorted(keys)
        ids += keys
        header = settings | {"start": start, "rows": rows, "data": given or digest.value()}
        if todo:
            _write(path, _joined(parts), header)
            log.info("activesel: %s is written, %d rows so far", path, rows)
        files[path.name], tensors = _read(path, header)
        constants = _constants(tensors, constants, path)
    if not rows:
        raise ValueError("data must have rows, got none")
    stray = sorted(path.name for path in folder.glob("shard-*") if path.name not in files)
    if stray:
        raise ValueError(f"data has {rows} rows, fewer than {folder} is of, which has {stray[0]}")
    header = settings | {"start": 0, "rows": rows, "data": given or digest.value()}
    if ids:
        keys, order = _sorted(ids)
        _write(folder / KEYS, {"id": keys, "row": order}, header)
        files[KEYS], _ = _read(folder / KEYS, header)
    from activesel import __version__

    index = header | {"files": files, "activesel": __version__}
    _whole(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n"))
    return ReferenceCache(folder, model=model)


class ReferenceCache:
    """What a reference said of every row of a data set, by row id: see `write_cache`.

    Takes the place of the reference in `Selector`. Files are mapped into memory, and checked: all
    their bytes when opened, which takes about a second per GB.

    Args:
        folder: of a whole cache.
        data: fingerprint that the data's must be, see `fingerprint`.
        model: fingerprint that the model's must be; or the model itself, which then also scores
            rows that are missing.
        preprocessing: text that the one given when writing must be.
        miss: ids that are not there: "error" refuses them, "compute" has them scored and remembers
            that in memory.
        device: where the values go, whole; "cpu" leaves them in the files.

    Attributes:
        kind: "loss" or "embeddings".
        loss: "softmax" or "sigmoid", None for embeddings.
        data, preprocessing: as stored.

    Raises:
        ValueError: a fingerprint is another; a file is missing, truncated, damaged or foreign.
        FileNotFoundError: there is no cache, or one that was never finished.

    Example:
        >>> import tempfile, torch
        >>> net = torch.nn.Linear(4, 3)
        >>> rows = {"inputs": torch.randn(2, 4), "targets": torch.tensor([0, 2]), "id": ["a", "b"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = write_cache(folder, net, [rows]).lookup(["b", "a"])
        ...     again = ReferenceCache(folder, model=fingerprint(net)).lookup([row_id("b")])
        >>> torch.equal(stored[:1], again)
        True
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
        index = _index(self.folder / INDEX)
        self.model = model if isinstance(model, nn.Module) else None
        given = {
            "data": data, "preprocessing": preprocessing,
            "model": fingerprint(model) if isinstance(model, nn.Module) else model,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and value != index[name]:
                raise ValueError(
                    f"{name} of the cache {folder} must be {value!r}, got {index[name]!r}"
                )
        self.kind: Kind = index["kind"]
        self.loss: Loss | None = index["loss"]
        self.data: str = index["data"]
        self.preprocessing: str = index["preprocessing"]
        self._rows: int = index["rows"]
        self._shard_rows: int = index["shard_rows"]
        self._constants: dict[str, Tensor] = {}
        self._tables, keys = [], None
        settings = {name: index[name] for name in SETTINGS}
        for name, entry in index["files"].items():
            entry, tensors = _read(self.folder / name, settings | entry)
            if name == KEYS:
                keys = tensors["id"], tensors["row"]
                continue
            self._tables.append(tensors.pop(self.kind))
            self._constants = _constants(tensors, self._constants, self.folder / name)
        self.device = self._tables[0].to(device, copy=False)[:0].device
        if self.device.type != "cpu":
            self._tables = [torch.cat(self._tables).to(self.device)]
            self._constants = {name: x.to(self.device) for name, x in self._constants.items()}
        self._keys = {self.device: keys and tuple(x.to(self.device) for x in keys)}
        self._keys[torch.device("cpu")] = keys
        self._found: dict[int, int] = {}  # ids that were missing -> rows of
        self._remembered = self._tables[0][:0]

    def __len__(self) -> int:
        return self._rows

    def lookup(
        self,
        ids: Ids,  # [B]
        compute: Callable[[Tensor], Scored] | None = None,
    ) -> Scored:
        """Losses [B] float32, or `Pairs` of embeddings [B, D], of rows given by their ids.

        Args:
            ids: integers, or the strings they were given as; on the CPU or the cache's device.
            compute: with miss="compute", called with the positions [M] int64 in `ids` of distinct
                ids that are missing, returns their losses or `Pairs`.

        Raises:
            ValueError: ids are missing. On a CUDA device looking would stall: with miss="error"
                their rows are NaN there, and miss="compute" waits.

        Example: see `ReferenceCache`.
        """
        ids = _integers(ids)
        if ids.device not in self._keys:
            raise RuntimeError(f"ids must be on the CPU or {self.device}, got {ids.device}")
        rows, there = self._find(ids)
        values = self._take(rows.to(self.device))
        if ids.is_cuda and self.miss == "error":
            there = there.view(-1, *[1] * (values.ndim - 1))
            values = torch.where(there, values, torch.nan)
        elif not there.all():
            missing = (~there).nonzero()[:, 0]
            values[missing.to(self.device)] = self._compute(ids, missing, compute)
        if self.kind == "loss":
            return values
        return Pairs(values[:, 0], values[:, 1], **self._constants)

    def scoring(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Scored] | None:
        """What `lookup` takes as `compute` for a batch of inputs and targets, or images and texts.

        None unless the cache was given the model itself.

        Example:
            >>> import tempfile, torch
            >>> net, x, y = torch.nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = write_cache(folder, net, [(x[:2], y[:2])])
            ...     cache = ReferenceCache(folder, model=net, miss="compute")
            >>> cache.lookup(torch.arange(3), cache.scoring(x, y)).shape
            torch.Size([3])
        """
        model = self.model
        if model is None:
            return None
        return lambda rows: _score(
            model, self.kind, self.loss or "softmax", x[rows.to(x.device)], y[rows.to(y.device)]
        )

    # -------------------------------------------------------------------------------------- inside

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # [B] int64, [B] bool
        keys = self._keys[ids.device]
        last = self._rows - 1
        if keys is None:
            rows = ids.clamp(0, last)
            return rows, rows == ids
        at = torch.searchsorted(keys[0], ids).clamp_(max=last)
        return keys[1][at], keys[0][at] == ids

    def _take(self, rows: Tensor) -> Tensor:
        if len(self._tables) == 1:
            return self._tables[0][rows]
        first = self._tables[0]
        out = first.new_empty(len(rows), *first.shape[1:])
        shards = rows // self._shard_rows
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            out[here] = self._tables[shard][rows[here] - shard * self._shard_rows]
        return out

    def _compute(
        self,
        ids: Tensor,
        missing: Tensor,  # [M] int64 positions
        compute: Callable[[Tensor], Scored] | None,
    ) -> Tensor:  # [M, ...]
        keys = ids[missing].tolist()
        new = {key: at for key, at in zip(keys, missing.tolist(), strict=True)}
        new = {key: at for key, at in new.items() if key not in self._found}
        if new and (self.miss == "error" or compute is None):
            how = "" if self.miss == "error" else ", and nothing was given to compute them"
            raise ValueError(
                f"ids must be in the cache {self.folder}, got {len(keys)} of {len(ids)} that are"
                f" not, such as {', '.join(map(str, keys[:3]))}{how}"
            )
        if new:
            assert compute is not None
            positions = torch.tensor(list(new.values()), device=ids.device)
            packed = _pack(compute(positions), self.kind, len(new), self._remembered.dtype)
            values = packed.pop(self.kind).to(self.device)
            if values.shape[1:] != self._remembered.shape[1:]:
                raise ValueError(
                    f"computed {self.kind} must be {list(self._remembered.shape[1:])} a row, got"
                    f" {list(values.shape[1:])}"
                )
            for name, x in packed.items():
                if not torch.allclose(x, self._constants[name].cpu()):
                    raise ValueError(
                        f"computed {name} must be {self._constants[name].item()}, got {x.item()}"
                    )
            start, room = len(self._found), len(self._remembered)
            if start + len(new) > room:
                more = values.new_zeros(max(room, len(new)), *values.shape[1:])
                self._remembered = torch.cat([self._remembered, more])
            self._remembered[start : start + len(new)] = values
            self._found.update({key: start + i for i, key in enumerate(new)})
        return self._remembered[torch.tensor([self._found[key] for key in keys])]


# ------------------------------------------------------------------------------------------- files


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file all or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    text = json.dumps(header | {"content": fingerprint(tensors)})
    _whole(path, lambda temporary: save_file(tensors, temporary, {"activesel": text}))


def _read(path: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What tells a file from others of its cache, and its tensors, once both are known right."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["activesel"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} must be a whole file of a cache, got: {error}") from error
    _agree(path, header, expected)
    if fingerprint(tensors) != header["content"]:
        raise ValueError(f"{path} is damaged: its content is not what was written")
    return {name: x for name, x in header.items() if name not in SETTINGS}, tensors


def _agree(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} is of another cache or data set (overwrite replaces it): {' and '.join(other)}"
            f" must be the same, got {name} {found.get(name)!r} instead of {expected[name]!r}"
        )


def _index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no cache in {path.parent}, or one not finished: {path} is missing")
    try:
        index = json.loads(path.read_text())
        missing = {*SETTINGS, "data", "rows", "files"} - set(index)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must be the index of a cache, got: {error}") from error
    if missing or index["format"] != FORMAT:
        raise ValueError(f"{path} must be the index of a cache of format {FORMAT}, got another")
    return index


def _prepare(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make or clear the folder, or see that what is there can be gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.iterdir())  # the index first, so that a cache half removed is none
    for path in files:
        if not OURS.fullmatch(path.name):
            raise ValueError(f"{folder} must be empty or of a cache, got {path.name} in it")
    for path in files:
        if overwrite or path.name.endswith(".partial"):
            path.unlink()
        elif path.name == INDEX:
            _agree(path, _index(path), settings)
        else:
            _read(path, settings)


# -------------------------------------------------------------------------------------------- rows


class _Digest:
    """`fingerprint` of columns whose rows come in pieces."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}  # name: [hash, what must not change, rows]

    def update(self, columns: Mapping[str, Tensor]) -> None:
        for name, x in columns.items():
            kind = f"{x.dtype} {x.ndim} {list(x.shape[1:])}"
            column = self.columns.setdefault(name, [hashlib.blake2b(digest_size=16), kind, 0])
            if column[1] != kind:
                raise ValueError(
                    f"{name} must be alike in all batches unless data has a fingerprint, got"
                    f" {kind} after {column[1]}"
                )
            flat = x.detach().cpu().contiguous().reshape(-1)
            column[0].update(flat.view(torch.uint8).numpy())
            column[2] += len(x) if x.ndim else 1

    def value(self) -> str:
        parts = [(name, kind, n, h.hexdigest()) for name, (h, kind, n) in self.columns.items()]
        return hashlib.blake2b(json.dumps(sorted(parts)).encode(), digest_size=16).hexdigest()


def _tensor(x: Any, name: str) -> Tensor:
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor or an array, got {type(x).__name__}")
    return x


def _integers(ids: Any) -> Tensor:  # [B] int64
    if isinstance(ids, list | tuple):
        ids = torch.tensor([row_id(i) if isinstance(i, str) else i for i in ids])
    ids = _tensor(ids, "ids")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers or strings, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"ids must be [B], got shape {tuple(ids.shape)}")
    return ids.long()


def _pieces(
    data: Iterable[Any], kind: Kind, batch: int, shard_rows: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Batches cut to at most `batch` rows of one shard: its number, and the columns."""
    names, row, widths = (*FIELDS[kind], "id"), 0, set()
    for rows in data:
        if not isinstance(rows, Mapping):
            if not isinstance(rows, list | tuple):
                raise TypeError(f"batches must be dicts or tuples, got {type(rows).__name__}")
            if len(rows) > 3:
                raise ValueError(f"batches must be ({', '.join(names)}), got {len(rows)} parts")
            rows = dict(zip(names, rows, strict=False))
        for name in names[:2]:
            if name not in rows:
                raise ValueError(f"batches must have {name!r}, got {', '.join(map(str, rows))}")
        columns = [_tensor(rows[name], name) for name in names[:2]]
        if "id" in rows:
            columns.append(_integers(rows["id"]).cpu())
        widths.add(len(columns))
        lengths = [len(x) for x in columns]
        if len({*lengths}) > 1 or len(widths) > 1:
            raise ValueError(f"columns must all be as long in all batches, got {lengths} rows")
        at = 0
        while at < lengths[0]:
            size = min(batch, lengths[0] - at, shard_rows - row % shard_rows)
            yield row // shard_rows, [x[at : at + size] for x in columns]
            at, row = at + size, row + size


def _score(model: nn.Module, kind: Kind, loss: Loss, x: Tensor, y: Tensor) -> Scored:
    if kind == "loss":
        return score(online=Forward(model, x), targets=y, loss=loss)
    with untouched(model):
        return model.forward_pairs(x, y)  # type: ignore[operator]


def _pack(scored: Scored, kind: Kind, rows: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What files hold of rows scored, once it is known to be right."""
    if kind == "embeddings" and not isinstance(scored, Pairs):
        raise TypeError(f"embeddings must be Pairs, got {type(scored).__name__}")
    n = len(score(reference=scored, loss="dot" if kind == "embeddings" else "softmax"))
    if n != rows:
        raise ValueError(f"{kind} must be of {rows} rows, got {n}")
    if not isinstance(scored, Pairs):
        return {kind: scored.detach().float().cpu()}
    values = torch.stack([scored.image, scored.text], 1).detach()
    one = {"scale": scored.scale, "bias": scored.bias}
    constants = {k: torch.as_tensor(v).detach().float().reshape(1).cpu() for k, v in one.items()}
    return {kind: values.to(dtype or values.dtype).cpu()} | constants


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ...
