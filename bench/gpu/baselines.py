# SPDX-License-Identifier: Apache-2.0
"""What one writes without this package, what others offer, and the truth both are held against.

An operand is a list, as the operators take it: [losses], [logits] or [features, weight].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import spec
from activesel.testing import assert_as_accurate

CHECKED_ROWS = 4096
BASELINE_ERROR = 0.05  # of a score; bf16 logits of unit variance lose about 0.01


class Inputs(NamedTuple):
    """One copy of what a case works on."""

    online: list[Tensor]
    reference: list[Tensor]
    targets: Tensor | None = None  # [B] int64
    loss: str = "softmax"

    def part(self, rows: Tensor | slice) -> Inputs:
        online, reference = ([x[0][rows], *x[1:]] if x else [] for x in self[:2])
        targets = None if self.targets is None else self.targets[rows]
        return Inputs(online, reference, targets, self.loss)

    @property
    def rows(self) -> int:
        return (self.online or self.reference)[0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.online, *self.reference, self.targets) if t is not None)


def losses(
    operand: Sequence[Tensor],
    targets: Tensor | None,  # [B] int64
    loss: str,
    product: torch.dtype,  # of features and weight, and so of the logits
) -> Tensor:  # [B] float32, or float64 if the product is
    """Eager losses: the product's logits, upcast, then torch's own cross-entropy."""
    wide = torch.float64 if product == torch.float64 else torch.float32
    if operand[0].ndim == 1:
        return operand[0].to(wide)
    assert targets is not None
    x, *weight = operand
    logits = (x.to(product) @ weight[0].to(product).T if weight else x).to(wide)
    if loss == "softmax":
        return F.cross_entropy(logits, targets, reduction="none")
    return F.softplus(logits).sum(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)


def scores(inputs: Inputs, product: torch.dtype) -> Tensor:  # [B]
    sides = [losses(x, inputs.targets, inputs.loss, product) for x in inputs[:2] if x]
    return sides[0] - sides[1] if len(sides) > 1 else sides[0] if inputs.online else -sides[0]


def chunked(inputs: Inputs, product: torch.dtype, chunks: int) -> Tensor:  # [B]
    """`scores`, some rows at a time where all their logits would not fit."""
    if chunks == 1:
        return scores(inputs, product)
    size = -(-inputs.rows // chunks)
    return torch.cat(
        [scores(inputs.part(slice(i * size, (i + 1) * size)), product) for i in range(chunks)]
    )


def keys(s: Tensor) -> Tensor:  # [B] float32
    """Gumbel noise at temperature 1, as one writes it."""
    return s - torch.empty_like(s).exponential_().log()


def kept(k: Tensor, keep: int) -> Tensor:  # [k] int64, ascending
    return k.topk(keep).indices.sort().values


def chunks_that_fit(rows: int, classes: int) -> int:
    """Eager holds 10 bytes a logit at once: the product's 2, its float32 copy, the log-softmax."""
    if not torch.cuda.is_available():
        return 1
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + cached
    return max(1, -(-rows * classes * 10 * 5 // (free * 4)))


def liger(inputs: Inputs) -> Callable[[], Tensor] | None:
    """Scores by Liger's per-token fused loss, where it is installed."""
    try:
        ops = importlib.import_module("liger_kernel.ops")
        fused = ops.LigerFusedLinearScaledCrossEntropyFunction
    except (ImportError, AttributeError):
        return None
    if inputs.loss != "softmax" or not all(len(x) == 2 for x in inputs[:2]):
        return None

    def call() -> Tensor:
        on, ref = (fused.apply(x[0], x[1], inputs.targets) for x in inputs[:2])
        return on.float() - ref.float()

    return call


def flashinfer() -> Callable[[Tensor, int], Tensor] | None:
    """Its deterministic top-k, ties to the lower row, where it is installed; rows ascending."""
    try:
        module = importlib.import_module("flashinfer")
    except ImportError:
        return None

    def call(k: Tensor, keep: int) -> Tensor:
        found = module.top_k(k[None], keep, deterministic=True, tie_break=1)[1]
        return found[0].long().sort().values

    return call


# ------------------------------------------------------------------------------------------ checks


def some(rows: int, device: torch.device) -> Tensor:
    """Rows to hold against float64: evenly spaced, the last among them."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=device).round().long()


def check_scores(inputs: Inputs, got: Tensor, baseline: bool = False) -> str:
    """Ours: as accurate as eager in fp32. A baseline: the same function, as rounded as it is."""
    chosen = some(len(got), got.device)
    part = inputs.part(chosen)
    truth, eager = scores(part, torch.float64), scores(part, torch.float32)
    error = (got[chosen].double() - truth).abs().max().item()
    sides = [losses(x, part.targets, part.loss, torch.float32) for x in part[:2] if x]
    size = sum(side.abs().mean().item() for side in sides)
    if not baseline:
        assert_as_accurate(got[chosen], eager, truth, 1e-6 * (1 + size))
    elif not error <= BASELINE_ERROR * max(1.0, size / 1000):
        raise AssertionError(f"scores must be within {BASELINE_ERROR} of float64, got {error:.3g}")
    return f"{len(chosen)} scores within {error:.2g} of float64"


def check_keys(
    got_scores: Tensor,
    got_keys: Tensor,
    seed: Tensor,
    step: Tensor,
    temperature: Tensor,
) -> str:
    noise = spec.noise(len(got_scores), seed, step)
    expected, _ = spec.key(got_scores, noise, temperature)
    if not torch.equal(got_keys, expected):
        raise AssertionError("keys must be those of the specification, bit for bit")
    return "all keys bit for bit"


def check_rows(of: Tensor, keep: int, indices: Tensor, threshold: Tensor | None) -> str:
    """Ours, with its threshold: the specification's rows. A baseline: the same keys, ties apart."""
    expected, bound, _ = spec.topk(of, keep)
    if threshold is None:
        same = torch.equal(of[indices].sort().values, of[expected].sort().values)
    else:
        same = torch.equal(indices, expected) and torch.equal(threshold, bound)
    if not same:
        raise AssertionError("rows must be those of the specification")
    return "the same keys kept" if threshold is None else "all rows bit for bit"


def random_keys(rows: int, generator: torch.Generator) -> Tensor:  # [B] float32
    """Scores of unit variance with Gumbel noise, as keys come."""
    noise = torch.empty(rows, device=generator.device).exponential_(generator=generator)
    return torch.randn(rows, generator=generator, device=generator.device) - noise.log()
