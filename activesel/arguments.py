# SPDX-License-Identifier: Apache-2.0
"""What the public functions were given: checked, and turned into what the operators take."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activesel import ops, spec_joint
from activesel.operands import FLOATS, Operand, Pairs, pair_tensors, tensors
from activesel.scorers import Scorers, find

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_MAX = torch.finfo(torch.float32).max


class Operands(NamedTuple):
    """Both operands as the operators take them, checked against each other."""

    online: list[Tensor]
    reference: list[Tensor]
    scorers: Scorers | None  # those that a kernel takes from pixels on, and are not in the lists
    first: Tensor
    rows: int


def operands(
    online: Operand,
    reference: Operand,
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
    backend: str,
) -> Operands:
    """What `select` and `score` were given; a forward that no kernel takes whole is run here."""
    if isinstance(online, Pairs) or isinstance(reference, Pairs):
        if loss not in ("dot", "sigmoid"):
            raise ValueError(
                f'loss must be "dot" or "sigmoid" for Pairs, got {loss!r} (losses that depend on'
                " the other rows are joint_select's)"
            )
        online, reference = _alone(online, "online", loss), _alone(reference, "reference", loss)
        loss = "softmax"
    if loss not in ("softmax", "sigmoid"):
        raise ValueError(f'loss must be "softmax" or "sigmoid", got {loss!r}')
    integer(ignore_index, "ignore_index")
    if not 0 <= number(label_smoothing, "label_smoothing") <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    scorers = find(online, reference, targets, backend)
    if scorers is not None:
        return _beside(scorers, online, reference, targets, loss, label_smoothing, ignore_index)
    on, ref = tensors(online, "online"), tensors(reference, "reference")
    first = _first(on, ref)
    unreduced = [(s, n) for s, n in ((on, "online"), (ref, "reference")) if s and s[0].ndim > 1]
    if not unreduced:
        if targets is not None:
            raise ValueError("targets must be None when only losses are given, got a tensor")
    else:
        if targets is None:
            raise ValueError(f"targets must be given for {unreduced[0][1]}, got None")
        _check_targets(targets, unreduced, first.device)
    return Operands(on, ref, None, first, first.shape[0])


def _beside(
    scorers: Scorers,
    online: Operand,
    reference: Operand,
    targets: Any,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> Operands:
    """Scorers that a kernel takes whole; a side that is none of them becomes losses."""
    images = scorers.images
    logits = images.new_empty(len(images), scorers.packed.shape.classes, device="meta")
    _check_targets(targets, [([logits], scorers.names[0])], images.device)
    sides: list[list[Tensor]] = []
    for side, name in ((online, "online"), (reference, "reference")):
        given = [] if name in scorers.names else tensors(side, name)
        _check_beside(given, name, images)
        if given and given[0].ndim > 1:
            _check_targets(targets, [([logits], scorers.names[0]), (given, name)], images.device)
            given = [ops.score(given, [], targets, loss, label_smoothing, ignore_index, "auto")[0]]
        sides.append(given)
    return Operands(sides[0], sides[1], scorers, images, len(images))


def _alone(operand: Operand, name: str, loss: str) -> Operand:
    """Pairs as their per-row losses, anything else as it is."""
    if not isinstance(operand, Pairs):
        return operand
    side = pair_tensors(operand, name)
    x, flags = spec_joint.pair_logits(side if loss == "sigmoid" else spec_joint.unbiased(side))
    ops.check_pairs(flags, {name: side})
    return spec_joint.pair_loss(x, loss)


def pairs(
    online: Pairs | None,
    reference: Pairs | None,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Both sides of a joint selection as tensors, and their number of rows."""
    on, ref = (
        [] if side is None else pair_tensors(side, name)
        for side, name in ((online, "online"), (reference, "reference"))
    )
    return on, ref, _first(on, ref).shape[0]


def _first(on: list[Tensor], ref: list[Tensor]) -> Tensor:
    """The first tensor there is, after checking that all share its rows and device."""
    if not on and not ref:
        raise ValueError("online or reference must be given, got None for both")
    first = (on or ref)[0]
    for side, name in ((on, "online"), (ref, "reference")):
        _check_beside(side, name, first)
    return first


