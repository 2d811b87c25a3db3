# SPDX-License-Identifier: Apache-2.0
"""What a user hands to `select`: how much of the scoring has been left undone."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

log = logging.getLogger("activesel")


class Head(NamedTuple):
    """Features and the classifier still to be applied: logits = features @ weight.T + bias.

    The logits are never held all at once, and go from the fp32 accumulator straight into the loss.

    Args:
        features: [B, D] or [B, T, D], float32, bfloat16 or float16.
        weight: [C, D], any of those dtypes; may differ from the features'.
        bias: [C] or None.

    Example:
        >>> import torch, activesel
        >>> head = activesel.Head(torch.randn(8, 16), torch.randn(10, 16))
        >>> activesel.score(online=head, targets=torch.arange(8)).shape
        torch.Size([8])
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Forward(NamedTuple):
    """A scorer and its input: the whole forward is left to activesel.

    On CUDA devices an `activesel.models.ViT`, or any scorer with ``parts() -> Parts``, runs in one
    kernel launch from pixels to keys, together with a reference of its shape, where that is faster
    (docs/scorers.md). Else a scorer with ``forward_features(x) -> [B, D]`` and ``head: nn.Linear``
    becomes a `Head`, so that nothing is rounded after the head, and the output of any other
    callable is taken as logits. That forward runs without gradients and in evaluation mode, under
    the caller's autocast, and leaves training flags, buffers and random states as it found them.

    On CUDA devices `forward_features` is compiled by torch and replayed as a CUDA graph, once per
    shape; the first call takes as long as that takes. It runs as it is where it cannot be compiled
    (one line in the log says so), and while a caller traces, counts or captures.

    Args:
        scorer: module or callable.
        images: whatever the scorer takes, rows first.
        compile: False never compiles `forward_features`; True does on any device, and no kernel
            takes its place; None (default) compiles on CUDA devices, unless the environment has
            ACTIVESEL_COMPILE=off.
        fp8: multiply the blocks' linear layers in e4m3 where the kernel runs: faster, less exact.

    Example:
        >>> import torch, activesel
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
        >>> scorer = activesel.Forward(net, torch.randn(8, 4, 4))
        >>> losses = activesel.score(online=scorer, targets=torch.arange(8))
        >>> net.training, losses.requires_grad
        (True, False)
    """

    scorer: Callable[[Any], Tensor]
    images: Any
    compile: bool | None = None
    fp8: bool = False


class Pairs(NamedTuple):
    """Contrastive embeddings: pair i is an image and its text, logit_ij = scale * z_i . t_j + bias.

    Args:
        image: [B, D], rows of length 1, float32, bfloat16 or float16.
        text: [B, D], likewise.
        scale: inverse temperature of the contrastive loss, finite; a float, or a tensor of one
            element on the embeddings' device.
        bias: of the sigmoid loss, likewise; the softmax loss does not depend on it.

    Example:
        >>> import torch, activesel
        >>> z = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
        >>> activesel.score(online=activesel.Pairs(z, z, scale=10.0), loss="dot")[0].round()
        tensor(-10.)
    """

    image: Tensor
    text: Tensor
    scale: float | Tensor
    bias: float | Tensor = 0.0


FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Operand: TypeAlias = "Tensor | Head | Forward | Pairs | None"


@contextmanager
def untouched(*models: Any) -> Iterator[None]:
    """Run models without gradients in evaluation mode; then flags, buffers and RNG are as before.

    Flags are set directly, not through ``train()``: a module may have frozen parts of itself, and
    some override ``train`` with side effects. Evaluation mode leaves ordinary modules' buffers and
    random states alone; the copies are for those that are not ordinary.
    """
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    flags = [m.training for m in modules]
    buffers = [(m, name, b) for m in modules for name, b in m._buffers.items()]
    copies = [None if b is None else b.clone() for _, _, b in buffers]
    cuda = {b.device for m in modules for b in m.parameters(recurse=False) if b.is_cuda}
    capturing = bool(cuda) and torch.cuda.is_current_stream_capturing()
    try:
        for m in modules:
            m.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[] if capturing else list(cuda)):
            yield
    finally:
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag
        for (m, name, b), copy in zip(buffers, copies, strict=True):
            m._buffers[name] = b  # it may have been replaced
            if b is None or copy is None or _expanded(b):
                continue
            if torch.is_inference_mode_enabled() or not b.is_inference():
                b.data.copy_(copy)  # `.data`: whoever saved it for backward need not know


