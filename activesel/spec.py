# SPDX-License-Identifier: Apache-2.0
"""The executable specification: what every other backend must return, in plain torch.

Read it top to bottom: Philox bits -> Gumbel noise -> per-row losses -> scores -> keys -> top-k.
It is also the ``torch`` backend, so it runs on any device. Two promises are made of every backend:

* losses agree within rounding (all of them accumulate in fp32 or better);
* given the same fp32 scores, seed, step and offset, keys and rows agree **bit for bit**. That is
  why the logarithm below is a fixed fp32 polynomial, evaluated one rounded operation at a time:
  library logarithms and fused multiply-adds differ between devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NONFINITE_SCORE, TOO_FEW_ROWS, BAD_TARGET, BAD_TEMPERATURE = 1, 2, 4, 8  # bits of `flags`

MASK32 = 0xFFFFFFFF
FLOAT_MAX = torch.finfo(torch.float32).max
HEAD_CHUNK = 1 << 21  # logits held at once by `Head` on the CPU: 8 MiB in fp32

# ------------------------------------------------------------------------------------------- noise


def philox(
    counter: Sequence[Tensor],  # 4 x int64 holding uint32, any broadcastable shapes
    key: Sequence[Tensor],  # 2 x int64 holding uint32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # 4 x int64 holding uint32
    """Philox4x32-10, ten rounds of multiply and xor (Salmon et al., SC 2011)."""

    def mul(a: Tensor, m: int) -> tuple[Tensor, Tensor]:  # 32 x 32 -> (high, low), never above 2^49
        low = a * (m & 0xFFFF)
        mid = a * (m >> 16) + (low >> 16)
        return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = mul(c0, 0xD2511F53)
        hi1, lo1 = mul(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


LN2_HI, LN2_LO = 0.693145751953125, 1.428606765330187e-06  # LN2_HI * k is exact for |k| < 2^7
LOG_Q = (  # (log1p(f) - f + f^2/2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]; 1.3 ulp, fitted by us
    0.333333313465118408203125,
    -0.250008195638656616210938,
    0.200012266635894775390625,
    -0.166233569383621215820312,
    0.142017588019371032714844,
    -0.131601825356483459472656,
    0.127615749835968017578125,
    -0.076344929635524749755859,
)
SQRT_HALF_BITS = 0x3F3504F3  # bits of the fp32 nearest sqrt(1/2)
NEAR_ONE = 0x4AFB0CCC  # bits r below this have 1 - u >= sqrt(1/2)


def _log1p(f: Tensor, k: Tensor) -> Tensor:  # fp32: log(2^k * (1 + f))
    q = torch.full_like(f, LOG_Q[-1])
    for c in reversed(LOG_Q[:-1]):
        q = q * f + c
    r = f * f
    y = q * f * r
    y = y - 0.5 * r
    y = y + k * LN2_LO
    y = f + y
    return y + k * LN2_HI


def _split(x: Tensor) -> tuple[Tensor, Tensor]:  # fp32 x > 0 -> f, k with x = 2^k (1 + f)
    bits = x.view(torch.int32) - SQRT_HALF_BITS
    m = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    return m - 1.0, (bits >> 23).float()


def gumbel(
    r: Tensor,  # [B] int64 holding 32 random bits
) -> Tensor:  # [B] float32
    """Standard Gumbel noise g = -log(-log1p(-u)), u = (r + 1/2) / 2^32; finite, in [-3.14, 22.88].

    1 - u is formed from the integer ~r, so neither tail is truncated or rounded to 0 or 1.
    """
    near = r < NEAR_ONE
    u = (r.float() + 0.5) * 2.0**-32
    f, k = _split(((MASK32 - r).float() + 0.5) * 2.0**-32)
    e = 0.0 - _log1p(
        torch.where(near, -u, f), torch.where(near, 0.0, k)
    )  # exponential variate, > 0
    return 0.0 - _log1p(*_split(e))


def noise(
    rows: int,
    seed: Tensor,  # [1] int64
    step: Tensor,  # [1] int64
    offset: int = 0,
    chunk: int = 0,
) -> Tensor:  # [rows] float32
    """Noise of rows offset, ...: word row & 3 of the Philox block (row >> 2, step, chunk)."""
    row = torch.arange(offset, offset + rows, device=seed.device)
    block = row >> 2
    counter = (block & MASK32, block >> 32, step & MASK32, torch.full_like(step, chunk))
    words = torch.stack(philox(counter, (seed & MASK32, (seed >> 32) & MASK32)))
    return gumbel(words.gather(0, (row & 3).unsqueeze(0)).squeeze(0))


# ------------------------------------------------------------------------------------------ losses


def token_loss(
    logits: Tensor,  # [N, C] float
    targets: Tensor,  # [N] int | [N, C] float
    loss: str,  # "softmax" | "sigmoid"
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [N] float32, counts [N] bool, bad target [N] bool
    """Cross-entropy of each token, or BCE summed over classes, at y' = (1 - eps) y + eps / C."""
    x, eps, classes = logits.float(), label_smoothing, logits.shape[-1]
    if targets.is_floating_point():
        y = targets.float() * (1 - eps) + eps / classes
        if loss == "sigmoid":
            per_class = x.clamp_min(0) - x * y + torch.log1p(torch.exp(-x.abs()))
        else:
            per_class = -F.log_softmax(x, -1) * y
        counts = torch.ones_like(targets[:, 0], dtype=torch.bool)
        return per_class.sum(-1), counts, ~counts
    targets = targets.long()
    counts = targets != ignore_index
    bad = counts & ((targets < 0) | (targets >= classes))
    at = torch.where(counts & ~bad, targets, 0).unsqueeze(-1)
    if loss == "softmax":
        logp = F.log_softmax(x, -1)
        out = -(1 - eps) * logp.gather(-1, at).squeeze(-1)
        if eps:
            out = out - eps * logp.mean(-1)
    else:
        x_t = x.gather(-1, at)  # softplus(x) - x, with what cancels taken first
        its = x_t.clamp_min(0) - (1 - eps) * x_t + torch.log1p(torch.exp(-x_t.abs()))
        out = F.softplus(x).scatter(-1, at, its).sum(-1)
        if eps:
            out = out - eps * x.mean(-1)
    return out.masked_fill(bad, torch.nan), counts, bad


