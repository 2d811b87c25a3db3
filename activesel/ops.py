# SPDX-License-Identifier: Apache-2.0
"""The operators, as torch sees them: schema, shapes, FLOPs, and which backend runs.

Every backend is a module with `score` and `select` of the same signature as in `spec`. Inputs
arrive checked (`activesel.select` does that); what can only be known from the data comes back as
bits in `flags`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from activesel import _native, _triton, spec, spec_joint

BACKENDS = ("auto", "torch", "native", "triton", "cuda")
PREFERRED = {"cpu": ("native",), "cuda": ("cuda", "triton")}

MODULES = {"torch": spec, "native": _native, "triton": _triton}
JOINT = {**MODULES, "torch": spec_joint}  # engines of `spec_joint.joint`

LIB = torch.library.Library("activesel", "DEF")
LIB.define(
    "score(Tensor[] online, Tensor[] reference, Tensor? targets, str loss, float label_smoothing,"
    " int ignore_index, str backend) -> (Tensor scores, Tensor flags)"
)
LIB.define(
    "select(Tensor[] online, Tensor[] reference, Tensor? targets, SymInt k, Tensor seed,"
    " Tensor step, Tensor temperature, SymInt offset, str loss, float label_smoothing,"
    " int ignore_index, str backend)"
    " -> (Tensor indices, Tensor scores, Tensor keys, Tensor threshold, Tensor flags)"
)
LIB.define(
    "joint_select(Tensor[] online, Tensor[] reference, SymInt k, int chunks, bool normalize,"
    " Tensor seed, Tensor step, Tensor temperature, SymInt offset, str loss, str backend)"
    " -> (Tensor indices, Tensor scores, Tensor keys, Tensor threshold, Tensor flags,"
    " Tensor batch_score)"
)

# What a backend may have a kernel for: images -> rows, heads or logits -> keys, losses -> scores,
# losses -> keys -> rows, keys -> rows, embeddings of pairs -> rows.
STAGES = ("scorer", "head", "logits", "scores", "losses", "topk", "joint")
KERNELS = {"native": STAGES[1:], "triton": STAGES, "cuda": ("losses", "topk")}


def why_not(name: str, stage: str, device: torch.device) -> str:
    """Empty if a backend can do a stage on a device, else the reason why it cannot."""
    if name == "triton":
        return _triton.reason(device)
    if name == "native":
        if stage not in KERNELS[name]:
            return "no native kernel takes a scorer whole"
        if device.type != "cpu":
            return f"native kernels run on the CPU, got tensors on {device}"
        return "" if _native.available() else _native.reason()
    if name == "cuda":
        if device.type != "cuda":
            return f"CUDA kernels run on CUDA devices, got tensors on {device}"
        if stage not in KERNELS[name]:
            return f"no CUDA C++ kernel takes {stage}, a Triton kernel does"
        return _native.cuda_reason(device.index or 0)
    return ""


def asked_for(backend: str) -> tuple[str, str]:  # name, by whom
    """The backend asked for, "auto" if none is; `ACTIVESEL_BACKEND` overrides "auto"."""
    if backend == "auto":
        wanted, said = os.environ.get("ACTIVESEL_BACKEND", "auto"), "ACTIVESEL_BACKEND"
    else:
        wanted, said = backend, f'backend="{backend}"'
    if wanted not in BACKENDS:
        raise ValueError(f"{said} must be one of {', '.join(BACKENDS)}, got {wanted!r}")
    return wanted, said


def choose(
    backend: str,
    device: torch.device,
    stage: str = "losses",
) -> tuple[str, str]:  # name, reason
    """The backend that takes a stage on a device, and why."""
    wanted, said = asked_for(backend)
    if wanted != "auto" and stage == "scorer" and wanted != "triton":
        return "torch", f"{said} takes what the scorer's own forward makes"
    if wanted != "auto":
        if why := why_not(wanted, stage, device):
            raise RuntimeError(f"{said} cannot run: {why}")
        return wanted, said
    better: dict[str, str] = {}  # and why they cannot
    for name in PREFERRED.get(device.type, ()):
        if not (why := why_not(name, stage, device)):
            if "cuda" in better and better["cuda"] == _native.cuda_fault(device.index or 0):
                say_once(f"activesel: Triton's kernels stand in for CUDA's: {better['cuda']}")
            return name, "; ".join(better.values()) or "the fastest here"
        better[name] = why
    why = "; ".join(better.values()) or f"no kernels for {device.type}"
    if better and device.type != "cpu":
        say_once(f"activesel: {stage} on {device} is left to torch: {why}")
    return "torch", why


scorer_route, channels_last, say_once = (
    _triton.scorer_route,
    _triton.channels_last,
    _triton.say_once,
)


def opaque(x: Tensor) -> bool:
    """Whether torch has to see a call: while it traces or counts, or for tensor subclasses.

    A plain eager call skips the dispatcher, which takes 4 us.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        register_flops()
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or type(x) is not Tensor


