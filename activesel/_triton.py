# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: which kernel takes which operands, and what is left to the specification.

Functions have the names, arguments and results of their twins in `spec`. Kernels are imported when
first used; on CPU tensors they run under Triton's interpreter, for tests.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from activesel import spec, spec_joint

log = logging.getLogger("activesel")
TopK = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]


def absent() -> str:
    """Empty if Triton can be imported, else why not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: install triton>=3.5 ({error})"
    return ""


def compiler() -> str | None:
    """The C compiler that Triton builds its launchers with."""
    cc = os.environ.get("CC")
    return next(filter(None, map(shutil.which, ("gcc", "clang") if cc is None else (cc,))), None)


def no_launcher() -> str:
    """Empty if Triton can build its launchers, in C against Python's headers, else why not."""
    if not compiler():
        return "Triton finds no C compiler for its launchers: install one or set CC"
    scheme = sysconfig.get_default_scheme().replace("local", "prefix")  # as Triton does, for Debian
    header = os.path.join(sysconfig.get_path("include", scheme), "Python.h")
    if os.path.exists(header) or {"CPATH", "C_INCLUDE_PATH"} & os.environ.keys():
        return ""
    return f"Triton's launchers need {header}: install Python's headers (python3-dev)"


@cache
def reason(device: torch.device) -> str:
    """Empty if Triton kernels can run on `device`, else why not."""
    if why := absent():
        return why
    if device.type == "cpu":
        import triton

        if triton.knobs.runtime.interpret:
            return ""
        return "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU)"
    if device.type != "cuda" or torch.version.hip:
        return "Triton kernels are tested on NVIDIA devices only"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return "Triton kernels need compute capability 8.0, this device has {}.{}".format(
            *capability
        )
    return no_launcher()


@cache
def say_once(message: str) -> None:
    log.warning(message)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)


def _rows(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
    noise: Any,  # operands.Noise | None
) -> Any:  # operands.Rows
    from activesel.kernels import head, logits, operands, rows

    unreduced = [side for side in (online, reference) if side and side[0].ndim > 1]
    if not unreduced or targets is None:
        given = [side[0] if side else None for side in (online, reference)]
        return rows.rows(given[0], given[1], None, noise)
    if targets.is_floating_point():
        say_once("activesel: no kernel takes soft targets, so torch makes their losses")
        online, reference = (
            [spec.row_loss(side, targets, loss, label_smoothing, ignore_index)[0]]
            if side and side[0].ndim > 1
            else side
            for side in (online, reference)
        )
        return _rows(online, reference, None, loss, label_smoothing, ignore_index, noise)
    first = unreduced[0]
    classes = first[0].shape[-1] if len(first) == 1 else first[1].shape[0]
    tokens = targets.shape[1] if targets.ndim > 1 else 1
    labels = operands.Labels(
        targets.reshape(-1), tokens, classes, ignore_index, loss == "sigmoid", label_smoothing
    )
    if all(len(side) == 1 for side in unreduced):
        return logits.logits(online, reference, labels, noise)
    online, reference = (  # logits against a head: their losses first
        [logits.logits(side, [], labels, None).scores]
        if len(side) == 1 and side[0].ndim > 1
        else side
        for side in (online, reference)
    )
    return head.head(online, reference, labels, noise)


def _covered(*sides: Sequence[Tensor]) -> bool:
    tensors = [t for side in sides for t in side]
    if all(t.numel() and max(t.shape) <= 1 << 30 for t in tensors):
        return True
    say_once("activesel: no kernel takes empty or such large operands, so torch does all of it")
    return False


