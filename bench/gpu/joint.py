# SPDX-License-Identifier: Apache-2.0
"""Joint selection: ours, the matrix that the paper describes, and the same in running sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import Pairs, spec, spec_joint
from activesel.kernels import config, pairs
from activesel.testing import assert_as_accurate
from bench.gpu import baselines
from bench.gpu.baselines import Inputs
from bench.gpu.device import BF16, Bench
from bench.gpu.timing import Row, Variant, Work

CHUNKS, SCALE, BIAS = 16, 10.0, -10.0
CHECKED_ROWS = 256
Picked = tuple[Tensor, Tensor, Tensor]  # rows, those before the last chunk, scores [B] given them


def embed(bench: Bench, rows: int, width: int) -> list[Tensor]:
    image, text = (F.normalize(bench.randn(rows, width), dim=1).to(BF16) for _ in range(2))
    return [image, text, *(torch.full((1,), v, device=bench.device) for v in (SCALE, BIAS))]


def inputs_of(bench: Bench, rows: int, width: int) -> Inputs:
    return Inputs(embed(bench, rows, width), embed(bench, rows, width), loss="sigmoid")


def work_of(inputs: Inputs, keep: int, chunks: int) -> Work:
    *before, last = spec_joint.sizes(keep, chunks)
    similarities = 4 * (sum(before) * inputs.rows + last * keep)
    return Work(
        2 * similarities * inputs.online[0].shape[1],
        inputs.bytes + 8 * inputs.rows + 8 * keep,
        similarities,
        "flops: 2 D a similarity, of which 4 (k - last) B + 4 k last, two models and directions;"
        " bytes: inputs, 8 B for scores and keys, 8 k for rows; exps: one a similarity",
    )


def logits(a: Tensor, b: Tensor, side: list[Tensor], product: torch.dtype) -> Tensor:
    """[R, c], in fp32 (or in float64, if the product is)."""
    wide = torch.float64 if product == torch.float64 else torch.float32
    return side[2] * (a.to(product) @ b.to(product).T).to(wide) + side[3]


def added(inputs: Inputs, rows: Tensor | slice, chunk: Tensor, product: torch.dtype) -> Tensor:
    """What rows in `chunk` add to the scores of other rows, [R]."""
    total = None
    for sign, side in ((1, inputs.online), (-1, inputs.reference)):
        image, text = side[:2]
        for a, b in ((image, text), (text, image)):
            s = sign * F.softplus(logits(a[rows], b[chunk], side, product)).sum(1)
            total = s if total is None else total + s
    assert total is not None
    return total


def own(inputs: Inputs, product: torch.dtype) -> Tensor:  # [B]
    wide = torch.float64 if product == torch.float64 else torch.float32
    on, ref = (
        F.softplus(-(side[2] * (side[0].to(wide) * side[1].to(wide)).sum(1) + side[3]))
        for side in inputs[:2]
    )
    return on - ref


def incremental(inputs: Inputs, keep: int, chunks: int, step: Callable[..., Tensor]) -> Picked:
    """Running sums over all rows; `step` adds a chunk's part."""
    scores, before = own(inputs, BF16), torch.empty(0, dtype=torch.int64)
    open_ = torch.ones_like(scores)
    parts: list[Tensor] = []
    for c, size in enumerate(spec_joint.sizes(keep, chunks)):
        if c:
            scores = scores + step(inputs.online, inputs.reference, parts[-1])
            before = torch.cat(parts)
        parts.append(baselines.keys(scores).where(open_ > 0, -torch.inf).topk(size).indices)
        open_[parts[-1]] = 0
    return torch.cat(parts).sort().values, before.to(scores.device), scores


def dense(inputs: Inputs, keep: int, chunks: int) -> Picked:
    """The B x B matrix of both models' losses, summed over the rows chosen, chunk after chunk."""
    on, ref = (F.softplus(logits(side[0], side[1], side, BF16)) for side in inputs[:2])
    matrix = on.sub_(ref)
    mine = own(inputs, BF16)
    scores, chosen = mine, torch.zeros_like(mine)
    before: Tensor = chosen
    for c, size in enumerate(spec_joint.sizes(keep, chunks)):
        if c:
            scores, before = mine + matrix @ chosen + chosen @ matrix, chosen.clone()
        keys = baselines.keys(scores).where(chosen == 0, -torch.inf)
        chosen[keys.topk(size).indices] = 1.0
    return chosen.nonzero()[:, 0], before.nonzero()[:, 0], scores


def fits(rows: int) -> bool:
    """Twelve bytes an entry at once: two models' fp32 losses, and one of them being made."""
    if not torch.cuda.is_available():
        return True
    return 12 * rows * rows < 0.9 * torch.cuda.mem_get_info()[0]


# ------------------------------------------------------------------------------------------- checks


