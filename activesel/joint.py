# SPDX-License-Identifier: Apache-2.0
"""`joint_select`: rows chosen for how they work together."""

from __future__ import annotations

import torch
from torch import Tensor

from activesel import ops
from activesel.arguments import draw, integer, pairs
from activesel.operands import Pairs
from activesel.select import Loss, Selection


def joint_select(
    *,
    online: Pairs | None = None,
    reference: Pairs | None = None,
    k: int,
    chunks: int = 16,
    loss: Loss = "sigmoid",
    temperature: float | Tensor = 1.0,
    normalize: bool = False,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    backend: str = "auto",
) -> Selection:
    """Choose k of B pairs that a contrastive loss can learn most from *together* (JEST).

    With L_ij = -log sigmoid(m_ij (scale z_i . t_j + bias)), m = 1 for a pair and -1 for any other
    two, and S = L(online) - L(reference), a chunk at a time is drawn without replacement with
    probability softmax(s / T) from the scores given the set R chosen so far,

        s_i = S_ii + sum over j in R of (S_ij + S_ji).

    The softmax loss, with x_ij = scale z_i . t_j, scores the first chunk by -x_ii alone, later ones
    by -x_ii + (logsumexp_j x_ij + logsumexp_j x_ji) / 2 over j in R, online - reference. Memory is
    O(B): no B x B matrix is ever held. Noise is that of `sample` with the chunk's number in the
    counter, so chunks=1 equals `sample` of the S_ii, bit for bit.

    Args:
        online: embeddings of the model that learns; None selects easy pairs (easy-reference JEST).
        reference: embeddings of the trained model; None selects hard pairs. The two may differ in
            width.
        k: pairs to keep, in [1, B].
        chunks: in [1, k]; sizes differ by at most one, the first are the larger. k of them pick one
            pair at a time.
        loss: "sigmoid" (SigLIP) or "softmax" (CLIP).
        temperature: >= 0, see `select`. The sigmoid loss's scores grow with the rows chosen, so
            that at T = 1 later chunks hold nearly the highest scores.
        normalize: divide the sigmoid loss's scores by the number of their terms, 2 |R| + 1.
        seed, step, offset, backend: see `select`.

    Returns:
        `Selection`: `scores` and `keys` of chosen rows are those at the time of their pick, of the
        others the last; `threshold` is the last chunk's; `batch_score` is the learnability of the
        batch chosen, the sum of S over its pairs of rows (softmax: of its contrastive losses).
        Flag bits beside those of `select`: 16 an embedding's length was not 1, 32 a scale or bias
        was not finite; both are errors on the CPU. Rows with embeddings that are not finite score
        NaN, are never chosen while others are left, and have no part in other rows' scores.

    Raises:
        ValueError: shape or range. TypeError: dtype or kind. RuntimeError: device or backend.

    Source: Evans et al. 2024 (arXiv:2406.17711).

    Example:
        >>> import torch, activesel
        >>> def embed():
        ...     z = torch.nn.functional.normalize(torch.randn(2, 64, 16), dim=2)
        ...     return activesel.Pairs(z[0], z[1], scale=10.0, bias=-10.0)
        >>> online, reference = embed(), embed()
        >>> picked = activesel.joint_select(online=online, reference=reference, k=8, chunks=4)
        >>> picked.indices.shape, picked.batch_score.shape
        (torch.Size([8]), torch.Size([]))
    """
    if loss not in ("sigmoid", "softmax"):
        raise ValueError(f'loss must be "sigmoid" or "softmax", got {loss!r}')
    if normalize and loss == "softmax":
        raise ValueError('normalize must be False with loss="softmax", whose scores do not grow')
    on, ref, rows = pairs(online, reference)
    k, chunks = integer(k, "k"), integer(chunks, "chunks")
    if not 1 <= k <= rows:
        raise ValueError(f"k must be in [1, {rows}], got {k}")
    if not 1 <= chunks <= k:
        raise ValueError(f"chunks must be in [1, k={k}], got {chunks}")
    first = (on or ref)[0]
    seed, step, temperature_, offset = draw(seed, step, temperature, offset, first, rows)
    run = torch.ops.activesel.joint_select if ops.opaque(first) else ops.joint_select
    *out, batch_score = run(
        on, ref, k, chunks, bool(normalize), seed, step, temperature_, offset, loss, backend
    )
    indices, scores, keys, threshold, flags = out
    return Selection(indices, scores, keys, threshold, temperature, flags, batch_score)