def _expanded(x: Tensor) -> bool:
    """One place in memory stands for several elements: nobody can have written to it in place."""
    return any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _features(scorer: Any, images: Any) -> Tensor:
    return scorer.forward_features(images)


@cache
def _compiled() -> Callable[[Any, Any], Tensor]:
    return torch.compile(_features, mode="reduce-overhead")


_uncompilable: set[type] = set()


def _run_compiled(scorer: Any, images: Any) -> Tensor:
    if scorer.head.weight.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()
    try:
        return _compiled()(scorer, images).clone()  # the next replay overwrites the original
    except Exception as error:
        out = _features(scorer, images)  # raises too, if the fault is not the compiler's
        log.warning("activesel: %s cannot be compiled: %s", type(scorer).__name__, error)
        _uncompilable.add(type(scorer))
        return out


def _compiles(scorer: Any, wanted: bool | None) -> bool:
    if wanted is None:
        on_gpu = scorer.head.weight.is_cuda
        wanted = on_gpu and os.environ.get("ACTIVESEL_COMPILE", "on") != "off"
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return wanted and not watched and not capturing and type(scorer) not in _uncompilable


def forward(operand: Forward) -> Head | Tensor:
    """Features and head where the scorer offers both, else its output."""
    scorer = operand.scorer
    with untouched(scorer):
        head = getattr(scorer, "head", None)
        features = getattr(scorer, "forward_features", None)
        if type(head) is nn.Linear and callable(features):  # a subclass may do more
            run = _run_compiled if _compiles(scorer, operand.compile) else _features
            return Head(run(scorer, operand.images), head.weight, head.bias)
        return scorer(operand.images)


def tensors(
    operand: Operand,
    name: str,
) -> list[Tensor]:
    """An operand as the ops take it: [], [losses], [logits] or [features, weight, (bias)]."""
    if operand is None:
        return []
    if isinstance(operand, Forward):
        operand = forward(operand)
    if isinstance(operand, Head):
        return _head_tensors(operand, name)
    assert not isinstance(operand, Pairs)  # they have been reduced to losses
    operand = _scored(operand, name)
    if operand.ndim not in (1, 2, 3):
        raise ValueError(
            f"{name} must be losses [B] or logits [B, C] or [B, T, C],"
            f" got shape {tuple(operand.shape)}"
        )
    return [operand]


def _scored(t: Tensor, name: str) -> Tensor:
    if not isinstance(t, Tensor):
        kinds = "a Tensor" if "." in name else "a Tensor, Head, Forward or Pairs"
        raise TypeError(f"{name} must be {kinds}, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    return t.detach() if t.requires_grad else t


def pair_tensors(
    pairs: Pairs,
    name: str,
) -> list[Tensor]:
    """[image [B, D], text [B, D], scale [1] float32, bias [1] float32]."""
    if not isinstance(pairs, Pairs):
        raise TypeError(f"{name} must be Pairs, got {type(pairs).__name__}")
    image, text = _scored(pairs.image, f"{name}.image"), _scored(pairs.text, f"{name}.text")
    if image.ndim != 2:
        raise ValueError(f"{name}.image must be [B, D], got shape {tuple(image.shape)}")
    if text.shape != image.shape:
        raise ValueError(
            f"{name}.text must be {list(image.shape)} as {name}.image is, got {list(text.shape)}"
        )
    if text.device != image.device:
        raise RuntimeError(f"{name}.text must be on {image.device}, got {text.device}")
    return [
        image,
        text,
        _number(pairs.scale, f"{name}.scale", image),
        _number(pairs.bias, f"{name}.bias", image),
    ]


def _number(value: float | Tensor, name: str, like: Tensor) -> Tensor:  # [1] float32
    if isinstance(value, Tensor):
        value = _scored(value, name)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise RuntimeError(f"{name} must be on {like.device}, got {value.device}")
        return value.reshape(1).float()
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a Tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return torch.full((1,), value, dtype=torch.float32, device=like.device)


def _head_tensors(head: Head, name: str) -> list[Tensor]:
    features = _scored(head.features, f"{name}.features")
    weight = _scored(head.weight, f"{name}.weight")
    if features.ndim not in (2, 3):
        raise ValueError(
            f"{name}.features must be [B, D] or [B, T, D], got shape {tuple(features.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != features.shape[-1]:
        raise ValueError(
            f"{name}.weight must be [C, {features.shape[-1]}], got shape {tuple(weight.shape)}"
        )
    if head.bias is None:
        return [features, weight]
    bias = _scored(head.bias, f"{name}.bias")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}.bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    return [features, weight, bias]