def _stage(online: Sequence[Tensor], reference: Sequence[Tensor], reduced: str) -> str:
    sides = [side for side in (online, reference) if side]
    if all(side[0].ndim == 1 for side in sides):
        return reduced
    return "head" if any(len(side) > 1 for side in sides) else "logits"


def _check_flags(flags: Tensor, targets: Tensor | None, temperature: Tensor | None) -> None:
    """On the CPU looking at the data costs nothing, so bad data is an error there."""
    if flags.is_cpu and (bits := int(flags)) & (spec.BAD_TARGET | spec.BAD_TEMPERATURE):
        if bits & spec.BAD_TARGET and targets is not None:
            raise ValueError(
                "targets must be classes in [0, C) or ignore_index,"
                f" got values from {int(targets.min())} to {int(targets.max())}"
            )
        if temperature is not None:
            raise ValueError(f"temperature must be >= 0 with finite 1/T, got {temperature.item()}")


def score_images(
    scorers: Any,  # scorers.Scorers
    given: Sequence[Tensor],  # the other side's losses, or none
    targets: Tensor | None,
    *how: Any,  # as in `score`, without the backend
) -> tuple[Tensor, Tensor]:
    out = _triton.score_images(scorers, given, targets, *how)
    _check_weights(scorers)
    _check_flags(out[1], targets, None)
    return out


