# SPDX-License-Identifier: Apache-2.0
"""The compiled module `activesel._C`: loaded when first asked for; only here are pointers taken.

Functions have the names, arguments and results of their twins in `spec` and `spec_joint`, and run
on CPU tensors; those that end in `_cuda` run on CUDA tensors, on the current stream, and wait for
nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from activesel import driver, spec
from activesel.spec_joint import pair_logits as pair_logits  # one pass of 16: not worth a kernel

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int64: 4}
LOSSES, LOGITS = 1, 2  # kinds of operand; these numbers are launch.h's
GPU = "cuda"  # the type of device that functions ending in `_cuda` run on
NO_CUDA = "activesel._C was built without CUDA: reinstall with nvcc, or from a +cu wheel"

Ints = tuple[int, ...]


@cache
def _load() -> tuple[Any, str]:  # module or None, reason
    from activesel import __version__

    try:
        module = importlib.import_module("activesel._C")
    except ImportError as error:
        return None, f"activesel._C cannot be loaded, reinstall with a C++ compiler ({error})"
    if module.version != __version__:
        said = f"activesel._C was built for version {module.version}, not {__version__}: reinstall"
        return None, said
    return module, f"activesel._C loaded, {module.isa()} kernels"


def _module() -> Any:
    module, why = _load()
    if module is None:
        raise RuntimeError(why)
    return module


def available() -> bool:
    return _load()[0] is not None


def reason() -> str:
    return _load()[1]


def cuda_reason(device: int = 0) -> str:
    """Empty if the compiled module holds GPU code that `device` can run, else why not."""
    module, why = _load()
    if module is None:
        return why
    return cuda_fault(device) if module.cuda else NO_CUDA


def cuda_fault(device: int = 0) -> str:
    """Why `device` cannot run the GPU code that the module holds; to hold none is no fault."""
    module, _ = _load()
    return driver.refusal(module, device) if module and module.cuda else ""


def _on(device: str, x: Tensor) -> Tensor:
    """The one guard before a pointer is taken."""
    if x.device.type != device:
        raise RuntimeError(f"native kernels need {device.upper()} tensors, got one on {x.device}")
    return x.resolve_neg()


def _readable(x: Tensor, device: str = "cpu") -> Tensor:
    if x.dtype not in DTYPES:
        raise TypeError(f"native kernels read {', '.join(map(str, DTYPES))}, got {x.dtype}")
    return _on(device, x)


def _operand(x: Tensor) -> Ints:  # as `operand` in bindings.cpp reads it
    if x.ndim == 1:
        return LOSSES, x.data_ptr(), DTYPES[x.dtype], 0, x.stride(0), 0, 0
    row, *token, cls = x.stride()
    return LOGITS, x.data_ptr(), DTYPES[x.dtype], x.shape[-1], row, token[0] if token else 0, cls


def _labels(targets: Tensor) -> tuple[int, Ints]:  # tokens per row, as `targets_of` reads it
    stride = targets.stride()
    if targets.is_floating_point():
        row, *token, cls = stride
    else:
        (row, *token), cls = stride, 0
    return (
        targets.shape[1] if token else 1,
        (targets.data_ptr(), DTYPES[targets.dtype], row, token[0] if token else 0, cls),
    )


def _head_loss(
    operand: Sequence[Tensor],  # features [B, (T,) D], weight [C, D], (bias [C])
    targets: Tensor,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, int]:  # [B] float32, flags
    """Some tokens' logits at a time, so that they stay in the cache and are never all there."""
    weight = operand[1].float()
    bias = operand[2].float() if len(operand) > 2 else None
    rows, leading = operand[0].shape[0], operand[0].ndim - 1
    features, labels = operand[0].flatten(0, leading - 1), targets.flatten(0, leading - 1)
    out = features.new_empty(features.shape[0], dtype=torch.float32)
    size, flags = max(1, spec.HEAD_CHUNK // weight.shape[0]), 0
    for xs, ys, part in zip(features.split(size), labels.split(size), out.split(size), strict=True):
        logits = spec.head_logits(xs, weight, bias)
        flags |= _module().score(
            _operand(logits), (), _labels(ys)[1], loss == "sigmoid", label_smoothing, ignore_index,
            xs.shape[0], 1, part.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    if leading == 1:
        return out, flags
    soft = targets.is_floating_point()
    counts = torch.ones_like(out, dtype=torch.bool) if soft else labels != ignore_index
    return spec.row_mean(out, counts, rows), flags


class _Inputs:
    """Operands and targets as integers for the compiled module, and the tensors they point into."""

    __slots__ = ("arguments", "flags", "held", "rows")

    def __init__(
        self,
        online: Sequence[Tensor],
        reference: Sequence[Tensor],
        targets: Tensor | None,
        loss: str,
        label_smoothing: float,
        ignore_index: int,
    ) -> None:
        self.flags = 0
        self.held: list[Tensor] = []
        sides: list[Ints] = []
        tokens = 1
        labels: Ints = ()
        if targets is not None:
            targets = _readable(targets if targets.is_floating_point() else targets.long())
            tokens, labels = _labels(targets)
            self.held.append(targets)
        for operand in (online, reference):
            if len(operand) > 1 and targets is not None:
                x, bad = _head_loss(operand, targets, loss, label_smoothing, ignore_index)
                self.flags |= bad & spec.BAD_TARGET
            elif operand:
                x = _readable(operand[0])
            else:
                sides.append(())
                continue
            self.rows = x.shape[0]
            self.held.append(x)
            sides.append(_operand(x))
        self.arguments = (
            *sides, labels, loss == "sigmoid", label_smoothing, ignore_index, self.rows, tokens,
        )  # fmt: skip


def row_loss(
    operand: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    scores, flags = score(operand, (), targets, loss, label_smoothing, ignore_index)
    return scores, (flags & spec.BAD_TARGET).bool()


def score(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(online, reference, targets, loss, label_smoothing, ignore_index)
    scores = torch.empty(inputs.rows)
    flags = _module().score(*inputs.arguments, scores.data_ptr(), torch.get_num_threads())
    return scores, torch.tensor(flags | inputs.flags, dtype=torch.int32)


def select(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    k: int,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _Inputs(online, reference, targets, loss, label_smoothing, ignore_index)
    scores, keys = torch.empty(inputs.rows), torch.empty(inputs.rows)
    indices = torch.empty(k, dtype=torch.int64)
    threshold, flags = torch.empty(()), torch.empty((), dtype=torch.int32)
    _module().select(
        *inputs.arguments, inputs.flags, seed.data_ptr(), step.data_ptr(), temperature.data_ptr(),
        offset, k, scores.data_ptr(), keys.data_ptr(), indices.data_ptr(), threshold.data_ptr(),
        flags.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return indices, scores, keys, threshold, flags


def noise(
    rows: int,
    seed: Tensor,
    step: Tensor,
    offset: int = 0,
    chunk: int = 0,
) -> Tensor:
    out = torch.empty(rows)
    _module().noise(
        int(seed), int(step) & spec.MASK32, offset, chunk, rows, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def topk(
    keys: Tensor,  # [B] float32
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = _readable(keys).contiguous()
    indices, threshold = torch.empty(k, dtype=torch.int64), torch.empty(())
    flags = _module().topk(
        keys.data_ptr(), keys.shape[0], k, indices.data_ptr(), threshold.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return indices, threshold, torch.tensor(flags, dtype=torch.int32)


def _embeddings(side: Sequence[Tensor]) -> Ints:  # as `pair_side` in bindings.cpp reads it
    if not side:
        return ()
    matrices = [(_readable(x).data_ptr(), DTYPES[x.dtype], *x.stride()) for x in side[:2]]
    return side[0].shape[1], *matrices[0], *matrices[1]


def pair_add(
    state: Tensor,  # [1, R] | [4, R] float32, changed in place
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    rows: Tensor | None,  # [R] int64
    chunk: Tensor,  # [c] int64
    loss: str,
) -> None:
    sides = [[x.resolve_neg() for x in side] for side in (online, reference)]
    softmax = loss == "softmax"
    terms = [float(x) for side in sides for x in (side[2:] or (torch.zeros(()),) * 2)]
    if softmax:
        terms[1] = terms[3] = 0.0  # no bias
    chunk = chunk[chunk >= 0]
    at = chunk.new_full(((online or reference)[0].shape[0],), -1)
    at[chunk] = torch.arange(chunk.shape[0])
    if rows is not None:
        rows = rows.contiguous()
        at = at[rows]
    _module().joint(
        *map(_embeddings, sides), *terms, softmax, state.shape[1],
        0 if rows is None else rows.data_ptr(), at.data_ptr(), chunk.shape[0], chunk.data_ptr(),
        state.data_ptr(), state.stride(0), torch.get_num_threads(),
    )  # fmt: skip


# -------------------------------------------------------------------------------------- on the GPU


def _cuda() -> Any:
    module = _module()
    if not module.cuda:
        raise RuntimeError(NO_CUDA)
    return module


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _plain(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`x` so that a pointer to its numbers is all a kernel on `device` has to know."""
    x = _on(GPU, x).contiguous()
    if x.device != device:
        raise RuntimeError(f"{name} must be on {device} as the rest is, got {x.device}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    return x


def _results(x: Tensor, k: int) -> tuple[list[Tensor], Ints]:
    """Indices, threshold, flags and workspace beside `x`, and the integers that end a call."""
    rows = x.shape[0]
    if not 0 <= k <= rows:
        raise ValueError(f"k must be in [0, {rows}], got {k}")
    words = _cuda().topk_cuda_workspace(rows) // 8 + 1
    shapes = ((k, torch.int64), ((), torch.float32), ((), torch.int32), (words, torch.int64))
    out = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return out, (*(y.data_ptr() for y in out), x.device.index or 0, _stream(x.device))


def topk_cuda(
    keys: Tensor,  # [B] float32
    k: int,
    partial: Tensor | None = None,  # [P] int32, flags found so far: their OR joins the result's
) -> tuple[Tensor, Tensor, Tensor]:
    if keys.ndim != 1:
        raise ValueError(f"keys must be [B], got {list(keys.shape)}")
    keys = _plain("keys", keys, torch.float32, keys.device)
    words, count = 0, 0
    if partial is not None:
        partial = _plain("partial", partial, torch.int32, keys.device)
        words, count = partial.data_ptr(), partial.numel()
    (indices, threshold, flags, _workspace), where = _results(keys, k)
    _cuda().topk_cuda(keys.data_ptr(), keys.shape[0], k, words, count, *where)
    return indices, threshold, flags


def select_cuda(
    online: Sequence[Tensor],  # [] | [losses [B]]
    reference: Sequence[Tensor],
    k: int,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sides = [[_readable(x, GPU) for x in side] for side in (online, reference)]
    first = (*sides[0], *sides[1])[0]
    for x in sides[0] + sides[1]:
        if x.ndim != 1 or x.shape != first.shape:
            raise ValueError(f"losses must be [B] and of one length, got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"losses must be floating, got {x.dtype}")
        if x.device != first.device:
            raise RuntimeError(f"losses must be on one device, got {first.device} and {x.device}")
    state = [
        _plain("seed", seed, torch.int64, first.device),
        _plain("step", step, torch.int64, first.device),
        _plain("temperature", temperature, torch.float32, first.device),
    ]
    (indices, threshold, flags, _workspace), where = _results(first, k)
    scores, keys = (first.new_empty(first.shape, dtype=torch.float32) for _ in range(2))
    _cuda().select_cuda(
        *(_operand(side[0]) if side else () for side in sides), *(x.data_ptr() for x in state),
        offset, first.shape[0], k, scores.data_ptr(), keys.data_ptr(), *where,
    )  # fmt: skip
    return indices, scores, keys, threshold, flags
