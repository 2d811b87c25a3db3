# SPDX-License-Identifier: Apache-2.0
"""Five things people want done, and what they would do them with instead of activesel.

A workload's first variant is ours; the operators and eager torch come from `bench.kernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from bench import joint as dense
from bench.gpu import baselines
from bench.gpu.baselines import Inputs
from bench.gpu.timing import Variant, Work
from bench.kernels import builders
from bench.kernels.builders import Rows, check_twin, eager, law
from bench.kernels.place import Place

PIP = {  # how to get what may be missing
    "Composer": "pip install --no-deps mosaicml, then what its import asks for (it wants torch "
    "< 2.7.1, activesel torch >= 2.9)",
    "liger": "pip install liger-kernel",
    "flashinfer": "pip install flashinfer-python",
    "quack": "pip install quack-kernels",
    "F.linear_cross_entropy": "pip install 'torch>=2.13'",
}
COMPILE = "torch.compile"


@dataclass(frozen=True)
class Peer(Variant):
    """A variant whose products torch's counter does not see, and what to count instead."""

    counted: Callable[[], Any] | None = None


@dataclass
class Table:
    """The variants of one workload, ours first, and sentences on who is not there."""

    variants: list[Variant]
    work: Work
    copies: int = 1
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, call: Callable[..., Any], check: Any, **more: Any) -> None:
        self.variants.append(Peer(name, call, check, **more))

    def missing(self, name: str, why: str = "cannot be imported here") -> None:
        self.left_out.append(f"{name} left out: {why}; to get it: {PIP[name]}")


def on_gpu(table: Table, at: Place, name: str) -> bool:
    """Whether a peer that only runs on a GPU may be tried; says so if not."""
    if at.cpu:
        table.missing(name, "it needs a CUDA device")
    return not at.cpu


def compiled(
    table: Table, at: Place, plain: Callable[..., Any], call: Any, check: Any, copies: int = 1
) -> None:
    """`torch.compile` of what eager torch runs, on the same arguments."""
    fast = at.compile(plain)
    count = partial(call, plain, 0)
    table.add(COMPILE, lambda i: call(fast, i), check, counted=count)


# --------------------------------------------------------------------------------------- workloads


def _selected(at: Place, made: builders.Made, keep: int) -> Table:
    copies, first = made.copies, made.copies[0]
    table = Table([made.ours, made.twin], made.work, len(copies))

    def plain(on: list[Tensor], ref: list[Tensor], targets: Tensor) -> Rows:
        return eager(Inputs(on, ref, targets), keep, at.dtype)

    def call(function: Callable[..., Rows], i: int) -> Rows:
        return function(*copies[i][:3])

    compiled(table, at, plain, call, partial(check_twin, first, keep, at))
    return table


def _by_losses(
    table: Table,
    name: str,
    made: builders.Made,
    keep: int,
    at: Place,
    losses: Callable[..., Tensor],
) -> None:
    """Selection with somebody's losses [B] of a side and targets in place of torch's.

    Counted are the products of eager torch, which theirs equal: the counter does not see into them.
    """

    def call(i: int) -> Rows:
        on, ref, targets, _ = made.copies[i]
        s = losses(on, targets).float() - losses(ref, targets).float()
        return s, baselines.kept(baselines.keys(s), keep)

    check = partial(check_twin, made.copies[0], keep, at)
    table.add(name, call, check, counted=partial(made.twin.call, 0))


def logits(at: Place, rows: int, classes: int, keep: int) -> Table:
    made = builders.logits_to_rows(at, rows, classes, keep)
    table = _selected(at, made, keep)
    if on_gpu(table, at, "quack"):
        try:
            quack = importlib.import_module("quack.cross_entropy").cross_entropy
        except Exception:
            table.missing("quack")
        else:
            _by_losses(
                table, "quack", made, keep, at, lambda x, y: quack(x[0], y, reduction="none")
            )
    return table