def _check_beside(side: list[Tensor], name: str, first: Tensor) -> None:
    if side and side[0].shape[0] != first.shape[0]:
        raise ValueError(f"{name} must have {first.shape[0]} rows, got {side[0].shape[0]}")
    for t in side:
        _check_device(t, name, first.device)


def _check_targets(
    targets: Tensor, sides: list[tuple[list[Tensor], str]], device: torch.device
) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a Tensor, got {type(targets).__name__}")
    if targets.dtype not in FLOATS + INTEGERS:
        raise TypeError(f"targets must be integers or floats, got {targets.dtype}")
    _check_device(targets, "targets", device)
    for side, name in sides:
        shape = [*side[0].shape[:-1], side[1].shape[0] if len(side) > 1 else side[0].shape[-1]]
        if shape[-1] == 0:
            raise ValueError(f"{name} must have at least one class, got shape {shape}")
        expected = shape if targets.is_floating_point() else shape[:-1]
        if list(targets.shape) != expected:
            raise ValueError(
                f"targets must be {expected} for {name}, got shape {list(targets.shape)}"
            )
    classes = {s[1].shape[0] if len(s) > 1 else s[0].shape[-1] for s, _ in sides}
    if len(classes) > 1:
        raise ValueError(f"online and reference must have the same classes, got {sorted(classes)}")


def _check_device(t: Tensor, name: str, device: torch.device) -> None:
    if t.device != device:
        raise RuntimeError(f"{name} must be on {device}, got {t.device}")


def _one(t: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if t.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(t.shape)}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    _check_device(t, name, device)
    return t.detach().reshape(1)


def integer(value: Any, name: str) -> Any:  # int, or torch.SymInt, which must stay symbolic
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def number(value: Any, name: str) -> Any:
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


@lru_cache(maxsize=16)
def kept_full(size: tuple[int, ...], value: float, **kind: Any) -> Tensor:
    """`torch.full` for numbers that rarely change, only ever read: making one takes 1 us."""
    return torch.full(size, value, **kind)


def draw(
    seed: int | Tensor | None,
    step: int | Tensor,
    temperature: float | Tensor,
    offset: int,
    like: Tensor,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """What the noise and its scale depend on, as the operators take it."""
    offset = integer(offset, "offset")
    if not 0 <= offset < (1 << 63) - rows:
        raise ValueError(f"offset must be in [0, 2^63 - {rows}), got {offset}")
    device = like.device
    full = kept_full if device.type == "cpu" and not ops.opaque(like) else torch.full
    return (
        seed_tensor(seed, device, full),
        step_tensor(step, device),
        temperature_tensor(temperature, device, full),
        offset,
    )


def seed_tensor(
    given: int | Tensor | None,
    device: torch.device,
    full: Callable[..., Tensor],
) -> Tensor:  # [1] int64
    if isinstance(given, Tensor):
        return _one(given, "seed", torch.int64, device)
    if given is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("seed must be given during CUDA graph capture, got None")
        drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (1,))
        return drawn.to(device, non_blocking=True)
    seed = integer(given, "seed")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return full((1,), signed, dtype=torch.int64, device=device)


def step_tensor(given: int | Tensor, device: torch.device) -> Tensor:  # [1] int64
    if isinstance(given, Tensor):
        return _one(given, "step", torch.int64, device)
    step = integer(given, "step")
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step must be in [0, 2^32), got {step}")
    return torch.full((1,), step, device=device)


def temperature_tensor(
    given: float | Tensor,
    device: torch.device,
    full: Callable[..., Tensor],
) -> Tensor:  # [1] float32
    if isinstance(given, Tensor):
        return _one(given, "temperature", torch.float32, device)
    if not number(given, "temperature") >= 0:
        raise ValueError(f"temperature must be >= 0, got {given}")
    if 0 < given * FLOAT_MAX < 1:
        raise ValueError(f"temperature must be 0 or have a finite 1/T in float32, got {given}")
    t = math.inf if given > FLOAT_MAX else given
    return full((1,), t, dtype=torch.float32, device=device)
