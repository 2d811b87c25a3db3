# SPDX-License-Identifier: Apache-2.0
"""What is timed: who competes, what is checked, and how much work each case cannot avoid.

A rehearsal has the same cases, at sizes that an interpreter manages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import activesel
from activesel import Head, _native
from activesel.kernels import config
from activesel.kernels.head import head as head_kernel
from activesel.kernels.logits import logits as logits_kernel
from activesel.kernels.operands import Labels, Noise
from activesel.kernels.topk import topk as topk_kernel
from bench.gpu import baselines
from bench.gpu.baselines import Inputs
from bench.gpu.device import BF16, FP32, Bench
from bench.gpu.timing import Row, Variant, Work


def work_of(inputs: Inputs, keep: int = 0) -> Work:
    """Every input read once, scores, keys and rows written once, one product per head."""
    rows, flops, exps = inputs.rows, 0, 0
    for operand in (inputs.online, inputs.reference):
        if len(operand) == 2:
            flops += 2 * rows * operand[1].numel()
        if operand and operand[0].ndim == 2:
            classes = operand[1].shape[0] if len(operand) == 2 else operand[0].shape[1]
            exps += rows * classes * (2 if inputs.loss == "sigmoid" else 1)
    formula = (
        "flops: 2 B C D a head; bytes: inputs, and 8 B for scores and keys, 8 k for rows;"
        " exps: B C a side, twice for sigmoid (an exponential and a logarithm)"
    )
    return Work(flops, inputs.bytes + 8 * rows + 8 * keep, exps, formula)


# ---------------------------------------------------------------------------- head, logits -> keys


def keys(bench: Bench, make: Callable[[], Inputs], classes: int) -> Row:
    """Ours, eager and compiled, from one kind of inputs to scores and keys."""
    copies = bench.copies(make)
    first, loss = copies[0], copies[0].loss
    noise = (bench.seed, bench.step, bench.temperature)
    is_head = len(first.online) == 2
    chunks = baselines.chunks_that_fit(first.rows, classes)
    liger = [baselines.liger(c) for c in copies]

    def ours(i: int) -> tuple[Tensor, Tensor]:
        return our_keys(copies[i], bench, classes)

    def check(out: tuple[Tensor, Tensor]) -> str:
        said = baselines.check_scores(first, out[0])
        return f"{said}, {baselines.check_keys(*out, *noise)}"

    def check_baseline(out: tuple[Tensor, Tensor]) -> str:
        return baselines.check_scores(first, out[0], baseline=True)

    def eager(i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = baselines.chunked(copies[i], dtype, chunks)
        return s, baselines.keys(s)

    def plain(on: list[Tensor], ref: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        s = baselines.scores(Inputs(on, ref, targets, loss), BF16)
        return s, baselines.keys(s)

    compiled = bench.compile(plain)

    def with_liger(i: int) -> tuple[Tensor, Tensor]:
        call = liger[i]
        assert call is not None
        s = call()
        return s, baselines.keys(s)

    logits = ", bf16 logits" if is_head else ""
    parts = f", {chunks} chunks" if chunks > 1 else ""
    variants = [
        Variant("ours", ours, check, ours=True),
        Variant(f"eager{logits}{parts}", partial(eager, dtype=BF16), check_baseline),
        Variant("torch.compile", lambda i: compiled(*copies[i][:3]), check_baseline),
    ]
    if is_head:
        fp32 = partial(eager, dtype=FP32)
        variants.append(Variant(f"eager, fp32 logits{parts}", fp32, check_baseline))
    if liger[0]:
        variants.append(Variant("liger", with_liger, check_baseline))
    return bench.measure(variants, work_of(first), len(copies))


def our_keys(
    inputs: Inputs, bench: Bench, classes: int, tile: config.Tile | None = None
) -> tuple[Tensor, Tensor]:
    assert inputs.targets is not None
    labels = Labels(inputs.targets, 1, classes, -100, inputs.loss == "sigmoid", 0.0)
    noise = Noise(bench.seed, bench.step, bench.temperature, 0)
    if len(inputs.online) == 2:
        out = head_kernel(inputs.online, inputs.reference, labels, noise, tile)
    else:
        out = logits_kernel(inputs.online, inputs.reference, labels, noise)
    assert out.keys is not None
    return out.scores, out.keys


def head(rows: int, classes: int, width: int, cached: bool, loss: str, bench: Bench) -> Row:
    """Features to keys; both sides heads, or the reference's losses cached in fp32."""
    rows, classes = bench.size(rows, 24), bench.size(classes, 70)

    def make() -> Inputs:
        online = bench.head(rows, classes, width)
        reference = [bench.randn(rows) + 7] if cached else bench.head(rows, classes, width)
        return Inputs(online, reference, bench.labels(rows, classes), loss)

    return keys(bench, make, classes)


def logits(rows: int, classes: int, dtype: torch.dtype, bench: Bench) -> Row:
    """Given logits of both sides to keys."""
    rows, classes = bench.size(rows, 24), bench.size(classes, 300)

    def make() -> Inputs:
        online, reference = (bench.randn(rows, classes, dtype=dtype) for _ in range(2))
        return Inputs([online], [reference], bench.labels(rows, classes))

    return keys(bench, make, classes)


# ------------------------------------------------------------------------------------ keys -> rows


