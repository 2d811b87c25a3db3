# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests that need a GPU: which backends, what inputs, and what has to be exact."""

import importlib.util

import pytest
import torch
from test_select import C, make_targets
from torch.utils._pytree import tree_map_only

from activesel import Head, _native, spec

HAS_GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device")
NO_TRITON = importlib.util.find_spec("triton") is None
NO_CUDA = _native.cuda_reason() if HAS_GPU else "torch finds no CUDA device"

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(NO_TRITON, reason="triton is not installed")
)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA))
every_backend = pytest.mark.parametrize("backend", ["auto", TRITON])
every_backend_for_losses = pytest.mark.parametrize("backend", ["auto", TRITON, CUDA])

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
B, T, D = 53, 3, 40


def gpu(x):
    return tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), x)


def randn(*shape, dtype=FP32):
    return torch.randn(shape).to(dtype)


def head(*shape, dtype=BF16, weight_dtype=None, bias=False, classes=C):
    """A head whose logits have unit variance; the shape is the features'."""
    weight = (randn(classes, shape[-1]) * shape[-1] ** -0.5).to(weight_dtype or dtype)
    return Head(randn(*shape, dtype=dtype), weight, randn(classes, dtype=dtype) if bias else None)


def labels(*shape, ignored=True):
    """Classes, a fifth of them to be ignored; a row of several tokens keeps its first."""
    y = make_targets("int", shape, "softmax", None) if ignored else torch.randint(C, shape)
    if len(shape) > 1:
        y[:, 0] = 1
    return y


def bits(x):
    """To tell -0.0 from 0.0, and no NaN from another."""
    return x.masked_fill(x.isnan(), torch.nan).view(torch.int32)


def exact(picked, k, seed=0, step=0, offset=0, temperature=1.0):
    """Everything after the scores has to be the specification's on the CPU, bit for bit."""
    scores = picked.scores.cpu()
    noise = spec.noise(len(scores), torch.tensor([seed]), torch.tensor([step]), offset)
    keys, bad = spec.key(scores, noise, torch.tensor([temperature]))
    indices, threshold, few = spec.topk(keys, k)
    nonfinite = 0 if scores.isfinite().all() else spec.NONFINITE_SCORE
    assert torch.equal(bits(picked.keys.cpu()), bits(keys))
    assert torch.equal(picked.indices.cpu(), indices)
    assert torch.equal(picked.threshold.cpu(), threshold)
    assert int(picked.flags) == nonfinite | int(bad) | int(few)
