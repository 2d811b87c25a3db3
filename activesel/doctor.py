# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel doctor`: which backend takes what here, why, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import __version__, _native, ops, spec, spec_joint
from activesel.joint import joint_select
from activesel.models import vit
from activesel.operands import Forward, Head, Pairs
from activesel.select import score, select

STAGES = {
    "scorer": "images -> rows, at once",
    "head": "heads -> scores, keys",
    "logits": "logits -> scores, keys",
    "scores": "losses -> scores",
    "losses": "losses -> keys -> rows",
    "topk": "keys -> rows",
    "joint": "pairs -> rows, jointly",
}
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


def devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    yield from (torch.device("cuda", i) for i in range(torch.cuda.device_count()))


def versions() -> dict[str, str]:
    found = {"activesel": __version__, "Python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def examine(device: torch.device) -> bool:
    """Print what runs on a device, and why not the rest; whether all of it is right."""
    reasons: dict[str, None] = {}
    faults: dict[str, None] = {}
    print(f"{'':26}{'auto takes':12}" + "".join(f"{name:8}" for name in ops.BACKENDS[1:]))
    for stage, what in STAGES.items():
        try:
            chosen, why = ops.choose("auto", device, stage)
            reasons[f"auto takes {chosen}: {why}"] = None
        except (RuntimeError, ValueError) as error:  # the environment asks for what cannot be
            chosen = "-"
            faults[str(error)] = None
        cells = []
        for backend in ops.BACKENDS[1:]:
            if why := ops.why_not(backend, stage, device):
                reasons[f"{backend}: {why}"] = None
                cells.append("-")
                continue
            try:
                wrong = check(backend, stage, device)
            except Exception as error:  # one backend's crash must not hide the others
                wrong = f"{type(error).__name__}: {error}"
            cells.append("WRONG" if wrong else "right")
            if wrong:
                faults[f"{what} by {backend}: {wrong}"] = None
        print(f"  {what:24}{chosen:12}" + "".join(f"{cell:8}" for cell in cells))
    for line in [*reasons, *(f"WRONG {fault}" for fault in faults)]:
        print(f"  {line}")
    return not faults


def report() -> bool:
    """Print everything; whether all that can run here is right."""
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"compiled module: {_native.reason()}")
    print(f"its CUDA kernels: {_native.cuda_reason() or 'ready'}")
    healthy = True
    for device in devices():
        name = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        print(f"\n{device}{name}: every backend against the specification")
        healthy = examine(device) and healthy
    print(
        "\nForward is one launch, pixels to rows, where the scorer has parts (activesel.models.ViT)"
        "\nof a size that is faster so; it joins the head stage where it has forward_features and"
        "\nan nn.Linear head; the output of any other is taken as logits, rounded as it comes."
    )
    return healthy
