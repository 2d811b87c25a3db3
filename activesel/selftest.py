# SPDX-License-Identifier: Apache-2.0
"""Whether a backend does a stage as the specification says, on a device that is here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import _native, ops, spec, spec_joint
from activesel.joint import joint_select
from activesel.models import vit
from activesel.operands import Forward, Head, Pairs
from activesel.select import score, select

ROWS, CLASSES, WIDTH, KEPT = 300, 130, 48, 61  # nothing of it a multiple of a tile

Find = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def find_rows(backend: str) -> Find:
    """Top-k of keys by one backend."""
    return _native.topk_cuda if backend == "cuda" else ops.MODULES[backend].topk


def _side(stage: str, device: torch.device, seed: int) -> Head | Tensor:
    g = torch.Generator().manual_seed(seed)
    if stage == "head":
        x, w = torch.randn(ROWS, WIDTH, generator=g), torch.randn(CLASSES, WIDTH, generator=g)
        return Head(x.to(device).bfloat16(), (w / WIDTH**0.5).to(device).bfloat16())
    shape = (ROWS, CLASSES) if stage == "logits" else (ROWS,)
    return torch.randn(shape, generator=g).to(device)


def _true_loss(x: Head | Tensor, labels: Tensor | None) -> Tensor:  # [B] float64
    if isinstance(x, Head):
        x = x.features.double() @ x.weight.double().T
    x = x.double()
    return x if labels is None else F.cross_entropy(x, labels, reduction="none")


def check(backend: str, stage: str, device: torch.device) -> str:
    """Empty if a backend does a stage as the specification says, else what is wrong."""
    if stage == "joint":
        return _joint_differs(backend, device)
    if stage == "scorer":
        return _scorer_differs(backend, device)
    online, reference = (_side(stage, device, seed) for seed in (0, 1))
    if stage == "topk":
        assert isinstance(online, Tensor)
        return _rows_differ(find_rows(backend)(online, KEPT), online)
    labels = None
    if stage in ("head", "logits"):
        labels = torch.arange(ROWS, device=device) % CLASSES
    both = {"online": online, "reference": reference, "targets": labels, "backend": backend}
    picked = None if stage == "scores" else select(**both, k=KEPT, seed=1, step=2)  # type: ignore
    got = score(**both) if picked is None else picked.scores  # type: ignore[arg-type]
    truth = _true_loss(online, labels) - _true_loss(reference, labels)
    if not (error := (got - truth).abs().max().item()) <= 1e-5:
        return f"scores are off by {error:.1e}"
    if picked is None:
        return ""
    noise = spec.noise(ROWS, torch.tensor([1]), torch.tensor([2]))
    keys, _ = spec.key(got.cpu(), noise, torch.ones(1))
    if not torch.equal(picked.keys.cpu(), keys):
        return "keys are not the specification's for these scores"
    return _rows_differ((picked.indices, picked.threshold, picked.flags), keys)


def _scorer_differs(backend: str, device: torch.device) -> str:
    """Two vision transformers, pixels to rows, against their own forward in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (33, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(33) % 10
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        models = [vit("nano", image_size=28, patch=7, channels=1, classes=10) for _ in range(2)]
        losses = [F.cross_entropy(m.double()(images), labels, reduction="none") for m in models]
    online, reference = (Forward(m.float().to(device), images.to(device)) for m in models)
    picked = select(
        online=online, reference=reference, targets=labels.to(device), k=7, seed=1, backend=backend
    )
    error = (picked.scores.cpu() - (losses[0] - losses[1])).abs().max().item()
    if not error <= 1e-2:  # operands are rounded to fp16
        return f"scores are off by {error:.1e}"
    rows = spec.topk(picked.keys.cpu(), 7)[0]
    return "" if torch.equal(picked.indices.cpu(), rows) else "rows are not the specification's"


def _joint_differs(backend: str, device: torch.device) -> str:
    """Joint selection against the definition in float64."""
    z = F.normalize(torch.randn(4, ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=2)
    online, reference = (Pairs(z[i].to(device), z[i + 1].to(device), 10.0, -5.0) for i in (0, 2))
    picked = joint_select(online=online, reference=reference, k=KEPT, seed=1, backend=backend)
    number = torch.tensor([[10.0], [-5.0]]).double()
    on, ref = ([*z[i : i + 2].double(), *number] for i in (0, 2))
    seed, step, t = torch.tensor([1]), torch.tensor([0]), torch.ones(1)
    rows, scores, batch = spec_joint.dense(on, ref, KEPT, 16, False, seed, step, t, 0, "sigmoid")
    if not (error := (picked.scores.cpu() - scores).abs().max().item()) <= 1e-4:
        return f"conditional scores are off by {error:.1e}"
    if not torch.equal(picked.indices.cpu(), rows):
        return "rows are not the specification's"
    assert picked.batch_score is not None
    error = (picked.batch_score.cpu() - batch).abs().item()
    return f"the batch's score is off by {error:.1e}" if not error <= 1e-2 else ""


def _rows_differ(found: tuple[Tensor, Tensor, Tensor], keys: Tensor) -> str:
    names = "rows", "threshold", "flags"
    expected = spec.topk(keys.cpu(), KEPT)
    wrong = [
        n for n, a, b in zip(names, found, expected, strict=True) if not torch.equal(a.cpu(), b)
    ]
    return f"{', '.join(wrong)} are not the specification's for these keys" if wrong else ""