def topk(rows: int, keep: int, bench: Bench) -> Row:
    rows, keep = bench.size(rows, 700), bench.size(keep, 150)
    copies = [
        c.online[0]
        for c in bench.copies(lambda: Inputs([baselines.random_keys(rows, bench.generator)], []))
    ]

    def check(out: tuple[Tensor, ...] | Tensor) -> str:
        indices, threshold = (out, None) if isinstance(out, Tensor) else out[:2]
        return baselines.check_rows(copies[0], keep, indices, threshold)

    def unsorted(i: int) -> Tensor:
        return copies[i].topk(keep, sorted=False).indices

    variants = [
        Variant("ours, Triton", lambda i: topk_kernel(copies[i], keep), check, ours=True),
        Variant("torch.topk, sort", lambda i: baselines.kept(copies[i], keep), check),
        Variant("torch.topk alone, unsorted", unsorted, check),
    ]
    if not bench.rehearse:
        cuda = Variant("ours, CUDA", lambda i: _native.topk_cuda(copies[i], keep), check, ours=True)
        variants.insert(0, cuda)
    if flashinfer := baselines.flashinfer():
        variants.append(Variant("flashinfer, sort", lambda i: flashinfer(copies[i], keep), check))
    work = Work(bytes=4 * rows + 8 * keep, formula="bytes: 4 B keys in, 8 k rows out")
    return bench.measure(variants, work, len(copies))


# -------------------------------------------------------------------------------- the public verbs


def select(rows: int, keep: int, classes: int, width: int, bench: Bench) -> Row:
    """Losses (no classes) or two heads to rows, by `activesel.select` alone."""
    rows, keep, classes = bench.size(rows, 40), bench.size(keep, 9), bench.size(classes, 70)

    def make() -> Inputs:
        if not classes:
            return Inputs([bench.randn(rows)], [])
        online, reference = (bench.head(rows, classes, width) for _ in range(2))
        return Inputs(online, reference, bench.labels(rows, classes))

    copies = bench.copies(make)
    steps = itertools.count()
    noise = (bench.seed, bench.step, bench.temperature)

    def ours(i: int, *, integers: bool) -> activesel.Selection:
        on, ref, targets, _ = copies[i]
        seed, step, temperature = (1, next(steps), 1.0) if integers else noise
        return activesel.select(
            online=_public(on), reference=_public(ref), targets=targets, k=keep,
            seed=seed, step=step, temperature=temperature, backend=bench.backend,
        )  # fmt: skip

    def check(p: activesel.Selection, *, integers: bool) -> str:
        said = baselines.check_scores(copies[0], p.scores)
        if not integers:
            said += ", " + baselines.check_keys(p.scores, p.keys, *noise)
        return f"{said}, {baselines.check_rows(p.keys, keep, p.indices, p.threshold)}"

    def rows_of(on: list[Tensor], ref: list[Tensor], targets: Tensor | None) -> Tensor:
        s = baselines.scores(Inputs(on, ref, targets), BF16)
        return baselines.kept(baselines.keys(s), keep)

    def check_rows(indices: Tensor) -> str:  # other noise, other rows
        if indices.shape != (keep,) or not (indices.diff() > 0).all():
            raise AssertionError(f"rows must be {keep} different ones, got {indices.tolist()[:8]}")
        return "as many rows, other noise"

    compiled = bench.compile(rows_of)
    chunks = baselines.chunks_that_fit(rows, classes)
    parts = f", {chunks} chunks" if chunks > 1 else ""

    def eager(i: int) -> Tensor:
        return baselines.kept(baselines.keys(baselines.chunked(copies[i], BF16, chunks)), keep)

    variants = [
        Variant("ours", partial(ours, integers=False), partial(check, integers=False), ours=True),
        Variant(f"eager{parts}", eager, check_rows),
        Variant("torch.compile", lambda i: compiled(*copies[i][:3]), check_rows),
        Variant(
            "ours, from Python", partial(ours, integers=True), partial(check, integers=True),
            ours=True, from_python=True,
        ),
        Variant("eager, from Python", eager, check_rows, from_python=True),
    ]  # fmt: skip
    return bench.measure(variants, work_of(copies[0], keep), len(copies))


def _public(operand: list[Tensor]) -> Head | Tensor | None:
    return None if not operand else operand[0] if len(operand) == 1 else Head(*operand)


# ------------------------------------------------------------------------------------------- tiles


def tiles(rows: int, classes: int, width: int, loss: str, bench: Bench) -> Row:
    """Every tile in the head kernel's table for this device and these inputs."""
    rows, classes = bench.size(rows, 24), bench.size(classes, 70)

    def make() -> Inputs:
        online, reference = (bench.head(rows, classes, width) for _ in range(2))
        return Inputs(online, reference, bench.labels(rows, classes), loss)

    copies = bench.copies(make)
    first = copies[0]

    def check(out: tuple[Tensor, Tensor]) -> str:
        return baselines.check_scores(first, out[0])

    def call(i: int, tile: config.Tile) -> tuple[Tensor, Tensor]:
        return our_keys(copies[i], bench, classes, tile)

    candidates = config.candidates(bench.device, config.kind([first.online, first.reference]))
    variants = [Variant(_said(t), partial(call, tile=t), check) for t in candidates]
    return bench.measure(variants, work_of(first), len(copies))


def _said(tile: config.Tile) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile._asdict().items())
