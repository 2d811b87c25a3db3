# SPDX-License-Identifier: Apache-2.0
"""Pixels to rows by a pair of scorers: our kernels, torch's own forward passes, and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import Forward
from activesel.kernels import blocks, config, routes, scorer
from activesel.ledger import forward_flops
from activesel.models import ViT, ViTConfig
from activesel.packing import Packed
from bench.gpu import baselines
from bench.gpu.device import BF16, FP32, Bench
from bench.gpu.timing import Row, Variant, Work
from bench.scorer_predictions import CASES, predict

CHUNK = 8192  # images at a time that torch's forward takes
SEEN = 64  # rows held against float64
WORSE, WORSE_FP8, WORSE_TORCH = 0.5, 64.0, 4.0  # errors at most, of that of bf16 modules
FEATURE_ERROR = 5e-3  # relative to their norm
RMS = 0.01  # of the learnability that makes rows hard to tell apart


class Pair:
    """Two scorers in bf16, the images that both look at, and their labels."""

    def __init__(self, name: str, bench: Bench, most: int = 1 << 30) -> None:
        case = CASES[name]
        s = case.shape
        side = bench.size(s.image_size, 2 * s.patch_size)
        sizes = s.width, bench.size(s.depth, 1), s.heads, side, s.patch_size, s.channels
        self.config = ViTConfig(*sizes, bench.size(s.classes, 9))
        self.rows = bench.size(min(case.images, most), 6)
        self.keep, self.bench = self.rows // 5 or 1, bench
        torch.manual_seed(0)
        self.models = [
            ViT(self.config).to(bench.device, BF16).eval().requires_grad_(False) for _ in range(2)
        ]
        self.targets = bench.labels(self.rows, self.config.classes)
        self.images = self._bytes(side)

    def _bytes(self, side: int) -> Tensor:  # [B, C, side, side]
        return torch.randint(
            256, (self.rows, self.config.channels, side, side), dtype=torch.uint8,
            generator=self.bench.generator, device=self.bench.device,
        )  # fmt: skip

    def squares(self) -> None:
        """Images of 8 x 8 squares, which differ in their means too."""
        side = self.config.image_size // 8
        few = self._bytes(8)
        self.images = few.repeat_interleave(side, 2).repeat_interleave(side, 3)

    @property
    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bench.seed, self.bench.step, self.bench.temperature

    def packed(self, fp8: bool = False) -> Packed:
        return Packed.of([m.parts() for m in self.models], fp8=fp8)

    def select(self, *, fp8: bool = False, temperature: float | None = None) -> activesel.Selection:
        online, reference = (Forward(m, self.images, fp8=fp8) for m in self.models)
        seed, step, usual = self.noise
        return activesel.select(
            online=online, reference=reference, targets=self.targets, k=self.keep, seed=seed,
            step=step, temperature=usual if temperature is None else temperature,
            backend="triton",
        )  # fmt: skip

    def scores(
        self,
        dtype: torch.dtype | None = None,  # modules cast to it; None: as they are
        losses: Callable[[ViT, Tensor, Tensor], Tensor] | None = None,
        rows: Tensor | None = None,
        chunk: int = CHUNK,
    ) -> Tensor:  # [B]
        """By torch, all rows or some, a chunk after the other."""
        images = self.images if rows is None else self.images[rows]
        targets = self.targets if rows is None else self.targets[rows]
        models = self.models if dtype is None else [copy.deepcopy(m).to(dtype) for m in self.models]
        losses, out = losses or bf16_losses, []
        for some, y in zip(images.split(chunk), targets.split(chunk), strict=True):
            on, ref = (losses(m, some, y) for m in models)
            out.append(on - ref)
        return torch.cat(out)

    def apart(self, tries: int = 10) -> None:
        """Move the online scorer away from the reference until learnability has `RMS`."""
        online, reference = (list(m.parameters()) for m in self.models)
        steps = [self.bench.randn(*p.shape) * p.float().square().mean().sqrt() for p in reference]
        low, high, rows = 1e-4, 1.0, baselines.some(self.rows, self.bench.device)[:: self.every]
        for _ in range(tries):
            size = (low * high) ** 0.5
            for p, q, step in zip(online, reference, steps, strict=True):
                p.copy_(q.float() + size * step)
            found = self.scores(torch.float64, rows=rows, chunk=256).square().mean().sqrt().item()
            if abs(found / RMS - 1) < 0.1:
                return
            low, high = (low, size) if found > RMS else (size, high)

    @property
    def every(self) -> int:
        return max(1, min(self.rows, baselines.CHECKED_ROWS) // 512)


def bf16_losses(model: ViT, images: Tensor, targets: Tensor) -> Tensor:
    logits = model(images)
    wide = torch.promote_types(logits.dtype, FP32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


def fp32_logits(model: ViT, images: Tensor, targets: Tensor) -> Tensor:
    weight, bias = (t.float() for t in (model.head.weight, model.head.bias))
    logits = F.linear(model.forward_features(images).float(), weight, bias)
    return F.cross_entropy(logits, targets, reduction="none")


class Truth:
    """Some rows' scores and features in float64, and how far bf16 modules are from the scores."""

    def __init__(self, pair: Pair) -> None:
        few = torch.linspace(0, pair.rows - 1, min(SEEN, pair.rows), device=pair.targets.device)
        self.rows = few.round().long()
        self.scores = pair.scores(torch.float64, rows=self.rows)
        self.bf16 = self._rms(pair.scores(rows=self.rows))
        models = [copy.deepcopy(m).double() for m in pair.models]
        images = pair.images[self.rows]
        self.features = torch.stack([m.forward_features(images) for m in models])

    def _rms(self, scores: Tensor) -> float:
        return (scores.double() - self.scores).square().mean().sqrt().item()

    def check(self, scores: Tensor, worse: float = WORSE) -> str:
        error, limit = self._rms(scores[self.rows]), max(worse * self.bf16, 1e-4)
        if not error < limit:
            raise AssertionError(f"scores must be within {limit:.2g} of float64, got {error:.2g}")
        return f"{len(self.rows)} scores within {error:.1g} of float64 (bf16 {self.bf16:.1g})"

    def check_features(self, x: Tensor) -> str:  # [S, B, DP]
        found = x[:, self.rows, : self.features.shape[-1]].double()
        error = ((found - self.features).norm() / self.features.norm()).item()
        if not error < FEATURE_ERROR:
            raise AssertionError(f"features must be within {FEATURE_ERROR}, got {error:.2g}")
        return f"{len(self.rows)} rows within {error:.1g} of float64"


