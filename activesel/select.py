# SPDX-License-Identifier: Apache-2.0
"""`select`, `score` and `sample`: check the arguments, call the operator, wrap the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from activesel import ops
from activesel.arguments import draw, integer, operands
from activesel.batches import take
from activesel.operands import Operand

Loss: TypeAlias = Literal["softmax", "sigmoid"]
RowLoss: TypeAlias = Literal["softmax", "sigmoid", "dot"]


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows chosen, and everything needed to understand or reweight the choice.

    Attributes:
        indices: [k] int64, ascending.
        scores: [B] float32, every row's score.
        keys: [B] float32, scores / temperature + Gumbel noise.
        threshold: [] float32, the largest key not chosen; -inf at k = B.
        temperature: as it was given.
        flags: [] int32 bits: 1 a score was not finite, 2 fewer than k rows could be chosen (NaN
            rows fill up), 4 a target was out of range (its row scores NaN), 8 a temperature tensor
            was unusable (taken as 0), 16 an embedding's length was not 1, 32 a scale or bias was
            not finite, 64 a weight of a scorer was not (looked at where a kernel takes it whole).
            From 4 on they are errors on the CPU; elsewhere looking would stall the device.
        batch_score: [] float32, joint selection only: learnability of the batch chosen.

    Example:
        >>> import torch, activesel
        >>> picked = activesel.sample(torch.tensor([0.0, 5.0, 1.0]), 2, temperature=0)
        >>> picked.indices, picked.threshold
        (tensor([1, 2]), tensor(0.))
    """

    indices: Tensor
    scores: Tensor
    keys: Tensor
    threshold: Tensor
    temperature: float | Tensor
    flags: Tensor
    batch_score: Tensor | None = None

    def take(self, batch: Any) -> Any:
        """The chosen rows of a batch of any structure.

        Tensors, arrays and lists whose first dimension is B are indexed, containers (dict, tuple,
        named tuple, list, mapping) are rebuilt with their own type, anything else passes through. A
        list of length B is taken as a container if it holds tensors of B rows, which decides the
        case of two tensors at B = 2. Indexing lists and arrays waits for the device; indexing
        tensors does not.

        Example:
            >>> import torch, activesel
            >>> picked = activesel.sample(torch.tensor([0.0, 9.0, 9.0]), 2, temperature=0)
            >>> picked.take({"x": torch.arange(3), "name": ["a", "b", "c"], "epoch": 7})
            {'x': tensor([1, 2]), 'name': ['b', 'c'], 'epoch': 7}
        """
        return take(batch, self.indices, self.scores.shape[0])

    def log_inclusion(self) -> Tensor:  # [k] float32
        """Log-probability of each chosen row to be chosen, given the threshold set by the others.

        log(-expm1(-exp(s / T - threshold))), in [-inf, 0] (Kool et al., ICML 2019). Raises
        ValueError at T = 0 and for joint selection, where it is not defined.

        Example:
            >>> import torch, activesel
            >>> activesel.sample(torch.zeros(4), 4, seed=0).log_inclusion()
            tensor([0., 0., 0., 0.])
        """
        if self.batch_score is not None:
            raise ValueError("inclusion probabilities are not defined for joint selection")
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            if temperature == 0:
                raise ValueError("temperature must be > 0 for inclusion probabilities, got 0")
            temperature = torch.full_like(self.threshold, temperature)
        elif temperature.is_cpu and not torch.compiler.is_compiling() and temperature.item() == 0:
            raise ValueError("temperature must be > 0 for inclusion probabilities, got 0")
        scaled = self.scores[self.indices] * (1.0 / temperature.float())
        scaled = torch.where(temperature.isinf(), 0.0, scaled)
        out = torch.log(-torch.expm1(-torch.exp(scaled - self.threshold)))
        return torch.where(scaled.isinf(), 0.0, out)  # infinite scores leave nothing to chance

    def weights(self) -> Tensor:  # [k] float32
        """Weights that make sum(w * loss) over the chosen rows unbiased for the super-batch mean.

        w = 1 / (B * inclusion) (Horvitz and Thompson 1952; Kool et al., ICML 2019); 0 for NaN rows
        that filled up. Raises ValueError at T = 0 and for joint selection.

        Example:
            >>> import torch, activesel
            >>> activesel.sample(torch.zeros(4), 4, seed=0).weights()
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        w = torch.exp(-self.log_inclusion()) / self.scores.shape[0]
        return torch.where(self.scores[self.indices].isnan(), 0.0, w)


def select(
    *,
    online: Operand = None,
    reference: Operand = None,
    targets: Tensor | None = None,  # [B] | [B, T] int, [B, C] | [B, T, C] float
    k: int,
    loss: RowLoss = "softmax",
    temperature: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Selection:
    """Choose k of B rows without replacement, with probability softmax(score / temperature).

    score = loss(online) - loss(reference) in fp32; key = score / temperature + Gumbel noise of
    (seed, step, offset + row); the k largest keys are kept. Order: the higher key, then the lower
    row; +inf before finite before -inf, NaN only when nothing else is left. The same fp32 scores,
    seed, step and offset give the same rows on every backend, bit for bit.

    Args:
        online: per-row losses [B], logits [B, C] or [B, T, C], `Head`, `Forward` or `Pairs`; None
            selects easy rows.
        reference: likewise, of any of these kinds; None selects hard rows.
        targets: needed for anything but losses. Integers are classes; floats are distributions
            (softmax) or multi-hot (sigmoid). With [B, T, ...] a row's loss is the mean over targets
            that are not ``ignore_index``, NaN when all are.
        k: rows to keep, in [0, B].
        loss: "softmax" cross-entropy, or "sigmoid" binary cross-entropy summed over classes. For
            `Pairs`, which need no targets: "dot", -scale z_i . t_i (ActiveCLIP, ActiveSigLIP), or
            "sigmoid", softplus(-(scale z_i . t_i + bias)).
        temperature: >= 0. 0 keeps the k highest scores, inf draws uniformly. A [1] float32 tensor
            on the inputs' device can change without recompiling or waiting.
        seed: 64-bit int or [1] int64 tensor. None draws one from torch's default CPU generator.
        step: training step, int in [0, 2^32) or [1] int64 tensor; a new step is new noise.
        offset: global position of row 0, for shards of a larger super-batch.
        label_smoothing: in [0, 1].
        ignore_index: class that is left out.
        backend: "auto", "torch", "native", "triton" or "cuda".

    Returns:
        `Selection`, on the inputs' device; no gradients, no host synchronisation, static shapes.

    Raises:
        ValueError: shape or range. TypeError: dtype or kind. RuntimeError: device or backend.

    Source: Evans et al. 2023 (arXiv:2312.05328); Kool et al. 2019 (Gumbel-top-k).

    Example:
        >>> import torch, activesel
        >>> online, reference = torch.randn(8, 10), torch.randn(8, 10)
        >>> picked = activesel.select(
        ...     online=online, reference=reference, targets=torch.arange(8), k=2, seed=0
        ... )
        >>> picked.indices.shape, picked.scores.shape
        (torch.Size([2]), torch.Size([8]))
    """
    given = operands(online, reference, targets, loss, label_smoothing, ignore_index, backend)
    on, ref, scorers, first, rows = given
    k = integer(k, "k")
    if not 0 <= k <= rows:
        raise ValueError(f"k must be in [0, {rows}], got {k}")
    noise = draw(seed, step, temperature, offset, first, rows)
    rest = targets, k, *noise, loss, label_smoothing, ignore_index, backend
    if scorers is not None:
        out = ops.select_images(scorers, on or ref, *rest)
    else:
        out = (torch.ops.activesel.select if ops.opaque(first) else ops.select)(on, ref, *rest)
    indices, scores, keys, threshold, flags = out
    return Selection(indices, scores, keys, threshold, temperature, flags)


def score(
    *,
    online: Operand = None,
    reference: Operand = None,
    targets: Tensor | None = None,
    loss: RowLoss = "softmax",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:  # [B] float32
    """Score of every row: loss(online) - loss(reference), a missing side counting as zero.

    hard = l_online, easy = -l_reference, learnability = l_online - l_reference. Arguments and
    errors are those of `select`.

    Example:
        >>> import torch, activesel
        >>> activesel.score(online=torch.tensor([2.0, 3.0]), reference=torch.tensor([0.5, 4.0]))
        tensor([ 1.5000, -1.0000])
    """
    given = operands(online, reference, targets, loss, label_smoothing, ignore_index, backend)
    on, ref, scorers, first, _ = given
    rest = targets, loss, label_smoothing, ignore_index
    if scorers is not None:
        return ops.score_images(scorers, on or ref, *rest)[0]
    run = torch.ops.activesel.score if ops.opaque(first) else ops.score
    return run(on, ref, *rest, backend)[0]


def sample(
    scores: Tensor,  # [B] float
    k: int,
    temperature: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    offset: int = 0,
    backend: str = "auto",
) -> Selection:
    """Draw k of B rows without replacement, with probability softmax(scores / temperature).

    The same draw as ``torch.multinomial(softmax(scores / T), k, replacement=False)`` (successive
    sampling, or Plackett-Luce), with counter-based noise, any B, and no host synchronisation.
    Arguments and errors are those of `select`.

    Example:
        >>> import torch, activesel
        >>> activesel.sample(torch.tensor([0.0, 5.0, 1.0, 4.0]), 2, temperature=0).indices
        tensor([1, 3])
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a Tensor, got {type(scores).__name__}")
    if scores.ndim != 1:
        raise ValueError(f"scores must be [B], got shape {tuple(scores.shape)}")
    return select(
        online=scores,
        k=k,
        temperature=temperature,
        seed=seed,
        step=step,
        offset=offset,
        backend=backend,
    )