def head(at: Place, rows: int, classes: int, width: int, keep: int) -> Table:
    made = builders.head_to_rows(at, rows, classes, width, keep)
    table = _selected(at, made, keep)
    if hasattr(F, "linear_cross_entropy"):
        for name, options in (
            ("F.linear_cross_entropy", None),
            ("F.linear_cross_entropy, chunked", torch.nn.LinearCrossEntropyOptions()),
        ):

            def losses(x: list[Tensor], y: Tensor, options: Any = options) -> Tensor:
                return F.linear_cross_entropy(*x, y, reduction="none", options=options)

            _by_losses(table, name, made, keep, at, losses)
    else:
        table.missing("F.linear_cross_entropy", f"torch {torch.__version__} does not have it")
    if on_gpu(table, at, "liger"):
        calls = [baselines.liger(x) for x in made.copies]
        if calls[0] is None:
            table.missing("liger")
        else:

            def liger(i: int) -> Rows:
                s = calls[i]()  # type: ignore[misc]
                return s, baselines.kept(baselines.keys(s), keep)

            check, counted = (
                partial(check_twin, made.copies[0], keep, at),
                partial(made.twin.call, 0),
            )
            table.add("liger", liger, check, counted=counted)
    return table


def sample(at: Place, rows: int, keep: int) -> Table:
    """Draws without replacement: all follow one law, and nobody's rows are another's."""
    made = builders.sampled(at, rows, keep)
    copies = made.copies
    table = Table([made.ours, made.twin], made.work, len(copies))

    def plain(scores: Tensor) -> Tensor:
        return baselines.kept(baselines.keys(scores), keep)

    def numpy(scores: Tensor, k: int, generator: np.random.Generator) -> Tensor:
        p = scores.double().softmax(0).cpu().numpy()
        return torch.from_numpy(generator.choice(len(p), k, replace=False, p=p)).to(scores.device)

    def check(draw: Callable[[Tensor, int, int], Any], drawn: Tensor) -> str:
        if drawn.unique().shape != (keep,):
            raise AssertionError(f"rows must be {keep} different ones")
        return law(draw, at)

    def gumbel(s: Tensor, k: int, _: int) -> Tensor:
        return baselines.keys(s).topk(k).indices

    def call(function: Callable[[Tensor], Tensor], i: int) -> Tensor:
        return function(copies[i].online[0])

    table.add("eager Gumbel, topk, sort", partial(call, plain), partial(check, gumbel))
    compiled(table, at, plain, call, partial(check, gumbel))
    generator = np.random.default_rng(0)
    table.add(
        "numpy choice",
        lambda i: numpy(copies[i].online[0], keep, generator),
        partial(check, lambda s, k, n: numpy(s, k, np.random.default_rng(n))),
    )
    if rows > 1 << 24:
        table.left_out.append("torch.multinomial left out: it takes 2^24 rows at most")
        table.variants.remove(made.twin)
    return table


def top(at: Place, rows: int, keep: int) -> Table:
    """Temperature 0: the k highest scores, the lower row where scores tie."""
    copies = at.copies(lambda: Inputs([baselines.random_keys(rows, at.generator)], []))

    def ours(i: int) -> activesel.Selection:
        return activesel.sample(copies[i].online[0], keep, 0.0, at.seed, at.step)

    def check(out: Any) -> str:
        ours = isinstance(out, activesel.Selection)
        indices, threshold = (out.indices, out.threshold) if ours else (out, None)
        return baselines.check_rows(copies[0].online[0], keep, indices, threshold)

    table = Table(
        [Variant("ours", ours, check, ours=True)],
        builders.work_of(copies[0], keep, written=0),
        len(copies),
    )
    table.add("torch.topk, sort", lambda i: baselines.kept(copies[i].online[0], keep), check)
    table.add("torch.topk", lambda i: copies[i].online[0].topk(keep, sorted=False).indices, check)
    if on_gpu(table, at, "flashinfer"):
        if found := baselines.flashinfer():
            table.add("flashinfer, sort", lambda i: found(copies[i].online[0], keep), check)
        else:
            table.missing("flashinfer")
    return table