def select_images(
    scorers: Any,
    given: Sequence[Tensor],
    targets: Tensor | None,
    k: int,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    *how: Any,  # as in `select`, the backend last
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *how, backend = how  # type: ignore[assignment]
    best = _best_topk("triton", scorers.images.device, backend)
    out = _triton.select_images(scorers, given, targets, k, seed, step, temperature, *how, **best)
    _check_weights(scorers)
    _check_flags(out[4], targets, temperature)
    return out


def _check_weights(scorers: Any) -> None:
    """As `_check_flags`: a weight that is not finite is an error on the CPU, a flag elsewhere."""
    if scorers.packed.bad.is_cpu:
        scorers.packed.check(scorers.names)


def _best_topk(name: str, device: torch.device, backend: str) -> dict[str, Any]:
    if name == "triton" and backend == "auto" and choose(backend, device, "topk")[0] == "cuda":
        return {"find": _native.topk_cuda}
    return {}


def score(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    device = (online or reference)[0].device
    name, _ = choose(backend, device, _stage(online, reference, "scores"))
    out = MODULES[name].score(online, reference, targets, loss, label_smoothing, ignore_index)
    _check_flags(out[1], targets, None)
    return out


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = (online or reference)[0].device
    name, _ = choose(backend, device, _stage(online, reference, "losses"))
    if name == "cuda":
        return _native.select_cuda(online, reference, k, seed, step, temperature, offset)
    out = MODULES[name].select(
        online, reference, targets, k, seed, step, temperature, offset,
        loss, label_smoothing, ignore_index, **_best_topk(name, device, backend),
    )  # fmt: skip
    _check_flags(out[4], targets, temperature)
    return out


def check_pairs(flags: Tensor, sides: Mapping[str, Sequence[Tensor]]) -> None:
    """As `_check_flags`, for embeddings; nothing can be looked at while torch traces."""
    if not flags.is_cpu or type(flags) is not Tensor or torch.compiler.is_compiling():
        return
    if not int(flags) & (spec_joint.BAD_SCALE | spec_joint.BAD_NORM):
        return
    for name, side in sides.items():
        for part, x in zip(("image", "text", "scale", "bias"), side, strict=False):
            if part in ("scale", "bias"):
                if not x.isfinite():
                    raise ValueError(f"{name}.{part} must be finite, got {x.item()}")
                continue
            length = x.float().norm(dim=1)
            length = length[length.isfinite()]
            if ((length.square() - 1).abs() > spec_joint.NORM_TOLERANCE).any():
                raise ValueError(
                    f"{name}.{part} must have rows of length 1 (torch.nn.functional.normalize),"
                    f" got lengths from {length.min():.4g} to {length.max():.4g}"
                )


def joint_select(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    k: int,
    chunks: int,
    normalize: bool,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    loss: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    name, _ = choose(backend, (online or reference)[0].device, "joint")
    out = spec_joint.joint(
        online, reference, k, chunks, normalize, seed, step, temperature, offset, loss, JOINT[name]
    )
    check_pairs(out[4], {"online": online, "reference": reference})
    _check_flags(out[4], None, temperature)
    return out


def _fake_score(online: Any, reference: Any, *_: Any) -> tuple[Tensor, Tensor]:
    x = (online or reference)[0]
    return x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty((), dtype=torch.int32)


def _fake_select(online: Any, reference: Any, targets: Any, k: int, *_: Any) -> tuple[Tensor, ...]:
    scores, flags = _fake_score(online, reference)
    indices = scores.new_empty((k,), dtype=torch.int64)
    return indices, scores, torch.empty_like(scores), scores.new_empty(()), flags


def _fake_joint(online: Any, reference: Any, k: Any, *_: Any) -> tuple[Tensor, ...]:
    out = _fake_select(online, reference, None, k)
    return *out, out[3].new_empty(())


for _device in ("CPU", "CUDA"):
    LIB.impl("joint_select", joint_select, _device)
    LIB.impl("score", score, _device)
    LIB.impl("select", select, _device)
torch.library.register_fake("activesel::score", _fake_score, lib=LIB)
torch.library.register_fake("activesel::select", _fake_select, lib=LIB)
torch.library.register_fake("activesel::joint_select", _fake_joint, lib=LIB)


def _flops(online: Any, reference: Any, *_: Any, **__: Any) -> int:
    """2 D C per token and head; torch's own counter leaves pointwise work out, and so do we."""
    total = 0
    for shapes in (online, reference):
        if len(shapes) > 1:
            *tokens, width = shapes[0]
            total += 2 * torch.Size(tokens).numel() * width * shapes[1][0]
    return total


def _joint_flops(online: Any, reference: Any, k: int, chunks: int, *_: Any, **__: Any) -> int:
    """2 D per similarity: both directions of every chunk but the last against all rows, and of the
    last against the rows chosen."""
    *before, last = spec_joint.sizes(k, chunks)
    total = 0
    for shapes in (online, reference):
        if shapes:
            rows, width = shapes[0]
            total += 4 * width * (sum(before) * rows + last * k)
    return total


FLOPS = {
    torch.ops.activesel.score: _flops,
    torch.ops.activesel.select: _flops,
    torch.ops.activesel.joint_select: _joint_flops,
}


def register_flops() -> None:
    """Tells torch's FLOP counter, where it is in use; to import it would import Triton."""
    if (counting := sys.modules.get("torch.utils.flop_counter")) is None:
        return
    for op, formula in FLOPS.items():
        if op not in counting.flop_registry:
            counting.register_flop_formula(op)(formula)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, counting._FlopCounterMode):  # copied the registry when it was made
                mode.counter.flop_registry.setdefault(op, counting.flop_registry[op])


register_flops()