def check(inputs: Inputs, keep: int, picked: Picked, baseline: bool = True) -> str:
    """Different rows; of rows not chosen, scores given those chosen before, against float64."""
    rows, before, scores = picked
    if rows.shape != (keep,) or not (rows.diff() > 0).all():
        raise AssertionError(f"rows must be {keep} different ones, got {rows.tolist()[:8]}")
    left = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
    left = left[baselines.some(len(left), left.device)][:CHECKED_ROWS]
    truth, eager = (
        own(inputs, product)[left] + added(inputs, left, before, product)
        for product in (torch.float64, torch.float32)
    )
    error = (scores[left].double() - truth).abs().max().item()
    if not baseline:
        size = 1e-6 * (1 + 4e-5 * len(before))
        assert_as_accurate(scores[left], eager, truth, 1e-5 + size)
    elif not error <= baselines.BASELINE_ERROR:
        raise AssertionError(f"scores must be within 0.05 of float64, got {error:.3g}")
    return f"{len(left)} scores within {error:.2g} of float64"


def check_ours(inputs: Inputs, keep: int, chunks: int, p: activesel.Selection, bench: Bench) -> str:
    """The keys tell which chunk a row was picked in, since each has noise of its own."""
    kept, found = p.keys[p.indices], torch.full_like(p.indices, -1)
    for c in range(chunks):
        noise = spec.noise(inputs.rows, bench.seed, bench.step, 0, c)
        keys, _ = spec.key(p.scores, noise, bench.temperature)
        found[(found < 0) & (keys[p.indices] == kept)] = c
    if found.bincount(minlength=chunks).tolist() != spec_joint.sizes(keep, chunks):
        raise AssertionError("every chunk's keys must be those of the specification, bit for bit")
    left = torch.ones_like(p.keys, dtype=torch.bool).index_fill_(0, p.indices, False)
    if not torch.equal(p.keys[left].max(), p.threshold):
        raise AssertionError("the threshold must be the largest key left")
    said = check(inputs, keep, (p.indices, p.indices[found < chunks - 1], p.scores), baseline=False)
    return f"{said}, all keys bit for bit"


# -------------------------------------------------------------------------------------------- cases


def joint(rows: int, keep: int, width: int, bench: Bench) -> Row:
    """Embeddings of two models to rows, by `activesel.joint_select`."""
    rows, keep = bench.size(rows, 40), bench.size(keep, 11)
    width, chunks = bench.size(width, 24), bench.size(CHUNKS, 3)
    copies = bench.copies(partial(inputs_of, bench, rows, width))
    first = copies[0]

    def ours(i: int) -> activesel.Selection:
        online, reference = (Pairs(*side) for side in copies[i][:2])
        return activesel.joint_select(
            online=online, reference=reference, k=keep, chunks=chunks, seed=bench.seed,
            step=bench.step, temperature=bench.temperature, backend=bench.backend,
        )  # fmt: skip

    def step(online: list[Tensor], reference: list[Tensor], chunk: Tensor) -> Tensor:
        return added(Inputs(online, reference), slice(None), chunk, BF16)

    def incrementally(i: int, step: Callable[..., Tensor]) -> Picked:
        return incremental(copies[i], keep, chunks, step)

    check_it = partial(check, first, keep)
    variants = [
        Variant("ours", ours, lambda p: check_ours(first, keep, chunks, p, bench), ours=True),
        Variant("torch.compile, sums", partial(incrementally, step=bench.compile(step)), check_it),
        Variant("eager, sums", partial(incrementally, step=step), check_it),
    ]
    if fits(rows):
        variants.append(Variant("dense matrix", lambda i: dense(copies[i], keep, chunks), check_it))
    return bench.measure(variants, work_of(first, keep, chunks), len(copies))


def tiles(rows: int, chunk: int, width: int, loss: str, bench: Bench) -> Row:
    """One chunk's part with every tile in the table for this device."""
    rows, chunk, width = bench.size(rows, 40), bench.size(chunk, 20), bench.size(width, 24)
    copies = bench.copies(partial(inputs_of, bench, rows, width))
    picked = torch.arange(0, rows, rows // chunk, device=bench.device)[:chunk]
    lanes, none = (1, 0.0) if loss == "sigmoid" else (4, -torch.inf)
    exact = torch.full((lanes, rows), none, device=bench.device)
    spec_joint.pair_add(exact, copies[0].online, copies[0].reference, None, picked, loss)

    def call(i: int, tile: config.Tile) -> Tensor:
        state = torch.full_like(exact, none)
        pairs.pair_add(state, copies[i].online, copies[i].reference, None, picked, loss, tile)
        return state

    def check(state: Tensor) -> str:
        torch.testing.assert_close(state, exact, rtol=1e-4, atol=1e-3)
        return "as the specification"

    variants = [
        Variant(", ".join(f"{n} {v}" for n, v in t._asdict().items()), partial(call, tile=t), check)
        for t in config.pair_candidates(copies[0].online[0])
    ]
    work = Work(8 * rows * chunk * width, exps=4 * rows * chunk, formula="flops: 8 B c D")
    return bench.measure(variants, work, len(copies))
