# SPDX-License-Identifier: Apache-2.0
"""Which `Forward` operands a kernel takes whole, from pixels on, and their packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from activesel import ops
from activesel.operands import FLOATS, Forward, Operand
from activesel.packing import Packed
from activesel.vit_parts import Parts, Shape


class Scorers(NamedTuple):
    """One or two scorers of one shape, and the images both look at."""

    packed: Packed
    images: Tensor  # [B, C, H, W] uint8 or float
    names: tuple[str, ...]  # of the sides packed, "online" first

    @property
    def sign(self) -> int:
        """Of the first side's loss in the score."""
        return -1 if self.names == ("reference",) else 1


def find(
    online: Operand,
    reference: Operand,
    targets: Tensor | None,
    backend: str,
) -> Scorers | None:
    """The scorers among the operands, if a kernel takes them and is the faster way; else None.

    Asked for that kernel by name, it raises where `parts` finds something that the kernel does not
    compute, or two scorers do not match; under "auto" the log says so once. Sizes that no kernel
    takes are the scorer's own forward's in either case.
    """
    sides = {"online": online, "reference": reference}
    forwards = {n: s for n, s in sides.items() if isinstance(s, Forward) and _takes_part(s)}
    if not forwards or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    images = next(iter(forwards.values())).images
    if not isinstance(images, Tensor) or ops.opaque(images) or not images.numel():
        return None
    if ops.choose(backend, images.device, "scorer")[0] != "triton":
        return None
    asked = ops.asked_for(backend)[0] != "auto"
    try:
        with torch.no_grad():
            parts = {name: f.scorer.parts() for name, f in forwards.items()}  # type: ignore[attr-defined]
        if not all(isinstance(p, Parts) for p in parts.values()):
            return None
        shapes = {name: Shape.of(p) for name, p in parts.items()}
        _check_pair(forwards, shapes)
        shape = next(iter(shapes.values()))
        faster, why = ops.scorer_route(shape, images, _fp8(forwards))
        if why or not (faster or asked):
            if why:
                ops.say_once(f"activesel: {why}; the scorer's own forward is used instead")
            return None
        images = _images(next(iter(forwards)), images, next(iter(parts.values())))
    except (TypeError, ValueError) as error:
        if asked:
            raise type(error)(f'{error}; backend="auto" runs the scorer\'s own forward') from error
        ops.say_once(f"activesel: {error}; the scorer's own forward is used instead")
        return None
    return Scorers(_packed(forwards, parts, shape, images), images, tuple(forwards))


def _takes_part(forward: Forward) -> bool:
    """Whether its class has the method: attributes of that name may be anything."""
    return not forward.compile and callable(getattr(type(forward.scorer), "parts", None))


def _fp8(forwards: dict[str, Forward]) -> bool:
    return any(f.fp8 for f in forwards.values())


def _check_pair(forwards: dict[str, Forward], shapes: dict[str, Shape]) -> None:
    if len(forwards) < 2:
        return
    online, reference = forwards["online"], forwards["reference"]
    if shapes["online"] != shapes["reference"]:
        raise ValueError(
            "online and reference must have one shape,"
            f" got {shapes['online']} and {shapes['reference']}"
        )
    a, b = online.images, reference.images
    if a is not b and (
        not isinstance(b, Tensor) or a.data_ptr() != b.data_ptr() or a.shape != b.shape
        or a.stride() != b.stride() or a.dtype != b.dtype
    ):  # fmt: skip
        raise ValueError("online and reference must be given the same images, got two tensors")
    if online.fp8 != reference.fp8:
        raise ValueError(f"fp8 must be the same for both, got {online.fp8} and {reference.fp8}")


def _images(name: str, images: Tensor, parts: Parts) -> Tensor:  # [B, C, H, W]
    channels, side = parts.mean.shape[0], parts.image_size
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(
            f"{name}.images must be uint8, float32, bfloat16 or float16, got {images.dtype}"
        )
    if parts.position.device != images.device:
        raise RuntimeError(f"{name}.images must be on {parts.position.device}, got {images.device}")
    if images.shape[1:] == (channels, side, side):
        return images
    if images.shape[1:] == (side, side, channels):
        return images.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name}.images must be [B, {channels}, {side}, {side}] or [B, {side}, {side}, {channels}],"
        f" got {list(images.shape)}"
    )


# By scorer, by the other one (or itself), by layout, precision and stream: launches of one stream
# follow each other, so that nobody reads the buffers while they are filled again.
_kept: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, Packed]]] = WeakKeyDictionary()


def _packed(
    forwards: dict[str, Forward],
    parts: dict[str, Parts],
    shape: Shape,
    images: Tensor,
) -> Packed:
    """Weights as they are now, in the buffers of the last call for the same scorers."""
    models = [f.scorer for f in forwards.values()]
    sides: Sequence[Parts] = list(parts.values())
    last, fp8 = ops.channels_last(images), _fp8(forwards)
    cuda = images.is_cuda
    stream = torch.cuda.current_stream(images.device).cuda_stream if cuda else 0
    known = _kept.setdefault(models[0], WeakKeyDictionary()).setdefault(models[-1], {})
    key = len(sides), last, fp8, str(images.device), stream
    if cuda and torch.cuda.is_current_stream_capturing():
        before = next((p for p in known.values() if len(p.patch) == len(sides)), None)
        if before is None and sides[0].kept is not None:
            raise RuntimeError(
                "scorers that drop patches must have been called once before capture"
            )
        return Packed.of(sides, channels_last=last, fp8=fp8, like=before)  # the graph's own
    if key not in known or known[key].shape != shape:
        known[key] = Packed.of(sides, channels_last=last, fp8=fp8)
    else:
        known[key].refresh(sides)
    return known[key]