def joint(at: Place, rows: int, keep: int, width: int) -> Table:
    """The published algorithm holds all B x B losses; ours and `running sums` never do."""
    made = builders.joint(at, rows, keep, width)
    table = Table([made.ours, made.twin], made.work, max(1, len(made.copies)))
    need = 12 * rows * rows
    names = {"published": "dense JEST", "matvec": "dense JEST, matrix-vector products"}
    if need > at.free():
        said = f"needs {need >> 20:,} MB, {at.free() >> 20:,} MB available"
        table.left_out.append(f"dense JEST with B = {rows:,} left out: {said}")
    elif at.cpu:
        x = dense.Inputs.make(rows, keep, width)
        for name, title in names.items():
            other = partial(getattr(dense, name), x)
            table.add(title, lambda _, other=other: other(), made.twin.check)
    else:
        from bench.gpu import joint as gpu  # needs Triton

        def matrix(i: int) -> gpu.Picked:
            return gpu.dense(made.copies[i], keep, gpu.CHUNKS)

        table.add(names["matvec"], matrix, made.twin.check)
    return table


# ------------------------------------------------------------------------------ selective backprop


def composer() -> Callable[..., Any] | None:
    """Composer's function, where it is installed."""
    try:
        return importlib.import_module("composer.functional").select_using_loss
    except Exception:  # its imports fail in many ways
        return None


def by_rank(rows: int, share: float, device: torch.device) -> Tensor:  # [B] float32
    """Log-weights of selective backprop, the lowest loss first: ((rank + 1/2) / B)^(1/share - 1).

    Source: Jiang et al. 2019 (arXiv:1910.00762), as Composer draws it.
    """
    rank = torch.arange(rows, device=device)
    return (1 / share - 1) * torch.log((rank + 0.5) / rows)


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Composer draws from NumPy's global state, which is left as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def backprop(at: Place, rows: int, classes: int) -> Table:
    """Half of the rows, the likelier the higher their loss ranks; logits, labels in, half out."""
    keep = rows // 2
    copies = at.copies(
        lambda: Inputs([at.randn(rows, classes, dtype=at.dtype)], [], at.labels(rows, classes))
    )
    first = copies[0]
    weights = by_rank(rows, 0.5, at.device)

    def drawn(order: Tensor, weights: Tensor, k: int, step: Any) -> Tensor:
        return order[activesel.sample(weights, k, seed=at.seed, step=step).indices]

    def ours(i: int) -> tuple[Tensor, Tensor]:
        x, y = copies[i].online[0], copies[i].targets
        losses = activesel.score(online=x, targets=y)
        rows = drawn(losses.argsort(), weights, keep, at.step)
        return x[rows], y[rows]  # type: ignore[index]

    def numpy(weights: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
        return np.random.choice(len(weights), k, replace=False, p=weights)

    p = weights.double().softmax(0).cpu().numpy()

    def plain(i: int) -> tuple[Tensor, Tensor]:
        x, y = copies[i].online[0], copies[i].targets
        order = F.cross_entropy(x.float(), y, reduction="none").argsort()
        rows = order[torch.from_numpy(numpy(p, keep)).to(at.device)]
        return x[rows], y[rows]  # type: ignore[index]

    def check(draw: Callable[[Tensor, int, int], Any], out: tuple[Tensor, Tensor]) -> str:
        if [t.shape[0] for t in out] != [keep, keep]:
            raise AssertionError(f"rows must be {keep}, got {[t.shape[0] for t in out]}")
        few = by_rank(len(builders.FEW), 0.5, at.device)
        with numpy_seed(0):
            return law(draw, at, few)

    def of_order(few: Tensor, k: int, n: int) -> Tensor:  # losses that rise with the row
        return drawn(torch.arange(len(few), device=at.device), few, k, n)

    table = Table(
        [Variant("ours", ours, partial(check, of_order), ours=True)],
        Work(0, first.bytes + 2 * keep * (first.bytes // rows), 0, "bytes: inputs, rows kept"),
        len(copies),
    )
    table.add(
        "argsort, numpy choice",
        plain,
        partial(check, lambda few, k, n: numpy(few.double().softmax(0).cpu().numpy(), k)),
    )
    if select := composer():

        def theirs(i: int) -> tuple[Tensor, Tensor]:
            x, y = copies[i].online[0], copies[i].targets
            return select(x, y, lambda x: x.float(), F.cross_entropy, keep=0.5)

        def their_rows(few: Tensor, k: int, n: int) -> Tensor:
            losses = torch.arange(len(few), device=at.device, dtype=torch.float32)
            return select(losses, losses.long(), lambda x: x, lambda x, y, reduction: x, 0.5)[1]

        table.add("Composer", theirs, partial(check, their_rows))
    else:
        table.missing("Composer")
    return table