def head_logits(
    features: Tensor,  # [N, D] float
    weight: Tensor,  # [C, D] float32
    bias: Tensor | None,  # [C] float32
) -> Tensor:  # [N, C] float32
    """Logits in fp32, even under autocast, which would round them to bf16."""
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight, bias)


def row_mean(
    loss: Tensor,  # [N] float32
    counts: Tensor,  # [N] bool
    rows: int,
) -> Tensor:  # [rows] float32
    """Mean over a row's tokens that count; NaN where none does."""
    tokens = loss.shape[0] // max(rows, 1)
    loss, counts = loss.view(rows, tokens), counts.view(rows, tokens)
    return loss.where(counts, 0.0).sum(-1) / counts.sum(-1)


def row_loss(
    operand: Sequence[
        Tensor
    ],  # [loss [B]] | [logits [B, (T,) C]] | [features [B, (T,) D], weight, (bias)]
    targets: Tensor | None,  # [B, (T,)] int | [B, (T,) C] float
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B] float32, [] bool: a target was out of range
    """Per-row losses of one side. A head's logits exist a chunk of tokens at a time."""
    x = operand[0]
    if x.ndim == 1 and len(operand) == 1:
        return x.float(), torch.zeros((), dtype=torch.bool, device=x.device)
    assert targets is not None  # `select` has checked it
    rows = x.shape[0]
    x = x.flatten(0, -2)
    targets = targets.flatten(0, -2 if targets.is_floating_point() else -1)
    if len(operand) == 1:
        out, counts, bad = token_loss(x, targets, loss, label_smoothing, ignore_index)
        return row_mean(out, counts, rows), bad.any()
    weight = operand[1].float()
    bias = operand[2].float() if len(operand) > 2 else None
    step = max(1, HEAD_CHUNK // weight.shape[0])
    parts = [
        token_loss(head_logits(xs, weight, bias), ys, loss, label_smoothing, ignore_index)
        for xs, ys in zip(x.split(step), targets.split(step), strict=True)
    ]
    out, counts, bad = (torch.cat(p) for p in zip(*parts, strict=True))
    return row_mean(out, counts, rows), bad.any()


# --------------------------------------------------------------------------------- scores and keys


def score(
    online: Sequence[Tensor],  # [] or as `operand` above
    reference: Sequence[Tensor],
    targets: Tensor | None,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B] float32, [] int32 flags
    """Score s = l_online - l_reference in fp32; a missing side counts as zero."""
    sides = [
        row_loss(o, targets, loss, label_smoothing, ignore_index) for o in (online, reference) if o
    ]
    if online and reference:
        s = sides[0][0] - sides[1][0]
    else:
        s = sides[0][0] * 1.0 if online else 0.0 - sides[0][0]
    bad = torch.stack([b for _, b in sides]).any()
    return s, (bad * BAD_TARGET + (~s.isfinite()).any() * NONFINITE_SCORE).int()


def unusable(
    temperature: Tensor,  # [1] float32
) -> Tensor:  # [1] bool
    """Whether it is negative, NaN or so small that 1/T overflows."""
    inverse = 1.0 / temperature
    return ~(temperature >= 0) | (inverse.isinf() & (temperature != 0))


def key(
    scores: Tensor,  # [B] float32
    gumbel_noise: Tensor,  # [B] float32
    temperature: Tensor,  # [1] float32
) -> tuple[Tensor, Tensor]:  # [B] float32, [] int32 flags
    """Key = s / T + g; s itself at T = 0, g at T = inf. Infinite scores stay, and so does NaN.

    A temperature tensor that is negative, NaN or so small that 1/T overflows counts as 0 and is
    flagged (it cannot be looked at without waiting for the device).
    """
    inverse, bad = 1.0 / temperature, unusable(temperature)
    finite = scores.isfinite()
    scaled = (torch.where(finite, scores, 0.0) * inverse).clamp(
        -FLOAT_MAX, FLOAT_MAX
    ) + gumbel_noise
    keys = torch.where(finite, scaled, scores)
    keys = torch.where(temperature.isinf() & ~scores.isnan(), gumbel_noise, keys)
    return torch.where(bad | (temperature == 0), scores, keys), (bad.any() * BAD_TEMPERATURE).int()


def order(
    keys: Tensor,  # [B] float32
) -> Tensor:  # [B] int64, all different
    """Integers that descend in selection order: higher key, then lower row; NaN last, -0.0 is 0."""
    bits = keys.view(torch.int32)
    bits = torch.where(bits == -(1 << 31), 0, bits)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = torch.where(keys.isnan(), -(1 << 31), bits)
    row = torch.arange(keys.shape[0], device=keys.device)
    return bits.long() * (1 << 32) + (MASK32 - row)


def topk(
    keys: Tensor,  # [B] float32
    k: int,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # indices [k] int64 ascending, threshold [] float32, flags [] int32
    """The k first rows in `order`, and the largest key left out; -inf if none but NaN is."""
    first = order(keys).topk(min(k + 1, keys.shape[0])).values
    rows = MASK32 - (first & MASK32)
    if k < keys.shape[0]:
        left_out = keys.index_select(0, rows[k:]).squeeze(0)  # keys[rows[k]] would wait for it
        threshold = left_out.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    else:
        threshold = keys.new_full((), -torch.inf)
    few = (~keys.isnan()).sum() < k
    return rows[:k].sort().values, threshold, (few * TOO_FEW_ROWS).int()


def select(
    online: Sequence[Tensor],
    reference: Sequence[Tensor],
    targets: Tensor | None,
    k: int,
    seed: Tensor,  # [1] int64
    step: Tensor,  # [1] int64
    temperature: Tensor,  # [1] float32
    offset: int,
    loss: str,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of the above: indices [k] int64, scores [B], keys [B], threshold [], flags [] int32."""
    scores, flags = score(online, reference, targets, loss, label_smoothing, ignore_index)
    keys, key_flags = key(scores, noise(scores.shape[0], seed, step, offset), temperature)
    indices, threshold, few = topk(keys, k)
    return indices, scores, keys, threshold, flags | key_flags | few
