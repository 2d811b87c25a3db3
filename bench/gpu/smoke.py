# SPDX-License-Identifier: Apache-2.0
"""Small selections through every kernel, held against the specification on the CPU.

Meant for compute-sanitizer: inputs come from the CPU, so that hardly any kernel runs but ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import activesel
from activesel import Forward, Head, Pairs, _native, spec
from activesel.models import ViT, ViTConfig

Given = dict[str, Any]


def cases() -> Iterator[Given]:
    """Arguments of `select`; ragged sizes, so that every mask is needed."""
    torch.manual_seed(0)
    rows, tokens, classes, width = 37, 3, 71, 40

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    labels = torch.randint(classes, (rows,))
    many = torch.randint(classes, (rows, tokens)).masked_fill(torch.rand(rows, tokens) < 0.3, -100)
    many[:, 0] = 1
    weight, bias = randn(classes, width) / 8, randn(classes)
    for loss in ("softmax", "sigmoid"):
        yield {
            "online": Head(randn(rows, width), weight, bias),
            "reference": Head(randn(rows, width), weight),
            "targets": labels, "loss": loss,
        }  # fmt: skip
        yield {
            "online": Head(randn(rows, tokens, width), weight),
            "reference": torch.randn(rows), "targets": many, "loss": loss,
        }  # fmt: skip
        yield {
            "online": randn(rows, tokens, classes), "reference": randn(rows, tokens, classes),
            "targets": many, "loss": loss,
        }  # fmt: skip
    smooth = {"targets": labels, "label_smoothing": 0.1}
    yield {"online": torch.randn(rows, classes), **smooth}
    yield {"reference": Head(randn(rows, width), weight, bias), **smooth}


def losses() -> Iterator[Given]:
    for rows in (1, 700, 9000):
        yield {"online": torch.randn(rows), "reference": torch.randn(rows).half()}


def pairs() -> Iterator[Given]:
    """Arguments of `joint_select`: models of two widths, a bad row, ragged chunks."""
    for loss in ("sigmoid", "softmax"):
        for dtype in (torch.bfloat16, torch.float32):
            z = [torch.nn.functional.normalize(torch.randn(2, 201, d), dim=2) for d in (40, 72)]
            online, reference = (Pairs(*x.to(dtype), 10.0, -6.0) for x in z)
            online.image[7] = torch.nan
            yield {"online": online, "reference": reference, "loss": loss}
    yield {"reference": reference}


def scorers() -> Iterator[Given]:
    """Arguments of `select` that leave it the pixels: both routes, ragged groups, both layouts."""
    for width, depth, side, rows, pool in ((48, 2, 20, 7, "mean"), (192, 1, 36, 3, "class")):
        config = ViTConfig(width, depth, 3, side, 4, classes=71, pool=pool)
        online, reference = (ViT(config).eval().requires_grad_(False) for _ in range(2))
        images = torch.randint(256, (rows, 3, side, side), dtype=torch.uint8)
        given = {"online": Forward(online, images), "targets": torch.randint(71, (rows,))}
        yield {**given, "reference": Forward(reference, images)}
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    yield {**given, "online": Forward(online, last / 255), "reference": torch.randn(rows)}


def moved(given: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with every tensor passed through `to`; models go where their tensors would."""
    if isinstance(given, Tensor):
        return to(given)
    if isinstance(given, ViT):
        return copy.deepcopy(given).to(to(given.mean).device)
    if isinstance(given, (Head, Pairs, Forward)):
        return type(given)(*(moved(t, to) for t in given))
    if isinstance(given, dict):
        return {name: moved(value, to) for name, value in given.items()}
    return given


def check(given: Given, device: str, backend: str, atol: float = 1e-3) -> None:
    """Scores within fp32 rounding, or `atol`; keys, rows and threshold bit for bit."""
    expected = activesel.score(**given, backend="torch")
    keep = -(-len(expected) // 3)
    known: dict[int, Any] = {}  # what both sides share, they share there
    there = moved(given, lambda t: known.setdefault(id(t), t.to(device)))
    picked = activesel.select(**there, k=keep, seed=7, step=3, backend=backend)
    scores = picked.scores.cpu()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=atol)
    noise = spec.noise(len(scores), torch.tensor([7]), torch.tensor([3]))
    keys, _ = spec.key(scores, noise, torch.ones(1))
    indices, threshold, _ = spec.topk(keys, keep)
    for name, expected in (("keys", keys), ("indices", indices), ("threshold", threshold)):
        if not torch.equal(getattr(picked, name).cpu(), expected):
            raise AssertionError(f"{name} must be the specification's, {len(keys)} rows, {backend}")


def check_joint(given: Given, device: str, backend: str) -> None:
    """The same rows, at a temperature that leaves none to rounding; scores within fp32 rounding."""
    how: Given = {"k": 67, "chunks": 3, "seed": 7, "temperature": 5.0}
    expected = activesel.joint_select(**given, **how, backend="torch")
    there = moved(given, lambda t: t.to(device))
    picked = activesel.joint_select(**there, **how, backend=backend)
    if not torch.equal(picked.indices.cpu(), expected.indices):
        raise AssertionError(f"indices must be the specification's, joint selection, {backend}")
    for name in ("scores", "batch_score"):
        torch.testing.assert_close(
            getattr(picked, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-3,
            equal_nan=True,
        )  # fmt: skip


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device, count = "cuda" if on_gpu else "cpu", 0
    native = on_gpu and not _native.cuda_reason()
    for given in [*cases(), *losses()]:
        check(given, device, "triton")
        count += 1
    for given in scorers():
        check(given, device, "triton", atol=1e-2)  # products of fp16
        count += 1
    for given in pairs():
        check_joint(given, device, "triton")
        count += 1
    for given in losses() if native else ():
        check(given, device, "cuda")
        count += 1
    if native:  # the path of many rows
        check({"online": torch.randn(300_000)}, device, "cuda")
        count += 1
    print(f"{count} selections on {device} equal the specification")


if __name__ == "__main__":
    main()
