# SPDX-License-Identifier: Apache-2.0
"""The specification of joint selection (JEST): what it is, and how to do without a B x B matrix.

`dense` is the definition, to be read first; it holds the whole matrix, so it is for small B.
`joint` makes the same picks in O(B) memory: per row it keeps running sums over the rows already
chosen. It is the driver of every backend; an *engine* is a module with `noise`, `topk`,
`pair_logits` and `pair_add`, and this one, in plain torch, runs on any device. Given the same fp32
scores, all of them pick the same rows, bit for bit; the scores agree within rounding.

Source: Evans et al. 2024 (arXiv:2406.17711).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import spec
from activesel.spec import noise, topk

BAD_NORM, BAD_SCALE = 16, 32  # bits of `flags`, beside those in `spec`

NORM_TOLERANCE = 0.02  # of the squared length: bfloat16 moves it by 0.004 at most
BLOCK = 1 << 20  # similarities, or numbers of embeddings, held at once

Side = Sequence[Tensor]  # [] | [image [B, D], text [B, D], scale [1] float32, bias [1] float32]


def sizes(k: int, chunks: int) -> list[int]:
    """Rows picked per chunk: they differ by at most one, the larger ones first."""
    return [k // chunks + (c < k % chunks) for c in range(chunks)]


def unbiased(side: Side) -> Side:
    """The softmax loss has no bias: a constant added to all logits changes nothing."""
    return [*side[:3], torch.zeros_like(side[3])] if side else []


# ------------------------------------------------------------------------------------------- dense


def logits(side: Side) -> Tensor:  # [B, B] float: image i against text j
    image, text, scale, bias = side
    return scale * (image @ text.T) + bias


def pair_losses(side: Side) -> Tensor:  # [B, B]
    """Sigmoid loss L_ij = -log sigmoid(m_ij x_ij), m = 1 for a pair and -1 for any other two."""
    x = logits(side)
    return F.softplus(x - 2 * torch.diag(x.diag()))


def contrastive(side: Side, rows: Tensor) -> Tensor:  # [k]
    """Softmax loss of each pair within a batch: the mean of both directions' cross-entropies."""
    x = logits(side)[rows][:, rows]
    return (x.logsumexp(1) + x.logsumexp(0)) / 2 - x.diag()


def difference(f: Any, online: Side, reference: Side, *rest: Tensor) -> Tensor:
    """f(online) - f(reference), a missing side counting as zero."""
    if not (online and reference):
        return f(online, *rest) if online else -f(reference, *rest)
    return f(online, *rest) - f(reference, *rest)


