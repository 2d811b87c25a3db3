# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the one-launch scorer: its shapes, its weights, its precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from activesel import spec_scorer
from activesel.models.vit import ViT, ViTConfig

CLASSES = 10
TINY = 16, 1, 1, 8, 4, 3, "mean"
# Width, depth, heads, image size, patch, channels, pool.
FAMILIES = {
    "mu": (32, 1, 2, 32, 8, 3, "mean"),
    "16 tokens, head 24": (48, 2, 2, 28, 7, 1, "mean"),
    "5 tokens, head 16": (48, 1, 3, 14, 7, 3, "class"),
    "17 tokens": (64, 2, 2, 16, 4, 1, "class"),
    "49 tokens, depth 12": (64, 12, 2, 28, 4, 1, "mean"),
    "64 tokens, head 64": (64, 1, 1, 32, 4, 1, "mean"),
    "65 tokens": (64, 1, 4, 32, 4, 1, "class"),
    "196 tokens": (64, 1, 2, 56, 4, 1, "mean"),
    "50 tokens, patch 16": (96, 1, 3, 112, 16, 1, "class"),
    "1 token, patch 32": (128, 2, 2, 32, 32, 3, "mean"),
    "49 tokens, patch 16": (192, 1, 3, 112, 16, 1, "mean"),
    "197 tokens": (192, 1, 3, 56, 4, 1, "class"),
    "head 12": (36, 1, 3, 12, 3, 2, "class"),
}


def vit(width, depth, heads, image_size, patch, channels, pool, classes=CLASSES, seed=0):
    """Every layer counts: all weights are drawn, attention is uneven, GELU is bent."""
    config = ViTConfig(width, depth, heads, image_size, patch, channels, classes, pool)
    draw = torch.Generator().manual_seed(seed)
    model = ViT(config, [0.45, 0.5, 0.4][:channels], [0.2, 0.25, 0.3][:channels])
    for name, p in model.named_parameters():
        std = 1.5 * p.shape[1] ** -0.5 if p.ndim == 2 else 0.3
        nn.init.normal_(p, "norm" in name and name.endswith("weight"), std, generator=draw)
    return model


def pair(family, **options):
    return [vit(*FAMILIES[family], **options, seed=seed) for seed in (1, 2)]


def pictures(model, rows, dtype=torch.uint8):
    c = model.config
    shape = rows, c.channels, c.image_size, c.image_size
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype)
    return torch.rand(shape).to(dtype)


def error(x, y):
    """Root mean square of the difference, relative to what it is one from."""
    return float((x.double() - y).norm() / y.double().norm())


@torch.no_grad()
def check_features(
    found,  # [S, B, DP]
    models,
    packed,
    images,
    tight=1e-3,
):
    """As near to float64 as torch's fp16, and almost on the twin that rounds where they do."""
    width, last = packed.shape.width, packed.channels_last
    assert not found[..., width:].any(), "padded columns must be zero"
    rounding = dict(rounded=spec_scorer.half)
    if packed.fp8:  # attention goes through fp16 first, and what rounds the other way is amplified
        rounding["operand"], tight = spec_scorer.e4m3, 0.05
    for i, model in enumerate(models):
        ours = found[i, :, :width]
        order = images.permute(0, 2, 3, 1) if last else images
        twin = spec_scorer.features(packed.parts(i), order, channels_last=last, **rounding)
        assert (how := error(ours, twin)) < tight, how
        if not packed.fp8:
            floats = images if images.dtype == torch.uint8 else images.double()
            truth = copy.deepcopy(model).double().forward_features(floats)
            floats = images if images.dtype == torch.uint8 else images.half()
            eager = copy.deepcopy(model).half().forward_features(floats)
            assert error(ours, truth) < 1.5 * error(eager, truth)


def bytes_of(rows, side=8):
    draw = torch.Generator().manual_seed(side)
    return torch.randint(256, (rows, 3, side, side), dtype=torch.uint8, generator=draw)


IMAGES, Y = bytes_of(11), torch.arange(11) % CLASSES


@torch.no_grad()
def losses(model, images=IMAGES, y=Y, dtype=torch.float64, **options):
    """Of bytes, or of other numbers of their range."""
    logits = copy.deepcopy(model).to(dtype)(images.to(dtype) / 255)
    return F.cross_entropy(logits.double(), y, reduction="none", **options)


def near(found, models, images=IMAGES, y=Y):
    """As near to float64 as fp16 modules are: the loss of one, or the difference of two."""
    dtypes = torch.float64, torch.float16
    sides = [[losses(m, images, y, dtype) for m in models] for dtype in dtypes]
    truth, eager = (x[0] - x[1] if len(x) > 1 else x[0] for x in sides)
    assert (found - truth).norm() < 1.5 * (eager - truth).norm()


def tiny(seeds=(1, 2)):
    return [vit(*TINY, seed=seed) for seed in seeds]


@pytest.fixture
def taken(monkeypatch):
    """Calls of the kernel: how many sides each had."""
    from activesel.kernels import scorer

    seen, launch = [], scorer.scorer

    def counted(packed, *args, **options):
        seen.append(len(packed.patch))
        return launch(packed, *args, **options)

    monkeypatch.setattr(scorer, "scorer", counted)
    return seen


def triton(**options):
    return {"targets": Y, "backend": "triton"} | options