def score(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    if not _covered(online, reference):
        return spec.score(online, reference, targets, loss, label_smoothing, ignore_index)
    with _on((online or reference)[0].device):
        out = _rows(online, reference, targets, loss, label_smoothing, ignore_index, None)
        return out.scores, out.flags.amax()


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
    find: TopK | None = None,  # another backend's `topk`, where it is better
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from activesel.kernels import operands

    if not _covered(online, reference):
        return spec.select(
            online, reference, targets, k, seed, step, temperature, offset,
            loss, label_smoothing, ignore_index,
        )  # fmt: skip
    with _on((online or reference)[0].device):
        noise = operands.Noise(seed, step, temperature, offset)
        out = _rows(online, reference, targets, loss, label_smoothing, ignore_index, noise)
        indices, threshold, flags = (find or topk)(out.keys, k, out.flags)
    return indices, out.scores, out.keys, threshold, flags


def channels_last(images: Tensor) -> bool:  # [B, C, H, W]
    """Whether the kernels read these images' channels side by side."""
    from activesel.kernels import scorer

    return scorer.channels_last(images)


def scorer_route(shape: Any, images: Tensor, fp8: bool) -> tuple[bool, str]:
    """Whether kernels score such images faster than torch; why they cannot, if so."""
    from activesel.kernels import routes

    if why := routes.reason(shape, images.device, fp8):
        return False, why
    return routes.faster(shape, images), ""


def _labels(scorers: Any, targets: Tensor | None, loss: str, smoothing: float, ignore: int) -> Any:
    from activesel.kernels import operands

    assert targets is not None  # scorers have been found for targets
    classes = scorers.packed.shape.classes
    return operands.Labels(targets, 1, classes, ignore, loss == "sigmoid", smoothing)


def score_images(
    scorers: Any,  # scorers.Scorers
    given: Sequence[Tensor],  # the other side's losses [B], or none
    targets: Tensor | None,  # [B] int
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    from activesel.kernels import routes

    with _on(scorers.images.device):
        labels = _labels(scorers, targets, loss, label_smoothing, ignore_index)
        out, _ = routes.rows(scorers.packed, scorers.images, labels, given, scorers.sign, None)
    return out.scores, out.flags.amax() | scorers.packed.bad


def select_images(
    scorers: Any,
    given: Sequence[Tensor],
    targets: Tensor | None,
    k: int,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
    find: TopK | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from activesel.kernels import operands, routes

    with _on(scorers.images.device):
        labels = _labels(scorers, targets, loss, label_smoothing, ignore_index)
        noise = operands.Noise(seed, step, temperature, offset)
        packed, sign = scorers.packed, scorers.sign
        out, found = routes.rows(packed, scorers.images, labels, given, sign, noise, k)
        assert out.keys is not None
        if found is None:
            indices, threshold, flags = (find or topk)(out.keys, k, out.flags)
            found = indices, threshold, flags | packed.bad
    indices, threshold, flags = found
    return indices, out.scores, out.keys, threshold, flags


def noise(
    rows: int,
    seed: Tensor,
    step: Tensor,
    offset: int = 0,
    chunk: int = 0,
) -> Tensor:
    from activesel.kernels import noise as kernel

    with _on(seed.device):
        return kernel.noise(rows, seed, step, offset, chunk)


def topk(
    keys: Tensor,  # [B] float32
    k: int,
    partial: Tensor | None = None,  # [P] int32, flags to be or-ed
) -> tuple[Tensor, Tensor, Tensor]:
    from activesel.kernels import topk as kernel

    with _on(keys.device):
        return kernel.topk(keys.contiguous(), k, partial)


def pair_logits(side: spec_joint.Side) -> tuple[Tensor, Tensor]:
    from activesel.kernels import pairs

    if not _covered(side):
        return spec_joint.pair_logits(side)
    with _on(side[0].device):
        return pairs.pair_logits(side)


def pair_add(
    state: Tensor,
    online: spec_joint.Side,
    reference: spec_joint.Side,
    rows: Tensor | None,
    chunk: Tensor,
    loss: str,
) -> None:
    from activesel.kernels import pairs

    if not _covered(online, reference):
        return spec_joint.pair_add(state, online, reference, rows, chunk, loss)
    with _on(state.device):
        pairs.pair_add(state, online, reference, rows, chunk, loss)


def pair_keys(own: Tensor, *rest: Any) -> Tensor:
    from activesel.kernels import pair_keys as kernel

    if not _covered([own]):
        return spec_joint.pair_keys(own, *rest)
    with _on(own.device):
        return kernel.pair_keys(own, *rest)
