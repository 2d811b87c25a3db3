# SPDX-License-Identifier: Apache-2.0
"""Does a training step save what it says? Run it, and count."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from activesel.ledger.flops import Counter, backward, countable, self_check, tensors
from activesel.ledger.lines import Cost


@dataclass(frozen=True)
class Verdict:
    """What a step with selection costs beside a plain step on the whole super-batch.

    `rows` are of the super-batch, `keep` those said to be kept, `step` and `plain` FLOPs.

    >>> verdict = Verdict(100, 40, Cost(140.0, 80.0), Cost(100.0, 200.0))
    >>> verdict.gathers, round(verdict.ratio, 2), verdict.text[:17]
    (True, 0.73, 'gathers and saves')
    >>> verdict.forward_rows, verdict.backward_rows
    (140.0, 40.0)
    """

    rows: int
    keep: int | None
    step: Cost
    plain: Cost

    @property
    def ratio(self) -> float:
        """FLOPs of the step over those of the plain one; below 1 it saves some."""
        return self.step.train / self.plain.train

    @property
    def forward_rows(self) -> float:
        """Rows' worth of forward passes: scoring, by whatever model, and training."""
        return self.rows * self.step.forward / self.plain.forward

    @property
    def backward_rows(self) -> float:
        """Rows' worth of backward passes, those of an online scorer's training among them."""
        ours, whole = (cost.train - cost.forward for cost in (self.step, self.plain))
        return self.rows * ours / whole

    @property
    def gathers(self) -> bool:
        """Whether fewer rows go backward, instead of all with some of them masked: nearer to `keep`
        than to `rows`, or without `keep` at least 1 % fewer."""
        most = 0.99 * self.rows if self.keep is None else (self.keep + self.rows) / 2
        return self.backward_rows < most

    @property
    def text(self) -> str:
        """The verdict in words."""
        word = "gathers and saves" if self.ratio < 1 else "gathers, but saves nothing"
        said = "" if self.keep is None else f" ({self.keep} said to be kept)"
        return (
            f"{word if self.gathers else 'only masks'}: {self.ratio:.2f}x the FLOPs of a plain step"
            f" on all {self.rows} rows;\nforward passes are worth {self.forward_rows:.4g} rows,"
            f" backward passes {self.backward_rows:.4g}{said}"
        )

    def __str__(self) -> str:
        return self.text


def audit(
    step: Callable[[Any], object],
    batch: Any,
    plain: Callable[[Any], object] | nn.Module,
    *,
    keep: int | None = None,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    restore: Sequence[Any] = (),
) -> Verdict:
    """Count a training step with selection against a plain step on the whole super-batch.

    Both really run, on the device of `batch`: compiled functions eagerly, attention on a CPU as
    products (torch's counter misses the fused kernel). torch's random state is as before; whatever
    else the steps change stays changed, so each trains once, unless `restore` names it.

    Args:
        step: `step(batch)` selects, computes a loss, calls `backward()`, and whatever follows.
        batch: a super-batch, B rows; a tree of tensors.
        plain: the same step without selection; or the learner, of which a forward and a backward
            pass on all rows are counted and which is not changed by that.
        keep: rows that `step` says it keeps, in [1, B].
        inputs: `inputs(batch)`, the learner's arguments, where `plain` is the learner; the first
            tensor of the batch if not given.
        restore: modules, optimizers, selectors (anything with `state_dict`) to put back, gradients
            too. Their state is copied once.

    Raises:
        TypeError: a step that cannot be called; `restore` of something without `state_dict`.
        ValueError: no tensor in `batch`; `keep` out of range.
        RuntimeError: nothing countable ran, forward or backward; torch's counter is off.

    >>> learner, x, y = nn.Linear(8, 4), torch.randn(10, 8), torch.randint(4, (10,))
    >>> def loss(x, y):
    ...     return nn.functional.cross_entropy(learner(x), y, reduction="none")
    >>> def masking(batch):
    ...     each = loss(*batch)
    ...     (each * (each > each.median())).sum().backward()
    >>> def gathering(batch):
    ...     worst = loss(*batch).detach().topk(4).indices
    ...     loss(batch[0][worst], batch[1][worst]).mean().backward()
    >>> audit(masking, (x, y), learner, restore=[learner]).gathers
    False
    >>> print(audit(gathering, (x, y), learner, keep=4, restore=[learner]))
    gathers and saves: 0.90x the FLOPs of a plain step on all 10 rows;
    forward passes are worth 14 rows, backward passes 4 (4 said to be kept)
    """
    self_check()
    for name, given in (("step", step), ("plain", plain)):
        if not callable(given):
            raise TypeError(f"{name} must be callable, got {type(given).__name__}")
    for thing in restore:
        if not hasattr(thing, "load_state_dict"):
            raise TypeError(f"restore must hold things with state, got {type(thing).__name__}")
    found = [t for t in tensors(batch) if t.ndim]
    if not found:
        raise ValueError("batch must hold a tensor with rows, got none")
    rows = len(found[0])
    if keep is not None and not 1 <= keep <= rows:
        raise ValueError(f"keep must be in [1, {rows}], got {keep}")
    if isinstance(learner := plain, nn.Module):
        args = inputs(batch) if inputs else (found[0],)

        def plain(_: Any) -> None:
            buffers = {name: b.clone() for name, b in learner.named_buffers()}
            backward(functional_call(learner, buffers, args))

    counts = []
    for name, run in (("step", step), ("plain", plain)):
        with _unchanged(restore, found):
            counts.append(_count(name, run, batch, found[0].device))
    return Verdict(rows, keep, *counts)


def _count(name: str, run: Callable[[Any], object], batch: Any, device: torch.device) -> Cost:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # The counter's hooks are global, of which compiled modules warn; here they run eagerly.
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(countable(device))
        counter = stack.enter_context(Counter())
        run(batch)
    if not counter.forward or not counter.backward:
        raise RuntimeError(
            f"{name} must run countable operations forward and backward, got {counter.forward}"
            f" and {counter.backward} FLOPs (an exported or scripted model cannot be counted)"
        )
    return Cost(float(counter.forward), float(counter.backward))


@contextmanager
def _unchanged(things: Sequence[Any], rows: Sequence[Tensor]) -> Iterator[None]:
    """On leaving, `things` and torch's random states are as on entering."""
    before = [copy.deepcopy(thing.state_dict()) for thing in things]
    modules = [thing for thing in things if isinstance(thing, nn.Module)]
    grads = [(p, p.grad, copy.deepcopy(p.grad)) for m in modules for p in m.parameters()]
    try:
        with torch.random.fork_rng(devices={t.device for t in rows if t.is_cuda}):
            yield
    finally:
        for thing, state in zip(things, before, strict=True):
            thing.load_state_dict(state)
        for p, grad, values in grads:
            p.grad = grad
            if grad is not None and values is not None:
                grad.copy_(values)
