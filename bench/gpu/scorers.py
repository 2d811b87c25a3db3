# SPDX-License-Identifier: Apache-2.0
"""Scorers too big for one kernel: torch's own forward pass, and selection from images by it."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import Forward
from activesel.ledger import forward_flops
from activesel.models import ViT, vit
from bench.gpu import baselines
from bench.gpu.device import BF16, Bench
from bench.gpu.timing import Row, Variant, Work

FEATURE_ERROR = 0.05  # of bf16 features, relative to their norm
LOSS_ERROR = 0.2  # of a learnability whose two forward passes ran in bf16


def _scorer(size: str, classes: int, bench: Bench) -> ViT:
    model = vit("mu" if bench.rehearse else size, image_size=bench.size(224, 32), classes=classes)
    return model.to(bench.device, BF16).eval().requires_grad_(False)


def _images(rows: int, model: ViT, bench: Bench) -> Tensor:  # [B, 3, H, W] uint8
    side = model.config.image_size
    return torch.randint(
        256, (rows, 3, side, side), dtype=torch.uint8, generator=bench.generator,
        device=bench.device,
    )  # fmt: skip


def _work(images: Tensor, models: list[ViT], out: int) -> Work:
    flops = sum(forward_flops(model, tuple(images.shape[1:])) for model in models)
    formula = "flops: torch's counter on meta tensors; bytes: uint8 images once, results"
    return Work(int(len(images) * flops), images.nbytes + out, formula=formula)


def features(size: str, rows: int, bench: Bench) -> Row:
    """One forward pass to features, in bf16."""
    model = _scorer(size, 1, bench)
    images = _images(bench.size(rows, 2), model, bench)
    compiled = bench.compile(model.forward_features)

    def check(out: Tensor) -> str:
        truth = copy.deepcopy(model).float().forward_features(images[:2])
        error = ((out[:2].float() - truth).norm() / truth.norm()).item()
        if not error < FEATURE_ERROR:
            raise AssertionError(f"features must be within {FEATURE_ERROR}, got {error:.2g}")
        return f"2 rows within {error:.1g} of fp32"

    variants = [
        Variant("torch.compile", lambda _: compiled(images), check),
        Variant("eager", lambda _: model.forward_features(images), check),
    ]
    work = _work(images, [model], 2 * len(images) * model.config.width)
    return bench.measure(variants, work, 1)


def select(size: str, rows: int, keep: int, classes: int, bench: Bench) -> Row:
    """Images to rows by two scorers, through `Forward`."""
    rows, keep, classes = bench.size(rows, 6), bench.size(keep, 2), bench.size(classes, 9)
    models = [_scorer(size, classes, bench) for _ in range(2)]
    images, targets = _images(rows, models[0], bench), bench.labels(rows, classes)

    def ours(_: int, *, compiled: bool) -> activesel.Selection:
        on, ref = (Forward(m, images, None if compiled else False) for m in models)
        return activesel.select(
            online=on, reference=ref, targets=targets, k=keep, seed=bench.seed, step=bench.step,
            temperature=bench.temperature, backend=bench.backend,
        )  # fmt: skip

    def eager(_: int) -> tuple[Tensor, Tensor]:
        on, ref = (F.cross_entropy(m(images).float(), targets, reduction="none") for m in models)
        return on - ref, baselines.kept(baselines.keys(on - ref), keep)

    def near(scores: Tensor) -> str:
        few = slice(0, 8)
        on, ref = (
            F.cross_entropy(copy.deepcopy(m).float()(images[few]), targets[few], reduction="none")
            for m in models
        )
        error = (scores[few] - (on - ref)).abs().max().item()
        if not error < LOSS_ERROR:
            raise AssertionError(f"scores must be within {LOSS_ERROR} of fp32, got {error:.2g}")
        return f"scores within {error:.1g} of an fp32 forward"

    def check(p: activesel.Selection) -> str:
        noise = bench.seed, bench.step, bench.temperature
        said = [near(p.scores), baselines.check_keys(p.scores, p.keys, *noise)]
        return ", ".join([*said, baselines.check_rows(p.keys, keep, p.indices, p.threshold)])

    variants = [
        Variant("ours", partial(ours, compiled=True), check, ours=True),
        Variant("eager", eager, lambda out: near(out[0])),
        Variant("ours, forward not compiled", partial(ours, compiled=False), check, ours=True),
    ]
    return bench.measure(variants, _work(images, models, 8 * (rows + keep)), 1)
