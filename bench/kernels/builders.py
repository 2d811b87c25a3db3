# SPDX-License-Identifier: Apache-2.0
"""Every operator beside its baseline twin: what one writes in torch for the same result.

A builder makes inputs and both variants; a variant's check holds its result against float64, the
specification or, for draws, the exact law.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import Head, Pairs, _native, ops, spec
from activesel.ledger import forward_flops
from activesel.models import SIZES as MODELS
from activesel.models import ViT, ViTConfig
from activesel.testing import assert_as_accurate, assert_plackett_luce
from bench import joint as dense
from bench.gpu import baselines
from bench.gpu.baselines import Inputs
from bench.gpu.timing import Variant, Work
from bench.kernels.place import Place

FEW = (0.0, 0.5, 1.0, 1.5, -0.5, 2.0)  # scores of which draws are counted
DRAWS = 2000
EULER = 0.5772157  # mean of Gumbel noise

Rows = tuple[Tensor, Tensor]  # scores [B], rows kept [k]


class Made(NamedTuple):
    ours: Variant
    twin: Variant
    work: Work
    copies: list[Inputs]


# ------------------------------------------------------------------------------------------ checks


def check_rows(picked: activesel.Selection, keep: int, at: Place) -> str:
    """Keys and rows: those of the specification for these scores, bit for bit."""
    said = baselines.check_keys(picked.scores, picked.keys, at.seed, at.step, at.temperature)
    return f"{said}, {baselines.check_rows(picked.keys, keep, picked.indices, picked.threshold)}"


def check_twin(x: Inputs, keep: int, at: Place, out: Rows) -> str:
    """The same scores, and as many different rows: its noise is another one."""
    s, rows = out
    if rows.shape != (keep,) or not (rows.diff() > 0).all():
        raise AssertionError(f"rows must be {keep} different ones, got {rows.tolist()[:8]}")
    return baselines.check_scores(x, s, baseline=not at.cpu)


def law(draw: Callable[[Tensor, int, int], Any], at: Place, few: Tensor | None = None) -> str:
    """Accept a sampler `draw(scores, k, number)` by the exact law of successive sampling."""
    scores = torch.tensor(FEW, device=at.device) if few is None else few
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_plackett_luce(draw, scores, 3, draws=DRAWS, ordered=False)
    return f"{DRAWS:,} draws of 3 of {len(scores)} rows follow Plackett-Luce"


def equal(out: Any, expected: Any) -> str:
    """Bit for bit, tensors or tuples of them."""
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (out, expected)), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError("results must be those of the twin, bit for bit")
    return "bit for bit"


def near(got: Tensor, eager: Tensor, truth: Tensor, at: Place) -> str:
    """As near to float64 as eager torch is, on a GPU within what bf16 loses."""
    assert_as_accurate(got, eager, truth, 1e-5 if at.cpu else baselines.BASELINE_ERROR)
    return f"within {(got - truth).abs().max().item():.2g} of float64"


# ---------------------------------------------------------------------------------- public verbs


def public(operand: list[Tensor]) -> Any:
    """An operand as `activesel.select` takes it."""
    return None if not operand else operand[0] if len(operand) == 1 else Head(*operand)


def work_of(x: Inputs, keep: int = 0, written: int = 8) -> Work:
    heads = [side[1].numel() for side in (x.online, x.reference) if len(side) == 2]
    formula = f"flops: 2 B C D a head; bytes: inputs, {written} B for scores (and keys), 8 k rows"
    return Work(2 * x.rows * sum(heads), x.bytes + written * x.rows + 8 * keep, 0, formula)


def eager(x: Inputs, keep: int, dtype: torch.dtype) -> Rows:
    """Two losses, Gumbel noise, `topk`, `sort`: selection as one writes it."""
    s = baselines.scores(x, dtype)
    return s, baselines.kept(baselines.keys(s), keep)


def selected(at: Place, make: Callable[[], Inputs], keep: int) -> Made:
    copies = at.copies(make)
    first = copies[0]

    def ours(i: int) -> activesel.Selection:
        x = copies[i]
        return activesel.select(
            online=public(x.online), reference=public(x.reference), targets=x.targets, k=keep,
            loss=x.loss, seed=at.seed, step=at.step, temperature=at.temperature,
        )  # type: ignore[arg-type]  # fmt: skip

    def check(p: activesel.Selection) -> str:
        return f"{baselines.check_scores(first, p.scores)}, {check_rows(p, keep, at)}"

    twin = Variant(
        "eager", lambda i: eager(copies[i], keep, at.dtype), partial(check_twin, first, keep, at)
    )
    return Made(Variant("ours", ours, check, ours=True), twin, work_of(first, keep), copies)


def scored(at: Place, make: Callable[[], Inputs]) -> Made:
    copies = at.copies(make)
    first = copies[0]

    def ours(i: int) -> Tensor:
        x = copies[i]
        sides = {"online": public(x.online), "reference": public(x.reference)}
        return activesel.score(**sides, targets=x.targets, loss=x.loss)  # type: ignore[arg-type]

    check = partial(baselines.check_scores, first)
    twin = Variant(
        "eager",
        lambda i: baselines.scores(copies[i], at.dtype),
        partial(check, baseline=not at.cpu),
    )
    return Made(Variant("ours", ours, check, ours=True), twin, work_of(first, written=4), copies)


# ---------------------------------------------------------------------------------------- builders


def logits_to_rows(at: Place, rows: int, classes: int, keep: int) -> Made:
    def make() -> Inputs:
        sides = ([at.randn(rows, classes, dtype=at.dtype)] for _ in range(2))
        return Inputs(*sides, at.labels(rows, classes))

    return selected(at, make, keep)


def logits_to_losses(at: Place, rows: int, classes: int, loss: str = "softmax") -> Made:
    def make() -> Inputs:
        x = at.randn(rows, classes, dtype=at.dtype)
        return Inputs([x], [], at.labels(rows, classes), loss)

    return scored(at, make)


def losses_to_scores(at: Place, rows: int) -> Made:
    return scored(at, lambda: Inputs([at.randn(rows)], [at.randn(rows)]))


def losses_to_rows(at: Place, rows: int, keep: int) -> Made:
    return selected(at, lambda: Inputs([at.randn(rows)], [at.randn(rows)]), keep)


def head_to_rows(at: Place, rows: int, classes: int, width: int, keep: int) -> Made:
    def head() -> list[Tensor]:
        return [
            at.randn(rows, width, dtype=at.dtype),
            (at.randn(classes, width) * width**-0.5).to(at.dtype),
        ]

    return selected(at, lambda: Inputs(head(), head(), at.labels(rows, classes)), keep)


def multinomial(scores: Tensor, keep: int) -> Tensor:
    return torch.multinomial(scores.softmax(0), keep)


def sampled(at: Place, rows: int, keep: int) -> Made:
    copies = at.copies(lambda: Inputs([at.randn(rows)], []))

    def ours(i: int) -> activesel.Selection:
        return activesel.sample(copies[i].online[0], keep, at.temperature, at.seed, at.step)

    def check(p: activesel.Selection) -> str:
        said = law(lambda s, k, n: activesel.sample(s, k, seed=0, step=n), at)
        return f"{equal(p.scores, copies[0].online[0])}, {check_rows(p, keep, at)}, {said}"

    def check_multinomial(drawn: Tensor) -> str:
        if drawn.unique().shape != (keep,):
            raise AssertionError(f"rows must be {keep} different ones")
        return law(lambda s, k, _: multinomial(s, k), at)

    twin = Variant(
        "torch.multinomial", lambda i: multinomial(copies[i].online[0], keep), check_multinomial
    )
    work = work_of(copies[0], keep)
    return Made(Variant("ours", ours, check, ours=True), twin, work, copies)


def keys_to_rows(at: Place, rows: int, keep: int) -> Made:
    copies = at.copies(lambda: Inputs([baselines.random_keys(rows, at.generator)], []))
    name = ops.choose(at.backend, at.device, "topk")[0]
    topk: Any = _native.topk_cuda if name == "cuda" else ops.MODULES[name].topk

    def check(out: Any) -> str:
        indices, threshold = (out, None) if isinstance(out, Tensor) else out[:2]
        return baselines.check_rows(copies[0].online[0], keep, indices, threshold)

    ours = Variant("ours", lambda i: topk(copies[i].online[0], keep), check, ours=True)
    twin = Variant("eager", lambda i: baselines.kept(copies[i].online[0], keep), check)
    return Made(ours, twin, work_of(copies[0], keep, written=0), copies)


def noise(at: Place, rows: int) -> Made:
    name = ops.choose(at.backend, at.device, "losses")[0]
    make: Any = ops.MODULES["triton" if name == "cuda" else name].noise

    def check(out: Tensor) -> str:
        return equal(out, spec.noise(rows, at.seed, at.step))

    def check_twin(out: Tensor) -> str:  # five standard deviations of the mean
        off = abs(out.double().mean().item() - EULER)
        if not off < 5 * 1.2825 * rows**-0.5:
            raise AssertionError(f"Gumbel noise must have mean {EULER:.4f}, off by {off:.2g}")
        return f"mean of Gumbel noise within {off:.1g}"

    ours = Variant("ours", lambda _: make(rows, at.seed, at.step), check, ours=True)
    empty = torch.empty(rows, device=at.device)
    twin = Variant("eager", lambda _: -torch.empty_like(empty).exponential_().log(), check_twin)
    return Made(ours, twin, Work(0, 4 * rows, 0, "bytes: 4 B written"), [])


def pairs_to_rows(at: Place, rows: int, width: int, keep: int) -> Made:
    def make() -> Inputs:
        def embed() -> list[Tensor]:
            parts = F.normalize(at.randn(2, rows, width), dim=2).to(at.dtype)
            return [*parts, torch.full((1,), 10.0, device=at.device)]

        return Inputs(embed(), embed(), loss="dot")

    def scores(x: Inputs, dtype: torch.dtype) -> Tensor:
        on, ref = (
            -side[2].to(dtype) * (side[0].to(dtype) * side[1].to(dtype)).sum(1) for side in x[:2]
        )
        return on - ref

    copies = at.copies(make)
    first = copies[0]

    def ours(i: int) -> activesel.Selection:
        on, ref = (Pairs(*side) for side in copies[i][:2])
        return activesel.select(
            online=on, reference=ref, k=keep, loss="dot", seed=at.seed, step=at.step,
            temperature=at.temperature,
        )  # fmt: skip

    def plain(i: int) -> Rows:
        s = scores(copies[i], torch.float32)
        return s, baselines.kept(baselines.keys(s), keep)

    def right(s: Tensor) -> str:
        return near(s, scores(first, torch.float32), scores(first, torch.float64), at)

    work = Work(4 * rows * width, first.bytes + 8 * (rows + keep), 0, "flops: 4 B D; bytes: inputs")
    return Made(
        Variant("ours", ours, lambda p: f"{right(p.scores)}, {check_rows(p, keep, at)}", ours=True),
        Variant("eager", plain, lambda out: right(out[0])),
        work,
        copies,
    )


def joint(at: Place, rows: int, keep: int, width: int, loss: Any = "sigmoid") -> Made:
    """On the CPU the rows of both must be the same; on a GPU scores are held against float64."""
    if at.cpu:
        x = dense.Inputs.make(rows, keep, width)
        theirs = dense.incremental if loss == "sigmoid" else dense.incremental_softmax
        mine = partial(dense.ours, x, loss, at.backend)

        def check(other: Callable[[], dense.Picked], out: dense.Picked) -> str:
            return f"{dense.same(out, other()):.1%} of the rows the same"

        given = Inputs(
            *([p.image, p.text, torch.zeros(2)] for p in (x.online, x.reference)), loss=loss
        )
        return Made(
            Variant("ours", lambda _: mine(), partial(check, partial(theirs, x)), ours=True),
            Variant("eager, running sums", lambda _: theirs(x), partial(check, mine)),
            joint_work(given, keep, dense.CHUNKS),
            [],
        )
    from bench.gpu import joint as gpu  # needs Triton

    copies = at.copies(partial(gpu.inputs_of, at, rows, width))
    first, chunks = copies[0], gpu.CHUNKS

    def ours(i: int) -> activesel.Selection:
        on, ref = (Pairs(*side) for side in copies[i][:2])
        return activesel.joint_select(
            online=on, reference=ref, k=keep, chunks=chunks, seed=at.seed, step=at.step,
            temperature=at.temperature,
        )  # fmt: skip

    def sums(i: int) -> gpu.Picked:
        def step(online: list[Tensor], reference: list[Tensor], chunk: Tensor) -> Tensor:
            return gpu.added(Inputs(online, reference), slice(None), chunk, at.dtype)

        return gpu.incremental(copies[i], keep, chunks, step)

    return Made(
        Variant("ours", ours, lambda p: gpu.check_ours(first, keep, chunks, p, at), ours=True),
        Variant("eager, running sums", sums, partial(gpu.check, first, keep)),
        joint_work(first, keep, chunks),
        copies,
    )


def joint_work(x: Inputs, keep: int, chunks: int) -> Work:
    *before, last = dense.spec_joint.sizes(keep, chunks)
    similarities = 4 * (sum(before) * x.rows + last * keep)
    formula = "flops: 2 D a similarity, 4 (k - last) B + 4 k last of them; bytes: inputs, 8 B + 8 k"
    flops = 2 * similarities * x.online[0].shape[1]
    return Work(flops, x.bytes + 8 * x.rows + 8 * keep, similarities, formula)


def images_to_rows(at: Place, rows: int, size: str, keep: int) -> Made:
    """Fashion-MNIST's shapes: 28 x 28 pixels, patches of 7, 10 classes."""
    torch.manual_seed(0)
    config = ViTConfig(*MODELS[size], image_size=28, patch=7, channels=1, classes=10)
    models = [ViT(config).to(at.device, at.dtype).eval().requires_grad_(False) for _ in range(2)]
    shape = (rows, 1, 28, 28)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=at.generator, device=at.device)
    labels = at.labels(rows, 10)

    def scores(models: list[ViT]) -> Tensor:
        logits = [m(images) for m in models]
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        on, ref = (F.cross_entropy(x.to(wide), labels, reduction="none") for x in logits)
        return on - ref

    def ours(_: int) -> activesel.Selection:
        on, ref = (activesel.Forward(m, images) for m in models)
        return activesel.select(
            online=on, reference=ref, targets=labels, k=keep, seed=at.seed, step=at.step,
            temperature=at.temperature,
        )  # fmt: skip

    def plain(_: int) -> Rows:
        s = scores(models)
        return s, baselines.kept(baselines.keys(s), keep)

    truth = scores([copy.deepcopy(m).double() for m in models])
    right = partial(near, eager=scores(models), truth=truth, at=at)
    flops = int(2 * rows * forward_flops(models[0], (1, 28, 28)))
    bytes_ = images.nbytes + labels.nbytes + 8 * (rows + keep)
    work = Work(flops, bytes_, 0, "flops: torch's counter on meta tensors; bytes: images, results")
    return Made(
        Variant("ours", ours, lambda p: f"{right(p.scores)}, {check_rows(p, keep, at)}", ours=True),
        Variant("eager", plain, lambda out: right(out[0])),
        work,
        [],
    )


def take(at: Place, rows: int, width: int, keep: int) -> Made:
    batch = {"x": at.randn(rows, width), "y": at.labels(rows, 10)}
    picked = activesel.sample(at.randn(rows), keep, seed=0)

    def plain(_: int) -> list[Tensor]:
        return [batch[name][picked.indices] for name in ("x", "y")]

    def check(out: Any) -> str:
        got = out if isinstance(out, list) else [out[name] for name in ("x", "y")]
        return equal(got, [batch["x"].index_select(0, picked.indices), plain(0)[1]])

    work = Work(0, 2 * keep * (4 * width + 8), 0, "bytes: k rows read and written")
    ours = Variant("ours", lambda _: picked.take(batch), check, ours=True)
    return Made(ours, Variant("eager", plain, check), work, [])
