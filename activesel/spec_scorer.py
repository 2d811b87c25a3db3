# SPDX-License-Identifier: Apache-2.0
"""The executable specification of the one-launch scorer: pixels to features, in plain torch.

Patches -> embedding -> blocks -> pool -> norm. Computed in the dtype of the model, fp32 at least,
and rounded where the kernel rounds if asked to: float64 without is the truth, fp32 with is the
kernel's twin. Head, losses, scores and keys are those of `spec`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.vit_parts import Linear, Norm, Parts

Rounding: TypeAlias = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    """No rounding."""
    return x


def half(x: Tensor) -> Tensor:
    """To fp16, as of everything the kernel multiplies on tensor cores."""
    return x.half().to(x.dtype)


def e4m3(x: Tensor) -> Tensor:
    """To fp8, saturating, as of the inputs of a block's linear layers under `fp8`."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def features(
    parts: Parts,
    images: Tensor,  # [B, C, H, W] uint8 in 0..255, or float in 0..1; [B, H, W, C] if channels_last
    *,
    channels_last: bool = False,
    rounded: Rounding = exact,
    operand: Rounding | None = None,
) -> Tensor:  # [B, D]
    """Pooled and normalised features, the input of the head.

    Args:
        parts: the model; for the kernel's twin that of `Packed.parts`, whose weights are rounded.
        images: as of `ViT`, or with the channels last.
        channels_last: whether they are.
        rounded: applied to pixels u = (p - 128) / 64, to q, k, v and exp(s - max), and to the
            inputs of a block's linear layers: both norms, attention, GELU.
        operand: applied to the latter instead.

    >>> from activesel.models import vit
    >>> model = vit("mu", image_size=32, patch=8)
    >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> bool((features(model.parts(), images) - model.forward_features(images)).abs().max() < 1e-5)
    True
    """
    operand = operand or rounded
    dtype = torch.promote_types(parts.position.dtype, torch.float32)
    x = embed(parts, images.permute(0, 3, 1, 2) if channels_last else images, dtype, rounded)
    for block in parts.blocks:
        y = linear(block.qkv, operand(norm(block.norm1, x, parts.eps)))
        x = x + linear(block.out, operand(rounded(attention(rounded(y), parts.heads, rounded))))
        y = linear(block.up, operand(norm(block.norm2, x, parts.eps)))
        x = x + linear(block.down, operand(F.gelu(y)))
    return norm(parts.norm, x.mean(1) if parts.token is None else x[:, 0], parts.eps)


def embed(parts: Parts, images: Tensor, dtype: torch.dtype, rounded: Rounding) -> Tensor:
    """[B, T, D]: pixels as u = (p - 128) / 64, which fp16 holds exactly, and all else in weights.

    sum_k w_k (p_k / 255 - mean) / std = sum_k [64 w_k / (255 std)] u_k
                                       + sum_k w_k (128 / 255 - mean) / std
    """
    channels, patch = parts.mean.shape[0], parts.patch_size
    grid = parts.image_size // patch
    p = images.to(dtype) if images.dtype == torch.uint8 else 255 * images.to(dtype)
    u = rounded((p - 128) / 64).reshape(-1, channels, grid, patch, grid, patch)
    u = u.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid**2, channels * patch**2)
    if parts.kept is not None:
        u = u[:, parts.kept.to(u.device)]
    mean, std, position = (t.to(dtype) for t in (parts.mean, parts.std, parts.position))
    weight = parts.patch.weight.to(dtype).unflatten(1, (channels, -1))  # [D, C, P * P]
    bias = (weight.sum(-1) * (128 / 255 - mean) / std).sum(-1)
    if parts.patch.bias is not None:
        bias = bias + parts.patch.bias
    weight = (weight * (64 / 255 / std)[:, None]).flatten(1)
    x = F.linear(u, weight, bias)
    if parts.token is not None:
        x = torch.cat([parts.token.to(dtype).expand(len(x), 1, -1), x], 1)
    return x + position


def norm(layer: Norm, x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.bias.to(x.dtype), eps)


def linear(layer: Linear, x: Tensor) -> Tensor:
    """x W^T + b."""
    bias = layer.bias
    return F.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def attention(
    qkv: Tensor,  # [B, T, 3 D]
    heads: int,
    rounded: Rounding,
) -> Tensor:  # [B, T, D]
    """softmax(q k^T / sqrt(hd)) v of each head, divided by the sum after the product."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, h, T, hd]
    s = q @ k.mT * q.shape[-1] ** -0.5
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return ((rounded(p) @ v) / p.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