def dense(
    online: Side,
    reference: Side,
    k: int,
    chunks: int,
    normalize: bool,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:  # indices [k], scores [B], batch score []
    """The definition, in the embeddings' own precision; noise and keys are fp32."""
    if loss == "softmax":
        online, reference = unbiased(online), unbiased(reference)
    rows = (online or reference)[0].shape[0]
    if loss == "sigmoid":
        s = difference(pair_losses, online, reference)
        own = s.diag()
    else:
        own = difference(lambda side: -logits(side).diag(), online, reference)
    chosen = torch.zeros(rows, dtype=torch.bool)
    scores = own.clone()
    for c, size in enumerate(sizes(k, chunks)):
        now = own.clone()
        if c and loss == "sigmoid":
            now += s[:, chosen].sum(1) + s[chosen].sum(0)
            now /= 2 * int(chosen.sum()) + 1 if normalize else 1
        elif c:  # candidates are not among the chosen: the sums run over "chosen without i"

            def both_ways(side: Side) -> Tensor:
                x = logits(side)
                return (x[:, chosen].logsumexp(1) + x[chosen].logsumexp(0)) / 2

            now += difference(both_ways, online, reference)
        scores = torch.where(chosen, scores, now)
        keys, _ = spec.key(now.float(), noise(rows, seed, step, offset, c), temperature)
        chosen[topk(torch.where(chosen, torch.nan, keys), size)[0]] = True
    indices = chosen.nonzero().squeeze(1)
    if loss == "sigmoid":
        return indices, scores, s[indices][:, indices].sum()
    return indices, scores, difference(contrastive, online, reference, indices).sum()


# ----------------------------------------------------------------------------------------- streamed


def pair_logits(
    side: Side,
) -> tuple[Tensor, Tensor]:  # [B] float32, [] int32 flags
    """Logit of every pair, scale * z_i . t_i + bias; NaN if its embeddings are not finite."""
    image, text, scale, bias = side
    parts = []
    size = max(1, BLOCK // max(image.shape[1], 1))
    for a, b in zip(image.split(size), text.split(size), strict=True):
        a, b = a.float(), b.float()
        parts.append(torch.stack([(a * b).sum(1), a.square().sum(1), b.square().sum(1)]))
    dot, *lengths = torch.cat(parts, 1)
    finite = lengths[0].isfinite() & lengths[1].isfinite()
    off = ((lengths[0] - 1).abs() > NORM_TOLERANCE) | ((lengths[1] - 1).abs() > NORM_TOLERANCE)
    unusable = ~(scale.isfinite() & bias.isfinite())
    x = torch.where(finite, scale * dot + bias, torch.nan)
    return x, ((off & finite).any() * BAD_NORM + unusable.any() * BAD_SCALE).int()


def pair_add(
    state: Tensor,  # [1, R] | [4, R] float32, changed in place
    online: Side,
    reference: Side,
    rows: Tensor | None,  # [R] int64: the rows `state` is about; None for all B
    chunk: Tensor,  # [c] int64: rows just chosen, -1 for none
    loss: str,
) -> None:
    """Add what rows just chosen contribute to every row's score; a row adds nothing to itself.

    sigmoid: state[0, i] += sum_j (S_ij + S_ji). softmax: state[0] and [1], the online model's
    running log-sum-exps of x_ij and of x_ji, take in the chunk's; [2] and [3] are the reference's.
    """
    counts, at = chunk >= 0, chunk.clamp_min(0)
    if rows is None:
        rows = torch.arange(state.shape[1], device=state.device)
    size = max(1, BLOCK // max(chunk.shape[0], 1))
    with torch.autocast(state.device.type, enabled=False):
        for r, out in zip(rows.split(size), state.split(size, dim=1), strict=True):
            apart = (r[:, None] != chunk) & counts
            for m, side in enumerate((online, reference)):
                if not side:
                    continue
                image, text, scale, bias = side
                for way, (a, b) in enumerate(((image, text), (text, image))):
                    x = scale * (a[r].float() @ b[at].float().T)
                    if loss == "sigmoid":
                        its = torch.where(apart, F.softplus(x + bias), 0.0).sum(1)
                        out[0] += its if m == 0 else -its
                    else:
                        lse = torch.where(apart, x, -torch.inf).logsumexp(1)
                        out[2 * m + way] = torch.logaddexp(out[2 * m + way], lse)


def pair_keys(
    own: Tensor,  # [B] float32: score of a row alone
    state: Tensor | None,  # [1, B] | [4, B] float32; None before the first chunk
    chosen: Tensor,  # [B] bool
    scores: Tensor,  # [B] float32, changed in place, as keys are, where a row is not chosen
    keys: Tensor,  # [B] float32
    terms: Tensor | None,  # [1] float32, what scores are divided by
    sides: tuple[bool, bool],  # which models there are
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
    offset: int,
    chunk: int,
    noise: Any = noise,
) -> Tensor:  # [B] float32: the keys, NaN where a row is chosen
    """Scores of every row given the rows chosen so far, and their keys."""
    now = own
    if state is not None and state.shape[0] == 1:
        now = own + state[0]
    elif state is not None:
        if sides[0]:
            now = now + 0.5 * (state[0] + state[1])
        if sides[1]:
            now = now - 0.5 * (state[2] + state[3])
    if terms is not None:
        now = now / terms
    g = noise(own.shape[0], seed, step, offset, chunk)
    now_keys, _ = spec.key(now, g, temperature)
    scores.copy_(torch.where(chosen, scores, now))
    keys.copy_(torch.where(chosen, keys, now_keys))
    return torch.where(chosen, torch.nan, now_keys)


def joint(
    online: Side,
    reference: Side,
    k: int,
    chunks: int,
    normalize: bool,
    seed: Tensor,  # [1] int64
    step: Tensor,  # [1] int64
    temperature: Tensor,  # [1] float32
    offset: int,
    loss: str,
    engine: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices [k] int64, scores [B], keys [B], threshold [], flags [] int32, batch score []."""
    engine = engine or sys.modules[__name__]
    find_keys = getattr(engine, "pair_keys", partial(pair_keys, noise=engine.noise))
    if loss == "softmax":
        online, reference = unbiased(online), unbiased(reference)
    sides = [engine.pair_logits(side) if side else None for side in (online, reference)]
    own = _own([side and side[0] for side in sides], loss)
    rows = own.shape[0]
    flags = (~own.isfinite()).any().int() * spec.NONFINITE_SCORE
    flags = flags | spec.unusable(temperature).any() * spec.BAD_TEMPERATURE
    for side in sides:
        flags = flags | side[1] if side else flags
    softmax = loss == "softmax"
    state = own.new_full((4, rows), -torch.inf) if softmax else own.new_zeros((1, rows))
    chosen = torch.zeros_like(own, dtype=torch.bool)
    scores, keys = own.clone(), own.clone()
    chunk = own.new_empty(0, dtype=torch.int64)
    for c, size in enumerate(sizes(k, chunks)):
        if c:
            engine.pair_add(state, online, reference, None, chunk, loss)
        open_keys = find_keys(
            own, state if c else None, chosen, scores, keys,
            (2 * chosen.sum() + 1).float().reshape(1) if normalize else None,
            (bool(online), bool(reference)), seed, step, temperature, offset, c,
        )  # fmt: skip
        first, threshold, _ = engine.topk(open_keys, size)
        # Where too few rows are left, `first` is filled with rows whose key is NaN: not chosen.
        new = ~open_keys[first].isnan()
        chosen = chosen.index_put((first,), chosen[first] | new)
        chunk = torch.where(new, first, -1)
    indices, _, few = engine.topk(torch.where(chosen, 0.0, torch.nan), k)  # fills up, if it must
    state = state.index_select(1, indices)
    engine.pair_add(state, online, reference, indices, chunk, loss)
    batch = _batch_score([side and side[0][indices] for side in sides], state, loss)
    batch = torch.where(chosen[indices], batch, 0.0).sum()
    return indices, scores, keys, threshold, flags.int() | few, batch


def _own(
    x: Sequence[Tensor | None],  # online and reference: [B] float32
    loss: str,
) -> Tensor:  # [B] float32
    """Score of a row alone, made as `spec.score` makes it."""
    on, ref = ([pair_loss(y, loss)] if y is not None else [] for y in x)
    return spec.score(on, ref, None, "softmax", 0.0, 0)[0]


def pair_loss(
    x: Tensor,  # [B] float32
    loss: str,
) -> Tensor:  # [B] float32
    """Loss of a pair on its own: the sigmoid loss's diagonal, or -x (ActiveCLIP's actor loss)."""
    return F.softplus(-x) if loss == "sigmoid" else -x


def _batch_score(
    x: Sequence[Tensor | None],  # online and reference: [k] float32
    state: Tensor,  # [1, k] | [4, k]: over all chosen rows but itself
    loss: str,
) -> Tensor:  # [k] float32, to be summed
    if loss == "sigmoid":
        return _own(x, loss) + 0.5 * state[0]
    own = [
        (torch.logaddexp(state[2 * m], y) + torch.logaddexp(state[2 * m + 1], y)) / 2 - y
        for m, y in enumerate(x)
        if y is not None
    ]
    if len(own) == 2:
        return own[0] - own[1]
    return own[0] if x[0] is not None else -own[0]