def _work(pair: Pair) -> Work:
    flops = sum(forward_flops(m, tuple(pair.images.shape[1:])) for m in pair.models)
    formula = "flops: torch's counter on meta tensors; bytes: uint8 images once, results"
    return Work(
        int(pair.rows * flops), pair.images.nbytes + 8 * (pair.rows + pair.keep), 0, formula
    )


def predicted(name: str) -> Row:
    """Seconds by each route on an H200, and of which phases."""
    case = CASES[name]
    return {
        way: {part: found[part] for part in ("seconds", "phases") if part in found}
        for way, found in predict(case.shape, case.images).items()
    }


def select(name: str, fp8: bool, bench: Bench) -> Row:
    """Ours by `activesel.select`, and what of it is neither features nor anything else's work."""
    pair = Pair(name, bench)
    truth = Truth(pair)
    compiled = bench.compile(bf16_losses)
    packed = pair.packed()
    sides = [m.parts() for m in pair.models]

    def rows(_: int, losses: Callable[[ViT, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        s = pair.scores(losses=losses)
        return s, baselines.kept(baselines.keys(s), pair.keep)

    def check(p: activesel.Selection, worse: float = WORSE) -> str:
        said = [truth.check(p.scores, worse), baselines.check_keys(p.scores, p.keys, *pair.noise)]
        return ", ".join([*said, baselines.check_rows(p.keys, pair.keep, p.indices, p.threshold)])

    def check_torch(out: tuple[Tensor, Tensor]) -> str:
        return truth.check(out[0], WORSE_TORCH)

    parts = -(-pair.rows // CHUNK)
    chunks = f", {parts} chunks" if parts > 1 else ""
    variants = [
        Variant("ours", lambda _: pair.select(), check, ours=True),
        Variant(f"torch.compile{chunks}", partial(rows, losses=compiled), check_torch),
        Variant(f"eager{chunks}", partial(rows, losses=bf16_losses), check_torch),
        Variant(
            "features alone",
            lambda _: features(packed, pair.images),
            truth.check_features,
            ours=True,
        ),
        Variant("packing alone", lambda _: packed.refresh(sides), lambda _: "done", ours=True),
    ]
    if fp8 and routes.multiplies_e4m3(bench.device):
        low = Variant("ours, fp8", lambda _: pair.select(fp8=True), partial(check, worse=WORSE_FP8))
        variants.insert(3, low)
    return bench.measure(variants, _work(pair), 1) | {"predicted": predicted(name)}


def features(
    packed: Packed,
    images: Tensor,
    tile: config.ScorerTile | None = None,
    one: bool | None = None,  # launch; None: by the route that is used for such scorers
) -> Tensor:  # [S, B, DP]
    read = scorer.pixels(images)
    if routes.one_launch(packed) if one is None else one:
        return scorer.scorer(packed, read, None, None, 1, None, None, tile)[0]
    return blocks.features(packed, read, tile)


def agreement(name: str, bench: Bench) -> Row:
    """How much of the true top fifth by learnability each way of scoring keeps, at T = 0.

    Weights are rounded to bf16 before the truth is computed in float64.
    """
    pair = Pair(name, bench, 16_384)
    pair.squares()
    pair.apart()
    truth = pair.scores(torch.float64, chunk=256)
    best = truth.topk(pair.keep).indices
    picked = {"ours": pair.select(temperature=0.0)}
    if routes.multiplies_e4m3(bench.device):
        picked["ours, fp8"] = pair.select(fp8=True, temperature=0.0)
    scores = {way: p.scores for way, p in picked.items()} | {
        "eager, bf16": pair.scores(),
        "eager, bf16, fp32 logits": pair.scores(losses=fp32_logits),
    }
    kept = {way: s.topk(pair.keep).indices for way, s in scores.items()}
    kept |= {way: p.indices for way, p in picked.items()}
    return {
        "learnability_rms": truth.square().mean().sqrt().item(),
        "kept": pair.keep,
        "agreement": {
            way: {
                "overlap": torch.isin(kept[way], best).float().mean().item(),
                "error_rms": (s.double() - truth).square().mean().sqrt().item(),
            }
            for way, s in scores.items()
        },
    }


def tiles(name: str, bench: Bench) -> Row:
    """Pixels to features with every tile in the table for this device and scorer, both routes."""
    pair = Pair(name, bench)
    truth, packed = Truth(pair), pair.packed()

    def call(_: int, tile: config.ScorerTile, one: bool) -> Tensor:
        return features(packed, pair.images, tile, one)

    variants = [
        Variant(
            ", ".join([way, *(f"{n} {v}" for n, v in tile._asdict().items())]),
            partial(call, tile=tile, one=way == "one launch"),
            truth.check_features,
        )
        for tile in config.scorer_candidates(packed)
        for way in ("one launch", "blocks")
    ]
    return bench.measure(variants, _work(pair), 1) | {"predicted": predicted(name)}
